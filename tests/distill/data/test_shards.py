"""Tar shards give prompts and embeddings as they are; what is wrong with one is said with its place, and nothing in it
is run."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import cached_prompt_data, load_prompts
from distill.data.shards import read_shards, shard_paths
from distill.networks.base import open_base
from distill.run.checkpoint import list_checkpoints
from distill.run.trainer import RunOptions, run_training

CPU = torch.device("cpu")
WIDTH = 16


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def embedding(length: int, seed: int = 0) -> torch.Tensor:
    """(8, WIDTH): `length` rows and padding."""
    embeds = torch.zeros(8, WIDTH)
    embeds[:length] = torch.randn((length, WIDTH), generator=torch.Generator().manual_seed(seed))
    return embeds


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def sample(key: str, length: int, seed: int = 0) -> dict[str, bytes]:
    prompt = f"prompt {key}\n".encode()
    latent = saved(torch.zeros(2))
    return {f"{key}.embed.pt": saved(embedding(length, seed)), f"{key}.prompt.txt": prompt, f"{key}.latent.pt": latent}


def test_folder_of_shards_gives_prompts_and_embeddings_without_padding(
    tiny_config: DistillConfig, tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "b.tar", sample("0", 4, seed=3))
    write_tar(tmp_path / "shards" / "a.tar", sample("1", 5, seed=2) | sample("0", 2, seed=1))
    config = with_overrides(tiny_config, [f"prompts={tmp_path / 'shards'}"])
    assert load_prompts(config) == ["prompt 0", "prompt 1", "prompt 0"]
    data = cached_prompt_data(config, open_base(config.base), tmp_path / "cache", CPU)
    assert data.num_prompts == 3
    for index, (length, seed) in enumerate([(2, 1), (5, 2), (4, 3)]):
        rows = data.packed[data.offsets[index] : data.offsets[index + 1]]
        assert torch.equal(rows, embedding(length, seed)[:length])
    encoded = cached_prompt_data(tiny_config, open_base(tiny_config.base), tmp_path / "cache", CPU)
    negative = [part.packed[part.offsets[-2] : part.offsets[-1]] for part in (data, encoded)]
    # Encoded alone and beside longer prompts: sums over another number of masked positions.
    assert torch.allclose(negative[0], negative[1], atol=1e-5)


def test_run_trains_on_shards_and_a_shard_gone_bad_leaves_its_checkpoints(
    tiny_config: DistillConfig, tmp_path: Path
) -> None:
    shard = write_tar(tmp_path / "a.tar", sample("0", 2) | sample("1", 3, seed=1))
    config = with_overrides(tiny_config, [f"prompts={shard}", "max_iterations=2"])
    options = RunOptions(out=tmp_path / "run", device=CPU, preview_every_iterations=0)
    assert run_training(config, options, resume=False).num_student_updates == 1
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("state.pt")}
    broken = embedding(3)
    broken[1, 1] = float("nan")
    write_tar(shard, {"0.embed.pt": saved(broken), "0.prompt.txt": b"prompt"})
    with pytest.raises(ConfigError, match="not finite"):
        run_training(with_overrides(config, ["max_iterations=4"]), options, resume=True)
    assert before and before == {
        folder / "state.pt": before[folder / "state.pt"] for folder in list_checkpoints(options.out)
    }
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"7.embed.pt": saved({"call": os.getcwd}), "7.prompt.txt": b"a"}, r"a\.tar: 7\.embed\.pt is no plain tensor"),
        ({"7.embed.pt": b"junk", "7.prompt.txt": b"a"}, "no plain tensor"),
        ({"7.embed.pt": saved([1, 2]), "7.prompt.txt": b"a"}, "floating-point tensor, got list"),
        ({"7.embed.pt": saved(torch.full((3, WIDTH), float("inf"))), "7.prompt.txt": b"a"}, "not finite"),
        ({"7.embed.pt": saved(torch.ones(3, 5)), "7.prompt.txt": b"a"}, r"\(L, 16\), got \(3, 5\)"),
        ({"7.embed.pt": saved(torch.ones(3, WIDTH))}, r"sample 7 has no \.prompt\.txt"),
        ({"7.prompt.txt": b"a"}, r"sample 7 has no \.embed\.pt"),
        ({"7.embed.pt": saved(torch.ones(3, WIDTH)), "7.prompt.txt": b"\xff"}, "not UTF-8"),
        ({}, "holds no prompt"),
    ],
)
def test_bad_member_is_refused_by_name(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_shards([write_tar(tmp_path / "a.tar", members)], WIDTH)


def test_missing_or_damaged_tar_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.tar", tmp_path / "bad.tar"):
        (tmp_path / "bad.tar").write_bytes(b"junk")
        with pytest.raises(ConfigError, match="cannot be read as a tar"):
            read_shards(shard_paths(str(path)), WIDTH)
    assert shard_paths("captions.txt") == shard_paths("") == []

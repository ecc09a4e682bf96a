"""Tar shards give prompts and embeddings as they are; what is wrong with one is said with its place, and nothing in it
is run."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import cached_prompt_data, load_prompts
from distill.data.shards import shard_paths, shard_samples
from distill.networks.base import open_base
from distill.run.trainer import RunOptions, run_training

CPU = torch.device("cpu")
WIDTH = 16


def read_shards(paths: list[Path], width: int) -> list[tuple[str, torch.Tensor]]:
    return [(sample.text, sample.embeds) for path in paths for sample in shard_samples(path, width)]


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
        assert torch.equal(data.rows(index), embedding(length, seed)[:length])
    encoded = cached_prompt_data(tiny_config, open_base(tiny_config.base), tmp_path / "cache", CPU)
    negative = [part.rows(part.num_prompts) for part in (data, encoded)]
    # Encoded alone and beside longer prompts: sums over another number of masked positions.
    assert torch.allclose(negative[0], negative[1], atol=1e-5)


def test_run_trains_on_shards_and_a_shard_gone_bad_leaves_its_checkpoints(
    tiny_config: DistillConfig, tmp_path: Path
) -> None:
    shard = write_tar(tmp_path / "a.tar", sample("0", 2) | sample("1", 3, seed=1))
    config = with_overrides(tiny_config, [f"prompts={shard}", "max_iterations=2"])
    options = RunOptions(out=tmp_path / "run", device=CPU, preview_every_iterations=0)
    assert run_training(config, options, resume=False).num_student_updates == 1
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    broken = embedding(3)
    broken[1, 1] = float("nan")
    write_tar(shard, {"0.embed.pt": saved(broken), "0.prompt.txt": b"prompt"})
    with pytest.raises(ConfigError, match="not finite"):
        run_training(with_overrides(config, ["max_iterations=4"]), options, resume=True)
    assert before and before.keys() == set((tmp_path / "run" / "checkpoints").rglob("*.*"))
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
        ({"7.embed.pt": saved(torch.ones(3, WIDTH)), "7.prompt.txt": b"\xff"}, r"a\.tar: 7\.prompt\.txt is not UTF-8"),
        (
            {"7.embed.pt": saved(torch.ones(600, WIDTH)), "7.prompt.txt": b"a"},
            r"a\.tar: 7\.embed\.pt has 600 rows that are not zero, Wan reads 512; embed its prompt again",
        ),
        ({"7.embed.pt": saved(torch.zeros(3, WIDTH)), "7.prompt.txt": b"a"}, "has zeros only"),
        ({"7.embed.pt": saved(torch.full((3, WIDTH), 1e300, dtype=torch.float64)), "7.prompt.txt": b"a"}, "not finite"),
        ({"7.embed.pt": saved(torch.ones(3, WIDTH).to(torch.float8_e5m2)), "7.prompt.txt": b"a"}, "float8_e5m2 tensor"),
        ({"7.embed.pt": saved(torch.ones(3, WIDTH).to_sparse()), "7.prompt.txt": b"a"}, "floating-point|plain tensor"),
        (
            {"7.embed.pt": saved(torch.ones(3, WIDTH, device="meta")), "7.prompt.txt": b"a"},
            "floating-point|plain tensor",
        ),
        ({"7.embed.pt": saved(torch.ones(3, WIDTH).long()), "7.prompt.txt": b"a"}, "got torch.int64 tensor"),
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


def test_padding_past_what_wan_reads_is_taken_off(tmp_path: Path) -> None:
    embeds = torch.zeros(600, WIDTH)
    embeds[:500] = 1.0
    shard = write_tar(
        tmp_path / "a.tar", {"7.embed.pt": saved(embeds.bfloat16()), "7.prompt.txt": b"\xef\xbb\xbfa\r\n"}
    )
    ((prompt, kept),) = read_shards([shard], WIDTH)
    assert prompt == "a" and kept.shape == (500, WIDTH) and kept.dtype == torch.float32


def test_what_macos_adds_is_skipped(tmp_path: Path) -> None:
    members = sample("0", 2) | {"._0.prompt.txt": b"\x00\x05\x16\x07\xff", "dir/._0.embed.pt": b"x", ".DS_Store": b"x"}
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", members | {"./1.prompt.txt": b"b", "./1.embed.pt": saved(embedding(2))})
    (tmp_path / "shards" / "._a.tar").write_bytes(b"\x00\x05\x16\x07")
    samples = read_shards(shard_paths(str(tmp_path / "shards")), WIDTH)
    assert [prompt for prompt, _ in samples] == ["prompt 0", "b"]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_tar_without_its_end_is_refused_with_how_much_was_found(tmp_path: Path, cut: int) -> None:
    whole = write_tar(tmp_path / "a.tar", sample("0", 2) | sample("1", 2)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % tarfile.BLOCKSIZE
    (tmp_path / "a.tar").write_bytes(whole[:end])
    message = r"a\.tar is cut off or damaged: 2 samples were found, but not the end of the archive; write it again"
    with pytest.raises(ConfigError, match=message):
        read_shards([tmp_path / "a.tar"], WIDTH)
    (tmp_path / "a.tar").write_bytes(whole[: end - cut * tarfile.BLOCKSIZE])
    with pytest.raises(ConfigError, match=r"cut off or damaged|cannot be read as a tar|sample 1 has no"):
        read_shards([tmp_path / "a.tar"], WIDTH)


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", sample("0", 2) | sample("1", 2)).read_bytes())
    start = data.index(b"1.embed.pt")
    data[start + 148 : start + 156] = b"77777777"  # its checksum
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ConfigError, match="cut off or damaged: 1 samples were found"):
        read_shards([tmp_path / "a.tar"], WIDTH)


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{key}.tar", sample(key, 2)).read_bytes() for key in "01"]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    with pytest.raises(
        ConfigError, match="goes on behind the end of its archive, after 1 samples: tars are joined with"
    ):
        read_shards([tmp_path / "a.tar"], WIDTH)


def test_a_sample_given_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in [*sample("0", 2).items(), ("0.prompt.txt", b"another")]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(ConfigError, match=r"a\.tar: 0\.prompt\.txt stands there twice"):
        read_shards([tmp_path / "a.tar"], WIDTH)


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        entry = tarfile.TarInfo("0.prompt.txt")
        entry.type, entry.linkname = tarfile.SYMTYPE, "gone"
        archive.addfile(entry)
    with pytest.raises(ConfigError, match="cannot be read as a tar: KeyError"):
        read_shards([tmp_path / "a.tar"], WIDTH)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=2000))
def test_any_bytes_as_a_tar_are_refused_in_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ConfigError):
        read_shards([tmp_path / "a.tar"], WIDTH)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(where=st.integers(0, 10**6), value=st.integers(0, 255), length=st.integers(1, 600))
def test_any_damage_is_told_or_changes_nothing_but_values(tmp_path: Path, where: int, value: int, length: int) -> None:
    """A stretch of a shard is overwritten: no other exception, and never fewer samples in silence."""
    data = bytearray(write_tar(tmp_path / "a.tar", sample("0", 2) | sample("1", 3)).read_bytes())
    where %= len(data)
    data[where : where + length] = bytes([value]) * len(data[where : where + length])
    (tmp_path / "a.tar").write_bytes(data)
    try:
        samples = read_shards([tmp_path / "a.tar"], WIDTH)
    except ConfigError:
        return
    assert len(samples) == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(end=st.integers(0, 10**6))
def test_any_cut_is_told_or_takes_padding_alone(tmp_path: Path, end: int) -> None:
    data = write_tar(tmp_path / "a.tar", sample("0", 2) | sample("1", 3)).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: end % len(data)])
    try:
        samples = read_shards([tmp_path / "a.tar"], WIDTH)
    except ConfigError:
        return
    assert len(samples) == 2 and not data[end % len(data) :].strip(b"\0")

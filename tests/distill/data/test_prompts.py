"""Prompts, their embeddings, the cache and the order of batches."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.text import encode_prompts
from distill import cli
from distill.config import DistillConfig, with_overrides
from distill.data import packing
from distill.data.prompts import PromptData, batch_indices, cached_prompt_data, check_prompts, load_prompts
from distill.networks.base import open_base
from distill.worlds.shapeworld.captions import parse_caption

CPU = torch.device("cpu")


def test_batches_cover_every_epoch_exactly_once_in_a_new_order() -> None:
    drawn = [index for position in range(14) for index in batch_indices(position, 7, 3, seed=1)]
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_are_a_function_of_position_and_seed() -> None:
    assert batch_indices(5, 100, 8, seed=3) == batch_indices(5, 100, 8, seed=3)
    assert batch_indices(5, 100, 8, seed=3) != batch_indices(5, 100, 8, seed=4)


def test_batches_larger_than_the_data_repeat_prompts_evenly() -> None:
    assert set(Counter(batch_indices(0, 2, 6, seed=0)).values()) == {3}


def test_shapeworld_captions_are_drawn_by_seed(tiny_config: DistillConfig) -> None:
    config = with_overrides(tiny_config, ["prompts=", "num_captions=20"])
    assert load_prompts(config) == load_prompts(config)
    assert len(load_prompts(config)) == 20
    assert load_prompts(with_overrides(config, ["seed=1"])) != load_prompts(config)
    assert [parse_caption(caption).count for caption in load_prompts(config)] == [1, 2] * 10


def test_txt_and_jsonl_give_the_same_prompts(tiny_config: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red ring\n\n  two  \n", encoding="utf-8")
    rows = [{"prompt": "a red ring"}, {"caption": "two", "id": 3}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("p.txt", "p.jsonl"):
        assert load_prompts(with_overrides(tiny_config, [f"prompts={tmp_path / name}"])) == ["a red ring", "two"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("p.txt", b"\n \n", "no prompt"),
        ("p.csv", b"a\n", "jsonl or .tar"),
        ("p.txt", b"\xff\xfe\x00", "p.txt is not UTF-16-LE text: line 1"),
        ("p.jsonl", b'{"prompt":"a"}\n{"x":1}\n', "p.jsonl line 2"),
        ("p.jsonl", b'{"prompt":"a"}\n\nnot json\n', "p.jsonl line 3"),
        ("p.jsonl", b'{"prompt":3}\n', "p.jsonl line 1"),
        ("p.jsonl", b"[1]\n", "p.jsonl line 1"),
    ],
)
def test_bad_prompt_files_are_refused_with_the_place(
    tiny_config: DistillConfig, tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        load_prompts(with_overrides(tiny_config, [f"prompts={tmp_path / name}"]))


def test_missing_prompt_file_is_refused(tiny_config: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(with_overrides(tiny_config, [f"prompts={tmp_path / 'none.txt'}"]))


def test_embeddings_equal_those_of_padded_encoding(
    tiny_config: DistillConfig, tiny_pipeline: WanPipeline, tmp_path: Path
) -> None:
    prompts = ["a red ring", "a blue  circle moves right", "a red ring"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    config = with_overrides(tiny_config, [f"prompts={tmp_path / 'p.txt'}"])
    packed = cached_prompt_data(config, open_base(config.base), tmp_path / "cache", CPU)
    batch = packed.batch([0, 1, 2], CPU)
    want = encode_prompts(tiny_pipeline.tokenizer, tiny_pipeline.text_encoder, [*prompts, ""])
    num_kept = batch.prompt_embeds.shape[1]
    assert batch.prompt_embeds.shape == (3, 8, 16)
    torch.testing.assert_close(batch.prompt_embeds, want[:3, :num_kept], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.negative_prompt_embeds[2], want[3, :num_kept], rtol=1e-5, atol=1e-6)
    assert packed.num_prompts == 3
    assert [packed.text(index) for index in range(3)] == prompts


def rows_of(data: PromptData) -> list[torch.Tensor]:
    return [data.rows(index) for index in range(data.num_prompts + 1)]


def same(left: PromptData, right: PromptData) -> bool:
    return all(torch.equal(one, other) for one, other in zip(rows_of(left), rows_of(right), strict=True))


def test_cache_spares_the_text_encoder(
    tiny_config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_prompt_data(tiny_config, open_base(tiny_config.base), tmp_path, CPU)

    def refuse(*_: object) -> None:
        raise AssertionError("the text encoder was loaded again")

    monkeypatch.setattr(packing._Texts, "encode", refuse)
    second = cached_prompt_data(tiny_config, open_base(tiny_config.base), tmp_path, CPU)
    assert same(first, second)
    with pytest.raises(AssertionError, match="loaded again"):
        cached_prompt_data(
            with_overrides(tiny_config, ["negative_prompt=blue"]), open_base(tiny_config.base), tmp_path, CPU
        )


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("00000/embeds.bin", 50, "embeds.bin is truncated"),
        ("00000/embeds.bin", None, "lack embeds.bin"),
        ("00000/samples.safetensors", None, "lack samples.safetensors"),
        ("index.json", 30, "index.json"),
    ],
)
def test_a_damaged_cache_is_made_anew(
    tiny_config: DistillConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    size: int | None,
    reason: str,
) -> None:
    first = cached_prompt_data(tiny_config, open_base(tiny_config.base), tmp_path, CPU)
    want = [row.clone() for row in rows_of(first)]
    (folder,) = tmp_path.iterdir()
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if size is not None:
        (folder / name).write_bytes(data[:size])
    again = cached_prompt_data(tiny_config, open_base(tiny_config.base), tmp_path, CPU)
    assert all(torch.equal(one, other) for one, other in zip(rows_of(again), want, strict=True))
    assert reason in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def test_missing_text_encoder_is_a_checkpoint_error(tiny_config: DistillConfig, tmp_path: Path) -> None:
    shutil.copytree(Path(tiny_config.base, "transformer"), tmp_path / "base" / "transformer")
    config = with_overrides(tiny_config, [f"base={tmp_path / 'base'}"])
    with pytest.raises(CheckpointError, match="tokenizer"):
        cached_prompt_data(config, open_base(config.base), tmp_path / "cache", CPU)


@pytest.mark.parametrize("recipe", ["wan_1_3b", "wan_14b"])
def test_recipes_of_real_models_need_prompts(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (["--dry-run"], []):
        assert cli.main(["train", "--recipe", recipe, "--out", str(tmp_path / "run"), "--device", "cpu", *words]) == 2
        said = capsys.readouterr()
        (line,) = said.err.strip().split("\n")
        assert line.startswith(f"codmd-distill: prompts is not set: recipe {recipe} needs a .txt, .jsonl or .tar file")
        assert said.out == "" and not (tmp_path / "run").exists()


def test_what_was_read_is_told_in_one_line(tiny_config: DistillConfig, tmp_path: Path) -> None:
    long = "red " * 600
    (tmp_path / "p.txt").write_text(f"a red ring\n\na red ring\n{long}\n")
    config = with_overrides(tiny_config, [f"prompts={tmp_path / 'p.txt'}"])
    for _ in range(2):  # encoded, then from the cache
        read = cached_prompt_data(config, open_base(config.base), tmp_path / "cache", CPU)
        assert read.report == "prompts=3 distinct=2 dropped=1 cut=1 longest=512"
    assert check_prompts(config, open_base(config.base)) == {"prompts": 3, "duplicates": 1, "dropped": 1}


def test_a_dry_run_checks_embeddings_of_shards(tiny_config: DistillConfig, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        buffer = io.BytesIO()
        torch.save(torch.ones(3, 7), buffer)
        for name, content in (("0.prompt.txt", b"a"), ("0.embed.pt", buffer.getvalue())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    config = with_overrides(tiny_config, [f"prompts={tmp_path / 'a.tar'}"])
    with pytest.raises(ConfigError, match=r"a\.tar: 0\.embed\.pt must be of shape \(L, 16\), got \(3, 7\)"):
        check_prompts(config, open_base(config.base))

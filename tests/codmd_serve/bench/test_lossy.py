"""Lossy variants in the bench: how an error is taken, what a row says of them, and of a machine that has none."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from codmd_serve.bench import lossy
from codmd_serve.bench.lossy import LOSSY_SETTINGS, capped_psnr_db, left_out, unsupported
from codmd_serve.bench.options import BenchConfig
from codmd_serve.bench.report import document
from codmd_serve.bench.row import measure_row
from codmd_serve.bench.weights import PROMPTS
from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine
from codmd_serve.loading import load_engine

CPU = torch.device("cpu")
PARAMS = GenerateParams(prompt=PROMPTS[0], seed=0, height=32, width=32, num_frames=9, fps=16, crf=18)
REASONS = (
    "quantization fp8 needs a CUDA device of compute capability 8.9 or higher, got cpu; "
    "attention 'sage' is not installed for cpu"
)


@pytest.fixture
def config(tiny_bundle: Path) -> BenchConfig:
    return BenchConfig(
        bundle=str(tiny_bundle), device="cpu", against="lossy", pairs=2, cold_start=False, limit_s=10_000
    )


def read_row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((folder / "performance-tiny-codmd-cpu-lossy.json").read_text())
    return row


def test_psnr_follows_its_definition() -> None:
    want = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    assert capped_psnr_db(want, want) == 100.0
    assert capped_psnr_db(want + 5, want) == pytest.approx(20 * math.log10(255 / 5))
    assert capped_psnr_db(torch.zeros_like(want), torch.full_like(want, 255)) == pytest.approx(0.0)


def test_an_error_is_that_of_the_output_for_the_same_seeds(tiny_bundle: Path) -> None:
    engine = load_engine(tiny_bundle, "cpu")
    asked = lossy.some(PARAMS, PROMPTS)
    assert len({(params.seed, params.prompt) for params in asked}) == lossy.NUM_SEEDS
    wanted = [lossy.outputs(engine, params) for params in asked]
    assert wanted[0][0].shape == (1, 4, 3, 4, 4) and wanted[0][1].shape == (9, 32, 32, 3)
    same = lossy.compare_outputs(engine, wanted, asked)
    assert same.latents == [0.0] * lossy.NUM_SEEDS and same.psnr_db == [100.0] * lossy.NUM_SEEDS
    moved = [(1.25 * latents, frames) for latents, frames in wanted]
    assert lossy.compare_outputs(engine, moved, asked).latents == pytest.approx([0.2] * lossy.NUM_SEEDS)


def test_a_cpu_says_in_one_line_that_it_has_none_and_goes_on(config: BenchConfig, tmp_path: Path) -> None:
    problems = unsupported(CPU, torch.float32)
    assert problems.keys() == LOSSY_SETTINGS.keys() and left_out({}) == []
    printed = measure_row(config, tmp_path, "codmd-serve bench --against lossy")
    row = read_row(tmp_path)
    (said,) = row["left_out"]
    assert said.startswith(f"lossy fp8, sage, fp8+sage, not supported here: {REASONS}") and "\n" not in said
    assert row["contestants"].keys() == {"ours"} and row["lossy"] == {} and row["ratios"] == {}
    assert "| denoise |" in printed and f"- Left out: {said}." in (tmp_path / "performance.md").read_text()


def test_a_row_has_error_and_speed_of_every_variant_that_runs(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, str]] = []

    def load(name: str, bundle: Path, reference: Engine) -> Engine:
        # Another kernel stands for one that rounds: the machine of this test has no lossy one.
        loaded.append((name, reference.facts.attention))
        if name == "fp8+sage":
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return load_engine(bundle, "cpu", attention="_native_math")

    monkeypatch.setattr(lossy, "unsupported", lambda *_: {"sage": "no such package"})
    monkeypatch.setattr(lossy, "load_variant", load)
    measure_row(config, tmp_path, "codmd-serve bench --against lossy")
    row = read_row(tmp_path)
    assert loaded == [("fp8", "native"), ("fp8+sage", "native")]
    assert list(row["contestants"]) == ["ours", "lossy fp8"] == [*row["operators"], *row["ratios"]]
    entry = row["lossy"]["lossy fp8"]
    assert entry["attention"] == "_native_math" and len(entry["latents"]) == len(entry["psnr_db"]) == lossy.NUM_SEEDS
    assert 0 <= max(entry["latents"]) < 1e-4 and min(entry["psnr_db"]) > 40  # another order of sums
    assert row["ratios"]["lossy fp8"]["total"]["count"] == len(row["pairs"]["lossy fp8"]) == 2
    problems = "no such package; OutOfMemoryError: CUDA out of memory"
    assert row["left_out"] == [f"lossy sage, fp8+sage, not supported here: {problems}"]
    text = (tmp_path / "performance.md").read_text()
    speed = 1 / row["ratios"]["lossy fp8"]["total"]["median"]
    assert f"dB, the worst of 4 seeds; {speed:.2f}x as fast, denoise" in text and "| lossy fp8 / ours |" in text
    assert "- lossy fp8 (_native_math, eager) against float32: latents off by " in text


def test_no_variant_is_begun_when_the_time_is_over(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossy, "unsupported", lambda *_: {})
    measure_row(replace(config, limit_s=1, pairs=1), tmp_path, "codmd-serve bench --against lossy")
    assert read_row(tmp_path)["left_out"] == ["lossy fp8, sage, fp8+sage, not supported here: no time was left"]


def test_rows_from_before_there_were_variants_are_still_shown(config: BenchConfig, tmp_path: Path) -> None:
    measure_row(replace(config, against="none"), tmp_path, "codmd-serve bench --against none")
    (file,) = tmp_path.glob("*.json")
    row = json.loads(file.read_text())
    del row["lossy"]
    assert file.name == "performance-tiny-codmd-cpu.json" and "## tiny-codmd-cpu" in document([row])


@pytest.mark.parametrize("name", LOSSY_SETTINGS)
def test_variants_differ_from_the_engine_in_their_settings_only(
    name: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    reference = load_engine(tiny_bundle, "cpu")
    monkeypatch.setattr(lossy, "load_engine", lambda *words, **settings: asked.update(settings, words=words))
    lossy.load_variant(name, tiny_bundle, reference)
    assert asked == {"words": (tiny_bundle, "cpu", "float32"), "execution": "eager", **LOSSY_SETTINGS[name]}

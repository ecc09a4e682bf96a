"""The analytic worlds as a base: prepared once, trained by every method, and refused what they cannot do."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import load_module, read_spec
from distill.config import ANALYTIC_RECIPES, DistillConfig, with_overrides
from distill.data.prompts import read_prompts
from distill.methods.registry import METHODS, recipe_config
from distill.networks import analytic
from distill.networks.analytic import AnalyticBase
from distill.networks.base import Base, open_base
from distill.run.bundle import export_bundle
from distill.run.start import run_with_start
from distill.run.trainer import RunOptions
from distill.validate import analytic as validate_analytic
from distill.worlds.analytic.makers import WORLDS
from distill.worlds.analytic.network import AnalyticNetwork
from distill.worlds.analytic.pretrain import PretrainConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache whose start network had a moment of training; the settings are part of its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analytic, "PRETRAIN", PretrainConfig(updates=3, batch_size=16, width=8))
        yield tmp_path_factory.mktemp("analytic-cache")


def short(method: str, *settings: str) -> DistillConfig:
    small = ["batch_size=6", "max_iterations=4", "student_every_iterations=2", "num_captions=16"]
    if method in ("rcm", "dcm"):
        small += ["rcm.data_steps=3", "rcm.warmup_iterations=1"]
    if method == "regression":
        small += ["regression.paths=6", "regression.teacher_steps=3"]
    if method in ("dmd2", "f-distill", "avd", "vdot"):
        small += ["terms.data_steps=3"]
    return with_overrides(recipe_config("analytic_ties", method), [*small, *settings])


def test_every_world_has_a_recipe_and_numbered_captions() -> None:
    assert set(ANALYTIC_RECIPES.values()) == set(WORLDS)
    texts = read_prompts(short("dmd")).texts
    assert texts[:9] == [*(f"caption {number}" for number in range(8)), "caption 0"] and len(texts) == 16


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_in_an_analytic_world_and_exports_its_student(
    method: str, cache: Path, tmp_path: Path
) -> None:
    config = short(method)
    outcome = run_with_start(config, RunOptions(out=tmp_path / "run", device=CPU, cache_dir=cache), resume=False)
    assert outcome.bundle is not None and outcome.num_skipped == 0 and outcome.num_student_updates >= 1
    assert not (tmp_path / "run" / "previews").exists() and not (tmp_path / "run" / "pipeline").exists()
    spec = read_spec(outcome.bundle)
    assert (spec.base, spec.sigmas, spec.base_model) == ("analytic:ties", config.grid().sigmas, "analytic:ties")
    student = load_module(AnalyticNetwork, outcome.bundle, "transformer")
    base = open_base(config.base).prepared(cache)
    begin = base.load_transformer(torch.float32).state_dict()
    assert any(not torch.equal(begin[name], tensor) for name, tensor in student.state_dict().items())
    (flow,) = student(torch.zeros(2, 4, 8, 2, 2), torch.tensor([1000.0, 500.0]), torch.eye(9)[:2, None])
    assert flow.isfinite().all()
    again = export_bundle(tmp_path / "run", tmp_path / "again")
    assert again == outcome.iteration
    assert read_spec(tmp_path / "again").config_sha256 == spec.config_sha256


def test_a_start_network_is_trained_once_and_anew_for_other_settings(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base("analytic:orbit")
    assert isinstance(base, AnalyticBase)
    with pytest.raises(CheckpointError, match="no pipeline"):
        base.load_transformer(torch.float32)
    first = base.prepared(tmp_path)
    calls: list[str] = []
    trained = analytic.pretrain
    monkeypatch.setattr(analytic, "pretrain", lambda *args: (calls.append("again"), trained(*args))[1])
    assert base.prepared(tmp_path).folder == first.folder and calls == []
    monkeypatch.setattr(analytic, "PRETRAIN", PretrainConfig(updates=2, batch_size=16, width=8))
    assert base.prepared(tmp_path).folder != first.folder and calls == ["again"]


def test_a_run_with_a_regressed_start_goes_through_both_stages(cache: Path, tmp_path: Path) -> None:
    config = short("dmd", "start.updates=3", "start.paths=6", "start.teacher_steps=3")
    options = RunOptions(out=tmp_path / "run", device=CPU, cache_dir=cache)
    outcome = run_with_start(config, options, resume=False)
    assert outcome.iteration == 4 and read_spec(tmp_path / "run" / "start" / "bundle").step == 3
    again = run_with_start(with_overrides(config, ["max_iterations=6"]), options, resume=True)
    assert again.iteration == 6 and json.loads((tmp_path / "run" / "config.json").read_text())["max_iterations"] == 6


def test_a_run_is_validated_by_the_scores_of_its_world(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate_analytic, "SAMPLES_PER_CAPTION", 8)
    config = short("dmd", "validate.every_iterations=2", "validate.metric=analytic.energy", "guidance_scale=3")
    options = RunOptions(out=tmp_path / "run", device=CPU, cache_dir=cache)
    run_with_start(config, options, resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert len(lines) >= 2 and all(math.isfinite(line["analytic.energy"]) for line in lines)
    assert {"analytic.tau_err", "analytic.kept", "analytic.tau_kept", "analytic.w1"} <= lines[-1].keys()
    assert json.loads((tmp_path / "run" / "best.json").read_text())["metric"] == "analytic.energy"
    with pytest.raises(ConfigError, match="is none"):
        validate_analytic.analytic_suite(config, Base(source="moon", is_local=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["precision=bf16"], "precision fp32, got bf16"),
        (["lora_critic_rank=2"], "lora_critic_rank 0"),
        (["activation_checkpointing=true"], "activation_checkpointing false"),
        (["native.num_frames=9"], "8 frames"),
    ],
)
def test_what_needs_wan_blocks_is_refused(cache: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_with_start(
            short("dmd", *settings), RunOptions(out=tmp_path / "run", device=CPU, cache_dir=cache), resume=False
        )
    assert not (tmp_path / "run").exists()


def test_another_prompt_than_its_captions_is_refused(cache: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("caption 3\ncaption 8\n", encoding="utf-8")
    config = short("dmd", f"prompts={prompts}")
    with pytest.raises(ConfigError, match=r"caption 0 to caption 7 in world ties, got 'caption 8'"):
        run_with_start(config, RunOptions(out=tmp_path / "run", device=CPU, cache_dir=cache), resume=False)


def test_an_unknown_world_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of ties, orbit, switch, got 'moon'"):
        open_base("analytic:moon")

"""Runs whose networks differ: a teacher of another architecture, a student that is trained as LoRA, or both."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import whole_state
from diffusers import WanTransformer3DModel
from runs import with_method
from safetensors import safe_open

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.attention import use_compact_cross_attention
from codmd_serve.wan.checkpoint import load_bundle, read_spec
from codmd_serve.wan.convert import ConvertOptions, convert
from codmd_serve.wan.lora import merge_lora
from codmd_serve.wan.published import read_published
from distill.config import DistillConfig, with_overrides
from distill.methods.registry import METHODS
from distill.networks.base import open_base
from distill.run.bundle import export_bundle, export_lora
from distill.run.checkpoint import list_checkpoints
from distill.run.previews import averaged_weights
from distill.run.start import run_with_start
from distill.run.trainer import RunOptions, RunOutcome, Trainer, run_training

CPU = torch.device("cpu")
NUM_ADAPTERS = 2 * 10 * 2  # up and down of ten linear layers in each of two blocks

Run = Callable[..., RunOutcome]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache_dir: Path) -> Run:
    def start(config: DistillConfig, out: Path, resume: bool = False) -> RunOutcome:
        options = RunOptions(out=out, device=CPU, cache_dir=cache_dir, preview_every_iterations=0, has_pipeline=False)
        return run_with_start(config, options, resume=resume)

    return start


@pytest.fixture
def lora_config(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(tiny_config, ["lora_student_rank=2", "lora_student_alpha=4"])


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that runs make."""
    made: list[Trainer] = []
    original = Trainer.__init__

    def noted(self: Trainer, *args: object, **options: object) -> None:
        original(self, *args, **options)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Trainer, "__init__", noted)
    return made


def short(config: DistillConfig, method: str, *settings: str) -> DistillConfig:
    """Two turns of the student in a run of the method."""
    own = {
        "rcm": ["rcm.data_steps=2", "rcm.warmup_iterations=1"],
        "dp_dmd": ["dp_dmd.teacher_steps=2", "dp_dmd.match_step=1"],
        "regression": ["regression.teacher_steps=2", "regression.paths=4"],
    }
    config = with_method(config, method)
    return with_overrides(config, ["max_iterations=3", *own.get(config.method_settings.group, []), *settings])


def state_of(out: Path) -> dict[str, torch.Tensor]:
    state = whole_state(list_checkpoints(out)[-1])
    return {f"{kind}/{name}": tensor for kind in ("networks", "ema") for name, tensor in _flat(state[kind]).items()}


def _flat(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in state.items():
        found |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def flow(transformer: WanTransformer3DModel) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(2, 4, 3, 4, 4, generator=rng), torch.randn(2, 8, 16, generator=rng)
    with torch.no_grad():
        flow_pred: torch.Tensor = transformer(latents, torch.tensor([900.0, 300.0]), prompt, return_dict=False)[0]
    return flow_pred


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_distils_another_teacher_into_a_lora_student(
    method: str, tiny_config: DistillConfig, big_teacher: Path, tmp_path: Path, run: Run, trainers: list[Trainer]
) -> None:
    config = short(tiny_config, method, f"teacher={big_teacher}", "lora_student_rank=2")
    outcome = run(config, tmp_path / "run")
    assert outcome.bundle is not None
    networks = trainers[0].networks
    assert (len(networks.teacher.blocks), len(networks.student.blocks)) == (3, 2)
    base = open_base(config.base).load_transformer(torch.float32).state_dict()
    student = networks.student.state_dict()
    assert all(torch.equal(student[name], tensor) for name, tensor in base.items())
    ups = [tensor for name, tensor in student.items() if name.endswith("lora_up")]
    assert len(ups) == NUM_ADAPTERS // 2
    assert sum(bool(up.any()) for up in ups) > len(ups) // 2
    bundle = load_bundle(outcome.bundle)
    assert bundle.spec.base_model == "big"
    assert len(bundle.transformer.blocks) == 2


def test_a_run_with_another_teacher_resumes_bit_for_bit(
    tiny_config: DistillConfig, big_teacher: Path, tmp_path: Path, run: Run
) -> None:
    config = short(tiny_config, "codmd", f"teacher={big_teacher}", "lora_critic_rank=2")
    run(config, tmp_path / "whole")
    run(with_overrides(config, ["max_iterations=1"]), tmp_path / "parts")
    run(config, tmp_path / "parts", resume=True)
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    with pytest.raises(ConfigError, match="cannot resume with another teacher"):
        run(with_overrides(config, ["teacher="]), tmp_path / "parts", resume=True)


def test_samples_are_those_of_the_teacher(
    tiny_config: DistillConfig, big_teacher: Path, tmp_path: Path, run: Run, trainers: list[Trainer]
) -> None:
    """And cached apart from those of the base."""
    for setting in ("", str(big_teacher)):
        run(
            short(tiny_config, "dcm", f"teacher={setting}", "max_iterations=1"),
            tmp_path / ((setting and "big") or "base"),
        )
    own, others = (trainer.latents for trainer in trainers)
    assert own is not None
    assert others is not None
    assert own.folder != others.folder
    assert not torch.allclose(own.batch([0], CPU), others.batch([0], CPU), atol=1e-2)


def test_a_checkpoint_of_a_lora_student_holds_its_adapters_alone_and_resumes_bit_for_bit(
    lora_config: DistillConfig, tmp_path: Path, run: Run
) -> None:
    config = short(lora_config, "codmd", "lora_critic_rank=2")
    run(config, tmp_path / "whole")
    run(with_overrides(config, ["max_iterations=1"]), tmp_path / "parts")
    run(config, tmp_path / "parts", resume=True)
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert len([name for name in whole if "student" in name]) == NUM_ADAPTERS
    assert all("lora_" in name for name in whole)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_the_bundle_is_the_running_student(
    lora_config: DistillConfig, tmp_path: Path, run: Run, trainers: list[Trainer]
) -> None:
    """Its moving average, with the adapters in the weights."""
    outcome = run(with_overrides(short(lora_config, "dmd"), ["ema.decay=0.5"]), tmp_path / "run")
    assert outcome.bundle is not None
    # Trimmed prompts, as in training.
    merged = use_compact_cross_attention(load_bundle(outcome.bundle).transformer)
    assert not any("lora" in name for name in merged.state_dict())
    student = trainers[0].networks.student
    current = flow(student)
    with averaged_weights(student, trainers[0].ema.shadow):
        average = flow(student)
    # The products are summed in another order.
    torch.testing.assert_close(flow(merged), average, rtol=1e-5, atol=1e-5)
    assert float((current - average).norm() / average.norm()) > 1e-4
    base = flow(use_compact_cross_attention(open_base(lora_config.base).load_transformer(torch.float32)))
    assert float((base - average).norm() / average.norm()) > 1e-3


def test_the_adapters_alone_are_what_the_bundle_has_more_than_the_base(
    lora_config: DistillConfig, tmp_path: Path, run: Run
) -> None:
    outcome = run(short(lora_config, "dmd"), tmp_path / "run")
    assert outcome.bundle is not None
    assert export_lora(tmp_path / "run", tmp_path / "lora") == 3
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) >= {"transformer.blocks.0.attn1.to_q.lora_A.weight"}
        assert len(list(opened.keys())) == NUM_ADAPTERS
        assert (opened.metadata()["lora_alpha"], opened.metadata()["rank"]) == ("2", "2")
    merged = load_bundle(outcome.bundle).transformer.state_dict()
    base = open_base(lora_config.base).load_transformer(torch.float32).state_dict()
    for name, tensor in merge_lora(read_published(file), base, str(file)).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7)
    own = read_spec(outcome.bundle)
    for source, base, name in ((file, Path(lora_config.base), "one"), (tmp_path / "lora", None, "two")):
        # It is sampled as it was trained to be, and nothing is guessed.
        spec = convert(source, base, tmp_path / name, ConvertOptions(), own.package_version).spec
        assert replace(spec, base=own.base, base_model=own.base_model) == own


def test_a_lora_student_starts_from_a_file_and_needs_it_again(
    lora_config: DistillConfig, tmp_path: Path, run: Run
) -> None:
    """Its checkpoints hold the adapters alone, so the weights under them are needed for resuming and for export."""
    first = run(with_overrides(short(lora_config, "dmd"), ["lora_student_rank=0"]), tmp_path / "first").bundle
    config = short(lora_config, "dmd", f"student_from={first}", "max_iterations=1")
    second = run(config, tmp_path / "second").bundle
    export_lora(tmp_path / "second", tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert first is not None
    assert second is not None
    export_bundle(tmp_path / "second", tmp_path / "again")
    weights = [load_bundle(path).transformer.state_dict() for path in (first, second, tmp_path / "again")]
    untrained = "patch_embedding.weight"
    assert torch.equal(weights[0][untrained], weights[1][untrained])
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[1].items())
    run(with_overrides(config, ["max_iterations=2"]), tmp_path / "second", resume=True)
    first.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="student_from: there is no file or folder"):
        export_bundle(tmp_path / "second", tmp_path / "again")


def test_a_regressed_start_hands_its_adapters_over(
    lora_config: DistillConfig, tmp_path: Path, run: Run, trainers: list[Trainer]
) -> None:
    settings = ["start.updates=2", "start.paths=4", "start.teacher_steps=2", "max_iterations=1"]
    # The critic's turns alone: the student stays where it began.
    config = short(lora_config, "dmd", *settings, "critic_warmup_iterations=1")
    outcome = run(config, tmp_path / "run")
    assert outcome.bundle is not None
    start, own = (state_of(tmp_path / name) for name in ("run/start", "run"))
    adapters = [name for name in start if name.startswith("ema/")]
    assert len(adapters) == NUM_ADAPTERS
    assert all(torch.equal(start[name], own[name]) for name in adapters)
    assert len(trainers) == 2
    base = open_base(config.base).load_transformer(torch.float32).state_dict()
    student = trainers[1].networks.student.state_dict()
    assert all(torch.equal(student[name], tensor) for name, tensor in base.items())


def test_a_full_student_has_no_adapters_to_export(tiny_config: DistillConfig, tmp_path: Path) -> None:
    options = RunOptions(out=tmp_path / "run", device=CPU, preview_every_iterations=0, has_pipeline=False)
    run_training(with_overrides(tiny_config, ["max_iterations=1"]), options, resume=False)
    with pytest.raises(ConfigError, match="trains a full student, which has no adapters"):
        export_lora(tmp_path / "run", tmp_path / "lora")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lora_student_rank"] == 0

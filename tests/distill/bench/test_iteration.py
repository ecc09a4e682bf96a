"""The restated iteration computes our losses and gradients, and does the extra work that it is there to show."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from codmd_serve.errors import CodmdError
from distill.bench import iteration as bench_step
from distill.bench.iteration import (
    VARIANT_NAMES,
    Arm,
    build_arms,
    check_losses,
    report_text,
    summary,
)
from distill.cli import main
from distill.config import DistillConfig, with_overrides


@pytest.fixture(scope="module")
def config(tiny_config: DistillConfig) -> DistillConfig:
    settings = ["copula.reference_compat=true", "score_window=full", "copula.weight_batch=0"]
    return with_overrides(tiny_config, settings)


@pytest.fixture(scope="module")
def arms(config: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Arm]:
    built = build_arms(config, tmp_path_factory.mktemp("cache"))
    with torch.no_grad():
        for arm in built:
            rng = torch.Generator().manual_seed(0)
            # While critic and teacher are copies, their difference is little but rounding.
            for network in (arm.networks.student, arm.networks.critic):
                for parameter in network.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return built


def gradient(arm: Arm, role: str) -> torch.Tensor:
    network = getattr(arm.networks, role)
    arm.losses(role, 0, 2).backward()
    flat = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    network.zero_grad(set_to_none=True)
    return flat


def test_all_variants_give_the_same_losses(arms: list[Arm]) -> None:
    assert [arm.name for arm in arms] == list(VARIANT_NAMES)
    assert check_losses(arms) < 1e-4


@pytest.mark.parametrize("role", ["student", "critic"])
def test_all_variants_give_the_same_gradient(arms: list[Arm], role: str) -> None:
    gradients = [gradient(arm, role) for arm in arms]
    assert gradients[0].norm() > 1e-3
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-3 * gradients[0].norm()


def test_calls_and_tokens_are_those_of_each_variant(arms: list[Arm]) -> None:
    """Calls of student and teacher in one student step that leaves at the first of four steps, and prompt length."""
    counted = []
    for arm in arms:
        calls: dict[str, list[int]] = {"student": [], "teacher": []}

        def note(name: str, into: dict[str, list[int]] = calls) -> Callable[..., None]:
            return lambda _module, args: into[name].append(args[2].shape[1])

        hooks = [getattr(arm.networks, name).register_forward_pre_hook(note(name)) for name in calls]
        arm.losses("student", 0, 0)
        for hook in hooks:
            hook.remove()
        counted.append((len(calls["student"]), len(calls["teacher"]), max(calls["teacher"]) == 512))
    assert counted == [(4, 2, True), (4, 2, False), (1, 2, False), (1, 1, False), (1, 1, False)]


def test_another_loss_is_an_error(arms: list[Arm]) -> None:
    last = arms[-1]
    wrong = Arm(
        name=last.name,
        networks=last.networks,
        losses=lambda *args: 1.01 * last.losses(*args),
        optimizers=last.optimizers,
        ema=last.ema,
    )
    with pytest.raises(CodmdError, match=r"student at exit step 0 differ by 0\.01"):
        check_losses([*arms[:-1], wrong])


def test_shares_add_up_and_the_ratio_is_of_all_trials() -> None:
    cpu_s = {"authors": [10.0] * 4 + [12.0] * 4, "trimmed": [8.0] * 8, "ours": [6.0] * 4 + [5.0] * 4}
    report = summary(cpu_s, cpu_s)
    assert report["ratio"] == pytest.approx(5.5 / 11)
    assert report["ratio_of_blocks"] == pytest.approx([0.6, 5 / 12])
    assert report["ratio_prompts_trimmed"] == pytest.approx(5.5 / 8)
    assert report["shares"] == pytest.approx({"trimmed": 3 / 5.5, "ours": 2.5 / 5.5})
    text = report_text(report | {"batch_size": 2, "trials": 8, "loss_error": 1e-6})
    assert "ours / authors: 0.500" in text and "| trimmed | 8.000 | 8.000 | 55% |" in text


def test_command_measures_prints_and_writes(
    config: DistillConfig,
    arms: list[Arm],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench-step", "--trials", "3"]) == 2
    assert "multiple of 4" in capsys.readouterr().err
    monkeypatch.setattr(bench_step, "bench_config", lambda _base, _batch_size: config)
    monkeypatch.setattr(
        bench_step, "build_arms", lambda _config, _cache: arms
    )  # a loss of fresh copies is mostly rounding
    assert main(["bench-step", "--trials", "4", "--json", str(tmp_path / "step.json")]) == 0
    report = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert list(report["cpu_s"]) == list(VARIANT_NAMES)
    assert all(len(times) == 4 and min(times) > 0 for times in report["cpu_s"].values())
    assert sum(report["shares"].values()) == pytest.approx(1.0)
    assert capsys.readouterr().out.startswith("| variant |")

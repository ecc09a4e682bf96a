"""The shared loop: schedule, randomness, moving average, snapshots, divergence."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from codmd_serve.errors import CodmdError
from distill.pretrain.stage import LrSchedule, Snapshots, StageOptions, run_stage, step_generator


def options(folder: Path) -> StageOptions:
    return StageOptions(folder=folder, device=torch.device("cpu"), precision="fp32", budget_s=None, stop=lambda: False)


def test_schedule_warms_up_stays_and_decays() -> None:
    schedule = LrSchedule(warmup_steps=50, decay_share=0.3)
    assert schedule.factor(0, 0.0) == pytest.approx(0.02)
    assert schedule.factor(500, 0.5) == 1.0
    assert schedule.factor(500, 0.85) == pytest.approx(0.5)
    assert schedule.factor(500, 1.0) == pytest.approx(0.02)
    assert LrSchedule(decay_share=0.5).factor(500, 0.75) == pytest.approx(0.5)


def test_generators_depend_on_their_key_alone() -> None:
    cpu = torch.device("cpu")
    first = torch.rand(4, generator=step_generator(cpu, 1, 4, 7))
    assert torch.equal(first, torch.rand(4, generator=step_generator(cpu, 1, 4, 7)))
    others = [(1, 4, 8), (1, 5, 7), (2, 4, 7), (1, 7, 4)]
    assert all(not torch.equal(first, torch.rand(4, generator=step_generator(cpu, *key))) for key in others)


def test_snapshots_are_taken_of_the_moving_average(tmp_path: Path) -> None:
    module, seen = nn.Linear(2, 1, bias=False), []
    average = run_stage(
        "toy",
        module,
        5,
        0.01,
        lambda _step, _progress: (module.weight.square().sum(), {}),
        options(tmp_path),
        ema_decay=0.9,
        snapshots=Snapshots(every_s=0.0, take=lambda step, _, weights: seen.append((step, weights["weight"].clone()))),
    )
    assert average is not None
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert torch.equal(seen[-1][1], average["weight"])
    assert not torch.equal(seen[0][1], seen[-1][1])


def test_moving_average_follows_and_is_returned(tmp_path: Path) -> None:
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)

    def compute_loss(_step: int, _progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return (module.weight - 1.0).square().sum(), {}

    average = run_stage("toy", module, 60, 0.01, compute_loss, options(tmp_path), ema_decay=0.9)
    assert average is not None
    # The weight climbs from 0 towards 1, so its average trails behind it.
    assert (average["weight"] > 0.05).all()
    assert (average["weight"] < module.weight - 0.005).all()


def test_divergence_is_an_error_that_says_where(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)

    def compute_loss(step: int, _progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return module(torch.ones(1, 2)).sum() * (float("nan") if step == 3 else 1.0), {}

    with pytest.raises(CodmdError, match="toy: the loss was not finite at step 3"):
        run_stage("toy", module, 10, 0.01, compute_loss, options(tmp_path))

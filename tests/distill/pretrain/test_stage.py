"""The shared loop: which parameters Muon takes, schedule, moving average, divergence."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from codmd_serve.errors import CodmdError
from distill.pretrain.stage import DECAY_SHARE, MatrixOptimizer, StageOptions, _schedule, run_stage


def options(folder: Path) -> StageOptions:
    return StageOptions(folder=folder, device=torch.device("cpu"), precision="fp32", budget_s=None, stop=lambda: False)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.conv = nn.Conv3d(32, 16, 3)
        self.linear = nn.Linear(32, 4)


def test_muon_takes_matrices_and_convolutions_but_no_tables_biases_or_thin_layers() -> None:
    module = Mixed()
    optimizer = MatrixOptimizer(module, 1e-3)
    assert [id(p) for p in optimizer.matrices] == [id(module.conv.weight)]
    assert {id(p) for p in optimizer.others} == {
        id(p) for name, p in module.named_parameters() if name != "conv.weight"
    }
    assert MatrixOptimizer(module, 1e-3, use_muon=False).matrices == []


def test_muon_step_moves_the_parameter_by_an_orthogonal_matrix() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=False)
    before = linear.weight.detach().clone()
    optimizer = MatrixOptimizer(nn.Sequential(linear), 1e-2)
    # A gradient of very unequal singular values: its update must have nearly equal ones.
    linear.weight.grad = torch.randn(32, 48) * torch.linspace(1.0, 0.1, 48)
    optimizer.step()
    moved = torch.linalg.svdvals(linear.weight.detach() - before)
    assert moved.min() > 0.4 * moved.max()
    assert moved.max() < 1e-2 * 0.2 * 48**0.5 * 1.5
    assert linear.weight.grad is None


def test_schedule_warms_up_stays_and_decays() -> None:
    assert _schedule(0, 0.0) == pytest.approx(0.02)
    assert _schedule(500, 0.5) == 1.0
    assert _schedule(500, 1.0 - DECAY_SHARE / 2) == pytest.approx(0.5)
    assert _schedule(500, 1.0) == pytest.approx(0.02)


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

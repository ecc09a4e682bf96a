"""The diversity term of DP-DMD: zero on the teacher's own way, a mean square elsewhere."""

import pytest
import torch
from torch import Tensor

from distill.losses.trajectory import trajectory_loss

SHAPE = (3, 2, 4, 5, 6)


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("start_sigma", [1.0, 0.9])
def test_zero_when_the_students_flow_leads_where_the_teachers_steps_lead(start_sigma: float) -> None:
    start, first, second = normal(0), normal(1), normal(2)
    state = start + (0.8 - start_sigma) * first + (0.5 - 0.8) * second
    mean_flow = ((start_sigma - 0.8) * first + (0.8 - 0.5) * second) / (start_sigma - 0.5)
    torch.testing.assert_close(start + (0.5 - start_sigma) * mean_flow, state)
    assert float(trajectory_loss(mean_flow, start, state, start_sigma, 0.5)) < 1e-28
    assert float(trajectory_loss(mean_flow + 2.0, start, state, start_sigma, 0.5)) == pytest.approx(4.0)


def test_gradient_reaches_the_students_flow_alone() -> None:
    flow, start, state = (normal(seed).requires_grad_() for seed in range(3))
    trajectory_loss(flow, start, state, 1.0, 0.5).backward()
    assert flow.grad is not None
    assert start.grad is None and state.grad is None


def test_bfloat16_flow_is_compared_in_float32() -> None:
    start, state = normal(0, torch.float32), normal(1, torch.float32)
    loss = trajectory_loss(normal(2, torch.float32).bfloat16(), start, state, 1.0, 0.9)
    assert loss.dtype == torch.float32

"""f-distill's weights against the divergences that they are made of."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.losses.divergence import (
    DIVERGENCES,
    binned_means,
    density_ratio,
    divergence_weight,
    level_bins,
    normalised_weights,
)

GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weight_is_the_second_derivative_of_f_times_r_squared(divergence: str) -> None:
    ratio = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[divergence](ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    torch.testing.assert_close(divergence_weight(ratio.detach(), divergence), second * ratio.detach().square())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weighted_score_differences_are_the_gradient_of_the_divergence(divergence: str) -> None:
    """Of two Gaussians of variance 1: dD_f / dmean against the mean of -h(r) * (score_p - score_q) under q."""
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    step, mean_p = float(grid[1] - grid[0]), 0.7

    def density(mean: Tensor) -> Tensor:
        return torch.exp(-0.5 * (grid - mean).square()) / (2 * torch.pi) ** 0.5

    mean_q = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    p, q = density(torch.tensor(mean_p, dtype=torch.float64)), density(mean_q)
    (want,) = torch.autograd.grad((q * GENERATORS[divergence](p / q)).sum() * step, mean_q)
    q = q.detach()
    # The sample x = mean + noise moves by 1 with the mean.
    difference = (mean_p - grid) - (0.2 - grid)
    got = -(q * divergence_weight(p / q, divergence) * difference).sum() * step
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_ratio_is_the_exponential_within_its_bounds() -> None:
    ratio = density_ratio(torch.tensor([0.0, 1.0, -9.0, 50.0]), 0.1, 20.0)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 2.7182818, 0.1, 20.0]))


def test_running_means_take_the_batch_by_bins_and_keep_those_without_samples() -> None:
    bins = level_bins(torch.tensor([0.05, 0.999, 0.95, 1.0]), 10)
    assert bins.tolist() == [0, 9, 9, 9]
    means = torch.linspace(1, 10, 10)
    moved = binned_means(torch.tensor([5.0, 1.0, 2.0, 6.0]), bins, means, 0.5)
    assert moved[0] == pytest.approx(0.5 * 1 + 0.5 * 5)
    assert moved[9] == pytest.approx(0.5 * 10 + 0.5 * 3)
    assert torch.equal(moved[1:9], means[1:9])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_have_mean_1_and_levels_are_put_on_one_footing(divergence: str) -> None:
    ratio, bins = torch.tensor([2.0, 4.0, 0.2, 0.4]), torch.tensor([0, 0, 1, 1])
    means = binned_means(ratio, bins, torch.ones(2), 0.0)
    weights = normalised_weights(ratio, bins, means, divergence)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(weights[:2], weights[2:])
    want = {"reverse_kl": 1.0, "forward_kl": 2.0, "js": (4 / 7) / (2 / 5)}[divergence]
    assert float(weights[1] / weights[0]) == pytest.approx(want, rel=1e-5)

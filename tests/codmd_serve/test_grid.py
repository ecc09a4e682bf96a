"""Step grids: the published numbers, and grids that cannot be sampled."""

import math

import pytest

from codmd_serve.errors import ConfigError
from codmd_serve.grid import StepGrid, causvid_grid, check_step_grid, rcm_grid, wan_1_3b_grid, wan_14b_grid


def test_wan_1_3b_grid_is_the_published_one() -> None:
    grid = wan_1_3b_grid()
    assert grid.timesteps == (1000.0, 900.0, 757.0, 522.0)
    assert grid.sigmas == pytest.approx((1.0, 0.899851, 0.756757, 0.521739, 0.0), abs=1e-6)


def test_wan_14b_grid_feeds_a_thousand_times_sigma() -> None:
    grid = wan_14b_grid()
    assert grid.sigmas == pytest.approx((1.0, 0.9375, 0.833333, 0.625, 0.0), abs=1e-6)
    assert grid.timesteps == pytest.approx([1000 * sigma for sigma in grid.sigmas[:-1]])


def test_causvid_grid_is_the_published_one() -> None:
    grid = causvid_grid()
    assert grid.timesteps == (1000.0, 757.0, 522.0)
    assert grid.sigmas == pytest.approx((1.0, 0.756757, 0.521739, 0.0), abs=1e-6)


def test_rcm_grid_is_the_angles_in_levels_of_noise() -> None:
    grid = rcm_grid()
    # tan(angle) is noise over signal, and so is sigma / (1 - sigma).
    ratios = [sigma / (1.0 - sigma) for sigma in grid.sigmas[:-1]]
    assert ratios == pytest.approx([80.0, math.tan(1.5), math.tan(1.4), math.tan(1.0)])
    assert grid.timesteps == pytest.approx([1000 * sigma for sigma in grid.sigmas[:-1]])


@pytest.mark.parametrize(
    ("sigmas", "timesteps", "sampler", "message"),
    [
        ((1.0, 0.0), (1000.0,), "euler", "sampler must be one of sde, ode"),
        ((1.0, 0.5, 0.0), (1000.0,), "sde", "one entry more than timesteps"),
        ((0.0,), (), "sde", "at least two"),
        ((1.0, 0.5, 0.5, 0.0), (3.0, 2.0, 1.0), "sde", "must descend"),
        ((1.1, 0.0), (1000.0,), "sde", "from at most 1"),
        ((1.0, 0.1), (1000.0,), "sde", "to exactly 0"),
        ((float("nan"), 0.0), (1000.0,), "sde", "must descend"),
        ((1.0, 0.0), (float("inf"),), "ode", "timesteps must be finite"),
    ],
)
def test_check_step_grid_refuses(
    sigmas: tuple[float, ...], timesteps: tuple[float, ...], sampler: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_step_grid(sigmas, timesteps, sampler)


def test_step_grid_refuses_what_check_step_grid_refuses() -> None:
    with pytest.raises(ConfigError, match="must descend"):
        StepGrid(sigmas=(0.5, 1.0, 0.0), timesteps=(1.0, 2.0))

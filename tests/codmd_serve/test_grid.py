"""Step grids: the published numbers, and grids that cannot be sampled."""

import math

import pytest

from codmd_serve.errors import ConfigError
from codmd_serve.grid import (
    StepGrid,
    causvid_grid,
    check_step_grid,
    codmd_14b_grid,
    rcm_grid,
    wan_1_3b_grid,
    wan_14b_grid,
)


def test_wan_1_3b_grid_is_the_published_one() -> None:
    grid = wan_1_3b_grid()
    assert grid.timesteps == (1000.0, 900.0, 757.0, 522.0)
    assert grid.sigmas == pytest.approx((1.0, 0.899851, 0.756757, 0.521739, 0.0), abs=1e-6)


@pytest.mark.parametrize("grid", [wan_1_3b_grid(), codmd_14b_grid(), causvid_grid()])
def test_authors_feed_integers_and_look_sigma_up_in_their_shift_8_table(grid: StepGrid) -> None:
    """FlowMatchScheduler(shift=8, sigma_min=0, extra_one_step) of 1000 entries; argmin over |timesteps - t|."""
    unshifted = [1.0 - index / 1000 for index in range(1000)]
    table = [8.0 * u / (1.0 + 7.0 * u) for u in unshifted]
    assert all(timestep == int(timestep) for timestep in grid.timesteps)
    nearest = [min(table, key=lambda sigma: abs(1000 * sigma - timestep)) for timestep in grid.timesteps]
    assert grid.sigmas == pytest.approx((*nearest, 0.0), abs=1e-12)


def test_codmd_14b_grid_is_the_published_one() -> None:
    grid = codmd_14b_grid()
    assert grid.timesteps == (1000.0, 937.0, 833.0, 624.0)
    assert grid.sigmas == pytest.approx((1.0, 0.936937, 0.832972, 0.624319, 0.0), abs=1e-6)


def test_wan_14b_grid_is_the_one_that_lightx2v_warps() -> None:
    """Entry 1000 - x of the levels 1, .999, ..., .001 at shift 5, for x = 1000, 750, 500, 250."""
    levels = [1.0 - index / 1000 for index in range(1000)]
    warped = [5.0 * u / (1.0 + 4.0 * u) for u in (levels[1000 - step] for step in (1000, 750, 500, 250))]
    assert wan_14b_grid().sigmas == pytest.approx((*warped, 0.0))


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

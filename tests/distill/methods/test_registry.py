"""Every method has its entry, and brings the settings that are published for it."""

import math

import pytest

from codmd_serve.errors import ConfigError
from distill import config as configuration
from distill.config import RECIPES, shapeworld, wan_1_3b, wan_14b
from distill.methods.registry import METHODS, with_method
from distill.run.trainer import ROLES


def test_every_method_of_the_config_has_an_entry() -> None:
    assert tuple(METHODS) == configuration.METHODS
    assert all(set(method.steps) == set(ROLES) for method in METHODS.values())


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("method", ["codmd", "dmd", "dp-dmd"])
def test_matching_methods_change_nothing_else_of_a_recipe(recipe: str, method: str) -> None:
    changed = configuration.config_to_dict(with_method(RECIPES[recipe](), method))
    assert changed == configuration.config_to_dict(RECIPES[recipe]()) | {"method": method}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("method", ["rcm", "dcm"])
def test_rcm_is_not_clipped_and_averages_by_power(recipe: str, method: str) -> None:
    config = with_method(RECIPES[recipe](), method)
    assert config.method == method
    assert config.optimizer.clip_norm is None
    assert config.optimizer.betas == (0.0, 0.999)
    assert (config.ema.kind, config.ema.length, config.ema.start_update) == ("power", 0.05, 0)
    assert (config.score_window, config.score_sigma_max) == ("full", 1.0)
    thetas = (math.atan(80.0), 1.5, 1.4, 1.0)
    want = [math.sin(theta) / (math.cos(theta) + math.sin(theta)) for theta in thetas]
    assert config.grid().sigmas == pytest.approx((*want, 0.0))
    assert config.grid().timesteps == pytest.approx([1000 * sigma for sigma in want])


def test_rcm_on_wan_has_the_published_constants() -> None:
    small, large = with_method(wan_1_3b(), "rcm"), with_method(wan_14b(), "rcm")
    for config in (small, large):
        assert (config.guidance_scale, config.score_shift, config.max_steps) == (5.0, 5.0, 10_000)
        assert (config.rcm.scm_weight, config.rcm.dmd_weight, config.rcm.theta_std) == (100.0, 1.0, 1.6)
        assert (config.rcm.sigma_max, config.rcm.sample_thetas) == (80.0, (1.5, 1.4, 1.0))
        assert (config.rcm.data_steps, config.rcm.data_shift) == (100, 3.0)
    assert (small.optimizer.student_lr, small.optimizer.critic_lr) == (2e-6, 4e-7)
    assert (large.optimizer.student_lr, large.optimizer.critic_lr) == (1e-6, 1e-7)
    assert (small.student_every_steps, small.rcm.warmup_steps, small.batch_size) == (5, 1000, 256)
    assert (large.student_every_steps, large.rcm.warmup_steps, large.batch_size) == (10, 200, 64)
    assert (small.rcm.theta_mean, large.rcm.theta_mean) == (0.7, 1.5)


def test_rcm_on_shapeworld_fits_its_latents() -> None:
    config = with_method(shapeworld(), "rcm")
    assert config.rcm.theta_mean == pytest.approx(-0.8 + 0.5 * math.log(5), abs=0.01)
    assert config.optimizer.student_lr == shapeworld().optimizer.student_lr


def test_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="method must be one of codmd, dmd, rcm, dcm, dp-dmd, got 'gan'"):
        with_method(shapeworld(), "gan")

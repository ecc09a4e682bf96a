"""Every method has its entry, brings the settings that are published for it, and is compared by name nowhere else."""

import ast
import math
from pathlib import Path

import pytest

from codmd_serve.errors import ConfigError
from distill.config import RECIPES, DistillConfig, config_to_dict, with_overrides
from distill.methods.arms import terms_settings
from distill.methods.consistency import rcm_settings
from distill.methods.draws import ROLES
from distill.methods.registry import METHODS, recipe_config
from distill.methods.trajectory import dp_dmd_settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_what_its_entry_calls_it(name: str) -> None:
    config = recipe_config("shapeworld", name)
    assert METHODS[name].name == config.method == name
    assert type(config.method_settings) is METHODS[name].settings
    assert METHODS[name].passes(config).keys() == set(ROLES)


def compared_names(tree: ast.AST) -> set[str]:
    """Names of methods that a file compares with something, in whatever form."""
    found = set()
    for node in ast.walk(tree):
        places: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            places = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            places = [node.value]
        elif isinstance(node, ast.Subscript):
            places = [node.slice]
        for place in places:
            for part in ast.walk(place):
                if isinstance(part, ast.Constant) and part.value in METHODS:
                    found.add(part.value)
                # The names that the families export, as in `method == consistency.RCM`.
                if isinstance(part, ast.Name | ast.Attribute):
                    name = part.id if isinstance(part, ast.Name) else part.attr
                    found |= {name} & EXPORTED
    return found


EXPORTED = {name.upper().replace("-", "_") for name in METHODS}


def test_no_file_but_those_of_the_methods_compares_a_methods_name() -> None:
    product = [path for room in ("codmd_serve", "distill", "app") for path in sorted((ROOT / room).rglob("*.py"))]
    files = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in product}
    comparing = {path for path, tree in files.items() if compared_names(tree)}
    assert {path for path in comparing if not path.startswith("distill/methods/")} == set()
    # Or the test would look past comparisons.
    assert {"distill/methods/matching.py", "distill/methods/consistency.py"} <= comparing
    for text in ('config.method == "rcm"', 'x in ("a", "dcm")', 'table["dp-dmd"]', "config.method == matching.CODMD"):
        assert compared_names(ast.parse(text)), text


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("method", ["dmd", "dmd2", "f-distill", "vdot"])
def test_dmd_and_its_arms_change_nothing_else_of_a_recipe(recipe: str, method: str) -> None:
    own, codmd = (config_to_dict(recipe_config(recipe, name)) for name in (method, "codmd"))
    for settings in (own, codmd):
        del settings["method"]
        for group in ("copula", "terms"):
            settings.pop(group, None)
    assert own == codmd


# Analytic worlds have optimizers of their own.
@pytest.mark.parametrize("recipe", sorted(name for name in RECIPES if not name.startswith("analytic")))
def test_dp_dmd_has_its_authors_constants(recipe: str) -> None:
    """scripts/run_train_sd35.sh and train_sd35_dpdmd.py of dpdmd@d8f75c9; the rest is the recipe's."""
    config, codmd = recipe_config(recipe, "dp-dmd"), recipe_config(recipe)
    settings = dp_dmd_settings(config)
    assert (settings.weight, settings.teacher_steps, settings.match_step, settings.shift) == (0.05, 30, 10, 3.0)
    assert (settings.matching, config.sampler, config.score_window) == ("full", "ode", "full")
    # The schedule of diffusers, of 1000 steps at shift 3: its ends are shifted before all of it is.
    ends = [1.0, 3 * 0.001 / (1 + 2 * 0.001)]
    lowest = 3 * ends[1] / (1 + 2 * ends[1])
    assert (config.score_sigma_min, config.score_sigma_max) == (pytest.approx(lowest, abs=1e-5), 1.0)
    assert config.student_every_iterations == codmd.student_every_iterations + 1
    optimizer = config.optimizer
    if not recipe.startswith("wan"):
        assert optimizer == codmd.optimizer and config.student_every_iterations == 5
    else:
        assert (optimizer.student_lr, optimizer.critic_lr, optimizer.betas) == (1e-5, 1e-5, (0.9, 0.999))
        assert (optimizer.weight_decay, optimizer.clip_norm) == (0.0, 1.0)
        assert config.student_every_iterations == 6
    for name in ("ema", "guidance_scale", "score_shift", "batch_size", "timesteps", "step_shift", "native", "base"):
        assert getattr(config, name) == getattr(codmd, name), name


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_dp_dmd_gives_both_roles_the_updates_of_codmd(recipe: str) -> None:
    def updates(method: str) -> list[float]:
        config = recipe_config(recipe, method)
        passes = METHODS[method].passes(config)
        return [config.max_iterations * passes[role].turns for role in ("student", "critic")]

    assert updates("dp-dmd") == pytest.approx(updates("codmd"), abs=1e-6)


def test_turns_of_dp_dmd_are_five_of_the_critic_and_then_one_of_the_student() -> None:
    config = recipe_config("wan_1_3b", "dp-dmd")
    turns = [METHODS["dp-dmd"].turns(config, iteration) for iteration in range(12)]
    assert turns == 2 * [*5 * [("critic",)], ("student",)]


@pytest.mark.parametrize("recipe", ["wan_1_3b", "wan_14b"])
@pytest.mark.parametrize("method", ["codmd", "dmd", "dp-dmd", "regression"])
def test_average_starts_after_self_forcings_200_iterations(recipe: str, method: str) -> None:
    """Its trainer/distillation.py: the average is made when self.step is 200; 0, 5, ..., 195 updated the student."""
    config = recipe_config(recipe, method)
    updates_before = sum(step % 5 == 0 for step in range(200))
    assert (config.ema.decay, config.ema.start_after_updates) == (0.99, updates_before)


def runs(method: str) -> list[DistillConfig]:
    """Runs of a method short enough to count their turns."""
    config = with_overrides(recipe_config("shapeworld", method), ["max_iterations=61", "critic_warmup_iterations=4"])
    if "rcm" not in config_to_dict(config):
        return [config]
    return [
        with_overrides(config, settings)
        for settings in (["rcm.warmup_iterations=13"], ["rcm.warmup_iterations=99"], ["rcm.dmd_weight=0"])
    ]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_turns_that_a_plan_counts_are_those_of_the_run(name: str) -> None:
    for config in runs(name):
        turns = [METHODS[name].turns(config, iteration) for iteration in range(config.max_iterations)]
        for role, passes in METHODS[name].passes(config).items():
            assert passes.turns == pytest.approx(sum(role in roles for roles in turns) / config.max_iterations)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("method", ["rcm", "dcm"])
def test_rcm_is_not_clipped_and_averages_by_power(recipe: str, method: str) -> None:
    config = recipe_config(recipe, method)
    assert config.method == method
    assert config.optimizer.clip_norm is None
    assert config.optimizer.betas == (0.0, 0.999)
    assert (config.ema.kind, config.ema.length, config.ema.start_after_updates) == ("power", 0.05, 0)
    assert (config.score_window, config.score_sigma_max) == ("full", 1.0)
    thetas = (math.atan(80.0), 1.5, 1.4, 1.0)
    want = [math.sin(theta) / (math.cos(theta) + math.sin(theta)) for theta in thetas]
    assert config.grid().sigmas == pytest.approx((*want, 0.0))
    assert config.grid().timesteps == pytest.approx([1000 * sigma for sigma in want])


def test_rcm_on_wan_has_the_published_constants() -> None:
    small, large = recipe_config("wan_1_3b", "rcm"), recipe_config("wan_14b", "rcm")
    for config in (small, large):
        assert (config.guidance_scale, config.score_shift, config.max_iterations) == (5.0, 5.0, 10_000)
        rcm = rcm_settings(config)
        assert (rcm.scm_weight, rcm.dmd_weight, rcm.theta_std) == (100.0, 1.0, 1.6)
        assert (rcm.sigma_max, rcm.sample_thetas) == (80.0, (1.5, 1.4, 1.0))
        assert (rcm.data_steps, rcm.data_shift) == (100, 3.0)
    assert (small.optimizer.student_lr, small.optimizer.critic_lr) == (2e-6, 4e-7)
    assert (large.optimizer.student_lr, large.optimizer.critic_lr) == (1e-6, 1e-7)
    assert (small.student_every_iterations, small.batch_size) == (5, 256)
    assert (large.student_every_iterations, large.batch_size) == (10, 64)
    assert (rcm_settings(small).theta_mean, rcm_settings(large).theta_mean) == (0.7, 1.5)
    assert (rcm_settings(small).warmup_iterations, rcm_settings(large).warmup_iterations) == (1000, 0)


def test_rcm_on_shapeworld_fits_its_latents() -> None:
    config = recipe_config("shapeworld", "rcm")
    assert rcm_settings(config).theta_mean == pytest.approx(-0.8 + 0.5 * math.log(5), abs=0.01)
    assert config.optimizer.student_lr == recipe_config().optimizer.student_lr


def test_arms_have_the_constants_of_their_authors() -> None:
    for recipe in sorted(RECIPES):
        dmd2, f_distill, avd, vdot = (
            terms_settings(recipe_config(recipe, name)) for name in ("dmd2", "f-distill", "avd", "vdot")
        )
        for terms in (dmd2, f_distill, vdot):
            assert (terms.gan.weight, terms.gan.critic_weight) == (5e-3, 1e-2)
        assert not dmd2.gan.shares_noise and f_distill.gan.shares_noise
        weights = f_distill.f_distill
        assert (weights.divergence, weights.ratio_min, weights.ratio_max, weights.bins) == ("js", 0.1, 20.0, 10)
        assert (avd.avd.regression_weight, avd.avd.motion_weight, avd.avd.motion_threshold) == (1.0, 0.05, 0.8)
        assert (avd.avd.sharpness, avd.avd.error_decay) == (3.0, 0.95)
        assert avd.critic_head() is None
        assert vdot.transport.weight > 0 == dmd2.transport.weight
    for recipe in ("wan_1_3b", "wan_14b"):
        config = recipe_config(recipe, "avd")
        # Their 5 in cond + 5 * (cond - uncond).
        assert (config.guidance_scale, config.score_shift) == (6.0, 5.0)
        assert config.grid().timesteps == (1000.0, 900.0, 757.0, 522.0)
        assert (config.optimizer.student_lr, config.optimizer.critic_lr) == (2e-6, 2e-6)


def test_unknown_recipe_and_method_are_refused_by_option() -> None:
    with pytest.raises(ConfigError, match=f"--method must be one of {', '.join(METHODS)}, got 'none'"):
        recipe_config(method="none")
    with pytest.raises(ConfigError, match=f"--recipe must be one of {', '.join(RECIPES)}, got ''"):
        recipe_config(recipe="")

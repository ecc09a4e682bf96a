"""Recipes carry the published numbers; settings survive JSON, old formats load, and what is not known is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from runs import with_method

from codmd_serve.errors import ConfigError
from codmd_serve.grid import wan_1_3b_grid, wan_14b_grid
from distill.config import (
    FORMAT,
    RECIPES,
    WAN_NEGATIVE_PROMPT,
    DistillConfig,
    config_to_dict,
    settings_digest,
    with_overrides,
)
from distill.formats import RENAMED
from distill.methods.consistency import rcm_settings
from distill.methods.draws import reference_sigma
from distill.methods.matching import copula_settings
from distill.methods.registry import METHODS, config_from_dict, recipe_config
from distill.methods.trajectory import dp_dmd_settings
from distill.settings import NativeConfig

# Every recipe by every method as format 1 saved it, with its steps and its digest.
FORMAT_1: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "configs_format_1.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_survives_json(name: str, method: str) -> None:
    config = recipe_config(name, method)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert again.sha256() == config.sha256()
    assert (config.recipe, config.method) == (name, method)


def first_edition(config: DistillConfig) -> DistillConfig:
    """The recipe of today as when format 1 was written.

    The world had another size, Wan's bundles were float32 and their average started after 200 updates, dp-dmd was what
    dp_dmd.matching exit is now with all other settings of codmd, and rcm at 14B warmed up.
    """
    if config.method == "dp-dmd":
        codmd = recipe_config(config.recipe, "codmd")
        settings = dataclasses.replace(dp_dmd_settings(config), matching="exit")
        config = dataclasses.replace(codmd, method="dp-dmd", method_settings=settings)
    if config.recipe == "shapeworld":
        return dataclasses.replace(config, native=NativeConfig(height=64, width=64, num_frames=17, fps=16))
    if config.ema.kind == "constant":
        config = dataclasses.replace(config, ema=dataclasses.replace(config.ema, start_after_updates=200))
    if config.recipe == "wan_14b" and config.method_settings.group == "rcm":
        settings = dataclasses.replace(rcm_settings(config), warmup_iterations=200)
        config = dataclasses.replace(config, method_settings=settings)
    return dataclasses.replace(config, bundle_dtype="fp32")


@pytest.mark.parametrize("name", sorted(FORMAT_1))
def test_configs_of_format_1_load_as_what_the_recipe_is_today(name: str) -> None:
    saved, config = FORMAT_1[name], first_edition(recipe_config(*name.split("/")))
    assert config_from_dict(saved["config"]) == config
    assert list(config.grid().sigmas) == saved["sigmas"] and list(config.grid().timesteps) == saved["timesteps"]
    # What a bundle of that time says is the digest of its run's config.json as it stands.
    assert settings_digest(saved["config"]) == saved["sha256"]


def test_every_renamed_setting_of_format_1_loads_and_is_still_taken_by_set() -> None:
    changed = {
        "max_steps": 7,
        "student_every_steps": 3,
        "critic_warmup_steps": 2,
        "log_every_steps": 4,
        "save_every_steps": 6,
        "copula.shared_sigma": True,
        "reference_compat": True,
        "rcm.warmup_steps": 9,
        "ema.start_update": 11,
    }
    assert changed.keys() == RENAMED.keys()
    for name, value in changed.items():
        method = "rcm" if name.startswith("rcm.") else "codmd"
        data = json.loads(json.dumps(FORMAT_1[f"shapeworld/{method}"]["config"]))
        *groups, leaf = name.split(".")
        (data[groups[0]] if groups else data)[leaf] = value
        data.get("ema", {}).pop(RENAMED[name].rpartition(".")[2], None)
        recipe = first_edition(recipe_config("shapeworld", method))
        want = with_overrides(recipe, [f"{RENAMED[name]}={json.dumps(value)}"])
        assert want != recipe
        assert config_from_dict(data) == want
        assert with_overrides(recipe, [f"{name}={json.dumps(value)}"]) == want


def test_ema_of_format_3_starts_after_as_many_updates_as_it_said() -> None:
    """The unit was always the student's updates; only the recipes had a count of iterations in it."""
    config = with_overrides(recipe_config("wan_1_3b"), ["ema.start_after_updates=200"])
    data = config_to_dict(config) | {"format": 3}
    data["ema"]["start_update"] = data["ema"].pop("start_after_updates")
    assert config_from_dict(data) == config
    data["format"] = FORMAT
    with pytest.raises(ConfigError, match=r"unknown setting ema\.start_update"):
        config_from_dict(data)


def test_dp_dmd_of_format_3_stays_the_method_that_it_was() -> None:
    config = first_edition(recipe_config("wan_1_3b", "dp-dmd"))
    data = config_to_dict(config) | {"format": 3}
    data["ema"]["start_update"] = data["ema"].pop("start_after_updates")
    del data["dp_dmd"]["matching"]
    old = config_from_dict(data)
    assert old == config
    assert (dp_dmd_settings(old).matching, old.sampler, old.student_every_iterations) == ("exit", "sde", 5)
    assert METHODS["dp-dmd"].turns(old, 0) == ("student", "critic")


@pytest.mark.parametrize(("before", "after"), [(False, "none"), (True, "teacher_only")])
def test_permute_of_format_2_is_the_control_that_it_was(before: bool, after: str) -> None:
    config = with_overrides(recipe_config(), [f"copula.control={after}"])
    data = config_to_dict(config) | {"format": 2}
    del data["copula"]["control"]
    data["copula"]["permute"] = before
    assert config_from_dict(data) == config
    assert with_overrides(recipe_config(), [f"copula.permute={json.dumps(before)}"]) == config
    data["copula"]["permute"] = "yes"
    with pytest.raises(ConfigError, match=r"copula\.permute must be one of False, True, got 'yes'"):
        config_from_dict(data)
    with pytest.raises(ConfigError, match=r"copula\.control must be one of"):
        with_overrides(recipe_config(), ["copula.control=shuffled"])


@pytest.mark.parametrize("newer", [FORMAT + 1, "4", None])
def test_a_config_of_a_newer_version_is_refused_with_a_sentence(newer: object) -> None:
    data = config_to_dict(recipe_config()) | {"format": newer, "something": {"new": 1}}
    with pytest.raises(ConfigError, match="a newer version wrote them, so update this one"):
        config_from_dict(data)


def test_a_config_of_this_format_holds_no_settings_of_other_methods() -> None:
    data = config_to_dict(recipe_config())
    assert data["format"] == FORMAT and "copula" in data and "rcm" not in data
    with pytest.raises(ConfigError, match="unknown setting rcm"):
        config_from_dict(data | {"rcm": {}})
    with pytest.raises(ConfigError, match="unknown setting method_settings"):
        config_from_dict(data | {"method_settings": {}})


def test_settings_that_are_no_object_are_refused() -> None:
    with pytest.raises(ConfigError, match="one JSON object"):
        config_from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [None, 3, "gan"])
def test_a_config_without_a_known_method_is_refused(method: object) -> None:
    data = config_to_dict(recipe_config()) | {"method": method}
    with pytest.raises(ConfigError, match="method"):
        config_from_dict(data)


def test_the_method_is_not_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"method cannot be set with --set.*use --method rcm"):
        with_overrides(recipe_config(), ["method=rcm"])


def test_wan_1_3b_has_the_published_constants() -> None:
    config = recipe_config("wan_1_3b")
    assert config.timesteps == (1000.0, 900.0, 757.0, 522.0)
    assert config.grid().sigmas == (1.0, 0.9, 0.757, 0.522, 0.0)
    assert (config.score_shift, config.score_window) == (8.0, "full")
    assert (config.score_sigma_min, config.score_sigma_max) == (0.02, 0.98)
    assert (config.optimizer.student_lr, config.optimizer.critic_lr) == (2e-6, 4e-7)
    assert config.optimizer.betas == (0.9, 0.999)
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.01, 10.0)
    assert (config.ema.decay, config.ema.start_after_updates) == (0.99, 40)
    assert config.student_every_iterations == 5
    copula = copula_settings(config)
    assert (copula.weight_batch, copula.weight_frame) == (0.0, 1.0)
    assert (copula.scale, copula.temperature, copula.features) == (0.1, 0.1, "mean")
    assert (config.native.height, config.native.width, config.native.num_frames, config.native.fps) == (
        480,
        832,
        81,
        16,
    )
    assert config.negative_prompt == WAN_NEGATIVE_PROMPT


def test_wan_14b_differs_where_the_authors_do() -> None:
    config = recipe_config("wan_14b")
    assert config.grid().timesteps == pytest.approx((1000.0, 937.5, 5000 / 6, 625.0))
    assert config.grid().sigmas == pytest.approx(wan_14b_grid().sigmas)
    assert (config.score_shift, config.score_window) == (5.0, "full")
    assert (config.optimizer.student_lr, config.optimizer.critic_lr) == (4e-6, 8e-7)
    copula = copula_settings(config)
    assert (copula.weight_batch, copula.weight_frame) == (1.0, 1.0)


@pytest.mark.parametrize("recipe", ["wan_1_3b", "wan_14b"])
def test_published_guidance_3_5_is_guidance_scale_4_5(recipe: str) -> None:
    cond, uncond = 1.7, -0.4
    config = recipe_config(recipe)
    ours = uncond + config.guidance_scale * (cond - uncond)
    assert ours == pytest.approx(cond + 3.5 * (cond - uncond))


def test_reference_compat_snaps_sigmas_as_published_students_were_trained() -> None:
    config = with_overrides(recipe_config("wan_1_3b"), ["copula.reference_compat=true"])
    assert config.grid().sigmas == pytest.approx(wan_1_3b_grid().sigmas, abs=1e-6)
    assert config.grid().timesteps == wan_1_3b_grid().timesteps


@pytest.mark.parametrize("timestep", [1000.0, 999.3, 757.0, 20.0, 4.0, 0.1])
def test_reference_sigma_is_the_nearest_of_all_table_entries(timestep: float) -> None:
    table = [8 * u / (1 + 7 * u) for u in (i / 1000 for i in range(1, 1001))]
    assert reference_sigma(timestep) == pytest.approx(min(table, key=lambda s: abs(s - timestep / 1000)), abs=1e-12)


def test_shapeworld_steps_follow_its_shift() -> None:
    config = dataclasses.replace(recipe_config(), step_shift=5.0)
    assert config.grid().sigmas == pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0))
    assert config.grid().timesteps == pytest.approx((1000.0, 937.5, 5000 / 6, 625.0))


def test_overrides_reach_nested_keys_and_keep_kinds() -> None:
    config = with_overrides(
        recipe_config(),
        ["batch_size=8", "copula.features=spatial", "optimizer.betas=[0.9,0.99]", "guidance_scale=4", "base=a=b"],
    )
    assert (config.batch_size, copula_settings(config).features, config.optimizer.betas) == (8, "spatial", (0.9, 0.99))
    assert (config.guidance_scale, config.base) == (4.0, "a=b")
    assert type(config.guidance_scale) is float


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("batchsize=8", "batchsize"),
        ("copula.tau=0.1", "copula.tau"),
        ("copula=3", "copula"),
        ("seed.x=3", "seed.x"),
        ("batch_size", "key=value"),
        ("batch_size=many", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("batch_size=true", "batch_size"),
        ("batch_size=2.5", "batch_size"),
        ("score_window=half", "score_window"),
        ("copula.temperature=0", "copula.temperature"),
        ("copula.temperature=NaN", "copula.temperature"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.student_lr=-1", "optimizer.student_lr"),
        ("timesteps=[500,900]", "descend"),
        ("score_sigma_min=0.99", "score_sigma_min"),
        ("native.height=0", "native.height"),
        ("ema.decay=1", "ema.decay"),
        ("ema.kind=linear", "ema.kind"),
        ("ema.length=0.3", "ema.length"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm"),
        ("optimizer.clip_norm=off", "optimizer.clip_norm"),
        ("rcm.scm_weight=1", "rcm.scm_weight"),
    ],
)
def test_bad_settings_are_refused_by_name(assignment: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        with_overrides(recipe_config(), [assignment])


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("rcm.scm_weight=0", "rcm.scm_weight"),
        ("rcm.dmd_weight=-1", "rcm.dmd_weight"),
        ("rcm.theta_mean=NaN", "rcm.theta_mean"),
        ("rcm.theta_std=-1", "rcm.theta_std"),
        ("rcm.warmup_iterations=-1", "rcm.warmup_iterations"),
        ("rcm.discrete_steps=1", "rcm.discrete_steps"),
        ("rcm.sigma_max=0", "rcm.sigma_max"),
        ("rcm.sigma_max=10", "rcm.sample_thetas"),
        ("rcm.sample_thetas=[1.4,1.5]", "rcm.sample_thetas"),
        ("rcm.sample_thetas=[1.5,0]", "rcm.sample_thetas"),
        ("rcm.sample_thetas=[NaN]", "rcm.sample_thetas"),
        ("rcm.data_steps=0", "rcm.data_steps"),
        ("rcm.data_shift=0", "rcm.data_shift"),
        ("dp_dmd.weight=-1", "dp_dmd.weight"),
        ("dp_dmd.match_step=31", "dp_dmd.match_step"),
        ("dp_dmd.teacher_steps=0", "dp_dmd.teacher_steps"),
        ("dp_dmd.shift=0", "dp_dmd.shift"),
        ("dp_dmd.matching=half", "dp_dmd.matching"),
        ("copula.scale=1", "copula.scale"),
    ],
)
def test_bad_settings_of_other_methods_are_refused_by_name(assignment: str, named: str) -> None:
    method = "dp-dmd" if named.startswith("dp_dmd") else "rcm"
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        with_overrides(recipe_config("shapeworld", method), [assignment])


@pytest.mark.parametrize(
    ("assignments", "named"),
    [
        (["terms.gan.critic_weight=0"], "terms.gan.weight needs terms.gan.critic_weight"),
        (["terms.gan.weight=0", "terms.gan.critic_weight=0"], "terms.f_distill.divergence js needs terms.gan.critic"),
        (["terms.gan.shares_noise=false"], "terms.f_distill.divergence js needs terms.gan.shares_noise"),
        (["terms.f_distill.divergence=kl"], "terms.f_distill.divergence must be one of none, reverse_kl, js, forward"),
        (["terms.f_distill.ratio_max=0.5"], "terms.f_distill.ratio_max"),
        (["terms.f_distill.bins=0"], "terms.f_distill.bins"),
        (["terms.f_distill.ratio_decay=1"], "terms.f_distill.ratio_decay"),
        (["terms.gan.depth=1.5"], "terms.gan.depth"),
        (["terms.gan.weight=-1"], "terms.gan.weight"),
        (["terms.gan.width=true"], "terms.gan.width must be of type int"),
        (["terms.avd.regression_weight=NaN"], "terms.avd.regression_weight"),
        (["terms.avd.error_decay=2"], "terms.avd.error_decay"),
        (["terms.transport.over=video"], "terms.transport.over must be one of frame, batch, got 'video'"),
        (["terms.transport.epsilon=0"], "terms.transport.epsilon"),
        (["terms.transport.iterations=0"], "terms.transport.iterations"),
        (["terms.transport.weight=1", "terms.transport.over=batch", "batch_size=1"], "terms.transport.over batch"),
        (["terms.data_steps=0"], "terms.data_steps"),
        (["context_parallel=2"], "context_parallel must be 1 with a discriminator, got 2"),
        (["gan.weight=1"], "unknown setting 'gan.weight' of method f-distill"),
        (["terms.gan.colour=1"], "unknown setting 'terms.gan.colour'"),
    ],
)
def test_bad_settings_of_arms_are_refused_by_name(assignments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        with_overrides(recipe_config("shapeworld", "f-distill"), assignments)


def test_unknown_and_missing_keys_of_a_file_are_refused_by_name() -> None:
    data = config_to_dict(recipe_config())
    with pytest.raises(ConfigError, match=r"copula\.colour"):
        config_from_dict(data | {"copula": {"colour": 1}})
    del data["guidance_scale"]
    with pytest.raises(ConfigError, match="guidance_scale"):
        config_from_dict(data)


def test_batch_term_needs_samples_to_relate() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        with_overrides(recipe_config(), ["copula.weight_batch=1", "batch_size=2"])
    assert with_overrides(recipe_config("shapeworld", "dmd"), ["copula.weight_batch=1", "batch_size=2"]).batch_size == 2


def test_bf16_teacher_needs_autocast() -> None:
    with pytest.raises(ConfigError, match="teacher_dtype"):
        with_overrides(recipe_config(), ["teacher_dtype=bf16", "precision=fp32"])


def test_sha256_changes_with_any_setting() -> None:
    digests = {with_overrides(recipe_config(), [f"seed={seed}"]).sha256() for seed in range(3)}
    assert len(digests) == 3
    assert recipe_config("shapeworld", "dmd").sha256() != recipe_config("shapeworld", "codmd").sha256()


def test_clipping_can_be_switched_off_and_stays_off_in_json() -> None:
    config = with_overrides(recipe_config(), ["optimizer.clip_norm=null"])
    assert config.optimizer.clip_norm is None
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert with_overrides(config, ["optimizer.clip_norm=3"]).optimizer.clip_norm == 3.0


def test_settings_saved_before_the_newer_methods_still_load() -> None:
    data = json.loads(json.dumps(FORMAT_1["shapeworld/codmd"]["config"]))
    for key in ("rcm", "dp_dmd"):
        del data[key]
    for key in ("kind", "length"):
        del data["ema"][key]
    assert config_from_dict(data) == first_edition(recipe_config())


def test_rcm_steps_are_angles_unless_timesteps_are_given() -> None:
    config = recipe_config("shapeworld", "rcm")
    tangents = (80.0, math.tan(1.5), math.tan(1.4), math.tan(1.0))
    assert config.grid().sigmas == pytest.approx((*(value / (1 + value) for value in tangents), 0.0))
    assert with_overrides(config, ["timesteps=[900,300]"]).grid().sigmas == (0.9, 0.3, 0.0)


@pytest.mark.parametrize("method", ["rcm", "dcm"])
def test_rcm_refuses_settings_that_leave_a_network_untrained_or_mean_nothing(method: str) -> None:
    config = recipe_config("shapeworld", method)
    with pytest.raises(ConfigError, match="student_every_iterations"):
        with_overrides(config, ["student_every_iterations=1"])
    assert with_overrides(config, ["student_every_iterations=1", "rcm.dmd_weight=0"]).student_every_iterations == 1
    with pytest.raises(ConfigError, match="score_window"):
        with_overrides(config, ["score_window=above"])
    with pytest.raises(ConfigError, match="reference_compat"):
        with_overrides(config, ["copula.reference_compat=true"])


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("sampler=sde", 'sampler must be "ode"'),
        ("score_window=step", 'score_window must be "full"'),
        ("exit_per_sample=true", "exit_per_sample must be false"),
        ("student_every_iterations=1", "student_every_iterations must be 2 or more"),
    ],
)
def test_dp_dmd_as_its_authors_have_it_refuses_what_undoes_it(assignment: str, named: str) -> None:
    config = recipe_config("wan_1_3b", "dp-dmd")
    with pytest.raises(ConfigError, match=named):
        with_overrides(config, [assignment])
    assert with_overrides(config, ["dp_dmd.matching=exit", assignment]).method == "dp-dmd"


@pytest.mark.parametrize("method", ["rcm", "dcm", "regression"])
def test_exit_steps_per_sample_need_exit_steps(method: str) -> None:
    with pytest.raises(ConfigError, match=f"exit_per_sample must be false for method {method}"):
        with_overrides(recipe_config("wan_1_3b", method), ["exit_per_sample=true"])
    config = with_overrides(recipe_config("wan_1_3b"), ["exit_per_sample=true", "score_shared_sigma=true"])
    with pytest.raises(ConfigError, match="exit_per_sample needs score_shared_sigma false or score_window full"):
        with_overrides(config, ["score_window=step"])


def test_dp_dmd_needs_a_step_after_the_first() -> None:
    config = with_method(recipe_config(), "dp-dmd")
    with pytest.raises(ConfigError, match="timesteps"):
        with_overrides(config, ["timesteps=[1000]"])
    with pytest.raises(ConfigError, match="reference_compat"):
        with_overrides(config, ["copula.reference_compat=true"])

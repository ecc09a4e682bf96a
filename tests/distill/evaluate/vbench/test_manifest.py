"""Plans: names, seeds, subsets, and plan.json."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from codmd_serve.errors import ConfigError
from distill.evaluate.vbench.facts import DIMENSIONS, PRESETS, Preset
from distill.evaluate.vbench.manifest import PLAN_NAME, Plan, case_collisions, make_plan, read_plan, write_plan
from distill.evaluate.vbench.suite import Suite, read_suite

ALL = Preset("all", ("scene", "temporal_flickering"), 5, 25, False, "")


def test_plan_gives_every_video_its_own_seed_and_a_name_without_prompt(suite_file: Path) -> None:
    plan = make_plan(read_suite(suite_file), ALL)
    videos = list(plan.videos())
    assert len(videos) == 25 + 25 + 5
    assert len({video.seed for _, video in videos}) == len(videos)
    for _, video in videos:
        assert re.fullmatch(r"\d{4}-\d{2}\.mp4", video.file)
    assert not case_collisions([video.file for _, video in videos])
    assert {prompt.text for prompt in plan.prompts} >= {"../../a red circle/../moves"}


def test_plan_of_a_subset_keeps_names_and_seeds(suite_file: Path) -> None:
    suite = read_suite(suite_file)
    whole = {video.file: video.seed for _, video in make_plan(suite, ALL, base_seed=3).videos()}
    part = [video for _, video in make_plan(suite, ALL, dimensions=["scene"], base_seed=3).videos()]
    assert part and all(whole[video.file] == video.seed for video in part)
    other = {video.seed for _, video in make_plan(suite, ALL, base_seed=4).videos()}
    assert not other & set(whole.values())


def test_plan_tells_the_model_the_longer_prompt_and_the_evaluator_the_short_one(suite_file: Path) -> None:
    suite = read_suite(suite_file)
    longer = {prompt.index: f"long {prompt.index}" for prompt in suite.prompts}
    plan = make_plan(suite, ALL, augmented=longer, augmented_sha256="abc")
    assert (plan.prompts[0].text, plan.prompts[0].model_text) == (
        "In a still frame, a red circle",
        "long 0",
    )


def test_plan_is_read_as_it_was_written_and_not_replaced_by_another(suite_file: Path, tmp_path: Path) -> None:
    suite = read_suite(suite_file)
    plan = make_plan(suite, ALL)
    path = write_plan(plan, tmp_path / "run")
    first = path.read_bytes()
    write_plan(plan, tmp_path / "run")
    assert path.read_bytes() == first
    read = read_plan(tmp_path / "run")
    assert read.prompts == plan.prompts and len(read.sha256) == 64
    with pytest.raises(ConfigError, match="holds another plan"):
        write_plan(make_plan(suite, ALL, base_seed=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be in 1..99"),
        ({"flicker_samples": 100}, "flicker samples"),
        ({"base_seed": -1}, "seed must be"),
        ({"dimensions": ["color"]}, "has no color; it has scene, temporal_flickering"),
    ],
)
def test_plan_refuses_what_it_cannot_plan(options: dict[str, object], message: str, suite_file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(read_suite(suite_file), ALL, **options)  # type: ignore[arg-type]


def test_plan_refuses_dimensions_without_prompts_with_the_list(suite_file: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt for subject_consistency, motion_smoothness, dynamic_degree"):
        make_plan(read_suite(suite_file), PRESETS["mlperf"])


@pytest.mark.parametrize("name", ["../0000-00.mp4", "a red circle-0.mp4", "0001-00.mp4"])
def test_plan_refuses_a_name_that_it_did_not_give(name: str, planned: Callable[..., tuple[Path, Plan]]) -> None:
    folder, _ = planned("temporal_flickering")
    path = folder / PLAN_NAME
    data = json.loads(path.read_text())
    data["prompts"][0]["videos"][0]["file"] = name
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="is no name that"):
        read_plan(folder)


def test_plan_refuses_damage(planned: Callable[..., tuple[Path, Plan]], tmp_path: Path) -> None:
    folder, _ = planned("scene")
    path = folder / PLAN_NAME
    data = json.loads(path.read_text())
    data["prompts"][0]["videos"][1]["seed"] = data["prompts"][0]["videos"][0]["seed"]
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="share a name or a seed"):
        read_plan(folder)
    del data["prompts"][0]["text"]
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="is damaged"):
        read_plan(folder)
    path.write_text(json.dumps({**data, "format": "other"}))
    with pytest.raises(ConfigError, match="format"):
        read_plan(folder)
    with pytest.raises(ConfigError, match="eval vbench plan --out"):
        read_plan(tmp_path / "nowhere")


def test_presets_are_the_published_protocols() -> None:
    assert PRESETS["vbench"].dimensions == tuple(DIMENSIONS) and len(DIMENSIONS) == 16
    assert (PRESETS["vbench"].samples, PRESETS["vbench"].flicker_samples) == (5, 25)
    # MLPerf's 248 prompts: subject consistency shares its own with two dimensions, scene with background consistency.
    own = {name: DIMENSIONS[name].num_prompts for name in ("subject_consistency", "scene", "appearance_style")}
    assert sum(own.values()) == 248 and set(own) < set(PRESETS["mlperf"].dimensions)


def test_plan_of_the_official_list_is_recognised(suite_file: Path) -> None:
    suite = read_suite(suite_file)
    official = Suite(
        prompts=suite.prompts,
        num_entries=suite.num_entries,
        sha256="5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd",
    )
    assert make_plan(official, ALL).is_official and not make_plan(suite, ALL).is_official

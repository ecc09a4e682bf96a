"""The captions of validation are nobody else's, and the scores see what they are named for."""

import numpy as np
import pytest

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import load_prompts
from distill.evaluate.sample import render_truth
from distill.evaluate.shapebench import SuiteConfig, plan_suite
from distill.methods.registry import recipe_config
from distill.networks.base import open_base
from distill.validate import shapebench
from distill.validate.shapebench import VALIDATION_SEED, ShapeBenchSuite, shapebench_suite, validation_captions
from distill.validate.suites import Samples
from distill.worlds.shapeworld import captions as grammar_of_captions
from distill.worlds.shapeworld.captions import all_single_scenes, canonical_caption, parse_caption, sample_scene

SMALL = ["num_captions=64", "validate.num_prompts=8", "validate.deep_prompts=2", "validate.deep_seeds=8"]


@pytest.fixture(scope="module")
def config() -> DistillConfig:
    return with_overrides(recipe_config("shapeworld"), SMALL)


@pytest.fixture(scope="module")
def suite(config: DistillConfig) -> ShapeBenchSuite:
    return shapebench_suite(config, open_base(config.base))


def test_no_caption_can_stand_in_a_report(config: DistillConfig) -> None:
    captions = validation_captions(256, load_prompts(config))
    assert len(set(captions)) == 256
    # Every report, of whatever seed, draws held-out scenes alone.
    assert not any(parse_caption(caption).is_held_out for caption in captions)
    for seed in (0, 1, 10_000):
        reported = {request.caption for request in plan_suite(SuiteConfig(seed=seed)).requests}
        assert not reported & set(captions)


def test_no_seed_can_stand_in_a_report() -> None:
    with pytest.raises(ConfigError, match="seed must be in"):
        SuiteConfig(seed=VALIDATION_SEED)


def test_no_caption_is_trained_on_in_any_phrasing() -> None:
    training = load_prompts(recipe_config("shapeworld"))
    trained = {canonical_caption(parse_caption(text)) for text in training}
    captions = validation_captions(64, [*training, "no caption of the grammar"])
    assert len(training) == 4096 and not trained & set(captions)
    counts = [parse_caption(caption).count for caption in captions]
    assert counts == [1, 2] * 32
    assert captions == validation_captions(64, training)


def test_a_run_that_trained_on_all_single_objects_is_validated_on_two() -> None:
    captions = validation_captions(6, [canonical_caption(scene) for scene in all_single_scenes()])
    assert [parse_caption(caption).count for caption in captions] == [2] * 6


def test_a_run_that_trains_on_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [sample_scene(np.random.default_rng(count), "train", count) for count in (1, 2)]
    monkeypatch.setattr(grammar_of_captions, "sample_scene", lambda rng, split, count: scenes[count - 1])
    with pytest.raises(ConfigError, match="num_prompts must be 2 or less"):
        validation_captions(3, [])


def test_settings_that_cannot_work_are_refused(config: DistillConfig) -> None:
    base = open_base(config.base)
    with pytest.raises(ConfigError, match=r"validate\.prompts is for suite command"):
        shapebench_suite(with_overrides(config, ["validate.prompts=x.txt"]), base)
    with pytest.raises(ConfigError, match=r"deep_prompts is 9, but only \d+ of"):
        shapebench_suite(with_overrides(config, ["validate.deep_prompts=9"]), base)


def test_deep_captions_are_sampled_with_many_seeds(suite: ShapeBenchSuite) -> None:
    assert len(suite.requests) == 6 + 2 * 8
    assert len(suite.suite.depth) == 2
    assert {request.seed for request in suite.requests} == set(range(8))


def test_scores_tell_the_world_from_what_is_not_it(suite: ShapeBenchSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapebench, "NUM_TRUTH", 16)
    truth = render_truth(suite.suite.requests, 5)
    right = suite.score(Samples(clips=truth))
    assert suite.better.keys() <= right.keys()
    assert right["all"] > 0.8 and right["imaging"] > 0.8
    still = suite.score(Samples(clips=np.repeat(truth[:, :1], truth.shape[1], axis=1)))
    assert still["direction"] < 0.5 < right["direction"] and still["colour"] == right["colour"]
    # One clip for all seeds: no spread, and no tie between factors that vary together.
    first = np.array([np.flatnonzero(suite.suite.caption_index == index)[0] for index in suite.suite.caption_index])
    copied = suite.score(Samples(clips=truth[first]))
    assert copied["diversity"] < 0.1 < right["diversity"]
    assert copied["dependence"] > right["dependence"]

"""Caption grammar: every phrasing reads back, the split holds, the vocabulary is complete."""

import re

import numpy as np
import pytest

from codmd_serve.errors import ConfigError
from distill.worlds.shapeworld.captions import (
    all_single_scenes,
    canonical_caption,
    free_caption,
    held_out_captions,
    parse_caption,
    sample_caption,
    sample_scene,
    vocabulary,
)
from distill.worlds.shapeworld.schema import Scene


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_phrasing_reads_back_as_its_scene(split: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(1500):
        scene = sample_scene(rng, split)
        assert parse_caption(canonical_caption(scene)) == scene
        assert parse_caption(free_caption(scene, rng)) == scene


def test_canonical_form_is_the_documented_one() -> None:
    assert parse_caption("a red circle moves right quickly on a black background") == Scene(
        (("red", "circle"),), "right", "quickly", "black"
    )
    assert parse_caption("a blue ring left of a white cross stay still on a navy background") == Scene(
        (("blue", "ring"), ("white", "cross")), "still", None, "navy", "left of"
    )
    two = Scene((("blue", "ring"), ("white", "cross")), "up", "slowly", "teal")
    assert canonical_caption(two) == "a blue ring and a white cross move up slowly on a teal background"


def test_two_objects_with_a_motion_each_read_and_print_as_documented() -> None:
    moving = "a red circle moves left slowly and a blue ring moves up quickly on a black background"
    resting = "a red circle stays still and a blue ring moves left slowly on a navy background"
    objects = (("red", "circle"), ("blue", "ring"))
    apart = Scene(objects, "left", "slowly", "black", second_move=("up", "quickly"))
    assert parse_caption(moving) == apart and canonical_caption(apart) == moving
    assert parse_caption(resting) == Scene(objects, "still", None, "navy", second_move=("left", "slowly"))
    assert canonical_caption(parse_caption(resting)) == resting
    free = "against a navy backdrop, the crimson disc rests while one azure hoop swiftly glides to the left"
    assert parse_caption(free) == Scene(objects, "still", None, "navy", second_move=("left", "quickly"))


def test_one_motion_said_twice_is_the_shared_one() -> None:
    twice = "a red circle moves left slowly and a blue ring moves left slowly on a black background"
    once = "a red circle and a blue ring move left slowly on a black background"
    assert parse_caption(twice) == parse_caption(once)
    first = "a red circle moves left slowly with a blue ring on a black background"
    assert parse_caption(first) == parse_caption(once)


def test_sampled_scenes_hold_every_kind_of_motion_and_both_splits_of_pairs() -> None:
    rng = np.random.default_rng(4)
    twos = [sample_scene(rng, split, 2) for split in ("train", "held_out") for _ in range(600)]
    apart = [scene for scene in twos if scene.second_move is not None]
    assert 0.2 < len(apart) / len(twos) < 0.4
    assert {scene.moves[1][0] for scene in apart} == {"left", "right", "up", "down", "still"}
    pairs = {held: {frozenset(scene.objects) for scene in twos if scene.is_held_out == held} for held in (True, False)}
    assert pairs[True] and not pairs[True] & pairs[False]


def test_free_phrasings_differ_in_words_and_order() -> None:
    scene = Scene((("red", "circle"),), "right", "quickly", "black")
    phrasings = {free_caption(scene, np.random.default_rng(seed)) for seed in range(200)}
    assert len(phrasings) > 100
    assert any(text.startswith(("on a", "against a")) for text in phrasings)


def test_vocabulary_holds_every_word_and_no_other() -> None:
    rng = np.random.default_rng(2)
    used = {word for _ in range(6000) for word in re.findall(r"[a-z]+", sample_caption(rng))}
    assert used <= set(vocabulary())
    assert len(vocabulary()) >= 60
    assert len(used) >= 0.95 * len(vocabulary())


def test_splits_are_disjoint_and_held_out_combinations_have_known_parts() -> None:
    rng = np.random.default_rng(3)
    held = [parse_caption(text) for text in held_out_captions(128, seed=0)]
    train = [sample_scene(rng) for _ in range(3000)]
    assert all(scene.is_held_out for scene in held)
    assert not any(scene.is_held_out for scene in train)
    seen = {pair for scene in train for pair in scene.objects}
    assert {pair for scene in held for pair in scene.objects} <= seen
    share = np.mean([scene.is_held_out for scene in all_single_scenes()])
    assert 0.08 < share < 0.18


def test_far_captions_are_held_out_as_pairs_and_each_object_alone_too() -> None:
    far = [parse_caption(text) for text in held_out_captions(16, seed=0, split="far")]
    assert len(set(far)) == 16 and {scene.count for scene in far} == {2}
    for scene in far:
        assert scene.is_held_out and scene.is_far
        for pair, (motion, speed) in zip(scene.objects, scene.moves, strict=True):
            assert Scene((pair,), motion, speed, "black").is_held_out
    assert len({frozenset(zip(scene.objects, scene.moves, strict=True)) for scene in far}) > 8
    # Most held-out scenes are not far: one of their objects is trained on, with its motion, alone.
    held = [parse_caption(text) for text in held_out_captions(128, seed=0, count=2)]
    assert sum(scene.is_far for scene in held) < 8
    rng = np.random.default_rng(0)
    assert not any(sample_scene(rng, "train", 2).is_far for _ in range(300))
    assert sample_scene(rng, "far").count == 2
    with pytest.raises(ConfigError, match="two objects only"):
        sample_scene(rng, "far", 1)


def test_held_out_captions_are_distinct_repeatable_and_half_of_them_have_two_objects() -> None:
    captions = held_out_captions(64, seed=5)
    assert captions == held_out_captions(64, seed=5)
    assert captions != held_out_captions(64, seed=6)
    assert len(set(captions)) == 64
    assert sum(parse_caption(text).count == 2 for text in captions) == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog runs", "no 'colour shape' pair"),
        ("a red circle on a black background", "expected one motion"),
        ("a red circle moves left right quickly on a black background", "expected one motion"),
        ("a red circle moves left quickly", "expected one background"),
        ("a red circle moves left on a black background", "speed must be given"),
        ("a red circle and a red ring stay still on a black background", "must differ in colour"),
        ("a red circle, a blue ring and a white cross stay still on a gray background", "one or two objects"),
        (
            "a red circle moves left and a blue ring moves up quickly on a black background",
            "expected one speed of the first object",
        ),
        (
            "a red circle stays still slowly and a blue ring moves up quickly on a black background",
            "speed must be given exactly",
        ),
        (
            "a red circle moves left slowly above a blue ring stays still on a black background",
            "a relation needs two objects that move alike",
        ),
    ],
)
def test_captions_outside_the_grammar_are_refused_with_the_part_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_caption(text)


def test_sample_scene_refuses_an_unknown_split() -> None:
    with pytest.raises(ConfigError, match="one of train, held_out, far"):
        sample_scene(np.random.default_rng(0), "test")

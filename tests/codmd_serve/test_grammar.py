"""A bundle's grammar: what is inside it passes, anything else gets a reason and the nearest caption inside it."""

import json
from pathlib import Path

import numpy as np
import pytest

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.grammar import GRAMMAR_FILE, Grammar
from distill.worlds.shapeworld.captions import grammar, parse_caption, sample_caption


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Grammar:
    """The world's grammar as a server reads it, from world.json."""
    folder = tmp_path_factory.mktemp("bundle")
    grammar().save(folder)
    loaded = Grammar.load(folder)
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_caption_of_the_world_passes(known: Grammar, split: str) -> None:
    rng = np.random.default_rng(0)
    assert [known.warning(sample_caption(rng, split)) for _ in range(300)] == [None] * 300
    assert all(known.warning(example) is None for example in known.examples)


def test_saved_and_loaded_grammars_are_equal(known: Grammar) -> None:
    assert known == grammar()


@pytest.mark.parametrize(
    ("prompt", "reason", "nearest"),
    [
        (
            "a red circle moves left on a black background",
            "speed must be given exactly when something moves",
            "a red circle moves left slowly on a black background",
        ),
        (
            "a red circle moves left and a blue ring moves up",
            "expected one background, got none",
            "a red circle moves left slowly and a blue ring moves up slowly on a black background",
        ),
        (
            "A pink ball falls fast!",
            "no 'colour shape' pair found",
            "a purple circle moves down quickly on a black background",
        ),
        (
            "a rde cirlce moves quikcly left on a nvay background",
            "no 'colour shape' pair found",
            "a red circle moves left quickly on a navy background",
        ),
        (
            "a red circle above a red ring stays still on a teal background",
            "two objects must differ in colour, got red twice",
            "a red circle above a green ring stay still on a teal background",
        ),
        (
            "a red circle, a blue ring and a white cross stay still on a gray background",
            "expected one or two objects, got 3",
            "a red circle and a blue ring stay still on a gray background",
        ),
        (
            "a green triangle moves up left slowly on a navy background",
            "expected one motion, got 2: up, left",
            "a green triangle moves up slowly on a navy background",
        ),
        (
            "a red circle moves left slowly above a blue ring stays still on a black background",
            "a relation needs two objects that move alike",
            "a red circle moves left slowly and a blue ring stays still on a black background",
        ),
        ("a cat plays the piano", "no 'colour shape' pair found", "a red circle stays still on a black background"),
        ("two squares", "no 'colour shape' pair found", "a red square stays still on a black background"),
        ("", "no 'colour shape' pair found", "a red circle stays still on a black background"),
    ],
)
def test_a_prompt_outside_gets_the_reason_the_range_and_the_nearest_caption(
    known: Grammar, prompt: str, reason: str, nearest: str
) -> None:
    warning = known.warning(prompt)
    assert warning is not None and reason in warning
    assert "one or two shapes (circle, square, triangle, cross, ring; red, green" in warning
    assert known.nearest(prompt) == nearest and f'"{nearest}"' in warning
    assert known.warning(nearest) is None


def test_the_nearest_caption_of_any_text_is_inside(known: Grammar) -> None:
    rng = np.random.default_rng(1)
    words = [*known._meanings, *known.near, "of", "a", "and", "cat"]
    for _ in range(500):
        text = " ".join(rng.choice(words, size=rng.integers(0, 12)))
        nearest = known.nearest(text)
        assert known.warning(nearest) is None, (text, nearest)
        assert parse_caption(nearest)


def test_a_caption_inside_is_its_own_nearest_meaning(known: Grammar) -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        text = sample_caption(rng)
        assert parse_caption(known.nearest(text)) == parse_caption(text)


def test_read_names_the_part_that_is_wrong(known: Grammar) -> None:
    with pytest.raises(ConfigError, match="expected one speed of the second object"):
        known.read("a red circle rests and a blue ring slowly moves left quickly on a black background")


def test_a_bundle_without_a_grammar_has_none(tmp_path: Path) -> None:
    assert Grammar.load(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("colours"),
        lambda data: data.update(shapes=[]),
        lambda data: data.update(forms={}),
        lambda data: data.update(examples=["a dog"]),
        lambda data: data.update(about_=""),
        lambda data: data["forms"].update(one="{colour1:>9999999999}"),
        lambda data: data["forms"].update(two="{0}"),
        lambda data: data.update(examples=["[" * 10_000]),
    ],
)
def test_a_damaged_grammar_is_refused(tmp_path: Path, change) -> None:
    grammar().save(tmp_path)
    data = json.loads((tmp_path / GRAMMAR_FILE).read_text(encoding="utf-8"))
    change(data)
    (tmp_path / GRAMMAR_FILE).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a grammar"):
        Grammar.load(tmp_path)
    (tmp_path / GRAMMAR_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Grammar.load(tmp_path)

"""docs/explanation/constants.md: every constant of every method is on it, and "ours" is what the recipes have."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from distill.config import ANALYTIC_RECIPES, RECIPES, config_to_dict
from distill.methods.registry import METHODS, recipe_config

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "explanation" / "constants.md").read_text(encoding="utf-8")
# Settings of a run that are no constants of a method: where it is from, how it is computed and what it writes.
# Those below are; a new setting of one of these groups, or with one of these names, has to be put on the page.
GROUPS = ("optimizer.", "ema.", "native.", "step_", "score_")
NAMES = (
    "batch_size",
    "max_iterations",
    "student_every_iterations",
    "critic_warmup_iterations",
    "guidance_scale",
    "sampler",
    "timesteps",
    "exit_per_sample",
)
BASE = "codmd"
# Recipes with numbers of their own, by the section that has them.
WORLDS = {
    "shapeworld": "## ShapeWorld",
    **dict.fromkeys(ANALYTIC_RECIPES, "## Analytic worlds"),
}


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def constants(recipe: str, method: str) -> dict[str, Any]:
    """The constants among the settings of a recipe by a method, by dotted name."""
    groups = (*GROUPS, f"{METHODS[method].settings.group}.")
    settings = flat(config_to_dict(recipe_config(recipe, method)))
    return {name: value for name, value in settings.items() if name in NAMES or name.startswith(groups)}


def section(text: str, heading: str) -> str:
    """The text below a heading, up to the next of its rank or above."""
    rank = heading.index(" ")
    match = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{rank}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"docs/explanation/constants.md has no section {heading!r}: write one"
    return match[1]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the tables in a text, by the name in their first cell."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        name = re.fullmatch(r"`([\w.]+)`", cells[0])
        if line.startswith("|") and name:
            assert name[1] not in found, f"{name[1]} is there twice"
            found[name[1]] = cells[1:]
    return found


def value(cell: str) -> Any:
    """The JSON value in a cell; what follows it in brackets is a remark. Without one, words that no value equals."""
    match = re.match(r"`([^`]*)`($| \()", cell)
    return json.loads(match[1]) if match else f"in words: {cell}"


def table(method: str) -> dict[str, list[str]]:
    """A method's own rows over those of the method that its section refers to."""
    text = section(PAGE, f"## {method}")
    if method == BASE:
        return rows(text)
    other = re.search(r"^As `([\w-]+)` in every constant", text, re.MULTILINE)
    return table(other[1] if other else BASE) | rows(text)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_page_has_every_constant_of_a_method_with_the_values_of_its_recipes(method: str) -> None:
    found = table(method)
    for column, recipe in ((1, "wan_1_3b"), (3, "wan_14b")):
        own = constants(recipe, method)
        assert own.keys() - found.keys() == set(), f"{method}: these have no row"
        assert {name: value(found[name][column]) for name in own} == own


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rows_of_a_method_are_of_its_constants_and_say_why_ours_differs(method: str) -> None:
    own = rows(section(PAGE, f"## {method}"))
    assert own.keys() <= constants("wan_14b", method).keys()
    for name, (theirs, ours, theirs_14b, ours_14b, _, why) in own.items():
        differs = value(theirs) != value(ours) or value(theirs_14b) != value(ours_14b)
        assert bool(why) == differs, f"{method}: {name} must say why it differs, and only if it does"


@pytest.mark.parametrize(("recipe", "heading"), sorted(WORLDS.items()))
@pytest.mark.parametrize("method", sorted(METHODS))
def test_page_names_every_number_that_a_small_world_has_of_its_own(method: str, recipe: str, heading: str) -> None:
    text = section(PAGE, heading)
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    mine = [heading for heading in headings if method in re.split(r", | and ", heading)]
    assert len(mine) == 1, f"{method}: expected one heading below {heading}, got {mine}"
    found = rows(section(text, f"### {mine[0]}"))
    wan, world = constants("wan_1_3b", method), constants(recipe, method)
    assert found.keys() == {name for name in wan if wan[name] != world[name]}
    for name, (of_wan, of_world, why) in found.items():
        assert (value(of_wan), value(of_world)) == (wan[name], world[name]) and why


def test_every_recipe_is_on_the_page() -> None:
    assert RECIPES.keys() == {"wan_1_3b", "wan_14b", *WORLDS}


def test_constants_that_are_no_settings_are_those_of_the_code() -> None:
    found = rows(section(PAGE, "## Constants that are no settings"))
    assert found
    for name, (theirs, ours, source, why) in found.items():
        module, _, attribute = name.rpartition(".")
        assert value(ours) == getattr(importlib.import_module(module), attribute), name
        assert source and bool(why) == (value(theirs) != value(ours)), name


def test_a_stale_number_on_the_page_is_noticed() -> None:
    """Or these tests would read past it."""
    stale = PAGE.replace("| `dp_dmd.weight` | `0.05` | `0.05` |", "| `dp_dmd.weight` | `0.05` | `0.5` |")
    assert stale != PAGE
    assert value(rows(section(stale, "## dp-dmd"))["dp_dmd.weight"][1]) == 0.5

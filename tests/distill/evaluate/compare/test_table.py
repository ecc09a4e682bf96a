"""What a table may say, and what is refused before the first run."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import TINY

from codmd_serve.errors import ConfigError
from distill.config import with_overrides
from distill.evaluate.compare.cells import all_cells, cell_config, check_cells, iterations_for
from distill.evaluate.compare.table import TABLES, as_dict, find_table, parse_table, read_table
from distill.methods.registry import METHODS, recipe_config


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(TINY), **changes}


def test_a_start_adds_an_arm_for_each_that_it_names() -> None:
    table = parse_table(TINY)
    assert [arm.name for arm in table.arms][-2:] == ["codmd", "dmd+start"]
    assert table.arm("dmd+start").settings["start.updates"] == 2 and table.arm("dmd+start").unequal
    assert as_dict(table)["arms"]["dmd+start"]["method"] == "dmd"
    cells = [cell for chain in all_cells(table, table.seeds) for cell in chain]
    assert len(cells) == 6 * 2 * 2 and len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed' of the table"),
        ({"seeds": [1]}, "2 or more"),
        ({"seeds": [1, 1]}, "without repetitions"),
        ({"seeds": [0, 1]}, "seed 0 is a tuning seed"),
        ({"budgets": [3, 2]}, "must ascend"),
        ({"budgets": 3}, "budgets must be a list"),
        ({"guidance": [float("nan")]}, "guidance must be numbers"),
        ({"baseline": "truth"}, "must be a run"),
        ({"baseline": "moon"}, "must be an arm"),
        ({"arms": {**TINY["arms"], "DMD": {"method": "dmd"}}}, "differ in more than case: DMD, dmd"),
        ({"arms": {**TINY["arms"], "a/b": {"method": "dmd"}}}, "cannot be the name of a folder"),
        ({"arms": {**TINY["arms"], "x": {"method": "dmd", "stepz": 1}}}, "unknown key 'stepz' of arm x"),
        ({"arms": {**TINY["arms"], "x": {"kind": "teacher"}}}, "steps are those of a teacher"),
        ({"start": {"arms": ["moon"], "settings": {}}}, "unknown arm 'moon'"),
    ],
)
def test_a_table_that_compares_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_table(changed(**changes))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"method": "moon"}, "arm x: --method must be one of"),
        ({"method": "dmd", "settings": {"moon": 1}}, "arm x: unknown setting 'moon'"),
        ({"method": "dmd", "settings": {"student_every_iterations": 2}}, r"unequal\): x g=1 seed=1 budget=2 \(critic"),
        ({"method": "dp-dmd"}, r"x g=1 seed=1 budget=3 \(critic, teacher\)"),
        ({"method": "dmd", "updates": 7}, "updates"),
    ],
)
def test_an_arm_of_other_cost_must_say_why(arm: dict[str, Any], message: str) -> None:
    table = parse_table(changed(arms={**TINY["arms"], "x": arm}))
    with pytest.raises(ConfigError, match=message):
        check_cells(table, table.seeds)
    if "unequal)" in message or "budget" in message:
        table = parse_table(changed(arms={**TINY["arms"], "x": {**arm, "unequal": "by design"}}))
        assert any(line.startswith("x g=1") for line in check_cells(table, table.seeds))


def test_a_budget_ends_before_the_next_update_of_the_student() -> None:
    config = recipe_config("analytic_ties", "dmd")
    assert iterations_for(config, 500) == config.max_iterations == 2000
    assert iterations_for(with_overrides(config, ["critic_warmup_iterations=200"]), 500) == 2200
    for method in METHODS:
        own = recipe_config("analytic_ties", method)
        count = iterations_for(own, 3)
        turns = [METHODS[method].turns(own, iteration) for iteration in range(count + 1)]
        assert sum("student" in roles for roles in turns[:-1]) == 3 and "student" in turns[-1]


@pytest.mark.parametrize("name", sorted(path.stem for path in TABLES.glob("*.json")))
def test_every_shipped_table_can_run(name: str) -> None:
    table = read_table(find_table(name))
    num_seeds = 3 if table.recipe == "shapeworld" else 5
    assert table.name == name and len(table.seeds) == num_seeds and len(table.budgets) == 2
    check_cells(table, table.seeds)
    chains = all_cells(table, table.seeds)
    assert {cell_config(cell).precision for cell in chains[0]} == {"fp32"}


def test_a_table_that_is_nowhere_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of orbit, shapeworld, shapeworld_small, switch, ties, ties_guided"):
        find_table("moon")
    path = tmp_path / "own.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    assert read_table(find_table(str(path))).name == "tiny"

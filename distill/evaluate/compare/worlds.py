"""The worlds that methods are compared in, by recipe: what a table of each may say, and the bench that scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from codmd_serve.errors import ConfigError
from distill.config import ANALYTIC_RECIPES, DistillConfig
from distill.evaluate.compare import bench as analytic
from distill.evaluate.compare import shape_bench
from distill.evaluate.compare.table import Arm, Table


class Bench(Protocol):
    """What all cells of one guidance scale are scored against."""

    def score_arm(
        self, arm: Arm, config: DistillConfig, seed: int, bundle: Path | None, folder: Path, *, is_tested: bool = True
    ) -> dict[str, Any]:
        """Return what a cell's scores add to its facts: steps, one dict of numbers for each scored step, and more.

        Args:
            arm: of the cell.
            config: of the run, or of the baseline for an arm that trains nothing.
            seed: of the cell.
            bundle: the student of a run, or that of the start where the arm is the start of a regressed one.
            folder: for pictures; the cell's clips name them relative to the folder's parent.
            is_tested: without it, a point of a curve.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What `eval compare` needs of a world.

    Attributes:
        metrics: that a table may test; 0 is right.
        check: refuses a table that the bench cannot score.
        open: the bench of a table, the config of its baseline, a cache folder and a device; one for each process.
    """

    metrics: tuple[str, ...]
    check: Callable[[Table], None]
    open: Callable[[Table, DistillConfig, Path, str], Bench]


def world_of(recipe: str) -> World:
    """Return the world of a recipe.

    Raises:
        ConfigError: methods are not compared on that recipe.
    """
    if recipe not in WORLDS:
        raise ConfigError(f"recipe must be one of {', '.join(WORLDS)}, got {recipe!r}")
    return WORLDS[recipe]


def check_table(table: Table) -> None:
    """Refuse a table that its world cannot score.

    Raises:
        ConfigError: an unknown recipe or metric, or what the world's own check refuses.
    """
    world = world_of(table.recipe)
    unknown = [metric for metric in table.metrics if metric not in world.metrics]
    if unknown:
        raise ConfigError(
            f"unknown metric {unknown[0]!r} of {table.recipe}, expected some of {', '.join(world.metrics)}"
        )
    world.check(table)


def _check_analytic(table: Table) -> None:
    if table.bench:
        raise ConfigError(f"bench has no settings in {table.recipe}, got {', '.join(table.bench)}")


def _open_analytic(table: Table, config: DistillConfig, cache_dir: Path, device: str) -> Bench:
    del device  # a network of 194,000 parameters is fastest on a CPU
    return analytic.open_bench(table.recipe, config.guidance_scale, table.samples, cache_dir)


def _open_shapeworld(table: Table, config: DistillConfig, cache_dir: Path, device: str) -> Bench:
    settings = shape_bench.shape_settings(table.bench)
    return shape_bench.open_shape_bench(config, settings, table.samples, cache_dir, device)


WORLDS = {
    **dict.fromkeys(ANALYTIC_RECIPES, World(metrics=analytic.ERRORS, check=_check_analytic, open=_open_analytic)),
    "shapeworld": World(metrics=shape_bench.ERRORS, check=shape_bench.check_shape_table, open=_open_shapeworld),
}

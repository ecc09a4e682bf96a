"""The cells of a comparison: their configs, their calls, and one of them run through the product's trainer.

RUNS/TABLE/ARM/gG/seedN/run/             the product's run folder; budgets are checkpoints of one run, which is resumed
RUNS/TABLE/ARM/gG/seedN/run/student-BUDGET/  its bundle at a budget, beside run/bundle: both name the base from there
RUNS/TABLE/ARM/gG/seedN/strips-BUDGET/   pictures of a few clips, where the world has them
RUNS/TABLE/ARM/gG/seedN/scores-BUDGET.json   a finished cell, never run again
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from codmd_serve.errors import CodmdError, ConfigError
from codmd_serve.files import atomic_folder, write_json
from codmd_serve.textfiles import read_json_object
from distill.config import DistillConfig, config_to_dict, with_overrides
from distill.evaluate.compare.starts import link_start, shared_start
from distill.evaluate.compare.table import RUN, START, Arm, Table, check_names
from distill.evaluate.compare.worlds import check_table, world_of
from distill.methods.registry import METHODS, config_from_dict, recipe_config
from distill.methods.regression import start_of
from distill.run.checkpoint import iteration_of, list_checkpoints, load_checkpoint
from distill.run.start import START_FOLDER, run_with_start
from distill.run.trainer import RunOptions

ROLES = ("student", "critic", "teacher")
# What all arms of a table have in common, because they are scored on the same captions, against the same laws.
SHARED = ("base", "teacher", "native", "prompts", "num_captions", "negative_prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One arm with one seed, one guidance scale and one budget."""

    table: Table
    arm: Arm
    guidance: float
    seed: int
    budget: int

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.arm.name} g={self.guidance:g} seed={self.seed} budget={self.budget}"

    def folder(self, runs: Path) -> Path:
        """Return its folder, which it shares with the other budgets."""
        return runs / self.table.name / self.arm.name / f"g{self.guidance:g}" / f"seed{self.seed}"

    def scores(self, runs: Path) -> Path:
        """Return the file that makes it finished."""
        return self.folder(runs) / f"scores-{self.budget}.json"


class InterruptedCellError(Exception):
    """A signal ended the run of a cell; it goes on when it is run again."""


def all_cells(table: Table, seeds: tuple[int, ...]) -> list[list[Cell]]:
    """Return the cells in the order to run them, seed by seed; those of a list are budgets of one run."""
    return [
        [Cell(table=table, arm=arm, guidance=guidance, seed=seed, budget=budget) for budget in table.scored(arm)]
        for seed in seeds
        for guidance in table.guidance
        for arm in table.arms
    ]


def cell_config(cell: Cell) -> DistillConfig:
    """Return the config of a cell's run; an arm that trains nothing has that of the baseline.

    Raises:
        ConfigError: an unknown method or setting; names the arm.
    """
    table, arm = cell.table, cell.arm if cell.arm.kind == RUN else cell.table.arm(cell.table.baseline)
    world_of(table.recipe)
    settings = {**table.settings, **arm.settings, "guidance_scale": cell.guidance, "seed": cell.seed}
    # The teacher's paths are of the run's seed too: intervals over seeds are to hold for other paths.
    settings.setdefault("samples_seed", cell.seed)
    try:
        config = recipe_config(table.recipe, arm.method)
        config = with_overrides(config, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    except ConfigError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from error
    return replace(config, max_iterations=iterations_for(config, arm.updates or cell.budget))


def iterations_for(config: DistillConfig, num_updates: int) -> int:
    """Return the iterations with so many updates of the student, those of the critic before its next one included."""
    method, iteration, done = METHODS[config.method], 0, 0
    while True:
        if "student" in method.turns(config, iteration):
            if done == num_updates:
                return iteration
            done += 1
        iteration += 1


def expected_calls(config: DistillConfig) -> dict[str, float]:
    """Return how many samples each network is evaluated on in a run, by the method's own count, with its start."""
    calls = dict.fromkeys(ROLES, 0.0)
    for run in (start_of(config), config):
        if run is None:
            continue
        for role, passes in METHODS[run.method].passes(run).items():
            size = passes.turns * run.max_iterations * run.batch_size
            guided = 1 if run.guidance_scale == 1.0 else 2
            calls["teacher"] += size * passes.teacher * guided
            for network in ("student", "critic"):
                own = getattr(passes, network) + (passes.trained if network == role else 0.0)
                calls[network] += size * own
        calls["teacher"] += _path_calls(run)
    return calls


def _path_calls(config: DistillConfig) -> int:
    """Count the teacher's evaluations behind stored samples; they are made once, and count for every run."""
    sampling = METHODS[config.method].teacher_sampling(config)
    if sampling is None:
        return 0
    num_samples = sampling.num_samples or config.num_captions
    return num_samples * (len(sampling.sigmas()) - 1) * (1 if config.guidance_scale == 1.0 else 2)


def check_cells(table: Table, seeds: tuple[int, ...]) -> list[str]:
    """Check every arm before the first run: settings, and that updates and calls are those of the baseline.

    Returns:
        Lines that show updates and calls of every arm at every budget.

    Raises:
        ConfigError: a table that its world cannot score; an arm that cannot run, whose base, size or prompts are not
            the baseline's, or whose updates or calls differ without a reason; all are named.
    """
    check_table(table)
    lines, unequal = [], []
    for guidance in table.guidance:
        for budget in table.budgets:
            base = Cell(table=table, arm=table.arm(table.baseline), guidance=guidance, seed=seeds[0], budget=budget)
            baseline = cell_config(base)
            wanted = expected_calls(baseline)
            for arm in table.arms:
                cell = replace(base, arm=arm)
                config = cell_config(cell)
                own = [key for key in SHARED if getattr(config, key) != getattr(baseline, key)]
                if own:
                    raise ConfigError(f"arm {arm.name}: {own[0]} must be that of {table.baseline}: set it for all arms")
                if arm.kind != RUN:
                    continue
                calls, updates = expected_calls(config), arm.updates or budget
                shown = " ".join(f"{role}={calls[role]:,.0f}" for role in ROLES)
                lines.append(f"{cell.name}: updates={updates} iterations={config.max_iterations} {shown}")
                differs = [role for role in ("critic", "teacher") if abs(calls[role] - wanted[role]) > 0.5]
                differs += ["updates"] if updates != budget else []
                if differs and not arm.unequal:
                    unequal.append(f"{cell.name} ({', '.join(differs)})")
    if unequal:
        raise ConfigError(
            f"updates or calls differ from those of {table.baseline}, and the arm does not say why (unequal): "
            + "; ".join(unequal)
        )
    return lines


def check_runs_folder(table: Table, runs: Path) -> None:
    """Refuse a folder of runs in which two arms differ only in case.

    Raises:
        ConfigError: lists them.
    """
    own = runs / table.name
    found = {entry.name for entry in own.iterdir() if entry.is_dir()} if own.is_dir() else set()
    check_names(sorted(found | {arm.name for arm in table.arms}), "arms")


def is_finished(cell: Cell, runs: Path) -> bool:
    """Return whether a cell has its scores.

    Raises:
        ConfigError: they are of other settings than the table's.
    """
    path = cell.scores(runs)
    if not path.is_file():
        return False
    # Parsed and not by its digest: a version that adds settings reads the old ones as before.
    made, wanted = config_from_dict(read_json_object(path, ConfigError).get("config", {})), cell_config(cell)
    before, after = config_to_dict(made), config_to_dict(wanted)
    differs = [key for key in after if before.get(key) != after[key]]
    if differs:
        raise ConfigError(
            f"{path} was made with another {differs[0]} than the table has now: "
            "name another --out, or delete its folder"
        )
    return True


def read_scores(cell: Cell, runs: Path, folder: Path) -> dict[str, Any]:
    """Return what a report needs of a finished cell: all but its config; strips by their paths from `folder`."""
    path = cell.scores(runs)
    found = read_json_object(path, ConfigError)
    own = path.parent.resolve()
    for clip in found.get("clips", []):
        clip["strip"] = Path(os.path.relpath(own / clip["strip"], folder.resolve())).as_posix()
    return {key: value for key, value in found.items() if key != "config"}


def run_cell(cell: Cell, runs: Path, cache_dir: Path, device: str = "cpu") -> None:
    """Run a cell to its scores, going on with what an earlier call left.

    Args:
        cell: to run.
        runs: folder of all runs.
        cache_dir: shared by all cells.
        device: cpu, cuda or cuda:N.

    Raises:
        InterruptedCellError: by a signal.
        CodmdError: the run cannot go on, see its folder.
    """
    folder, config = cell.folder(runs), cell_config(cell)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if is_finished(cell, runs):
            return
        if not cell.arm.has_budgets:
            for budget in cell.table.scored(cell.arm):
                same = replace(cell, budget=budget)
                if is_finished(same, runs):
                    found = read_json_object(same.scores(runs), ConfigError)
                    write_json(cell.scores(runs), {**found, "budget": cell.budget, "config": config_to_dict(config)})
                    return
        begin = time.process_time()
        bundle, facts = None, {"calls": dict.fromkeys(ROLES, 0), "student_updates": 0, "iterations": 0}
        if cell.arm.kind == RUN:
            bundle, facts = _train(cell, config, folder, cache_dir, device)
        if cell.arm.kind == START:
            bundle = _start_bundle(cell, config, folder, cache_dir, device)
        trained_s = time.process_time() - begin
        baseline = replace(cell, arm=cell.table.arm(cell.table.baseline), budget=cell.table.budgets[0])
        first = cell_config(replace(baseline, seed=cell.table.seeds[0]))
        bench = world_of(cell.table.recipe).open(cell.table, first, cache_dir, device)
        is_tested, strips = cell.budget in cell.table.budgets, folder / f"strips-{cell.budget}"
        scores = bench.score_arm(cell.arm, config, cell.seed, bundle, strips, is_tested=is_tested)
        write_json(
            cell.scores(runs),
            {
                "arm": cell.arm.name,
                "guidance": cell.guidance,
                "seed": cell.seed,
                "budget": cell.budget,
                "config": config_to_dict(config),
                "cpu_s": round(trained_s, 2),
                **facts,
                **scores,
            },
        )


def _train(
    cell: Cell, config: DistillConfig, folder: Path, cache_dir: Path, device: str
) -> tuple[Path, dict[str, Any]]:
    run, student = folder / "run", folder / "run" / f"student-{cell.budget}"
    checkpoints = list_checkpoints(run)
    if checkpoints and iteration_of(checkpoints[-1]) > config.max_iterations:
        raise ConfigError(f"{run} is past the budget of {cell.name}: delete {folder} to run it anew")
    options, start = _options(run, cache_dir, device), start_of(config)
    if start is not None and not link_start(start, options):
        raise InterruptedCellError(cell.name)
    outcome = run_with_start(config, options, resume=(run / "config.json").is_file())
    if outcome.bundle is None:
        raise InterruptedCellError(cell.name)
    wanted = cell.arm.updates or cell.budget
    if outcome.num_student_updates != wanted:
        raise CodmdError(
            f"{cell.name}: {outcome.num_student_updates} updates of the student, expected {wanted}: "
            f"{outcome.num_skipped} were not finite"
        )
    with atomic_folder(student) as fresh:
        shutil.copytree(outcome.bundle, fresh, dirs_exist_ok=True)
    calls = _counted(run)
    calls["teacher"] += _path_calls(config)
    if start is not None:
        counted = _counted(run / START_FOLDER)
        calls = {role: calls[role] + counted[role] for role in ROLES}
        calls["teacher"] += _path_calls(start)
    facts = {"calls": calls, "student_updates": wanted, "iterations": outcome.iteration}
    return student, facts


def _start_bundle(cell: Cell, config: DistillConfig, folder: Path, cache_dir: Path, device: str) -> Path | None:
    """Return the student of the start that the baseline has; None where it begins with the base's own network."""
    start = start_of(config)
    if start is None:
        return None
    made = shared_start(start, _options(folder / "run", cache_dir, device))
    if made is None:
        raise InterruptedCellError(cell.name)
    return made / "bundle"


def _options(run: Path, cache_dir: Path, device: str) -> RunOptions:
    return RunOptions(
        out=run,
        device=torch.device(device),
        cache_dir=cache_dir,
        preview_every_iterations=0,
        has_pipeline=False,
        has_curves=False,
    )


def _counted(run: Path) -> dict[str, int]:
    values = load_checkpoint(list_checkpoints(run)[-1]).values
    return {role: int(values["calls"][role]) for role in ROLES}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep two processes from running one cell; the second waits for the first."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

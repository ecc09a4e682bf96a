"""Results of eval compare without a run: scores of a known law, so that a report of them has a known answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from tiny_comparison import TINY

from distill.evaluate.compare.results import scored_updates
from distill.evaluate.compare.table import as_dict, parse_table

RULED: dict[str, Any] = {
    **copy.deepcopy(TINY),
    "seeds": [1, 2, 3, 4, 5],
    "rule": "no_loss",
    "arms": {
        **copy.deepcopy(TINY["arms"]),
        "control": {"method": "codmd", "settings": {"copula.control": "matched"}},
        "old_control": {"method": "codmd", "settings": {"copula.control": "teacher_only"}},
        "rival": {"method": "dp-dmd", "unequal": "more of the teacher"},
        "alone": {"method": "regression", "updates": 4, "unequal": "the start alone"},
    },
}

Error = Callable[[str, int, str], float]
"""The mean of a metric, by arm, student updates and metric."""


def comparison(
    table: dict[str, Any], error: Error, *, spread: float = 0.02, has_matrices: bool = False, **signed: float
) -> dict[str, Any]:
    """Return the JSON of a table.

    Args:
        table: as a table file says it.
        error: mean of each tested metric.
        spread: relative, over seeds; half of it is shared by all arms of a seed.
        has_matrices: cells have matrices, 3 factors and 4 frames.
        signed: mean of kept, tau_kept and so on, for all trained arms; others have 1.
    """
    parsed = parse_table(table)
    declared = as_dict(parsed)
    rng = np.random.default_rng(0)
    names = sorted({"kept": 1.0, "tau_kept": 1.0, "sd_ratio": 1.0, "copying": 0.5} | signed)
    cells = []
    for place, seed in enumerate(parsed.seeds):
        common = dict(zip(parsed.metrics, rng.normal(0, spread / 2, len(parsed.metrics)), strict=True))
        for arm, entry in declared["arms"].items():
            is_run = entry.get("kind", "run") == "run"
            for guidance in parsed.guidance:
                for updates in scored_updates(declared, entry):
                    turn = 2 * np.pi * place / len(parsed.seeds) + len(arm) + updates
                    # Over seeds it adds up to 0: arms of equal errors have no difference, by chance either.
                    own = {metric: spread / 2 * np.sin(turn + i) for i, metric in enumerate(parsed.metrics)}
                    step = {
                        metric: float(error(arm, updates, metric) * (1 + common[metric] + own[metric]))
                        for metric in parsed.metrics
                    }
                    centres = {name: signed.get(name, 1.0) if is_run else 1.0 for name in names}
                    step |= {name: centre + 0.002 * float(np.sin(turn)) for name, centre in centres.items()}
                    is_tested = updates in parsed.budgets
                    cell = {
                        "arm": arm,
                        "guidance": guidance,
                        "budget": updates,
                        "seed": seed,
                        "student_updates": entry.get("updates") or updates if is_run else 0,
                        "calls": _calls(entry, updates)
                        if is_run
                        else dict.fromkeys(("student", "critic", "teacher"), 0),
                        "cpu_s": 1.5,
                        "steps": [step] * (4 if is_tested and is_run else 1),
                    }
                    if has_matrices and is_tested:
                        cell["matrices"] = {"tau": _matrix(rng, 3, is_run), "rho": _matrix(rng, 4, is_run)}
                    cells.append(cell)
    return {"format": 1, "table": declared, "cells": cells}


def _calls(entry: dict[str, Any], updates: int) -> dict[str, int]:
    if entry.get("updates"):
        return {"student": 10 * entry["updates"], "critic": 0, "teacher": 4}
    extra = 1000 if entry.get("unequal") else 0
    return {"student": 40 * updates, "critic": 80 * updates + extra, "teacher": 20 * updates + extra}


def _matrix(rng: np.random.Generator, size: int, is_run: bool) -> list[list[float]]:
    values = np.full((size, size), 0.7 if is_run else 0.5) + rng.normal(0, 0.01, (size, size))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1.0)
    found: list[list[float]] = values.round(4).tolist()
    return found

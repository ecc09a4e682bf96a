"""`codmd-distill eval compare`: arguments and output; imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_json

if TYPE_CHECKING:
    from distill.evaluate.compare.results import Comparison
    from distill.evaluate.compare.table import Table

MAX_JOBS = 256


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `codmd-distill eval compare`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    table: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
        "plan": ("check a table and show the calls of every arm", _add_plan),
        "run": ("run the cells that are not finished, and collect them", _add_run),
        "collect": ("make the JSON of finished cells", _add_collect),
        "pack": ("cut JSON files down to what a report uses, for keeping", _add_pack),
        "report": ("make the report of JSON files, in seconds", _add_report),
    }
    for name, (summary, add_arguments) in table.items():
        add_arguments(actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "table",
        help="a JSON file, or one that comes with the package: ties, ties_guided, orbit, switch, shapeworld or "
        "shapeworld_small",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="report these alone of the table's seeds")
    parser.add_argument("--arms", nargs="+", help="report these alone of the table's arms; the baseline always")
    parser.add_argument("--tuning", action="store_true", help="run the tuning seeds in place of the reported ones")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_table(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_table(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs; started again, it goes on")
    parser.add_argument("--cache", type=Path, help="start networks, paths and references; default: OUT/cache")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N, for ShapeWorld; default cpu")
    parser.add_argument("--json", type=Path, help="default: OUT/TABLE.json, with --tuning OUT/TABLE-tuning.json")


def _add_collect(parser: argparse.ArgumentParser) -> None:
    _add_table(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--json", type=Path, help="as `run`")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path, nargs="+", help="of `run`, `collect` or `pack`")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PAGE.md",
        help="Markdown; its figures go into the folder PAGE, the same as one file with all plots into PAGE.html",
    )
    parser.add_argument(
        "--insert", type=Path, metavar="FILE", help="put main figure and recommendation between its marks"
    )


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path, nargs="+", help="of `run` or `collect`")
    parser.add_argument("--out", type=Path, required=True, help="folder of TABLE.json.gz and of the clips")


def run_compare(args: argparse.Namespace) -> int:
    """Run a command of `codmd-distill eval compare`.

    Returns:
        0; 128 + the signal's number when `run` was interrupted, 1 when a cell failed.

    Raises:
        ConfigError: a table, a folder or results that cannot be used; the message lists what is wrong.
    """
    if args.action in ("report", "pack"):
        return _report(args) if args.action == "report" else _pack(args)
    table = _table(args)
    if args.action == "plan":
        return _plan(table)
    if args.action == "run":
        return _run(args, table)
    return _collect(args, table)


def _table(args: argparse.Namespace) -> Table:
    """Read the table, cut down to the seeds and arms that were asked for."""
    from dataclasses import replace

    from distill.evaluate.compare.table import find_table, read_table

    table = read_table(find_table(args.table))
    if args.tuning:
        if not table.tuning_seeds or args.seeds:
            raise ConfigError("--tuning needs tuning_seeds in the table, and takes no --seeds")
        # Their folders and their JSON are apart: a tuning seed is never reported.
        table = replace(table, name=f"{table.name}-tuning", seeds=table.tuning_seeds, tuning_seeds=())
    for key, wanted in (("seeds", args.seeds), ("arms", args.arms)):
        if wanted is None:
            continue
        known = [arm.name for arm in table.arms] if key == "arms" else list(table.seeds)
        unknown = [value for value in wanted if value not in known]
        if unknown:
            raise ConfigError(f"--{key}: {unknown[0]} is not in the table, which has {', '.join(map(str, known))}")
    if args.seeds:
        table = replace(table, seeds=tuple(seed for seed in table.seeds if seed in args.seeds))
    if args.arms:
        names = {table.baseline, *args.arms}
        table = replace(table, arms=tuple(arm for arm in table.arms if arm.name in names))
    return table


def _plan(table: Table) -> int:
    from distill.evaluate.compare.cells import all_cells, check_cells

    print("\n".join(check_cells(table, table.seeds)))
    print(f"{sum(map(len, all_cells(table, table.seeds)))} cells, seeds {', '.join(map(str, table.seeds))}")
    return 0


def _run(args: argparse.Namespace, table: Table) -> int:
    if not 1 <= args.jobs <= MAX_JOBS:
        raise ConfigError(f"--jobs must be in 1..{MAX_JOBS}, got {args.jobs}")

    from codmd_serve.device import choose_device
    from codmd_serve.wan.checkpoint import silence_libraries
    from distill.evaluate.compare.cells import all_cells, cell_config, check_cells, check_runs_folder, is_finished
    from distill.evaluate.compare.pool import run_chains
    from distill.networks.base import open_base

    silence_libraries()
    device = str(choose_device(args.device))
    check_cells(table, table.seeds)
    check_runs_folder(table, args.out)
    cache = args.cache or args.out / "cache"
    chains = all_cells(table, table.seeds)
    left = [chain for chain in chains if not all(is_finished(cell, args.out) for cell in chain)]
    total = sum(map(len, chains))
    print(
        f"{total - sum(not is_finished(cell, args.out) for chain in left for cell in chain)} of {total} cells are done"
    )
    if left:
        # Once, before workers would each make one.
        open_base(cell_config(left[0][0]).base).prepared(cache)
    report = run_chains(left, args.out, cache, args.jobs, lambda name: print(f"done {name}", flush=True), device)
    for name, reason in report.failed.items():
        print(f"failed {name}: {reason}", file=sys.stderr)
    if report.signal_number is not None:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + report.signal_number
    return 1 if report.failed else _collect(args, table)


def _collect(args: argparse.Namespace, table: Table) -> int:
    from distill.evaluate.compare.cells import all_cells, check_runs_folder, is_finished, read_scores
    from distill.evaluate.compare.results import FORMAT, check_complete
    from distill.evaluate.compare.table import as_dict

    check_runs_folder(table, args.out)
    cells = [cell for chain in all_cells(table, table.seeds) for cell in chain]
    path = args.json or args.out / f"{table.name}.json"
    found = [read_scores(cell, args.out, path.parent) for cell in cells if is_finished(cell, args.out)]
    data = {"format": FORMAT, "table": as_dict(table), "cells": found}
    check_complete(data)
    write_json(path, data, indent=None)
    print(f"{path}: {len(found)} cells")
    return 0


def _pack(args: argparse.Namespace) -> int:
    from distill.evaluate.compare.pack import pack

    for own in _read(args.json):
        path = pack(own, args.out)
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def _read(paths: list[Path]) -> list[Comparison]:
    """Read and check results; two files or two tables of one name are refused."""
    from distill.evaluate.compare.results import read_results
    from distill.evaluate.compare.table import check_names

    check_names([str(path) for path in paths], "files", are_paths=True)
    comparisons = [read_results(path) for path in paths]
    check_names([own.table["name"] for own in comparisons], "tables")
    return comparisons


def _report(args: argparse.Namespace) -> int:
    from distill.evaluate.compare.page import commands_of, write_report

    comparisons = _read(args.json)
    commands = commands_of(comparisons, args.json, args.out, args.insert)
    for path in write_report(comparisons, commands, args.out, args.insert):
        print(path)
    return 0

"""`codmd-distill curves`: the curves of several runs in one picture; imports nothing heavy until the command runs."""

import argparse
from pathlib import Path

from codmd_serve.errors import ConfigError
from codmd_serve.files import atomic_file


def add_curves_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill curves`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="draw these numbers alone, as log.jsonl names them")


def run_curves(args: argparse.Namespace) -> int:
    """Draw the numbers of the runs, one panel per number, one line per run.

    Returns:
        0.

    Raises:
        ConfigError: a folder without a log, a number that no run has, or a picture that cannot be written.
    """
    from distill.run.curves import draw_runs, read_curves
    from distill.run.log import LOG_FILE, VALIDATION_FILE

    runs = {}
    for label, run in zip(_labels(args.runs), args.runs, strict=True):
        curves = {**read_curves(run / LOG_FILE), **read_curves(run / VALIDATION_FILE)}
        if not curves:
            raise ConfigError(f"{run} holds no log of a run: expected {LOG_FILE} with a line in it")
        runs[label] = curves
    known = sorted({name for curves in runs.values() for name in curves})
    missing = [name for name in args.names or [] if name not in known]
    if missing:
        raise ConfigError(f"no run has the number {missing[0]!r}, expected one of: {', '.join(known)}")
    for label, curves in runs.items():
        runs[label] = {name: curves[name] for name in args.names or curves if name in curves}
    try:
        with atomic_file(args.out) as temporary:
            temporary.write_bytes(draw_runs(runs))
    except OSError as error:
        raise ConfigError(f"{args.out} cannot be written: {error}") from error
    print(args.out)
    return 0


def _labels(runs: list[Path]) -> list[str]:
    """Return the folders' names, or whole paths where two have one name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]

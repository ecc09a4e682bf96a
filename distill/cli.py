"""codmd-distill on the command line: the one place of the package that reads the environment and configures logging."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial

from codmd_serve.commands import OneLineParser, run_command
from codmd_serve.cpu import prepare_threads
from codmd_serve.errors import ConfigError
from codmd_serve.textfiles import shown
from distill.bench.iteration import add_bench_step_arguments, run_bench_step
from distill.evaluate.command import add_eval_arguments, run_eval
from distill.parallel.launch import find_launch
from distill.plan.command import add_plan_arguments, run_plan
from distill.pretrain.command import add_teacher_arguments, run_teacher
from distill.run.command import (
    add_export_arguments,
    add_extract_arguments,
    add_train_arguments,
    run_export,
    run_extract,
    run_train,
)
from distill.run.runs_drawn import add_curves_arguments, run_curves
from distill.run.samples import add_sample_arguments, run_sample_teacher
from distill.worlds.shapeworld.preview import add_preview_arguments, run_preview

PROGRAM = "codmd-distill"
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "train": ("distil a student from a teacher", add_train_arguments, run_train),
    "sample-teacher": (
        "make the samples of the teacher that a run trains on",
        add_sample_arguments,
        run_sample_teacher,
    ),
    "export": ("write the student of a checkpoint, for codmd-serve or diffusers", add_export_arguments, run_export),
    "extract": ("write a student as a low-rank update of its base", add_extract_arguments, run_extract),
    "curves": ("draw the curves of several runs in one picture", add_curves_arguments, run_curves),
    "bench-step": ("time our iteration beside the authors'", add_bench_step_arguments, run_bench_step),
    "plan": ("say what a run needs: memory per GPU, operations, hours", add_plan_arguments, run_plan),
    "teacher": ("train the ShapeWorld pipeline from nothing", add_teacher_arguments, run_teacher),
    "eval": ("score teachers and students on held-out captions", add_eval_arguments, run_eval),
    "shapeworld": ("look at the captioned world", add_preview_arguments, run_preview),
}


def build_parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the parser of all commands; `args.handler` is what to call, `args.compiler` the C++ compiler of $CXX,
    `args.find_launch` tells what started this process."""
    parser = OneLineParser(prog=PROGRAM, description="Distil few-step text-to-video students.")
    launch = partial(find_launch, environment)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        add_arguments(command)
        command.set_defaults(handler=run, compiler=environment.get("CXX", "g++"), find_launch=launch)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code, see `codmd_serve.commands`."""
    return run_command(PROGRAM, lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    prepare_threads(os.environ)  # before torch is imported
    args = build_parser(os.environ).parse_args(argv)
    level = os.environ.get("CODMD_LOG_LEVEL", "").strip().upper() or "INFO"
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(
            f"$CODMD_LOG_LEVEL must be one of {', '.join(logging.getLevelNamesMapping())}, got {shown(level)}"
        )
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    for library in ("httpx", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.WARNING)
    return int(args.handler(args))


if __name__ == "__main__":
    sys.exit(main())

"""Arguments of `codmd-serve bench`; imports nothing heavy until the command runs, so that --help is quick."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import PurePath
from typing import Any

from codmd_serve.bench.options import OPPONENTS, PRESETS, BenchConfig, writable_folder

BENCH_HELP = {
    "bundle": "student bundle to measure: a folder, a hub id, or a name of `models`",
    "random_weights": f"measure a bundle of random weights instead: {', '.join(PRESETS)}; needs no download",
    "against": f"{', '.join(OPPONENTS)}: the stock pipeline, also as 50-step teacher; or fp8 and SageAttention",
    "device": "auto, cpu, cuda or cuda:N",
    "dtype": "auto (bfloat16 on cuda, the faster of bfloat16 and float32 on a CPU), float32, bfloat16 or float16",
    "height": "pixels; 0 is what the bundle was trained at",
    "width": "pixels; 0 is what the bundle was trained at",
    "num_frames": "4k + 1; 0 is what the bundle was trained at",
    "pairs": "timed requests of each side at equal steps, in turns",
    "teacher_pairs": "the same against the teacher",
    "limit_s": "begin nothing new after this many seconds",
    "cold_start": "start a server and time it up to /ready; with --serving, ask it for videos",
    "serving": "measure server overhead and overlap of jobs in place of the stages",
    "timeline": "with --serving: name of the picture of three overlapped requests",
    "resume": "keep a row that the folder already has from this version on this device",
    "out": "folder of the JSON, the table and the picture",
    "work": "folder that keeps random weights between calls; a temporary one when empty",
}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-serve bench`."""
    for entry in fields(BenchConfig):
        default: Any = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        shown = "" if default == "" else f" (default: {default})"
        options: dict[str, Any] = {"default": default, "help": (BENCH_HELP[entry.name] + shown).replace("%", "%%")}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": type(default), "metavar": "N" if isinstance(default, int) else "TEXT"}
        parser.add_argument("--" + entry.name.replace("_", "-"), **options)


def run_bench(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run `codmd-serve bench`; return 0.

    Args:
        options: as parsed.
        words: as typed, without the program; they go into the results.

    Raises:
        CodmdError: what cannot be measured here; no result is written then.
    """
    config = BenchConfig(**{entry.name: getattr(options, entry.name) for entry in fields(BenchConfig)})
    folder = writable_folder(config.out)
    from codmd_serve.bench.row import measure_row
    from codmd_serve.wan.checkpoint import silence_libraries

    silence_libraries()
    print(measure_row(config, folder, typed(words)))
    return 0


def typed(words: Sequence[str]) -> str:
    """Return the command without private paths: of an absolute path only the last part is kept."""
    shown = [PurePath(word).name if PurePath(word).is_absolute() else word for word in words]
    return shlex.join(["codmd-serve", *shown])

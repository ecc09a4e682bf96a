"""`codmd-distill eval vbench`: arguments and output; imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codmd_serve.config import DEFAULT_CRF, DTYPE_CHOICES, EXECUTIONS, QUANTIZATIONS, default_bundle_path
from codmd_serve.errors import ConfigError
from codmd_serve.files import write_json, write_text
from distill.evaluate.vbench.facts import DIMENSIONS, PRESETS, VBENCH2_NEEDS
from distill.evaluate.vbench.suite import ENVIRONMENT

VBENCH2 = "vbench-2.0"


def add_vbench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `codmd-distill eval vbench`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    table: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
        "plan": ("write which videos to make, from which prompts and seeds", _add_plan),
        "generate": ("make the planned videos that are not there yet", _add_generate),
        "check": ("verify every planned video before hours of scoring", _add_check),
        "run": ("score the videos with the vbench package", _add_run),
        "score": ("make Quality, Semantic and Total of raw scores", _add_score),
        "compare": ("compare two arms of one plan, paired by prompt", _add_compare),
        "curve": ("show scores over training checkpoints", _add_curve),
        "validate": ("score the videos of a validation, as a command of train", _add_validate),
    }
    for name, (summary, add_arguments) in table.items():
        add_arguments(actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--suite", type=Path, help=f"VBench's prompt list or wheel; default: that of {ENVIRONMENT}")
    parser.add_argument("--preset", choices=(*PRESETS, VBENCH2), default="vbench", help="default vbench")
    parser.add_argument("--dimensions", nargs="+", choices=tuple(DIMENSIONS), default=[], help="default: the preset's")
    parser.add_argument("--samples", type=int, help="videos of a prompt; default 5, mlperf 1")
    parser.add_argument("--flicker-samples", type=int, help="of temporal flickering, before its filter; default 25")
    parser.add_argument("--seed", type=int, default=0, help="all seeds are made of it; default 0")
    parser.add_argument("--augmented", type=Path, help="longer prompts for the model, a line for each of the suite")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="with plan.json")
    parser.add_argument("--bundle", type=Path, default=default_bundle_path(), help="default: the embedded student")
    for name in ("height", "width", "num-frames", "fps"):
        parser.add_argument(f"--{name}", type=int, help="default: what the bundle was trained at")
    parser.add_argument("--crf", type=int, default=DEFAULT_CRF, help=f"of H.264, default {DEFAULT_CRF}")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="make every N-th prompt; one process for each K")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto")
    parser.add_argument("--attention", default="auto", help="auto or the name of a kernel")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--execution", choices=EXECUTIONS, default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: as torch chooses")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="with plan.json and the videos")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="with plan.json and the videos")
    parser.add_argument("--dimensions", nargs="+", choices=tuple(DIMENSIONS), default=[], help="default: the plan's")
    parser.add_argument("--python", type=Path, default=ENVIRONMENT / "bin" / "python", help="that has vbench")
    parser.add_argument("--device", default="cpu", help="of the evaluator: cpu, cuda or cuda:N; default cpu")
    parser.add_argument("--static-filter", type=Path, help="VBench's filtered_static_video.json")
    _add_failed_as_zero(parser)


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=Path, nargs="*", help="folders of `run`; VBench's *_eval_results.json, or zips")
    parser.add_argument("--published", action="store_true", help="recompute the totals of published rows")
    parser.add_argument("--out", type=Path, help="folder for score.md and score.json")
    _add_summary(parser)
    _add_failed_as_zero(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="folder of `run`, or VBench's *_eval_results.json")
    parser.add_argument("second", type=Path, help="the same of the other arm")
    parser.add_argument("--out", type=Path, help="folder for compare.md and compare.json")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    _add_failed_as_zero(parser)


def _add_curve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("points", nargs="+", metavar="ITERATION=FOLDER", help="scores of a checkpoint")
    parser.add_argument("--out", type=Path, help="folder for curve.md, curve.json and curve.png")
    _add_summary(parser)
    _add_failed_as_zero(parser)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="with plan.json, of one video of each prompt")
    parser.add_argument("videos", type=Path, nargs="?", help="folder of mp4s; without it the prompts are printed")
    parser.add_argument("prompts", type=Path, nargs="?", help="JSON list of file and prompt")
    parser.add_argument("--python", type=Path, default=ENVIRONMENT / "bin" / "python", help="that has vbench")
    parser.add_argument("--device", default="cpu", help="of the evaluator: cpu, cuda or cuda:N; default cpu")


def _add_summary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=(*PRESETS, VBENCH2), default="vbench", help="default vbench")
    parser.add_argument("--partial", action="store_true", help="show the dimensions that are there, without totals")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def _add_failed_as_zero(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--failed-as-zero", action="store_true", help="count videos that failed as 0, do not refuse")


def run_vbench(args: argparse.Namespace) -> int:
    """Run a command of `codmd-distill eval vbench`.

    Returns:
        0; or 1 where videos failed, are bad, or published totals differ.

    Raises:
        CodmdError: what the commands raise.
    """
    if getattr(args, "preset", "") == VBENCH2:
        raise ConfigError(VBENCH2_NEEDS)
    if getattr(args, "seed", 0) < 0:
        raise ConfigError(f"--seed must be 0 or more, got {args.seed}")
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "plan": _plan,
        "generate": _generate,
        "check": _check,
        "run": _run,
        "score": _score,
        "compare": _compare,
        "curve": _curve,
        "validate": _validate,
    }
    return actions[args.action](args)


def _plan(args: argparse.Namespace) -> int:
    from distill.evaluate.vbench.manifest import make_plan, write_plan
    from distill.evaluate.vbench.suite import find_suite, read_augmented, read_suite
    from distill.evaluate.vbench.tables import plan_text

    suite = read_suite(find_suite(args.suite))
    augmented = None if args.augmented is None else read_augmented(args.augmented, suite)
    plan = make_plan(
        suite,
        PRESETS[args.preset],
        dimensions=args.dimensions,
        samples=args.samples,
        flicker_samples=args.flicker_samples,
        base_seed=args.seed,
        augmented=augmented,
        augmented_sha256="" if augmented is None else hashlib.sha256(args.augmented.read_bytes()).hexdigest(),
    )
    path = write_plan(plan, args.out)
    print(plan_text(plan), end="")
    print(path)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from distill.evaluate.vbench.check import listed
    from distill.evaluate.vbench.generate import GenerateSettings, generate

    k, _, n = args.shard.partition("/")
    if not (k.isdecimal() and n.isdecimal()):
        raise ConfigError(f"--shard must be K/N, got {args.shard}")
    names = ("device", "dtype", "attention", "quantization", "execution", "threads")
    settings = GenerateSettings(
        bundle=args.bundle,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        fps=args.fps,
        crf=args.crf,
        shard=(int(k), int(n)),
        engine={name: getattr(args, name) for name in names},
    )
    outcome = generate(args.folder, settings)
    print(f"made {outcome.num_made}, kept {outcome.num_kept}, failed {len(outcome.failed)}")
    if outcome.failed:
        print(f"failed, and tried again by the next call: {listed(list(outcome.failed))}")
    return 1 if outcome.failed else 0


def _check(args: argparse.Namespace) -> int:
    from distill.evaluate.vbench.check import check_videos
    from distill.evaluate.vbench.manifest import read_plan

    verdicts = check_videos(args.folder, read_plan(args.folder))
    print("\n".join(verdicts.lines()))
    return 0 if verdicts.is_clean else 1


def _run(args: argparse.Namespace) -> int:
    from distill.evaluate.vbench.run import RunSettings, run
    from distill.evaluate.vbench.score import summary
    from distill.evaluate.vbench.tables import score_text

    settings = RunSettings(
        python=args.python,
        device=args.device,
        dimensions=tuple(args.dimensions),
        static_filter=args.static_filter,
        failed_as_zero=args.failed_as_zero,
    )
    results = run(args.folder, settings)
    preset = PRESETS["vbench"]
    print(score_text(summary(results, preset, is_partial=True), results, preset), end="")
    return 0


def _score(args: argparse.Namespace) -> int:
    from distill.evaluate.vbench.curve import curve_json
    from distill.evaluate.vbench.score import agreement, read_scores, summary
    from distill.evaluate.vbench.tables import agreement_text, cited_text, score_text

    if args.published:
        found = agreement()
        print(agreement_text(found), end="")
        return 0 if all(row.agrees or row.misprint for row in found) else 1
    if not args.paths:
        raise ConfigError("nothing to score: name folders or files, or say --published")
    preset = PRESETS[args.preset]
    results = read_scores(args.paths, failed_as_zero=args.failed_as_zero)
    rows = summary(results, preset, is_partial=args.partial, seed=args.seed)
    text = score_text(rows, results, preset)
    if preset.has_totals:
        text += f"\n{cited_text()}"
    _write(args.out, "score", text, curve_json({0: rows})["0"])
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from distill.evaluate.vbench.compare import compare
    from distill.evaluate.vbench.score import read_scores
    from distill.evaluate.vbench.tables import compare_text

    arms = [read_scores([path], failed_as_zero=args.failed_as_zero) for path in (args.first, args.second)]
    differences = compare(arms[0], arms[1], args.seed)
    names = [path.resolve().name for path in (args.first, args.second)]
    if names[0] == names[1]:
        names = [str(args.first), str(args.second)]
    _write(args.out, "compare", compare_text(differences, *names), [asdict(row) for row in differences])
    return 0


def _curve(args: argparse.Namespace) -> int:
    from distill.evaluate.vbench.curve import curve_json, curve_rows, curve_table, plot_curve, read_points

    points = read_points(args.points, failed_as_zero=args.failed_as_zero)
    rows = curve_rows(points, PRESETS[args.preset], is_partial=args.partial, seed=args.seed)
    _write(args.out, "curve", curve_table(rows), curve_json(rows))
    if args.out is not None:
        plot_curve(rows, args.out / "curve.png")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from distill.evaluate.vbench.run import RunSettings
    from distill.evaluate.vbench.validate import plan_prompts, score_validation

    if args.videos is None:
        print("\n".join(plan_prompts(args.folder)))
        return 0
    prompts = args.videos / "prompts.json" if args.prompts is None else args.prompts
    settings = RunSettings(python=args.python, device=args.device)
    print(json.dumps(score_validation(args.folder, args.videos, prompts, settings)))
    return 0


def _write(folder: Path | None, name: str, text: str, numbers: Any) -> None:
    print(text, end="")
    if folder is None:
        return
    json.dumps(numbers, allow_nan=False)  # a NaN would be no JSON
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.md", text)
        write_json(folder / f"{name}.json", numbers)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error

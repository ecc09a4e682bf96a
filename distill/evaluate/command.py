"""`codmd-distill eval`: its suites; arguments, arms and files of shapebench; imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_text
from distill.evaluate.compare.command import add_compare_arguments, run_compare
from distill.evaluate.study.command import add_study_arguments, run_study
from distill.evaluate.vbench.command import add_vbench_arguments, run_vbench

if TYPE_CHECKING:
    import numpy as np

    from distill.evaluate.sample import SampledModel
    from distill.evaluate.shapebench import ArmResult, Reference, Suite, SuiteConfig

STUDENTS = "students"
ARMS = ("truth", "vae", "teacher", "teacher_again", "few", "few_unguided", STUDENTS)
REPORT_NAME = "shapebench"
INSERT_MARKER = "<!-- shapebench -->\n"
SAMPLED_CAPTIONS = 4


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suites of `codmd-distill eval`, each with its own arguments."""
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, (summary, add_arguments, run) in SUITES.items():
        suite = suites.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        add_arguments(suite)
        suite.set_defaults(run_suite=run)


def run_eval(args: argparse.Namespace) -> int:
    """Run the chosen suite of `codmd-distill eval`; return its exit code."""
    return int(args.run_suite(args))


def add_shapebench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill eval shapebench`."""
    parser.add_argument("--teacher", default="weights/shapeworld", help="diffusers Wan pipeline folder")
    parser.add_argument("--student", dest="students", type=Path, action="append", default=[], help="bundle; repeatable")
    parser.add_argument("--num-captions", type=int, default=128, help="breadth suite (default 128)")
    parser.add_argument("--seeds", type=int, default=1, help="clips of each caption (default 1)")
    parser.add_argument("--depth-captions", type=int, default=4, help="depth suite (default 4; 0 leaves it out)")
    parser.add_argument("--depth-seeds", type=int, default=32, help="clips of each depth caption (default 32)")
    parser.add_argument("--guidance", type=float, default=3.0, help="uncond + g * (cond - uncond); default 3.0")
    parser.add_argument("--steps", type=int, default=50, help="steps of the teacher (default 50)")
    parser.add_argument("--few-steps", type=int, default=4, help="steps of the teacher's short run (default 4)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of captions, noise and ground truth")
    parser.add_argument("--out", type=Path, help=f"folder for {REPORT_NAME}.md and {REPORT_NAME}.json")
    parser.add_argument("--insert", type=Path, metavar="FILE", help=f"put the report after {INSERT_MARKER.strip()}")
    parser.add_argument("--samples", type=Path, metavar="PNG", help="write a contact sheet of every arm")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run_shapebench(args: argparse.Namespace) -> int:
    """Run `codmd-distill eval shapebench`; the same arguments print and write the same numbers.

    Returns:
        0 when the report is written.

    Raises:
        ConfigError, CheckpointError: settings, weights or folders that cannot work.
        CodmdError: sampling failed.
    """
    _check_args(args)

    import torch

    from codmd_serve.device import choose_device
    from codmd_serve.wan.checkpoint import read_spec, silence_libraries
    from distill.evaluate.report import Analysis, analysis_json
    from distill.evaluate.shapebench import SuiteConfig, plan_suite
    from distill.evaluate.tables import as_markdown
    from distill.networks.base import open_base

    silence_libraries()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = SuiteConfig(
        num_captions=args.num_captions,
        num_seeds=args.seeds,
        depth_captions=args.depth_captions,
        depth_seeds=args.depth_seeds,
        seed=args.seed,
    )
    students = _student_names(args)
    for folder in students.values():  # hours of sampling must not end in a misspelt folder
        read_spec(folder)
    if set(args.arms) - {"truth", STUDENTS}:
        open_base(args.teacher)
    suite = plan_suite(config)
    runner = _Runner(args, config, suite, students, choose_device(args.device))
    arms = runner.run()
    settings = _report_settings(args)
    analysis = Analysis(arms, suite, runner.reference, args.seed)
    report = as_markdown(analysis, list(students), settings)
    print(report, end="")
    _write_report(args, report, analysis_json(analysis, list(students), settings), arms, suite)
    return 0


def _check_args(args: argparse.Namespace) -> None:
    for name in ("steps", "few_steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if not math.isfinite(args.guidance):
        raise ConfigError(f"--guidance must be a number, got {args.guidance}")
    if args.samples is not None and args.samples.suffix.lower() != ".png":
        raise ConfigError(f"--samples must name a .png file, got {args.samples}")
    if args.insert is not None and _text_before_marker(args.insert) is None:
        raise ConfigError(f"--insert {args.insert}: expected a file with one line {INSERT_MARKER.strip()}")
    if set(args.arms) == {STUDENTS} and not args.students:
        raise ConfigError("nothing to evaluate: --arms students needs at least one --student")
    for folder in (args.out, args.samples.parent if args.samples else None):
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{folder} cannot be made: {error}") from error


def _text_before_marker(path: Path) -> str | None:
    """Return the text of a file up to and including its marker line; None without such a file or line."""
    try:
        before, *after = path.read_text(encoding="utf-8").split(INSERT_MARKER)
    except (OSError, UnicodeDecodeError):
        return None
    return before + INSERT_MARKER if len(after) == 1 else None


def _student_names(args: argparse.Namespace) -> dict[str, Path]:
    if STUDENTS not in args.arms:
        return {}
    names = [path.resolve().name for path in args.students]
    is_clear = len(set(names)) == len(names) and not set(names) & set(ARMS)
    result = {name if is_clear else str(path): path for name, path in zip(names, args.students, strict=True)}
    if len(result) < len(args.students):
        raise ConfigError("the same --student is given twice")
    return result


def _report_settings(args: argparse.Namespace) -> dict[str, object]:
    names = ("teacher", "num_captions", "seeds", "depth_captions", "depth_seeds", "guidance", "steps", "few_steps")
    return {name: getattr(args, name) for name in (*names, "seed")}


class _Runner:
    """Draw and measure the arms one after the other, under one progress bar."""

    def __init__(
        self, args: argparse.Namespace, config: SuiteConfig, suite: Suite, students: dict[str, Path], device: Any
    ) -> None:
        from tqdm import tqdm

        from distill.evaluate.shapebench import num_reference

        self.args, self.config, self.suite, self.students, self.device = args, config, suite, students, device
        self.reference: Reference
        num_arms = len([arm for arm in args.arms if arm != STUDENTS]) + len(students)
        # Each clip counts once when drawn and once when measured.
        total = 2 * num_arms * len(suite.requests) + num_reference(config) * len(suite.depth)
        self.bar = tqdm(total=total, unit="clip", disable=None)
        self.keep = tuple(range(min(SAMPLED_CAPTIONS, config.num_captions))) if args.samples else ()

    def run(self) -> list[ArmResult]:
        """Run every arm, in the order of the table."""
        from distill.evaluate.sample import load_student, load_teacher, render_truth, sample_student
        from distill.evaluate.shapebench import measure_reference

        args, requests = self.args, self.suite.requests
        with self.bar:
            self.reference = measure_reference(self.suite, self.config, self.bar.update)
            needed = set(args.arms)
            truth = render_truth(requests, args.seed) if needed & {"truth", "vae"} else None
            results = []
            if truth is not None and "truth" in needed:
                self.bar.update(len(truth))
                results.append(self._measure("truth", "ground truth", truth))
            if needed - {"truth", STUDENTS}:
                teacher = load_teacher(args.teacher, self.device)
                results += self._teacher_arms(teacher, truth)
            for name, folder in self.students.items():
                model = load_student(folder, self.device)
                label = f"{name}, {len(model.timesteps)} steps"
                clips = sample_student(model, requests, bench_seed=args.seed, on_clips=self.bar.update)
                results.append(self._measure(name, label, clips))
        return results

    def _teacher_arms(self, teacher: SampledModel, truth: np.ndarray | None) -> list[ArmResult]:
        from distill.evaluate.sample import sample_teacher, through_vae
        from distill.pretrain.vae import psnr_db

        args, results = self.args, []
        if truth is not None and "vae" in args.arms:
            decoded = through_vae(teacher, truth, self.bar.update)
            psnr = float(sum(psnr_db(a, b) for a, b in zip(truth, decoded, strict=True)) / len(truth))
            results.append(self._measure("vae", "ground truth through VAE", decoded, psnr))
        guided = f"guided {args.guidance:g}"
        arms: dict[str, tuple[str, int, float, int]] = {
            "teacher": (f"teacher, {args.steps} steps, {guided}", args.steps, args.guidance, 0),
            "teacher_again": ("the same, other noise (A/A)", args.steps, args.guidance, 1),
            "few": (f"teacher, {args.few_steps} steps, {guided}", args.few_steps, args.guidance, 0),
            "few_unguided": (f"teacher, {args.few_steps} steps, unguided", args.few_steps, 1.0, 0),
        }
        for name, (label, steps, guidance, repeat) in arms.items():
            if name in args.arms:
                clips = sample_teacher(
                    teacher,
                    self.suite.requests,
                    num_steps=steps,
                    guidance_scale=guidance,
                    bench_seed=args.seed,
                    repeat=repeat,
                    on_clips=self.bar.update,
                )
                results.append(self._measure(name, label, clips))
        return results

    def _measure(self, name: str, label: str, clips: np.ndarray, psnr: float | None = None) -> ArmResult:
        from distill.evaluate.shapebench import measure_arm

        self.bar.set_description(name)
        update: Callable[[int], object] = self.bar.update
        return measure_arm(name, label, clips, self.suite, self.reference, update, psnr_db=psnr, keep_samples=self.keep)


def _write_report(
    args: argparse.Namespace, report: str, numbers: dict[str, object], arms: list[ArmResult], suite: Suite
) -> None:
    try:
        if args.out is not None:
            write_text(args.out / f"{REPORT_NAME}.md", report)
            text = json.dumps(numbers, indent=2, allow_nan=False)
            write_text(args.out / f"{REPORT_NAME}.json", f"{text}\n")
        if args.insert is not None:
            write_text(args.insert, f"{_text_before_marker(args.insert)}{report}")
        if args.samples is not None:
            from PIL import Image

            from distill.worlds.shapeworld.preview import contact_sheet

            captions = {request.caption_index: request.caption for request in suite.requests}
            strips = [
                (f"{arm.label}: {captions[index]}", clip)
                for index in (arms[0].samples if arms else {})
                for arm in arms
                for clip in (arm.samples[index],)
            ]
            sheet = contact_sheet([text for text, _ in strips], [clip for _, clip in strips])
            # A palette: a fifth of the bytes, and flat shapes on two grounds have few colours. Median cut, which is the
            # default, forgets the small saturated ones.
            palette = sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
            palette.save(args.samples, optimize=True)
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error}") from error


SUITES: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "shapebench": ("score held-out ShapeWorld captions from pixels", add_shapebench_arguments, run_shapebench),
    "compare": ("compare methods over seeds in a world whose teacher is exact", add_compare_arguments, run_compare),
    "study": ("run a blind pairwise study: make, serve, analyse", add_study_arguments, run_study),
    "vbench": ("drive VBench: plan, generate, check, run, score, compare, curve", add_vbench_arguments, run_vbench),
}

"""`codmd-distill eval study make | serve | analyse`: arguments and messages; imports nothing heavy until it runs.

Exit code 2 with the whole list on standard error when videos cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codmd_serve.errors import ConfigError

if TYPE_CHECKING:
    from distill.evaluate.study.design import Item, Study
    from distill.evaluate.study.simulate import Crowd
    from distill.evaluate.study.votes import Rater

DEFAULT_PORT = 7870
REPORT_FILE, NUMBERS_FILE, CSV_FILE, PLOT_FILE = "report.md", "analysis.json", "votes.csv", "study.png"


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill eval study`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_make(actions.add_parser("make", help="blind the videos of two or more arms and fix the design"))
    _add_serve(actions.add_parser("serve", help="show the study to raters on a web page"))
    _add_analyse(actions.add_parser("analyse", help="report, plot and CSV of the votes; or a self-test"))


def _add_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arms", nargs="*", metavar="ARM", help="folder of videos or student bundle, or NAME=FOLDER; two or more"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the study, new")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt a line, or a .json of file names and prompts; bundles "
        "need it; without it the file names are the prompts",
    )
    parser.add_argument("--seeds-per-prompt", type=int, default=1, help="videos of each prompt (default 1)")
    parser.add_argument("--title", default="Which video is better?", help="what raters read above the pairs")
    parser.add_argument("--pairs-per-rater", type=int, default=0, help="pairs that each rater sees (default: all)")
    parser.add_argument(
        "--catches", type=int, help="catch trials of each rater (default 8 %% of the pairs, at least 2)"
    )
    parser.add_argument("--repeats", type=int, help="swapped repeats of each rater (default 8 %%, at least 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of generated videos")
    parser.add_argument("--device", default="auto", help="that bundles run on: auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="that bundles run in")
    parser.add_argument(
        "--generated",
        type=Path,
        metavar="DIR",
        help="keeps the videos of bundles for the next make (default: OUT-generated)",
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="folder of `make`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"port (default {DEFAULT_PORT}; 0: a free one)")
    parser.add_argument("--rehearsal", action="store_true", help="raters of this run only try it out and never count")


def _add_analyse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, nargs="?", help="folder of `make`; optional with --simulate")
    parser.add_argument("--out", type=Path, help="folder for report, JSON, CSV and plot (default: STUDY/analysis)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, and of simulated raters")
    parser.add_argument("--simulate", action="store_true", help="self-test with simulated raters; never a result")
    parser.add_argument(
        "--strength", action="append", default=[], metavar="ARM=LOGIT", help="planted, for each arm (default 0.5, 0)"
    )
    parser.add_argument("--raters", type=int, default=12, help="simulated raters (default 12)")
    parser.add_argument("--clickers", type=int, default=0, help="of them, how many click at random (default 0)")
    parser.add_argument("--side-bias", type=float, default=0.3, help="logits towards the left video (default 0.3)")
    parser.add_argument("--num-prompts", type=int, default=32, help="of a simulation without STUDY (default 32)")


def run_study(args: argparse.Namespace) -> int:
    """Run `codmd-distill eval study`.

    Returns:
        0 when done.

    Raises:
        ConfigError: arguments, folders or videos that cannot work.
        GenerationError: a bundle or ffmpeg failed.
    """
    actions = {"make": _make, "serve": _serve, "analyse": _analyse}
    return actions[args.action](args)


def _make(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from distill.evaluate.study.folders import compare_arms, read_prompt_items
    from distill.evaluate.study.make import StudyOptions, build_study, check_out, num_copies, plan_study

    check_out(args.out)
    if args.seeds_per_prompt < 1:
        raise ConfigError(f"--seeds-per-prompt must be 1 or more, got {args.seeds_per_prompt}")
    if args.seeds_per_prompt > 1 and args.prompts is None:
        raise ConfigError("--seeds-per-prompt needs --prompts")
    arms = _named_arms(args.arms)
    items = None if args.prompts is None else read_prompt_items(args.prompts, args.seeds_per_prompt)
    folders = _with_generated(args, arms, items)
    with tqdm(unit="video", desc="check", disable=None) as bar:
        comparison = compare_arms(folders, items, bar.update)
    if comparison.problems:
        for problem in comparison.problems:
            print(f"  {problem}", file=sys.stderr)
        raise ConfigError(f"no study was made: {len(comparison.problems)} problems with the arms, listed above")
    options = StudyOptions(
        title=args.title,
        pairs_per_rater=args.pairs_per_rater,
        num_catches=args.catches,
        num_repeats=args.repeats,
        seed=args.seed,
    )
    study = plan_study(tuple(folders), comparison, options)
    with tqdm(total=num_copies(study), unit="video", desc="blind", disable=None) as bar:
        build_study(study, comparison, args.out, bar.update)
    print(
        f"{args.out}: {len(study.arms)} arms, {len(study.items)} items, {study.num_pairs} pairs; each rater sees "
        f"{study.pairs_per_rater}, {study.num_repeats} of them twice, and {len(study.catches)} catch trials"
    )
    return 0


def _named_arms(words: list[str]) -> dict[str, Path]:
    arms: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name, folder = Path(word).resolve().name, word
        if not name.strip() or not folder:
            raise ConfigError(f"an arm is FOLDER or NAME=FOLDER, got {word}")
        if name in arms:
            raise ConfigError(f"two arms are called {name}: name them with NAME=FOLDER")
        arms[name] = Path(folder)
    return arms


def _with_generated(args: argparse.Namespace, arms: dict[str, Path], items: tuple[Item, ...] | None) -> dict[str, Path]:
    """Return a folder of videos for every arm; bundles make theirs first."""
    from tqdm import tqdm

    from distill.evaluate.study.generate import GenerateOptions, generate_arm, is_bundle

    bundles = [name for name, folder in arms.items() if is_bundle(folder)]
    if not bundles or len(arms) < 2:  # one arm is refused, and not after an hour of sampling
        return arms
    if items is None:
        raise ConfigError(f"{', '.join(bundles)} would make videos, of which prompts? Name a file with --prompts")
    kept = args.generated or args.out.with_name(f"{args.out.resolve().name}-generated")
    options = GenerateOptions(folder=kept, device=args.device, dtype=args.dtype, seed=args.seed)
    folders = dict(arms)
    with tqdm(total=len(bundles) * len(items), unit="video", desc="generate", disable=None) as bar:
        for name in bundles:
            folders[name] = generate_arm(arms[name], items, options, bar.update)
    return folders


def _serve(args: argparse.Namespace) -> int:
    from distill.evaluate.study.serve import serve_study

    return serve_study(args.study, args.host, args.port, is_rehearsal=args.rehearsal)


def _analyse(args: argparse.Namespace) -> int:
    from distill.evaluate.study.analysis import analyse
    from distill.evaluate.study.design import read_study
    from distill.evaluate.study.log import LOG_FILE, read_records
    from distill.evaluate.study.report import as_markdown, choose_raters, headline, planted_table
    from distill.evaluate.study.session import HUMAN
    from distill.evaluate.study.simulate import simulate
    from distill.evaluate.study.votes import read_votes

    if args.study is None and not args.simulate:
        raise ConfigError("name the folder of a study, or try --simulate")
    planted: dict[tuple[str, str], float] = {}
    num_damaged = 0
    if args.simulate:
        study = _simulated_design(args) if args.study is None else read_study(args.study)
        crowd = _crowd(args, study)
        records = simulate(study, crowd)
        planted = {(a, b): crowd.win_rate(a, b) for a in study.arms for b in study.arms if a != b}
    else:
        study = read_study(args.study)
        records, num_damaged = read_records(args.study / LOG_FILE)
    raters, num_odd = read_votes(study, records)
    kind, chosen = choose_raters(raters)
    first_line = headline(kind, chosen, raters)
    numbers = {
        "raters_are_human": kind == HUMAN and any(rater.votes for rater in chosen),
        "kind": kind,
        "first_line": first_line,
    }
    numbers |= analyse(study, chosen, seed=args.seed)
    report = as_markdown(first_line, numbers)
    if planted:
        report += "\n".join(["", *planted_table(numbers, planted), ""])
    if num_damaged + num_odd:
        report += f"\nSkipped: {num_damaged} damaged lines of the log, {num_odd} records that fit no trial.\n"
    print(report, end="")
    out = args.out or (None if args.study is None or args.simulate else args.study / "analysis")
    if out is not None:
        _write_analysis(out, study, raters, numbers, report)
    return 0


def _simulated_design(args: argparse.Namespace) -> Study:
    from distill.evaluate.study.simulate import simulated_study

    if not 1 <= args.num_prompts <= 10_000:
        raise ConfigError(f"--num-prompts must be in 1..10000, got {args.num_prompts}")
    names = [word.partition("=")[0] for word in args.strength] or ["strong", "weak"]
    return simulated_study(names, args.num_prompts, seed=args.seed)


def _crowd(args: argparse.Namespace, study: Study) -> Crowd:
    from distill.evaluate.study.simulate import Crowd

    strengths = {}
    for word in args.strength:
        name, _, number = word.partition("=")
        try:
            strengths[name] = float(number)
        except ValueError:
            raise ConfigError(f"--strength is ARM=LOGIT, such as student=0.5, got {word}") from None
    if not strengths:
        strengths = {arm: 0.5 if index == 0 else 0.0 for index, arm in enumerate(study.arms)}
    return Crowd(
        strengths=strengths,
        num_raters=args.raters,
        num_clickers=args.clickers,
        side_bias=args.side_bias,
        seed=args.seed,
    )


def _write_analysis(out: Path, study: Study, raters: list[Rater], numbers: dict[str, Any], report: str) -> None:
    from codmd_serve.files import write_text
    from distill.evaluate.study.plot import draw_result
    from distill.evaluate.study.report import as_csv

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / REPORT_FILE, report)
        write_text(out / NUMBERS_FILE, json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        write_text(out / CSV_FILE, as_csv(study, raters))
        draw_result(numbers, numbers["first_line"], out / PLOT_FILE)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error
    print(f"written: {out / REPORT_FILE}, {NUMBERS_FILE}, {CSV_FILE}, {PLOT_FILE}", file=sys.stderr)

"""Arguments of `codmd-distill train` and `codmd-distill export`, and the commands themselves.

Knows nothing of training itself. Imports nothing heavy until a command runs, so that --help is quick.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from codmd_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from distill.config import DistillConfig
    from distill.parallel.processes import Processes
    from distill.plan.fit import Fit

# For `export --iteration`.
BEST = "best"


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill train`."""
    parser.add_argument(
        "--recipe", help="shapeworld (default), analytic_ties, analytic_orbit, analytic_switch, wan_1_3b or wan_14b"
    )
    parser.add_argument(
        "--method",
        help="with the settings published for it (default codmd); an unknown name lists all",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the bundle goes to OUT/bundle")
    parser.add_argument("--seed", type=int, help="default: the recipe's")
    parser.add_argument("--minutes", type=float, help="time budget, over all resumptions together")
    parser.add_argument(
        "--max-iterations", "--max-steps", dest="max_iterations", type=int, help="default: the recipe's"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        help="any setting of the recipe, for example copula.features=spatial; --dry-run lists them",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of all networks")
    parser.add_argument(
        "--preview-every",
        type=int,
        default=200,
        metavar="ITERATIONS",
        help="a picture of the EMA student in OUT/previews, and one at the end (default 200); 0 makes none",
    )
    parser.add_argument(
        "--keep-best",
        metavar="METRIC",
        help="keep the checkpoint with the best value of a metric beside the newest ones: one of log.jsonl, lower is "
        "better, or one of validation in place of validate.metric",
    )
    parser.add_argument(
        "--track",
        nargs="+",
        default=["tensorboard"],
        metavar="NAME",
        help="show the run on tensorboard (default), trackio or wandb, or on none",
    )
    parser.add_argument("--cache", type=Path, help="folder of prompt embeddings; default: OUT/cache")
    parser.add_argument(
        "--gpu-gib",
        type=float,
        metavar="GIB",
        help="memory of one GPU, for the check that the run fits; default: that of the device",
    )
    parser.add_argument("--anyway", action="store_true", help="start what does not fit by the count of `plan`")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the settings, write nothing")


def run_train(args: argparse.Namespace) -> int:
    """Run `codmd-distill train`.

    Returns:
        0 when the run ended with a bundle; 128 + the signal's number when it was interrupted and can be resumed.

    Raises:
        ConfigError, CheckpointError: settings, prompts, weights or folders that cannot work.
        CodmdError: training diverged.
    """
    import torch

    from codmd_serve.device import choose_device
    from codmd_serve.wan.checkpoint import silence_libraries
    from distill.networks.build import check_compiler
    from distill.parallel.processes import out_of_memory_in_one_line, process_group
    from distill.run.trackers import check_trackers

    silence_libraries()
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads must be 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.minutes is not None and not args.minutes > 0:
        raise ConfigError(f"--minutes must be above 0, got {args.minutes}")
    if args.preview_every < 0:
        raise ConfigError(f"--preview-every must be 0 or more, got {args.preview_every}")
    if args.gpu_gib is not None and not args.gpu_gib > 0:
        raise ConfigError(f"--gpu-gib must be above 0, got {args.gpu_gib}")
    args.track = check_trackers(args.track)
    device = choose_device(args.device)
    if args.compile:
        check_compiler(args.compiler, device)
    config = resolve_config(args, device)
    with process_group(device, config, args.find_launch()) as processes, out_of_memory_in_one_line(processes):
        return _train_with(args, config, processes)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill export`."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; one that exists is replaced")
    parser.add_argument(
        "--format",
        choices=("bundle", "pipeline", "lora"),
        default="bundle",
        help="a bundle for codmd-serve (default), a complete folder for diffusers.WanPipeline.from_pretrained, or the "
        "adapters of a LoRA student alone, for load_lora_weights",
    )
    parser.add_argument(
        "--iteration",
        "--step",
        dest="iteration",
        type=_iteration,
        metavar="N",
        help="of the checkpoint to take, or best, which validation or --keep-best chose; default: the newest",
    )
    parser.add_argument(
        "--best", dest="iteration", action="store_const", const=BEST, help="the same as --iteration best"
    )


def run_export(args: argparse.Namespace) -> int:
    """Run `codmd-distill export`: write the student of a run from a checkpoint; return 0.

    Raises:
        ConfigError, CheckpointError: no such run or checkpoint, or a folder that cannot be written.
    """
    from distill.run.bundle import export_bundle, export_lora, export_pipeline
    from distill.run.checkpoint import BEST_FILE, best_iteration

    exports: dict[str, Callable[[Path, Path, int | None], int]] = {
        "bundle": export_bundle,
        "pipeline": export_pipeline,
        "lora": export_lora,
    }
    wanted = args.iteration
    if wanted == BEST:
        wanted = best_iteration(args.run)
        if wanted is None:
            raise ConfigError(
                f"{args.run} has no {BEST_FILE}: neither validation nor --keep-best has chosen a checkpoint"
            )
    iteration = exports[args.format](args.run, args.out, wanted)
    print(f"{args.format} {args.out} from iteration {iteration}")
    return 0


def add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill extract`."""
    parser.add_argument("--bundle", type=Path, required=True, help="folder of a student")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; one that exists is replaced")
    parser.add_argument("--rank", type=int, default=32, help="of each linear layer's update (default 32)")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the file (default fp16)")


def run_extract(args: argparse.Namespace) -> int:
    """Run `codmd-distill extract`: write a student as a low-rank update of its base; return 0.

    Raises:
        ConfigError, CheckpointError: no such bundle or base, no update, or a folder that cannot be written.
    """
    from distill.run.extract import low_rank_update, write_low_rank

    update = low_rank_update(args.bundle, args.rank)
    file = write_low_rank(args.out, args.bundle, update, args.rank, args.dtype)
    print(f"{file} {file.stat().st_size / 1e6:.1f} MB, {update.kept:.1%} of the squared change of all weights")
    return 0


def _iteration(text: str) -> int | str:
    return BEST if text == BEST else int(text)


def _train_with(args: argparse.Namespace, config: "DistillConfig", processes: "Processes") -> int:
    from distill.data.prompts import check_prompts, require_prompts
    from distill.networks.base import open_base
    from distill.run.checks import native_latents
    from distill.run.start import run_with_start
    from distill.run.trainer import RunOptions
    from distill.run.validation import open_judge

    device = processes.device
    # Before the base is looked for, which may take a download.
    require_prompts(config)
    base = open_base(config.base)
    latents = native_latents(config, base)
    fit = _checked_fit(args, config, processes)
    if args.dry_run:
        open_judge(config, base, args.keep_best)
        base.check_run(config, processes.world_size, compiled=args.compile)
        summary = {
            **check_prompts(config, base),
            "latents": latents,
            "device": str(device),
            "processes": processes.world_size,
            "plan": None if fit is None else fit.summary(),
        }
        if processes.is_rank0:
            print(settings_as_json(config, summary))
        return 0
    options = RunOptions(
        out=args.out,
        device=device,
        minutes=args.minutes,
        cache_dir=args.cache,
        compiled=args.compile,
        preview_every_iterations=args.preview_every,
        keep_best=args.keep_best,
        trackers=args.track,
        processes=processes,
    )
    outcome = run_with_start(config, options, resume=args.resume)
    done = (
        f"{outcome.iteration} iterations, {outcome.num_student_updates} student updates, {outcome.num_skipped} skipped"
    )
    if outcome.signal_number is not None:
        if processes.is_rank0:
            print(f"interrupted after {done}; go on with --resume --out {args.out}", file=sys.stderr)
        return 128 + outcome.signal_number
    if processes.is_rank0:
        choice, chosen = outcome.choice, ""
        if config.validate.every_iterations and choice.best is not None:
            chosen = f" of iteration {choice.best_iteration}, the best by {choice.metric}={choice.best:.4g},"
        print(f"bundle {outcome.bundle}{chosen} after {done}, {outcome.elapsed_s / 60:.1f} minutes")
    return 0


def _checked_fit(args: argparse.Namespace, config: "DistillConfig", processes: "Processes") -> "Fit | None":
    """Ask `plan` whether the run fits; each rank does, with the smallest memory of all.

    Raises:
        ConfigError: it does not, and --anyway is not given. A dry run on a CPU without --gpu-gib only tells: a run is
            often prepared where it is not going to run.
    """
    from distill.plan.fit import check_fit, process_memory_bytes

    if args.gpu_gib is None:
        memory_bytes, is_gpu = process_memory_bytes(processes), processes.device.type == "cuda"
    else:
        memory_bytes, is_gpu = round(args.gpu_gib * 2**30), True
    fit = check_fit(config, processes.world_size, memory_bytes, is_gpu=is_gpu)
    if fit is None or fit.fits or args.anyway or (args.dry_run and not is_gpu):
        return fit
    raise ConfigError(fit.refusal())


def resolve_config(args: argparse.Namespace, device: "torch.device") -> "DistillConfig":
    """Build the config of a run: the recipe, or the saved config when resuming, then the overrides.

    Raises:
        ConfigError: unknown recipe or setting, a value out of range, or nothing to resume.
    """
    from distill.config import with_overrides
    from distill.methods.registry import recipe_config
    from distill.networks.precision import resolve_precision
    from distill.run.checkpoint import read_config

    if args.resume:
        config = read_config(args.out)
        for name in ("recipe", "method"):
            saved, wanted = getattr(config, name), getattr(args, name)
            if wanted not in (None, saved):
                raise ConfigError(
                    f"cannot resume with another {name}: {args.out} is a run of {name} {saved}, got {wanted}"
                )
    else:
        config = recipe_config(args.recipe, args.method)
    flags = {"seed": args.seed, "max_iterations": args.max_iterations}
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    config = with_overrides(config, [*args.settings, *given])
    return with_overrides(config, [f"precision={resolve_precision(config.precision, device)}"])


def settings_as_json(config: "DistillConfig", summary: dict[str, object]) -> str:
    """Return the resolved settings and what follows from them, as JSON."""
    from distill.config import config_to_dict

    grid = config.grid()
    derived = {"sigmas": grid.sigmas, "timesteps": grid.timesteps, "config_sha256": config.sha256(), **summary}
    return json.dumps({"config": config_to_dict(config), "derived": derived}, indent=2, ensure_ascii=False)

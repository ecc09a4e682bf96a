"""`codmd-distill teacher`: the stages in order, and the diffusers folder they end in; trains nothing itself.

RUN/config.json              the resolved PretrainConfig
RUN/elapsed.json             seconds spent per stage, over all sittings
RUN/vae.pt, text.pt, ...     state of each stage, enough to resume it
RUN/latents/                 encoded training clips, in parts
RUN/curve.json               how well what captions leave open was learnt, at every snapshot of the teacher
RUN/pipeline/                tokenizer, text_encoder, vae, transformer, scheduler, model_index.json
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_text
from distill.pretrain.config import PRETRAIN_PRESETS, PretrainConfig, pretrain_config_to_dict

PRETRAIN_CONFIG_FILE = "config.json"


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill teacher`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the pipeline goes to OUT/pipeline")
    parser.add_argument(
        "--preset",
        default="shapeworld",
        help="shapeworld (default); more, decoder, next, gpu, gpu-more: go on from --start; tiny learns nothing",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", default="", help="pipeline folder to go on training from; default: from nothing")
    parser.add_argument("--minutes", type=float, help="time budget of all stages, over all resumptions together")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--until", choices=("text", "vae", "latents"), help="stop after this stage; resume goes on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16 (autocast)")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")


def run_teacher(args: argparse.Namespace) -> int:
    """Run `codmd-distill teacher`.

    Returns:
        0 when OUT/pipeline is complete or the stage of --until is; 128 + the signal's number when interrupted, with
        everything needed to resume.

    Raises:
        ConfigError, CheckpointError: settings, weights or folders that cannot work.
        CodmdError: training diverged.
    """
    start = time.monotonic()
    if args.preset not in PRETRAIN_PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRETRAIN_PRESETS)}, got {args.preset!r}")
    if args.minutes is not None and not args.minutes > 0:
        raise ConfigError(f"--minutes must be positive, got {args.minutes}")
    if args.precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"--precision must be auto, fp32 or bf16, got {args.precision!r}")
    config = dataclasses.replace(PRETRAIN_PRESETS[args.preset](), seed=args.seed, start=args.start)

    import torch

    from codmd_serve.device import choose_device
    from codmd_serve.wan.checkpoint import silence_libraries
    from distill.networks.build import check_compiler
    from distill.networks.precision import resolve_precision
    from distill.pretrain.clock import Clock
    from distill.pretrain.stage import StageOptions
    from distill.pretrain.stages import PretrainRun, run_stages
    from distill.run.signals import stop_signal

    silence_libraries()
    device = choose_device(args.device)
    if args.compile:
        check_compiler(args.compiler, device)
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads must be 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    _claim(args.out, config, args.resume)
    clock = Clock(args.out, args.minutes, start=start)
    with stop_signal() as received:
        options = StageOptions(
            folder=args.out,
            device=device,
            precision=resolve_precision(args.precision, device),
            budget_s=None,
            stop=lambda: bool(received),
            compiled=args.compile,
        )
        last_stage = run_stages(PretrainRun(config, options, clock, args.until))
        if received:
            print(f"interrupted in stage {last_stage}; go on with --resume --out {args.out}", file=sys.stderr)
            return 128 + received[0]
    print(f"stage {last_stage} done, go on with --resume" if args.until else f"pipeline {args.out / 'pipeline'}")
    return 0


def _claim(out: Path, config: PretrainConfig, resume: bool) -> None:
    """Write config.json of a new run, or check that a resumed run has the same one."""
    path, text = out / PRETRAIN_CONFIG_FILE, json.dumps(pretrain_config_to_dict(config), indent=2) + "\n"
    if resume:
        try:
            saved = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{out} holds no run to resume: {path.name} cannot be read") from error
        if saved != text:
            raise ConfigError(f"{out} was begun with other settings; resume it with its own options")
        return
    if path.exists():
        raise ConfigError(f"{out} already holds a run: resume it or name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error

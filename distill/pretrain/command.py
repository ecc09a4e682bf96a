"""`codmd-distill teacher`: the stages in order, and the diffusers folder they end in; trains nothing itself.

RUN/config.json              the resolved PretrainConfig
RUN/vae.pt, text.pt, ...     state of each stage, enough to resume it
RUN/latents/                 encoded training clips, in parts
RUN/pipeline/                tokenizer, text_encoder, vae, transformer, scheduler, model_index.json
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_text
from distill.pretrain.config import PRESETS, PretrainConfig, config_to_dict

if TYPE_CHECKING:
    from distill.pretrain.stage import StageOptions

CONFIG_FILE = "config.json"
# Of a time budget, by what each stage took when the shipped weights were trained on two cores.
BUDGET_SHARES = {"vae": 0.4, "text": 0.03, "transformer": 0.45}

logger = logging.getLogger(__name__)


def add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-distill teacher`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the pipeline goes to OUT/pipeline")
    parser.add_argument(
        "--preset",
        default="shapeworld",
        help="shapeworld (default); more or decoder, which go on from --start; or tiny, which learns nothing",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", default="", help="pipeline folder to go on training from; default: from nothing")
    parser.add_argument("--minutes", type=float, help="time budget of all stages, over all resumptions together")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT")
    parser.add_argument("--until", choices=("vae", "text", "latents"), help="stop after this stage; resume goes on")
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
    if args.preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {args.preset!r}")
    if args.minutes is not None and not args.minutes > 0:
        raise ConfigError(f"--minutes must be positive, got {args.minutes}")
    config = dataclasses.replace(PRESETS[args.preset](), seed=args.seed, start=args.start)

    import torch

    from codmd_serve.device import choose_device
    from distill.networks.build import check_compiler
    from distill.networks.precision import resolve_precision
    from distill.pretrain.stage import StageOptions
    from distill.run.trainer import stop_signal

    device = choose_device(args.device)
    if args.compile:
        check_compiler(args.compiler, device)
    if args.precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"--precision must be auto, fp32 or bf16, got {args.precision!r}")
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads must be 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
    _claim(args.out, config, args.resume)
    with stop_signal() as received:
        options = {
            stage: StageOptions(
                folder=args.out,
                device=device,
                precision=resolve_precision(args.precision, device),
                budget_s=None if args.minutes is None else 60 * args.minutes * share,
                stop=lambda: bool(received),
                compiled=args.compile,
            )
            for stage, share in BUDGET_SHARES.items()
        }
        last_stage = _run_stages(config, args.out / "pipeline", options, args.until)
        if received:
            print(f"interrupted in stage {last_stage}; go on with --resume --out {args.out}", file=sys.stderr)
            return 128 + received[0]
    print(f"stage {last_stage} done, go on with --resume" if args.until else f"pipeline {args.out / 'pipeline'}")
    return 0


def _claim(out: Path, config: PretrainConfig, resume: bool) -> None:
    """Write config.json of a new run, or check that a resumed run has the same one."""
    path, text = out / CONFIG_FILE, json.dumps(config_to_dict(config), indent=2) + "\n"
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


def _run_stages(config: PretrainConfig, pipeline: Path, options: dict[str, "StageOptions"], until: str | None) -> str:
    """Run every stage that is not done; return the name of the last one entered."""
    import torch

    from distill.data.prompts import encode_prompt_data
    from distill.networks.base import open_base
    from distill.pretrain.pipeline import save_scheduler, save_text, save_transformer, save_vae
    from distill.pretrain.teacher import ClipSource, encode_clips, train_transformer
    from distill.pretrain.text import train_text_encoder
    from distill.pretrain.vae import train_vae
    from distill.pretrain.whiten import fold_into_vae

    vae = train_vae(config.vae, config.seed, options["vae"], config.start)
    if vae is not None and config.vae.decoder_only:
        # The encoder is the start's, and so are the statistics of its latents.
        kept = open_base(config.start).load(type(vae), "vae").config
        save_vae(pipeline, vae, list(kept.latents_mean), list(kept.latents_std))
    if vae is None or until == "vae":
        return "vae"
    text = train_text_encoder(config.text, config.seed, options["text"], config.start)
    if text is None:
        return "text"
    save_text(pipeline, *text)
    if until == "text":
        return "text"
    settings = config.transformer
    source = ClipSource(config.seed, settings.two_object_share)
    encoded = encode_clips(vae, settings.num_clips, source, options["transformer"], whiten=config.vae.whiten)
    if encoded is None:
        return "latents"
    if encoded.whitening is not None:
        fold_into_vae(vae, encoded.whitening)
    save_vae(pipeline, vae.cpu(), encoded.mean, encoded.std)
    del vae
    captions = source.captions(settings.num_clips)
    prompts = encode_prompt_data(
        [*captions, ""], open_base(str(pipeline)), torch.float32, options["transformer"].device
    )
    if until == "latents":
        return "latents"
    transformer = train_transformer(
        settings, encoded, prompts, config.text.d_model, config.seed, options["transformer"], config.start
    )
    if transformer is not None:
        save_transformer(pipeline, transformer)
        save_scheduler(pipeline, settings.sigma_shift)
    return "transformer"

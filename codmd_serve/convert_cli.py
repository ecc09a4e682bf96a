"""Arguments of `codmd-serve convert`, and what the command prints.

Imports nothing heavy until the command runs, so that --help is quick.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from codmd_serve import __version__
from codmd_serve.errors import ConfigError
from codmd_serve.grid import SAMPLERS
from codmd_serve.textfiles import shown
from codmd_serve.wan.families import METHOD_SAMPLING, plain_table

if TYPE_CHECKING:
    from codmd_serve.wan.checkpoint import StudentSpec


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `codmd-serve convert`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = plain_table().replace("%", "%%")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a .pt or .safetensors file, a diffusers folder, or org/name:file"
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="diffusers folder or hub id of the Wan pipeline that the student was distilled from; Wan2.1's of its "
        "width when absent",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="BUNDLE", help="folder to write; must not exist"
    )
    parser.add_argument("--method", help=f"{', '.join(METHOD_SAMPLING)}; guessed from the keys when absent")
    parser.add_argument(
        "--timesteps",
        type=_parse_timesteps,
        metavar="T,T,...",
        help="what the network is fed, for example 1000,750,500,250; as stated, or the method's, when absent",
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="as stated, or the method's, when absent")
    for name, unit in (("height", "pixels"), ("width", "pixels"), ("num-frames", "4k + 1"), ("fps", "per second")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{unit}, as trained; Wan's 480p when absent")
    parser.add_argument(
        "--lora-scale",
        type=float,
        metavar="X",
        help="factor of up @ down of a LoRA, in place of alpha / rank; what the file states, else 1, when absent",
    )
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="which network of a file that holds several, for example ema or generator",
    )
    parser.add_argument(
        "--bidirectional",
        action="store_true",
        help="the weights are not causal; has to be said of Self-Forcing checkpoints, whose tensors do not show it",
    )


def run_convert(options: argparse.Namespace) -> int:
    """Run `codmd-serve convert`; return 0.

    Raises:
        CheckpointError, ConfigError: what cannot be converted, in one line; nothing is written then.
    """
    from codmd_serve.wan.checkpoint import silence_libraries
    from codmd_serve.wan.convert import ConvertOptions, convert

    silence_libraries()
    names = ("method", "sampler", "timesteps", "height", "width", "num_frames", "fps", "lora_scale", "key")
    known = ConvertOptions(**{name: getattr(options, name) for name in names}, bidirectional=options.bidirectional)
    done = convert(_find_source(options.file), options.base, options.output, known, __version__)
    print(f"{options.file}: {done.looks}, {done.num_tensors} tensors")
    for note in done.notes:
        print(f"  {note}")
    for line in _assumptions(done.spec):
        print(line)
    print(f"{options.output}: ready; try codmd-serve generate PROMPT --bundle {options.output}")
    return 0


def _find_source(file: Path) -> Path:
    """Return the file or folder that FILE names; org/name:file is fetched from the hub."""
    from codmd_serve.wan.fetch import fetch_student, parse_hub_name

    name = parse_hub_name(str(file)) if ":" in str(file) and not file.exists() else None
    return file if name is None else fetch_student(name, f"there is no file {file}").path


def _assumptions(spec: "StudentSpec") -> list[str]:
    native = spec.native
    values = {
        "method": f"{spec.method} (--method)",
        "sampler": f"{spec.sampler} (--sampler)",
        "timesteps": f"{', '.join(f'{timestep:g}' for timestep in spec.timesteps)} (--timesteps)",
        "sigmas": ", ".join(f"{sigma:.4g}" for sigma in spec.sigmas),
        "native": f"{native.width}x{native.height}, {native.num_frames} frames at {native.fps} per second "
        "(--width, --height, --num-frames, --fps)",
        "step": f"{spec.step}, for unknown",
        "ema": str(spec.ema).lower(),
        "attention": "bidirectional; causal weights have the same names and would make broken videos (--bidirectional)",
        "lora_scale": "1, that is alpha = rank (--lora-scale)",
    }
    lines = [f"  {name:<10} {values[name]}" for name in spec.assumed]
    return [] if not lines else ["assumed, because the file does not say it (kept in student.json):", *lines]


def _parse_timesteps(text: str) -> tuple[float, ...]:
    wanted = f"--timesteps must be descending numbers in (0, 1000], for example 1000,750,500,250, got {shown(text)}"
    try:
        timesteps = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(wanted) from None
    is_descending = all(math.isfinite(high) and high > low for high, low in pairwise((*timesteps, 0.0)))
    if timesteps[0] > 1000.0 or not is_descending:
        raise ConfigError(wanted)
    return timesteps

"""`codmd-serve doctor`: what is installed, what would be used and why, and what is missing."""

import argparse
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from codmd_serve import __version__
from codmd_serve.commands import EXIT_BAD_INPUT, print_error
from codmd_serve.errors import CodmdError
from codmd_serve.video import check_encoder, find_ffmpeg

PROGRAM = "codmd-serve"


def run_doctor(options: argparse.Namespace) -> int:
    """Print what is installed, what would be used and why, and what is missing; 2 when serving could not work."""
    import torch

    from codmd_serve.device import choose_device, choose_dtype
    from codmd_serve.wan.checkpoint import read_spec

    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    lines = {
        "codmd-serve": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        **{name: metadata.version(name) for name in ("diffusers", "transformers", "gradio")},
        "devices": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "cpu only",
        "would use": f"{device} in {dtype}, {torch.get_num_threads()} CPU threads",
    }
    checks: dict[str, Callable[[], str]] = {
        "ffmpeg": _ffmpeg_line,
        "bundle": lambda: _bundle_line(Path(options.bundle), read_spec),
        "attention": lambda: _attention_lines(Path(options.bundle), options.attention, device, dtype),
    }
    problems = []
    for name, check in checks.items():
        try:
            lines[name] = check()
        except CodmdError as error:
            lines[name] = "MISSING"
            problems.append(str(error))
    for name, value in lines.items():
        print(f"{name:>12}  {value}")
    for problem in dict.fromkeys(problems):
        print_error(PROGRAM, problem)
    return EXIT_BAD_INPUT if problems else 0


def _ffmpeg_line() -> str:
    program = find_ffmpeg()
    check_encoder(program)
    return program


def _attention_lines(bundle: Path, name: str, device: Any, dtype: Any) -> str:
    """The kernel that would be used, and what each installed one takes on the video of the bundle."""
    from codmd_serve.wan.checkpoint import attention_shape
    from codmd_serve.wan.kernels import LOSSY, MATH, choose_attention, installed_kernels, measure_kernels

    # On a CPU a large video would take minutes to try.
    shape = attention_shape(bundle, max_tokens=4096 if device.type == "cpu" else None)
    chosen = choose_attention(name, shape, device, dtype)
    others = [n for n in installed_kernels(device) if n != MATH and n not in {entry.name for entry in chosen.table}]
    table = (*chosen.table, *measure_kernels(others, shape, device, dtype))
    lines = [f"{chosen.name}, at {shape.num_tokens} tokens, {shape.num_heads} heads of {shape.head_width}:"]
    for entry in table:
        times = ", ".join(
            f"{what} {ms:.3f} ms"
            for what, ms in (("self", entry.self_ms), ("prompt", entry.prompt_ms))
            if ms is not None
        )
        label = "lossy, only by name" if entry.name in LOSSY else ""
        lines.append(f"{entry.name:<18} {'; '.join(filter(None, (times, label, entry.problem)))}")
    return ("\n" + " " * 14).join(lines)


def _bundle_line(path: Path, read_spec: Any) -> str:
    spec = read_spec(path)
    native = spec.native
    return (
        f"{path.name}: {spec.method} student of {spec.base_model}, {len(spec.timesteps)} steps, "
        f"{native.width}x{native.height}, {native.num_frames} frames at {native.fps} per second"
    )

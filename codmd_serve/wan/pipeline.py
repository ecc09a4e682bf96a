"""Exports a student bundle as a complete diffusers folder for the stock WanPipeline; knows nothing of training.

OUT/model_index.json, scheduler/, transformer/, tokenizer/, text_encoder/, vae/, README.md
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import atomic_folder
from codmd_serve.student_scheduler import StudentScheduler
from codmd_serve.textfiles import read_json_object
from codmd_serve.wan.checkpoint import StudentSpec, read_spec, resolve_base
from codmd_serve.wan.hub import INDEX_FILE, STUDENT_PARTS
from codmd_serve.wan.stated import DMD2_KEY, dmd2_config

# Of the base; the transformer is the student's and the scheduler its step list.
COPIED_PARTS = STUDENT_PARTS

_CARD = """\
# A {num_steps}-step student of {base_model}

Made with `{method}`. The scheduler is a class of the package `codmd-serve`, which has to be installed and imported
before the folder is loaded; diffusers does not import by itself what a folder names, and needs no `trust_remote_code`:

    import codmd_serve.student_scheduler
    import torch
    from diffusers import WanPipeline
    from diffusers.utils import export_to_video

    pipe = WanPipeline.from_pretrained("THIS FOLDER")
    torch.manual_seed(7)
    frames = pipe(
        "a prompt", height={height}, width={width}, num_frames={num_frames},
        num_inference_steps={num_steps}, guidance_scale=1.0,
    ).frames[0]
    export_to_video(frames, "out.mp4", fps={fps})  # needs imageio and imageio-ffmpeg

A pipeline does not hand its `generator` to the scheduler. To draw from one, give it to both:
`pipe.scheduler.generator = rng` and `pipe(..., generator=rng)`; a CPU generator seeded alike gives the video that
`codmd-serve` makes of that seed.
"""


def check_stock_pipeline(sigmas: tuple[float, ...]) -> None:
    """Refuse a step list that the stock WanPipeline cannot start.

    Raises:
        ConfigError: the first level is below 1.
    """
    if sigmas[0] != 1.0:
        raise ConfigError(
            f"WanPipeline feeds its first noise unscaled, this student starts at sigma {sigmas[0]:.6g} times noise: "
            "its videos would differ from ours, so only the bundle can be written"
        )


def save_pipeline(bundle: Path, folder: Path) -> None:
    """Write a bundle with all of its base's other parts as one diffusers folder.

    Args:
        bundle: a student bundle; its base is copied, or downloaded when it is a hub id.
        folder: where to; one that exists is replaced, and it is the old one or the new one, never half of one.

    Raises:
        ConfigError: a student that the stock pipeline cannot sample.
        CheckpointError: the bundle or its base is missing or incomplete, or the folder cannot be written.
    """
    spec = read_spec(bundle)
    check_stock_pipeline(spec.sigmas)
    base = _local_base(bundle, spec)
    index = _student_index(base, spec)
    try:
        with atomic_folder(folder) as fresh:
            for part in COPIED_PARTS:
                shutil.copytree(base / part, fresh / part)
            # The same weights, written once where the file system can link them.
            shutil.copytree(bundle / "transformer", fresh / "transformer", copy_function=_link_or_copy)
            scheduler = StudentScheduler(spec.sigmas, spec.timesteps, spec.sampler)
            scheduler.save_pretrained(fresh / "scheduler")
            (fresh / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            (fresh / "README.md").write_text(_card(spec), encoding="utf-8")
    except OSError as error:  # copytree's list of errors is one too
        raise CheckpointError(f"pipeline {folder} cannot be written: {type(error).__name__}: {error}") from error


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _local_base(bundle: Path, spec: StudentSpec) -> Path:
    base = resolve_base(bundle, spec.base)
    missing = [name for name in (INDEX_FILE, *COPIED_PARTS) if not (base / name).exists()]
    if missing:
        raise CheckpointError(f"base {base} is no complete pipeline: it has no {missing[0]}")
    return base


def _student_index(base: Path, spec: StudentSpec) -> dict[str, Any]:
    path = base / INDEX_FILE
    index = read_json_object(path, CheckpointError)
    if index.get("_class_name") != "WanPipeline":
        raise CheckpointError(f"{path} must be of a WanPipeline")
    second = index.get("transformer_2")
    if second is not None and second != [None, None]:
        raise CheckpointError(f"{base} has two transformers, a student is one")
    # What the base says of its own steps, if anything, does not hold for the student.
    kept = {key: value for key, value in index.items() if not key.startswith("dmd")}
    return {
        **kept,
        "scheduler": [StudentScheduler.__module__, StudentScheduler.__name__],
        DMD2_KEY: dmd2_config(spec.timesteps, spec.sampler),
    }


def _card(spec: StudentSpec) -> str:
    native = spec.native
    return _CARD.format(
        num_steps=len(spec.timesteps),
        base_model=spec.base_model,
        method=spec.method,
        height=native.height,
        width=native.width,
        num_frames=native.num_frames,
        fps=native.fps,
    )

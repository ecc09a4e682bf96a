"""Published checkpoints become student bundles: weights by `published` and `names`, sampling by the published methods.

Knows nothing of the command line.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import first_line
from codmd_serve.grid import StepGrid, causvid_grid, rcm_grid, wan_1_3b_grid, wan_14b_grid
from codmd_serve.wan.checkpoint import NativeShape, StudentSpec, save_bundle
from codmd_serve.wan.names import check_config, merge_lora, to_diffusers
from codmd_serve.wan.preview import preview_map_of_base
from codmd_serve.wan.published import Published, read_published

WIDTH_14B = 5120
BASE_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
# What all published students of Wan2.1 were trained at, the smaller of its two sizes.
WAN_480P = NativeShape(height=480, width=832, num_frames=81, fps=16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """How the students of a published method are sampled; `grid` takes the width of the network."""

    sampler: str
    grid: Callable[[int], StepGrid]


# Sampler and steps by method. LightX2V steps along the flow, all others re-noise.
CONTRACTS = {
    "codmd": Contract(sampler="sde", grid=lambda width: wan_14b_grid() if width >= WIDTH_14B else wan_1_3b_grid()),
    "causvid": Contract(sampler="sde", grid=lambda _: causvid_grid()),
    "self-forcing": Contract(sampler="sde", grid=lambda _: wan_14b_grid()),
    "rcm": Contract(sampler="sde", grid=lambda _: rcm_grid()),
    "fastwan": Contract(sampler="sde", grid=lambda _: causvid_grid()),
    "lightx2v": Contract(sampler="ode", grid=lambda _: wan_14b_grid()),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a family looks like, in words, and which method most likely made it."""

    looks: str
    method: str
    ema: bool


FAMILIES = {
    "generator": Family(looks="a training checkpoint of CoDMD or CausVid (generator)", method="codmd", ema=False),
    "generator_ema": Family(
        looks="a training checkpoint of Self-Forcing (generator_ema)", method="self-forcing", ema=True
    ),
    "rcm": Family(looks="rCM weights (linear patch embedding)", method="rcm", ema=True),
    "original": Family(looks="weights in Wan's own names, as LightX2V publishes", method="lightx2v", ema=False),
    "diffusers": Family(looks="weights in diffusers' names, as FastWan publishes", method="fastwan", ema=False),
    "lora": Family(looks="a LoRA, merged into the base", method="lightx2v", ema=False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What the user knows about a checkpoint and need not be guessed; None is unknown.

    Args:
        method: one of CONTRACTS.
        sampler: sde or ode.
        timesteps: what the network is fed, descending, in (0, 1000]; the state is at sigma = timestep / 1000.
        height, width, num_frames, fps: the video it was trained to make.
    """

    method: str | None = None
    sampler: str | None = None
    timesteps: tuple[float, ...] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in CONTRACTS:
            raise ConfigError(f"method must be one of {', '.join(CONTRACTS)}, got {self.method!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What was made: where it came from in words, and how it will be sampled."""

    looks: str
    num_tensors: int
    spec: StudentSpec


def convert(source: Path, base: Path, output: Path, options: ConvertOptions, package_version: str) -> Converted:
    """Make a student bundle of a published checkpoint; the bundle appears whole or not at all.

    Args:
        source: a file or folder that `read_published` reads.
        base: diffusers folder of the Wan pipeline that the student was distilled from. It gives the architecture and,
            for a LoRA, the weights; the bundle refers to it for tokenizer, text encoder and VAE.
        output: folder of the bundle, which must not exist.
        options: what need not be guessed.
        package_version: of codmd-serve, for student.json.

    Returns:
        What the checkpoint is and the content of student.json. The weights keep their dtype.

    Raises:
        CheckpointError: a source that cannot be read or served, or does not fit the base; no such base; a bundle that
            cannot be written.
        ConfigError: output exists or has no folder to lie in; options that make no sense.
    """
    check_output(output)
    config = read_base_config(base)
    published = read_published(source)
    check_config(published.config, config, str(source))
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config)
    spec = _spec(published, base, output, options, package_version, transformer.patch_embedding.out_channels)
    if published.naming == "lora":
        base_weights = read_published(base / "transformer")
        merged = merge_lora(published, base_weights.weights, str(source))
        complete = Published(family="lora", naming="diffusers", weights=merged, config=config)
    else:
        complete = published
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    weights = to_diffusers(complete, shapes, str(source))
    transformer.load_state_dict(weights, assign=True)
    try:
        save_bundle(output, transformer, spec)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"bundle {output} cannot be written: {first_line(error)}; nothing was left there"
        ) from error
    return Converted(looks=FAMILIES[published.family].looks, num_tensors=len(published.weights), spec=spec)


def check_output(output: Path) -> None:
    """Refuse an output that cannot be written before minutes are spent on reading.

    Raises:
        ConfigError: it exists, or the folder it should lie in does not or cannot be written to.
    """
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output} exists already: name another folder, or delete it first")
    parent = output.resolve().parent
    if not parent.is_dir():
        raise ConfigError(f"there is no folder {parent} to write {output.name} to")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"the folder {parent} cannot be written to")


def read_base_config(base: Path) -> dict[str, Any]:
    """Read the architecture of a Wan pipeline folder.

    Returns:
        config.json of its transformer.

    Raises:
        CheckpointError: no such folder, a part of the pipeline missing, or no text-to-video Wan.
    """
    wanted = f"expected the diffusers folder of a Wan pipeline ({', '.join(BASE_PARTS)})"
    if not base.is_dir():
        raise CheckpointError(f"there is no folder {base}: {wanted}, name it with --base")
    missing = [part for part in BASE_PARTS if not (base / part).is_dir()]
    if missing:
        raise CheckpointError(f"{base} has no {missing[0]}/: {wanted}, name it with --base")
    try:
        config: dict[str, Any] = WanTransformer3DModel.load_config(base, subfolder="transformer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"transformer/config.json of {base} cannot be read: {first_line(error)}") from error
    kind = config.get("_class_name")
    if kind != "WanTransformer3DModel" or config.get("image_dim") is not None:
        what = kind if kind != "WanTransformer3DModel" else "an image-to-video WanTransformer3DModel"
        raise CheckpointError(f"{base} is no text-to-video Wan pipeline: its transformer is {what}; {wanted}")
    return config


def _spec(
    published: Published, base: Path, output: Path, options: ConvertOptions, package_version: str, width: int
) -> StudentSpec:
    family = FAMILIES[published.family]
    method = options.method or family.method
    contract = CONTRACTS[method]
    grid = _exact_grid(options.timesteps) if options.timesteps else contract.grid(width)
    sizes = {name: getattr(options, name) for name in ("height", "width", "num_frames", "fps")}
    given = {name: value for name, value in sizes.items() if value is not None}
    native = NativeShape(**{**{name: getattr(WAN_480P, name) for name in sizes}, **given})
    guessed = {
        "sigmas": options.timesteps is None,
        "timesteps": options.timesteps is None,
        "sampler": options.sampler is None,
        "native": len(given) < len(sizes),
        "method": options.method is None,
        "step": True,
        "ema": published.family not in ("generator", "generator_ema"),
        # A diffusers or original config that is not causal was read; without one nothing says it.
        "attention": "_class_name" not in published.config,
    }
    folder = base.resolve()
    return StudentSpec(
        base=os.path.relpath(folder, output.resolve()),
        sigmas=grid.sigmas,
        timesteps=grid.timesteps,
        sampler=options.sampler or contract.sampler,
        native=native,
        method=method,
        base_model=folder.name,
        step=0,
        ema=family.ema,
        config_sha256="",
        package_version=package_version,
        preview_map=preview_map_of_base(folder, is_local=True),
        assumed=tuple(name for name, is_guessed in guessed.items() if is_guessed),
    )


def _exact_grid(timesteps: tuple[float, ...]) -> StepGrid:
    return StepGrid(sigmas=(*(timestep / 1000.0 for timestep in timesteps), 0.0), timesteps=timesteps)

"""Converts published checkpoints into student bundles: weights, names and the sampling of the published method.

Knows nothing of the command line.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import check_name, first_line
from codmd_serve.grammar import Grammar
from codmd_serve.grid import StepGrid
from codmd_serve.textfiles import shown
from codmd_serve.wan.checkpoint import LORA_FILE, SPEC_FILE, NativeShape, StudentSpec, read_spec, save_bundle
from codmd_serve.wan.families import BASES, FAMILIES, METHOD_SAMPLING
from codmd_serve.wan.hub import find_pipeline
from codmd_serve.wan.lora import Scales, add_lora, find_scales, read_lora
from codmd_serve.wan.names import check_config, to_diffusers
from codmd_serve.wan.preview import preview_map_of_base
from codmd_serve.wan.published import IMAGE_CHANNELS, Published, read_published
from codmd_serve.wan.stated import Sampling, read_sampling

BASE_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
MAX_LORA_SCALE = 100.0
# What all published students of Wan2.1 were trained at, the smaller of its two sizes.
WAN_480P = NativeShape(height=480, width=832, num_frames=81, fps=16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions:
    """What the user states about a checkpoint; None is guessed.

    Attributes:
        method: one of METHOD_SAMPLING.
        sampler: sde or ode.
        timesteps: what the network is fed, descending, in (0, 1000]; the state is at sigma = timestep / 1000.
        height, width, num_frames, fps: the video it was trained to make.
        lora_scale: factor of up @ down, in place of alpha / rank.
        key: which of several networks of a file, by the name of its container or prefix.
        bidirectional: the user's word that the weights are not causal, where nothing in the file tells.
    """

    method: str | None = None
    sampler: str | None = None
    timesteps: tuple[float, ...] | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    lora_scale: float | None = None
    key: str | None = None
    bidirectional: bool = False

    def __post_init__(self) -> None:
        scale = self.lora_scale
        if scale is not None and (not math.isfinite(scale) or not 0.0 < abs(scale) <= MAX_LORA_SCALE):
            raise ConfigError(f"lora_scale must be a number other than 0, at most {MAX_LORA_SCALE:g}, got {scale}")
        if self.method is not None and self.method not in METHOD_SAMPLING:
            raise ConfigError(f"method must be one of {', '.join(METHOD_SAMPLING)}, got {shown(self.method)}")
        self.native()

    def sizes(self) -> dict[str, int]:
        """Return the stated sizes of the video."""
        values = {name: getattr(self, name) for name in ("height", "width", "num_frames", "fps")}
        return {name: value for name, value in values.items() if value is not None}

    def native(self) -> NativeShape:
        """Return the video's shape; Wan's 480p where it is not known.

        Raises:
            ConfigError: a number out of its range.
        """
        return replace(WAN_480P, **self.sizes())


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """Result of a conversion.

    Attributes:
        looks: what the file is, in words.
        num_tensors: read from it.
        spec: how it will be sampled.
        notes: what else was found out about the file, a sentence each.
    """

    looks: str
    num_tensors: int
    spec: StudentSpec
    notes: tuple[str, ...] = ()


def convert(source: Path, base: Path | None, output: Path, options: ConvertOptions, package_version: str) -> Converted:
    """Make a student bundle of a published checkpoint; the bundle appears whole or not at all.

    Args:
        source: a file or folder that `read_published` reads. An adapter folder with a student.json says there how it
            is sampled, and of which base.
        base: diffusers folder or hub id of the Wan pipeline that the student was distilled from. It gives the
            architecture and, for a LoRA, the weights; the bundle refers to it for tokenizer, text encoder and VAE.
            None is what student.json names, else Wan2.1's of the width of the network.
        output: folder of the bundle, which must not exist.
        options: what need not be guessed.
        package_version: of codmd-serve, for student.json.

    Returns:
        What the checkpoint is and the content of student.json. The weights keep their dtype.

    Raises:
        CheckpointError: a source that cannot be read or served, does not fit the base or is the base; no such base; a
            bundle that cannot be written.
        ConfigError: output exists or has no folder to lie in; options that make no sense.
    """
    check_output(output)
    published, roots = None, [Path()]
    home, stated = _stated_student(source)
    if base is None and stated is not None:
        base, roots = Path(stated.base), [home.resolve()]
    elif base is None:
        published = read_published(source, options.key)
        base = _guess_base(published, source)
    folder, is_folder = find_pipeline(str(base), roots, BASE_PARTS, wanted=_WANTED_BASE)
    config = read_base_config(folder)
    published = published or read_published(source, options.key)
    _refuse_options(published, options, str(source))
    check_config(published.config, config, str(source))
    # Those of the file first: they cost nothing, and the weights minutes.
    sampling = Sampling() if options.timesteps and options.sampler else read_sampling(source)
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config)
    given = read_published(folder / "transformer")
    weights, scales = student_weights(published, given.weights, transformer, str(source), options)
    _refuse_base(weights, given.weights, str(source), is_lora=scales is not None)
    transformer.load_state_dict(weights, assign=True)
    if stated is None:
        spec = _spec_fields(published, sampling, options, transformer.patch_embedding.out_channels, scales)
    else:
        spec, sampling = _stated_fields(stated, options), Sampling(sampler=stated.sampler, where=SPEC_FILE)
    spec |= {
        "base": os.path.relpath(folder, output.resolve()) if is_folder else str(base),
        "base_model": folder.name if is_folder else str(base),
        "package_version": package_version,
        "preview_map": preview_map_of_base(folder),
    }
    finished = StudentSpec(**spec)
    _save(output, transformer, finished, None if stated is None else Grammar.load(home))
    return Converted(
        looks=FAMILIES[published.family].looks,
        num_tensors=len(published.weights),
        spec=finished,
        notes=_notes(published, sampling, scales),
    )


def _stated_student(source: Path) -> tuple[Path, StudentSpec | None]:
    """Return the folder of an adapter, and the student.json in it, if there is one."""
    home = source.parent if source.name == LORA_FILE else source
    return home, read_spec(home) if (home / SPEC_FILE).is_file() else None


def _save(output: Path, transformer: WanTransformer3DModel, spec: StudentSpec, grammar: Grammar | None) -> None:
    try:
        save_bundle(output, transformer, spec, grammar)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"bundle {output} cannot be written: {first_line(error)}; nothing was left there"
        ) from error


def _guess_base(published: Published, source: Path) -> Path:
    """Return the hub id of the Wan2.1 pipeline of the width of a network.

    Raises:
        CheckpointError: it has another width, or is a LoRA, which does not show it.
    """
    patch = published.weights.get("patch_embedding.weight")
    width = 0 if patch is None or published.naming == "lora" else patch.shape[0]
    if width not in BASES:
        known = ", ".join(f"{width} is {base}" for width, base in BASES.items())
        raise CheckpointError(
            f"{source} does not show what it was distilled from: name it with --base (of the width of its network only "
            f"{known})"
        )
    return Path(BASES[width])


def student_weights(
    published: Published,
    base: dict[str, Tensor],
    transformer: WanTransformer3DModel,
    source: str,
    options: ConvertOptions,
) -> tuple[dict[str, Tensor], Scales | None]:
    """Return the weights of the student by diffusers name, and the strength of its update where it is one.

    Args:
        published: what `read_published` read.
        base: weights of the base by diffusers name, which a LoRA is added to.
        transformer: of the base's architecture; only its names and shapes are read.
        source: where the weights are from, for messages.
        options: lora_scale is used.

    Raises:
        CheckpointError: names or shapes differ from the base's, or a LoRA that cannot be merged.
    """
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    if published.naming != "lora":
        return to_diffusers(published, shapes, source), None
    lora = read_lora(published, base, source)
    scales = find_scales(lora, published.statements, source, options.lora_scale)
    merged = add_lora(lora, scales, base, source)
    complete = Published(family="lora", naming="diffusers", weights=merged, config={})
    return to_diffusers(complete, shapes, source), scales


def _refuse_options(published: Published, options: ConvertOptions, source: str) -> None:
    """Refuse a strength of what is no update, and a mostly causal family, which tensors do not show, without a word."""
    if options.lora_scale is not None and published.naming != "lora":
        raise ConfigError(f"--lora-scale is for LoRA files, {source} is {FAMILIES[published.family].looks}")
    is_doubtful = published.family == "generator_ema" or options.method == "self-forcing"
    if is_doubtful and not options.bidirectional and not published.says_attention:
        raise CheckpointError(
            f"{source} looks like {FAMILIES['generator_ema'].looks}: most of them are causal (autoregressive), have "
            "the same names, and would make broken videos here; say --bidirectional if this one is not, as those of "
            "Self-Forcing-Plus"
        )


def _refuse_base(weights: dict[str, Tensor], base: dict[str, Tensor], source: str, *, is_lora: bool) -> None:
    """Refuse a student that equals the undistilled base, at any precision."""
    for name, tensor in weights.items():
        other = base.get(name)
        if other is None or other.shape != tensor.shape:
            return
        coarser = min(tensor.dtype, other.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
        if not torch.equal(tensor.to(coarser), other.to(coarser)):
            return
    what = "its updates are zero" if is_lora else "all of its weights equal the base's"
    raise CheckpointError(
        f"{source} is the undistilled base itself: {what}, so a few steps would show noise; "
        "name the file of the student, or the base that it was distilled from with --base"
    )


def _notes(published: Published, sampling: Sampling, scales: Scales | None) -> tuple[str, ...]:
    notes = []
    if published.part:
        notes.append(f"taken from {shown(published.part)} of the file (--key)")
    if published.left_out:
        notes.append(f"left out: {', '.join(map(shown, published.left_out))}")
    if scales is not None and scales.by_module:
        low, high = min(scales.by_module.values()), max(scales.by_module.values())
        span = f"{low:.6g}" if math.isclose(low, high) else f"{low:.6g} to {high:.6g}"
        notes.append(f"update of {len(scales.by_module)} modules at scale {span} ({scales.stated or 'assumed'})")
    if sampling.where and (sampling.timesteps or sampling.sampler):
        notes.append(f"sampled as {sampling.where} says")
    return tuple(notes)


def check_output(output: Path) -> None:
    """Refuse an output that cannot be written before minutes are spent on reading.

    Raises:
        ConfigError: it exists, or the folder it should lie in does not or cannot be written to.
    """
    check_name(output)
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output} exists already: name another folder, or delete it first")
    parent = output.resolve().parent
    if not parent.is_dir():
        raise ConfigError(f"there is no folder {parent} to write {output.name} to")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"the folder {parent} cannot be written to")


_WANTED_BASE = f"expected the diffusers folder of a Wan pipeline ({', '.join(BASE_PARTS)}), name it with --base"


def read_base_config(base: Path) -> dict[str, Any]:
    """Read the architecture of a Wan pipeline folder.

    Returns:
        config.json of its transformer.

    Raises:
        CheckpointError: no such folder, a part of the pipeline missing, or no text-to-video Wan.
    """
    missing = [part for part in BASE_PARTS if not (base / part).is_dir()]
    if missing:
        raise CheckpointError(f"{base} has no {missing[0]}/: {_WANTED_BASE}")
    try:
        config: dict[str, Any] = WanTransformer3DModel.load_config(base, subfolder="transformer", local_files_only=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"transformer/config.json of {base} cannot be read: {first_line(error)}") from error
    kind = config.get("_class_name")
    for_images = config.get("image_dim") is not None or config.get("in_channels") in IMAGE_CHANNELS
    if kind != "WanTransformer3DModel" or for_images:
        what = shown(kind).strip("'") if kind != "WanTransformer3DModel" else "an image-to-video WanTransformer3DModel"
        raise CheckpointError(f"{base} is no text-to-video Wan pipeline: its transformer is {what}; {_WANTED_BASE}")
    return config


def _spec_fields(
    published: Published, sampling: Sampling, options: ConvertOptions, width: int, scales: Scales | None
) -> dict[str, Any]:
    """Return the fields of student.json, from the user's options, the file's statements and the method's defaults."""
    family = FAMILIES[published.family]
    method = options.method or family.method
    published_sampling = METHOD_SAMPLING[method]
    timesteps = options.timesteps or sampling.timesteps
    if timesteps is None:
        grid = published_sampling.grid(width)
    else:
        sigmas = None if options.timesteps else sampling.sigmas
        grid = StepGrid(sigmas=sigmas or _exact_sigmas(timesteps), timesteps=timesteps)
    if sampling.num_steps not in (None, len(grid.timesteps)) and not options.timesteps:
        raise CheckpointError(
            f"{sampling.where} says {sampling.num_steps} steps, {method} has {len(grid.timesteps)}: say them with "
            "--timesteps"
        )
    guessed = {
        "sigmas": timesteps is None,
        "timesteps": timesteps is None,
        "sampler": options.sampler is None and sampling.sampler is None,
        "native": len(options.sizes()) < 4,
        "method": options.method is None,
        "step": True,
        "ema": published.family != "generator" and not published.is_ema,
        # A diffusers or original config that is not causal was read, or the user said it; else nothing did.
        "attention": not published.says_attention and not options.bidirectional,
        "lora_scale": scales is not None and scales.is_assumed,
    }
    return {
        "sigmas": grid.sigmas,
        "timesteps": grid.timesteps,
        "sampler": options.sampler or sampling.sampler or published_sampling.sampler,
        "native": options.native(),
        "method": method,
        "step": 0,
        "ema": published.is_ema or (family.ema and published.family != "generator"),
        "config_sha256": "",
        "assumed": tuple(name for name, is_guessed in guessed.items() if is_guessed),
    }


def _stated_fields(stated: StudentSpec, options: ConvertOptions) -> dict[str, Any]:
    """Return the fields of a student.json that came with the weights, but for those that the user says otherwise."""
    names = ("sigmas", "timesteps", "sampler", "native", "method", "step", "ema", "config_sha256", "assumed")
    kept = {name: getattr(stated, name) for name in (*names, "vocabulary_note")}
    if options.timesteps is not None:
        kept |= {"timesteps": options.timesteps, "sigmas": _exact_sigmas(options.timesteps)}
    given = {"sampler": options.sampler, "method": options.method}
    return (
        kept
        | {name: value for name, value in given.items() if value is not None}
        | {"native": replace(stated.native, **options.sizes())}
    )


def _exact_sigmas(timesteps: tuple[float, ...]) -> tuple[float, ...]:
    return (*(timestep / 1000.0 for timestep in timesteps), 0.0)

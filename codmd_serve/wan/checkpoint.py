"""Student bundles on disk: what they say, loading them, writing them; knows nothing of requests or training."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from codmd_serve.config import default_bundle_path as default_bundle_path
from codmd_serve.errors import CheckpointError, CodmdError, ConfigError
from codmd_serve.files import atomic_folder, first_line
from codmd_serve.grammar import Grammar
from codmd_serve.grid import check_step_grid
from codmd_serve.wan.kernels import AttentionShape
from codmd_serve.wan.vae import vae_scales

SPEC_FILE = "student.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeShape:
    """The video a student was trained to make: pixels, pixels, frames, frames per second."""

    height: int
    width: int
    num_frames: int
    fps: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"native.{name} must be a positive whole number, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentSpec:
    """The content of student.json: how to sample the student, and where it came from.

    Args:
        base: folder (a relative one is relative to the bundle) or hub id of a diffusers Wan pipeline.
        sigmas: num_steps + 1 levels, descending, the last 0.0.
        timesteps: num_steps numbers fed to the network.
        sampler: `sde` or `ode`.
        native: the video it was trained to make.
        method: how it was distilled, for example codmd or dmd.
        base_model: name of the teacher.
        step: number of student updates behind these weights.
        ema: whether the weights are the moving average.
        config_sha256: of the resolved training config; empty when unknown.
        package_version: of codmd-serve that wrote the bundle.
        assumed: names of the fields that were guessed because the source of the weights does not record them;
            `attention` among them means that nothing said whether the weights are causal: they were taken not to be.
        preview_map: linear map from latents to RGB, see wan/preview.py; empty when unknown: it is fitted at load.
        vocabulary_note: one sentence for users whose prompt has words that the model never saw; empty for none.

    Raises:
        ConfigError: a grid that cannot be sampled, or a field of the wrong type.
    """

    base: str
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    sampler: str
    native: NativeShape
    method: str
    base_model: str
    step: int
    ema: bool
    config_sha256: str
    package_version: str
    assumed: tuple[str, ...] = field(default=())
    vocabulary_note: str = ""
    preview_map: tuple[tuple[float, float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("base", "sampler", "method", "base_model", "config_sha256", "package_version", "vocabulary_note"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be text, got {getattr(self, name)!r}")
        if not self.base:
            raise ConfigError("base must name a folder or a hub id, got nothing")
        if type(self.step) is not int or self.step < 0 or not isinstance(self.ema, bool):
            raise ConfigError(f"step must be a count and ema true or false, got {self.step!r} and {self.ema!r}")
        if any(len(row) != 3 or not all(math.isfinite(value) for value in row) for row in self.preview_map):
            raise ConfigError("preview_map must be rows of three finite numbers")
        check_step_grid(self.sigmas, self.timesteps, self.sampler)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A loaded student with everything it needs; the modules are in eval mode and carry no gradient.

    `grammar` is that of the captions it was trained on, for a student that knows only captions of a grammar.
    """

    path: Path
    spec: StudentSpec
    tokenizer: Any
    text_encoder: Any
    transformer: Any
    vae: Any
    grammar: Grammar | None = None


def silence_libraries() -> None:
    """Switch off the loading bars and warnings of diffusers and transformers, for a process whose output is ours.

    What they warn of while loading, missing and surplus tensors, is an error here that says it in one line.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def read_spec(bundle: Path) -> StudentSpec:
    """Read student.json of a bundle.

    Raises:
        CheckpointError: no such folder, no or malformed student.json, unknown, missing or senseless fields.
    """
    if not bundle.is_dir():
        raise CheckpointError(f"no student bundle at {bundle}: name a folder that holds {SPEC_FILE} and transformer/")
    path = bundle / SPEC_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{bundle} is not a student bundle: it has no {SPEC_FILE}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold one JSON object, got {type(data).__name__}")
    unknown = sorted(data.keys() - {entry.name for entry in fields(StudentSpec)})
    if unknown:
        raise CheckpointError(f"{path} has unknown fields: {', '.join(unknown)}")
    try:
        tuples: dict[str, Any] = {
            name: tuple(data[name]) for name in ("sigmas", "timesteps", "assumed") if name in data
        }
        for name in ("sigmas", "timesteps"):
            tuples[name] = tuple(_number(value) for value in tuples[name])
        if "preview_map" in data:
            tuples["preview_map"] = tuple(tuple(map(_number, row)) for row in data["preview_map"])
        return StudentSpec(**{**data, **tuples, "native": NativeShape(**data["native"])})
    except (ConfigError, KeyError, TypeError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {detail}") from error


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"expected a number, got {value!r}")
    return float(value)


def resolve_base(bundle: Path, base: str) -> tuple[str, bool]:
    """Find where the tokenizer, text encoder and VAE of a bundle are.

    Returns:
        A folder and True, or a hub id and False.

    Raises:
        CheckpointError: no such folder, and the text cannot be a hub id either.
    """
    folder = Path(os.path.normpath(bundle.resolve() / base))
    if folder.is_dir():
        return str(folder), True
    is_hub_id = base.count("/") == 1 and not base.startswith((".", "/")) and not base.endswith("/")
    if not is_hub_id:
        raise CheckpointError(f"the base pipeline of {bundle} is missing: expected a folder at {folder}")
    return base, False


def attention_shape(bundle: Path, max_tokens: int | None = None) -> AttentionShape:
    """Return what the transformer of a bundle attends to in its native video, from the configs alone.

    Args:
        bundle: folder.
        max_tokens: an upper bound to the number of tokens that is returned.

    Raises:
        CheckpointError: no such bundle, no VAE in its base, or a config that lacks a size.
    """
    spec = read_spec(bundle)
    base, is_local = resolve_base(bundle, spec.base)
    config = read_part_config(WanTransformer3DModel, bundle, "transformer", True)
    vae = read_part_config(AutoencoderKLWan, base, "vae", is_local)
    try:
        shape = native_attention_shape(config, vae, spec.native)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"transformer/config.json of {bundle} cannot be used: {first_line(error)}") from error
    return replace(shape, num_tokens=min(shape.num_tokens, max_tokens or shape.num_tokens))


def native_attention_shape(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], native: NativeShape
) -> AttentionShape:
    """Return what a transformer attends to in a native video.

    Args:
        transformer, vae: their configs.
        native: the video.

    Raises:
        KeyError: a config lacks a size.
    """
    temporal, spatial = vae_scales(vae)
    latents = ((native.num_frames - 1) // temporal + 1, native.height // spatial, native.width // spatial)
    return AttentionShape(
        num_tokens=math.prod(size // cell for size, cell in zip(latents, transformer["patch_size"], strict=True)),
        num_heads=transformer["num_attention_heads"],
        head_width=transformer["attention_head_dim"],
    )


def read_part_config(kind: Any, folder: Path | str, part: str, is_local: bool) -> dict[str, Any]:
    """Read the config of one module of a folder or hub id, without its weights.

    Args:
        kind: the diffusers class of the module.
        folder: a folder or hub id.
        part: the subfolder.
        is_local: whether `folder` is a folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        config: dict[str, Any] = kind.load_config(folder, subfolder=part, local_files_only=is_local)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{part} of {folder} has no readable config: {first_line(error)}") from error
    return config


def load_bundle(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    text_device: torch.device | str | None = None,
) -> Bundle:
    """Load a student and the modules of its base.

    Args:
        path: the bundle folder.
        dtype: of transformer and text encoder, which takes bfloat16 for float16. The VAE stays float32: in bfloat16 its
            clamp shows as banding.
        device: where the modules go.
        text_device: where the text encoder goes; None is `device`.

    Raises:
        CheckpointError: anything missing, truncated, of another kind, or parts that do not fit each other.
    """
    path = Path(path)
    spec = read_spec(path)
    grammar = Grammar.load(path)
    base, is_local = resolve_base(path, spec.base)
    transformer = load_module(WanTransformer3DModel, path, "transformer", True, torch_dtype=dtype)
    vae = load_module(AutoencoderKLWan, base, "vae", is_local, torch_dtype=torch.float32)
    # UMT5 was trained in bfloat16; its activations leave the range of float16.
    text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    text_encoder = load_module(UMT5EncoderModel, base, "text_encoder", is_local, dtype=text_dtype)
    tokenizer = load_tokenizer(base, is_local)
    for part, wanted, got in (
        ("latent channels of transformer and VAE", transformer.config.in_channels, vae.config.z_dim),
        ("text width of transformer and text encoder", transformer.config.text_dim, text_encoder.config.d_model),
    ):
        if wanted != got:
            raise CheckpointError(f"{path} does not fit its base {base}: {part} are {wanted} and {got}")
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {base} has {len(tokenizer)} tokens, its text encoder {text_encoder.config.vocab_size}"
        )
    for module, place in ((transformer, device), (vae, device), (text_encoder, text_device or device)):
        module.requires_grad_(False).eval().to(place)
    return Bundle(
        path=path,
        spec=spec,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        grammar=grammar,
    )


def load_module(kind: Any, folder: Path | str, subfolder: str, is_local: bool, **options: Any) -> Any:
    """Load one module of a folder or hub id with `kind.from_pretrained`, complete or not at all.

    Raises:
        CheckpointError: missing, truncated or of another kind. Both libraries fill missing tensors with random numbers
            and only log it: here that is an error.
    """
    where = f"{subfolder} of {folder}"
    if is_local and not (Path(folder) / subfolder).is_dir():
        raise CheckpointError(f"{folder} has no {subfolder}/ folder")
    try:
        module, info = kind.from_pretrained(
            folder, subfolder=subfolder, local_files_only=is_local, output_loading_info=True, **options
        )
    except CodmdError:
        raise
    except Exception as error:  # safetensors, both libraries and the file system each raise their own kinds
        raise CheckpointError(f"{where} cannot be loaded, is it complete? {first_line(error)}") from error
    problems = {name: sorted(map(str, info[name])) for name in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    for name, keys in problems.items():
        if keys:
            raise CheckpointError(f"{where} has {len(keys)} {name.replace('_', ' ')}, the first is {keys[0]}")
    return module


def load_tokenizer(folder: Path | str, is_local: bool) -> Any:
    """Load the tokenizer of a folder or hub id.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=is_local)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"tokenizer of {folder} cannot be loaded: {first_line(error)}") from error


def save_bundle(path: Path, transformer: Any, spec: StudentSpec, grammar: Grammar | None = None) -> None:
    """Write a bundle atomically.

    Args:
        path: the bundle folder; one that exists is replaced.
        transformer: a WanTransformer3DModel.
        spec: becomes student.json.
        grammar: becomes world.json; None when the student takes any text.
    """
    with atomic_folder(path) as fresh:
        transformer.save_pretrained(fresh / "transformer")
        (fresh / SPEC_FILE).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")
        if grammar is not None:
            grammar.save(fresh)

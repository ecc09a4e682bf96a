"""Reads, loads and writes student bundles; knows nothing of requests or training.

BUNDLE/student.json     how to sample the student, and where it came from
BUNDLE/transformer/     config.json and safetensors of a WanTransformer3DModel, in diffusers' layout
BUNDLE/world.json       grammar of the captions it knows; only bundles of a world have it

An adapter folder has pytorch_lora_weights.safetensors, an update of the base, in the place of transformer/; convert.py
makes a bundle of it.
"""

import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from codmd_serve.config import default_bundle_path as default_bundle_path
from codmd_serve.errors import CheckpointError, CodmdError, ConfigError
from codmd_serve.files import atomic_folder, first_line
from codmd_serve.grammar import Grammar
from codmd_serve.grid import MAX_TIMESTEP, check_step_grid
from codmd_serve.textfiles import read_json_object, shown
from codmd_serve.wan.blank import blank_weights
from codmd_serve.wan.hub import find_pipeline
from codmd_serve.wan.kernels import AttentionShape
from codmd_serve.wan.vae import vae_scales

SPEC_FILE = "student.json"
# The name that diffusers looks for.
LORA_FILE = "pytorch_lora_weights.safetensors"
# Ranges of the native video: what requests may ask for, and far more pixels and frames than any student makes.
MOST_NATIVE = {"height": 16_384, "width": 16_384, "num_frames": 10_000, "fps": 120}
MAX_STEPS = 1000
MAX_UPDATES = 10**12
MAX_FIELD_CHARS = {"base": 4096, "vocabulary_note": 4096}
MAX_NAME_CHARS = 256


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
                raise ConfigError(f"native.{name} must be a positive whole number, got {shown(value)}")
            if value > MOST_NATIVE[name]:
                raise ConfigError(f"native.{name} must be at most {MOST_NATIVE[name]}, got {shown(value)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentSpec:
    """The content of student.json: how to sample the student, and where it came from.

    Attributes:
        base: folder (a relative one is relative to the bundle) or hub id of a diffusers Wan pipeline.
        sigmas: num_steps + 1 levels, descending, the last 0.0.
        timesteps: num_steps numbers fed to the network, descending, in (0, 1000].
        sampler: `sde` or `ode`.
        native: the video it was trained to make.
        method: how it was distilled, for example codmd or dmd.
        base_model: name of the teacher.
        step: number of student updates behind these weights.
        ema: whether the weights are the moving average.
        config_sha256: of the resolved training config; empty when unknown.
        package_version: of codmd-serve that wrote the bundle.
        assumed: names of the fields that were guessed because the source of the weights does not record them;
            `attention` among them means that nothing said whether the weights are causal: they were taken not to be;
            `lora_scale` that nothing said how strong the update is: it was added once.
        preview_map: linear map from latents to RGB, see wan/preview.py; empty when unknown: it is fitted at load.
        vocabulary_note: one sentence for users whose prompt has words that the model never saw; empty for none.

    Raises:
        ConfigError: a grid that cannot be sampled, or a field of the wrong type or out of range.
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
            _check_text(name, getattr(self, name))
        for name in self.assumed:
            _check_text("assumed", name)
        if not self.base:
            raise ConfigError("base must name a folder or a hub id, got nothing")
        is_count = type(self.step) is int and 0 <= self.step <= MAX_UPDATES
        if not is_count or not isinstance(self.ema, bool):
            raise ConfigError(
                f"step must be a count and ema true or false, got {shown(self.step)} and {shown(self.ema)}"
            )
        if len(self.timesteps) > MAX_STEPS:
            raise ConfigError(f"timesteps must be at most {MAX_STEPS}, got {len(self.timesteps)} of them")
        if any(len(row) != 3 or not all(math.isfinite(value) for value in row) for row in self.preview_map):
            raise ConfigError("preview_map must be rows of three finite numbers")
        check_step_grid(self.sigmas, self.timesteps, self.sampler)
        steps = (*self.timesteps, 0.0)
        if steps[0] > MAX_TIMESTEP or not all(high > low for high, low in pairwise(steps)):
            raise ConfigError(f"timesteps must be descending numbers in (0, 1000], got {shown(list(self.timesteps))}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, got {shown(value)}")
    most = MAX_FIELD_CHARS.get(name, MAX_NAME_CHARS)
    if len(value) > most:
        raise ConfigError(f"{name} must be at most {most} characters, got {shown(value)}")
    if any(ord(char) < 32 or unicodedata.category(char) == "Cs" for char in value):
        raise ConfigError(f"{name} must be one line of text, got {shown(value)}")


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
    """Silence the progress bars and warnings of diffusers and transformers.

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
    if not path.exists():
        raise CheckpointError(f"{bundle} is not a student bundle: it has no {SPEC_FILE}")
    data = read_json_object(path, CheckpointError)
    unknown = sorted(data.keys() - {entry.name for entry in fields(StudentSpec)})
    if unknown:
        raise CheckpointError(f"{path} has unknown fields: {', '.join(unknown[:3])[:MAX_NAME_CHARS]}")
    try:
        tuples: dict[str, tuple[Any, ...]] = {
            name: _list(data, name) for name in ("sigmas", "timesteps", "assumed") if name in data
        }
        for name in ("sigmas", "timesteps"):
            tuples[name] = tuple(_finite_number(value) for value in tuples[name])
        if "preview_map" in data:
            tuples["preview_map"] = tuple(_row(row) for row in _list(data, "preview_map"))
        native = data["native"]
        if not isinstance(native, dict):
            raise ConfigError(f"native must be an object, got {shown(native)}")
        given: dict[str, Any] = {**data, **tuples, "native": NativeShape(**native)}
        return StudentSpec(**given)
    except (ConfigError, KeyError, TypeError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {detail}") from error


def _list(data: dict[str, Any], name: str) -> tuple[Any, ...]:
    if not isinstance(data[name], list):
        raise ConfigError(f"{name} must be a list, got {shown(data[name])}")
    return tuple(data[name])


def _row(value: object) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"preview_map must be rows of three finite numbers, got {shown(value)}")
    return tuple(map(_finite_number, value))


def _finite_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"expected a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # an integer past 1.8e308
        raise ConfigError(f"expected a number, got {shown(value)}") from None


def resolve_base(bundle: Path, base: str, *, configs_only: bool = False) -> Path:
    """Find the folder, or hub snapshot, with the tokenizer, text encoder and VAE of a bundle.

    Args:
        bundle: the bundle folder, which a relative base is relative to.
        base: as student.json names it.
        configs_only: of a hub id, the weights are not needed.

    Raises:
        CheckpointError: no such folder, and the hub does not have it either.
    """
    try:
        folder, _ = find_pipeline(base, [bundle.resolve()], configs_only=configs_only)
    except CheckpointError as error:
        raise CheckpointError(f"the base pipeline of {bundle} is missing: {error}") from error
    return folder


def attention_shape(bundle: Path, max_tokens: int | None = None) -> AttentionShape:
    """Return the attention shape of a bundle's native video, from the configs alone.

    Args:
        bundle: folder.
        max_tokens: an upper bound to the number of tokens that is returned.

    Raises:
        CheckpointError: no such bundle, no VAE in its base, or a config that lacks a size.
    """
    spec = read_spec(bundle)
    config = read_part_config(WanTransformer3DModel, bundle, "transformer")
    vae = read_part_config(AutoencoderKLWan, resolve_base(bundle, spec.base, configs_only=True), "vae")
    try:
        shape = native_attention_shape(config, vae, spec.native)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"transformer/config.json of {bundle} cannot be used: {first_line(error)}") from error
    return replace(shape, num_tokens=min(shape.num_tokens, max_tokens or shape.num_tokens))


def native_attention_shape(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], native: NativeShape
) -> AttentionShape:
    """Return the attention shape of a native video.

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


def read_part_config(kind: Any, folder: Path | str, part: str) -> dict[str, Any]:
    """Read the config of one module of a pipeline folder, without its weights.

    Args:
        kind: the diffusers class of the module.
        folder: of the pipeline.
        part: the subfolder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        config: dict[str, Any] = kind.load_config(folder, subfolder=part, local_files_only=True)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{part} of {folder} has no readable config: {first_line(error)}") from error
    return config


def load_bundle(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    text_device: torch.device | str | None = None,
    text_dtype: torch.dtype | None = None,
) -> Bundle:
    """Load a student and the modules of its base.

    Args:
        path: the bundle folder.
        dtype: of transformer and text encoder, which takes bfloat16 for float16. The VAE stays float32: in bfloat16 its
            clamp shows as banding.
        device: where the modules go.
        text_device: where the text encoder goes; None is `device`.
        text_dtype: of the text encoder, where it is not that of the transformer.

    Raises:
        CheckpointError: anything missing, truncated, of another kind, or parts that do not fit each other.
    """
    path = Path(path)
    spec = read_spec(path)
    grammar = Grammar.load(path)
    base = resolve_base(path, spec.base)
    transformer = load_module(WanTransformer3DModel, path, "transformer", torch_dtype=dtype)
    vae = load_module(AutoencoderKLWan, base, "vae", torch_dtype=torch.float32)
    # UMT5 was trained in bfloat16; its activations leave the range of float16.
    text_dtype = text_dtype or (torch.bfloat16 if dtype == torch.float16 else dtype)
    text_encoder = load_module(UMT5EncoderModel, base, "text_encoder", dtype=text_dtype)
    tokenizer = load_tokenizer(base)
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
        # Not the `to` of diffusers, which imports all its hooks to look for one that offloads.
        torch.nn.Module.to(module.requires_grad_(False).eval(), place)
    return Bundle(
        path=path,
        spec=spec,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        grammar=grammar,
    )


def load_tokenizer(base: Path | str) -> Any:
    """Load the tokenizer of a pipeline folder; code that the folder may bring is never run.

    Raises:
        CheckpointError: missing, damaged, or one that needs code of its own.
    """
    if not (Path(base) / "tokenizer").is_dir():
        raise CheckpointError(f"{base} has no tokenizer/ folder")
    try:
        return AutoTokenizer.from_pretrained(
            base, subfolder="tokenizer", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries and the file system each raise their own kinds
        raise CheckpointError(f"tokenizer of {base} cannot be loaded: {first_line(error)}") from error


def load_module(kind: Any, folder: Path | str, subfolder: str, **options: Any) -> Any:
    """Load one module of a pipeline folder with `kind.from_pretrained`; refuse missing or mismatched weights.

    Raises:
        CheckpointError: missing, truncated or of another kind. Both libraries fill missing tensors with random numbers
            and only log it: here that is an error.
    """
    where = f"{subfolder} of {folder}"
    if not (Path(folder) / subfolder).is_dir():
        raise CheckpointError(f"{folder} has no {subfolder}/ folder")
    try:
        with blank_weights():
            module, info = kind.from_pretrained(
                folder,
                subfolder=subfolder,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
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
        _save_spec(fresh, spec, grammar)


def save_adapter(
    path: Path,
    tensors: dict[str, Tensor],
    header: dict[str, str],
    spec: StudentSpec | None,
    grammar: Grammar | None = None,
) -> None:
    """Write an adapter folder atomically.

    Args:
        path: the folder; one that exists is replaced.
        tensors: the update of the base, under diffusers' names.
        header: of their file.
        spec: of the student that it makes of the base; becomes student.json. None where it is an update of other
            weights, which no pipeline has.
        grammar: becomes world.json; None when the student takes any text.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with atomic_folder(path) as fresh:
            save_file(tensors, fresh / LORA_FILE, {"format": "pt", **header})
            if spec is not None:
                _save_spec(fresh, spec, grammar)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"adapters cannot be written to {path}: {first_line(error)}") from error


def _save_spec(folder: Path, spec: StudentSpec, grammar: Grammar | None) -> None:
    (folder / SPEC_FILE).write_text(json.dumps(asdict(spec), indent=2) + "\n", encoding="utf-8")
    if grammar is not None:
        grammar.save(folder)

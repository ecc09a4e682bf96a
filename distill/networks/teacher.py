"""The teacher of a run, where it is another network than the one that student and critic start from.

It must share latents and prompt embeddings with the base: the same VAE, text encoder and tokenizer. Width, depth and
heads are its own. Knows neither losses nor the training loop.
"""

import inspect
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import UMT5Config

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import first_line
from codmd_serve.wan.blank import blank_weights
from codmd_serve.wan.checkpoint import SPEC_FILE, load_module, load_tokenizer, read_part_config, read_spec, resolve_base
from codmd_serve.wan.convert import ConvertOptions, student_weights
from codmd_serve.wan.hub import hub_snapshot, is_hub_id
from codmd_serve.wan.published import Published, read_published
from distill.config import DistillConfig
from distill.networks.base import Base, latent_grid, open_base
from distill.parallel.sharding import check_token_split

# What decides the embeddings of a prompt, of UMT5's config.
_TEXT_SIZES = (
    "d_model",
    "num_layers",
    "num_heads",
    "d_kv",
    "d_ff",
    "vocab_size",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)
_NUM_CHECKS = 256


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The network that a student is distilled from.

    Attributes:
        name: of its folder or file, or its hub id; student.json records it as base_model.
        pipeline: its pipeline, or where a bundle or a file brings the transformer alone, that of its other parts.
        transformer: the bundle or file with its transformer, where that is not the pipeline's.
        is_base: it is the base of the run itself.
    """

    name: str
    pipeline: Base
    transformer: Path | None = None
    is_base: bool = False

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The config of its transformer; of a file, as the shapes of its tensors say.

        Raises:
            CheckpointError: missing or damaged.
        """
        if self.transformer is None:
            return self.pipeline.transformer_config
        if self.transformer.is_dir():
            return read_part_config(WanTransformer3DModel, self.transformer, "transformer")
        return {**self.pipeline.transformer_config, **_sizes_of(read_published(self.transformer), self.pipeline)}

    def load(self, dtype: torch.dtype) -> WanTransformer3DModel:
        """Load the transformer.

        Raises:
            CheckpointError: missing, truncated or of another kind.
        """
        if self.is_base:
            return self.pipeline.load_teacher(dtype)
        if self.transformer is not None and self.transformer.is_file():
            return _load_file(self.transformer, self.architecture, dtype)
        transformer: WanTransformer3DModel = load_module(
            WanTransformer3DModel, self._folder, "transformer", torch_dtype=dtype
        )
        return transformer

    def files(self) -> list[Path]:
        """Return the files of its transformer, on disk.

        Raises:
            CheckpointError: the hub does not have it, or cannot be asked.
        """
        if self.transformer is not None and self.transformer.is_file():
            return [self.transformer]
        return sorted((self._folder / "transformer").glob("*"))

    @property
    def _folder(self) -> Path:
        if self.transformer is not None:
            return self.transformer
        # Of a hub id the transformer alone: text encoder and VAE are the base's.
        own = self.pipeline
        return own.folder if own.is_local or self.is_base else hub_snapshot(own.source, ("transformer",))


def open_teacher(config: DistillConfig, base: Base) -> Teacher:
    """Find the teacher that `teacher` names, the base where it is empty; nothing is loaded or compared.

    Args:
        config: teacher is a pipeline folder, a hub id, a bundle, or a file that `codmd-serve convert` reads.
        base: of the run.

    Raises:
        CheckpointError: no such folder or file, and the text cannot be a hub id.
    """
    if not config.teacher:
        return Teacher(name=base.name, pipeline=base, is_base=True)
    path = Path(config.teacher)
    if path.is_file():
        return Teacher(name=path.name, pipeline=base, transformer=path)
    try:
        pipeline = open_base(config.teacher)
    except CheckpointError as error:
        raise CheckpointError(f"teacher: {error}, or a file that codmd-serve convert reads") from error
    folder = Path(pipeline.source)
    if pipeline.is_local and (folder / SPEC_FILE).is_file():
        parts = open_base(str(resolve_base(folder, read_spec(folder).base)))
        return Teacher(name=folder.name, pipeline=parts, transformer=folder)
    return Teacher(name=pipeline.name, pipeline=pipeline)


def check_teacher(config: DistillConfig, base: Base) -> Teacher:
    """Refuse a teacher that cannot judge what the student makes.

    Configs are compared, and of the weights of VAE and text encoder, where both are on disk, a part of each tensor.

    Args:
        config: of the run.
        base: of the run; its VAE and text encoder are those of training.

    Returns:
        The teacher.

    Raises:
        ConfigError: other latents, another text encoder, or tokens that context_parallel cannot split.
        CheckpointError: a config of either cannot be read.
    """
    teacher = open_teacher(config, base)
    if teacher.is_base:
        return teacher
    for pipeline in (base, teacher.pipeline):
        if not pipeline.has_vae:
            raise ConfigError(f"teacher must be empty for {pipeline.name}: its world has an exact teacher of its own")
    own, theirs = base.transformer_config, teacher.architecture
    where = f"teacher {teacher.name}"
    if own["in_channels"] != theirs["in_channels"] or own["out_channels"] != theirs["out_channels"]:
        raise ConfigError(
            f"{where} has another latent space than base {base.name}: latents of {theirs['in_channels']} channels "
            f"against {own['in_channels']}; a teacher judges the student's latents, so name one with the base's VAE"
        )
    if teacher.pipeline is not base:
        _check_vae(teacher, base, where)
    if own["text_dim"] != theirs["text_dim"]:
        raise ConfigError(
            f"{where} reads another text encoder than base {base.name}: embeddings of width {theirs['text_dim']} "
            f"against {own['text_dim']}; prompts are embedded once, by the base's"
        )
    if teacher.pipeline is not base:
        _check_text(teacher, base, where)
    shape = latent_grid(config.native, theirs["in_channels"], tuple(theirs["patch_size"]), *base.vae_scales)
    cells = zip(shape[1:], theirs["patch_size"], strict=True)
    num_tokens = 1
    for size, cell in cells:
        num_tokens *= size // cell
    try:
        check_token_split(config, theirs["num_attention_heads"], num_tokens)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return teacher


def _check_vae(teacher: Teacher, base: Base, where: str) -> None:
    other = teacher.pipeline
    own, theirs = _vae_config(base), _vae_config(other)
    differing = sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{where} has another latent space than base {base.name}: {key} of its VAE is {theirs.get(key)} against "
            f"{own.get(key)}; a teacher judges the student's latents, so name one with the base's VAE"
        )
    name = _differing_tensor(other, base, "vae")
    if name is not None:
        raise ConfigError(
            f"{where} has another latent space than base {base.name}: their VAEs are of one shape but trained apart "
            f"({name} differs); a teacher judges the student's latents, so name one with the base's VAE"
        )


def _check_text(teacher: Teacher, base: Base, where: str) -> None:
    other = teacher.pipeline
    own, theirs = _text_config(base), _text_config(other)
    reason = next((f"{key} {theirs[key]} against {own[key]}" for key in own if own[key] != theirs[key]), None)
    if reason is None:
        name = _differing_tensor(other, base, "text_encoder")
        reason = None if name is None else f"they are of one shape but trained apart ({name} differs)"
    if reason is None and all((folder / "tokenizer").is_dir() for folder in (base.config_folder, other.config_folder)):
        vocabularies = [load_tokenizer(pipeline.config_folder).get_vocab() for pipeline in (other, base)]
        if vocabularies[0] != vocabularies[1]:
            reason = f"vocabularies of {len(vocabularies[0])} and {len(vocabularies[1])} tokens that differ"
    if reason is not None:
        raise ConfigError(
            f"{where} reads another text encoder than base {base.name}: {reason}; prompts are embedded once, by the "
            "base's"
        )


def _vae_config(pipeline: Base) -> dict[str, Any]:
    """Return the VAE's config with the defaults of what it leaves out."""
    given = read_part_config(AutoencoderKLWan, pipeline.config_folder, "vae")
    parameters = inspect.signature(AutoencoderKLWan.__init__).parameters
    known = {name: entry.default for name, entry in parameters.items() if entry.default is not inspect.Parameter.empty}
    return {name: _plain(given.get(name, default)) for name, default in known.items()}


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _text_config(pipeline: Base) -> dict[str, Any]:
    try:
        config = UMT5Config.from_pretrained(
            pipeline.config_folder, subfolder="text_encoder", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"text_encoder of {pipeline.source} has no readable config: {first_line(error)}"
        ) from error
    return {name: getattr(config, name, None) for name in _TEXT_SIZES}


def _differing_tensor(one: Base, other: Base, part: str) -> str | None:
    """Name a tensor of a part of two pipelines that differs; None where none does or weights are not on disk."""
    heads = [_heads(pipeline.config_folder / part) for pipeline in (one, other)]
    for name in sorted(heads[0].keys() & heads[1].keys()):
        (shape, values), (other_shape, other_values) = (found[name] for found in heads)
        # One of them may have been rounded to half precision.
        coarser = max(values.dtype, other_values.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if shape != other_shape or not torch.equal(values.to(coarser), other_values.to(coarser)):
            return name
    return None


def _heads(folder: Path) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Return the shape and the first numbers of each tensor of a folder of safetensors, of which little is read."""
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    rows = part[:1] if shape else file.get_tensor(name)
                    found[name] = shape, rows.flatten()[:_NUM_CHECKS]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return found


def _sizes_of(published: Published, base: Base) -> dict[str, int]:
    """Return the sizes of a network by the shapes of its tensors; heads are as wide as the base's.

    Raises:
        CheckpointError: it is an update of a network, or lacks a tensor that shows a size.
    """
    is_original = published.naming == "original"
    names = {
        "patch": "patch_embedding.weight",
        "head": "head.head.weight" if is_original else "proj_out.weight",
        "text": f"{'text_embedding.0' if is_original else 'condition_embedder.text_embedder.linear_1'}.weight",
        "time": f"{'time_embedding.0' if is_original else 'condition_embedder.time_embedder.linear_1'}.weight",
        "ffn": f"blocks.0.{'ffn.0' if is_original else 'ffn.net.0.proj'}.weight",
    }
    missing = [name for name in names.values() if name not in published.weights]
    if published.naming == "lora" or missing:
        what = "an update of a network" if published.naming == "lora" else f"without {missing[0]}"
        raise CheckpointError(f"teacher: expected a whole network, got a file {what}: convert it to a bundle first")
    shapes = {key: published.weights[name].shape for key, name in names.items()}
    blocks = {int(match[1]) for name in published.weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    volume = 1
    for cell in base.patch_size:
        volume *= cell
    patch = shapes["patch"]
    return {
        "num_layers": max(blocks) + 1,
        "num_attention_heads": patch[0] // int(base.transformer_entry("attention_head_dim")),
        "ffn_dim": shapes["ffn"][0],
        # A linear patch embedding reads the patch as one row.
        "in_channels": patch[1] // volume if len(patch) == 2 else patch[1],
        "out_channels": shapes["head"][0] // volume,
        "text_dim": shapes["text"][1],
        "freq_dim": shapes["time"][1],
    }


def _load_file(path: Path, architecture: dict[str, Any], dtype: torch.dtype) -> WanTransformer3DModel:
    with blank_weights():
        transformer = WanTransformer3DModel.from_config(architecture)
    weights, _scales = student_weights(read_published(path), {}, transformer, str(path), ConvertOptions())
    kept = set(transformer._keep_in_fp32_modules)
    weights = {
        name: tensor.to(torch.float32 if kept & set(name.split(".")) else dtype) for name, tensor in weights.items()
    }
    transformer.load_state_dict(weights, assign=True)
    return transformer


def teacher_name(config: DistillConfig, base: Base) -> str:
    """Return the name of a run's teacher for its bundle; its folder need not be there any more."""
    if not config.teacher:
        return base.name
    is_hub = is_hub_id(config.teacher) and not Path(config.teacher).exists()
    return config.teacher if is_hub else Path(config.teacher).name

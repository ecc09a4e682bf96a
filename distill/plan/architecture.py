"""The planned Wan transformer: sizes, parameter counts and tokens per sample.

Reads configs and builds the network on the meta device; loads no weights, contacts no hub, computes no cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from codmd_serve.errors import ConfigError
from distill.config import DistillConfig
from distill.networks.base import Base, latent_grid, open_base
from distill.networks.teacher import check_teacher, open_teacher

_WAN_2_1 = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "patch_size": (1, 2, 2),
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
# transformer/config.json of the published pipelines, so that a plan needs no download.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {**_WAN_2_1, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {**_WAN_2_1, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
PUBLISHED_VAE_SCALES = (4, 8)  # frames, pixels per latent


class UnknownNetworkError(ConfigError):
    """A base or teacher on the hub that is not in PUBLISHED: it can be trained, and not planned before a download."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes of a text-to-video Wan transformer, named as in its config."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    patch_size: tuple[int, int, int]

    @property
    def dim(self) -> int:
        """Return the width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_volume(self) -> int:
        """Return the latent positions per token."""
        frames, height, width = self.patch_size
        return frames * height * width


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        total: of the whole network.
        block: of one block.
        cast: those that bf16 autocast copies: linear layers, except those of `keep_sensitive_parts_float32`.
        kept_fp32: those that stay float32 in a bf16 teacher.
        lora_width: inputs plus outputs of all linear layers in the blocks; LoRA of rank r has r * lora_width.
    """

    total: int
    block: int
    cast: int
    kept_fp32: int
    lora_width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """One network of a run."""

    architecture: Architecture
    parameters: ParameterCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The subject of a plan.

    Attributes:
        config: settings.
        architecture, parameters: of the base, which student and full critic begin as.
        latents: (C, F, H, W) of one sample.
        teacher: where it is another network than the base.
    """

    config: DistillConfig
    architecture: Architecture
    parameters: ParameterCounts
    latents: tuple[int, ...]
    teacher: Network | None = None

    def network(self, role: str, lora_critic_rank: int = 0) -> Network:
        """Return the network of a role; a LoRA critic is the teacher's."""
        is_teachers = role == "teacher" or (role == "critic" and lora_critic_rank > 0)
        own = Network(architecture=self.architecture, parameters=self.parameters)
        return self.teacher if is_teachers and self.teacher is not None else own

    def num_tokens_of(self, role: str, lora_critic_rank: int = 0) -> int:
        """Return the tokens of one sample in the network of a role."""
        _, frames, height, width = self.latents
        return frames * height * width // self.network(role, lora_critic_rank).architecture.patch_volume

    @property
    def num_tokens(self) -> int:
        """Return the tokens of one sample."""
        _, frames, height, width = self.latents
        return frames * height * width // self.architecture.patch_volume


def read_subject(config: DistillConfig) -> Subject:
    """Read the network of a run: from the base's configs when it is local, else from the table PUBLISHED.

    Raises:
        ConfigError: a base or teacher of unknown architecture, two that do not fit each other, one that is not text to
            video, or a size that does not fit it.
        CheckpointError: a base that cannot be, or whose configs cannot be read.
    """
    base = open_base(config.base)
    if not base.is_local and base.source not in PUBLISHED:
        raise _unknown("base", config.base)
    network = base.transformer_config if base.is_local else PUBLISHED[base.source]
    architecture = read_architecture(network)
    if base.is_local:
        latents = base.latent_shape(config.native)
    else:
        latents = latent_grid(config.native, architecture.in_channels, architecture.patch_size, *PUBLISHED_VAE_SCALES)
    return Subject(
        config=config,
        architecture=architecture,
        parameters=count_parameters(network),
        latents=tuple(latents),
        teacher=_read_teacher(config, base) if config.teacher else None,
    )


def _read_teacher(config: DistillConfig, base: Base) -> Network:
    teacher = open_teacher(config, base)
    is_local = teacher.transformer is not None or teacher.pipeline.is_local
    if not is_local and teacher.pipeline.source not in PUBLISHED:
        raise _unknown("teacher", config.teacher)
    if is_local and base.is_local:
        check_teacher(config, base)
    network = teacher.architecture if is_local else PUBLISHED[teacher.pipeline.source]
    return Network(architecture=read_architecture(network), parameters=count_parameters(network))


def _unknown(role: str, name: str) -> UnknownNetworkError:
    return UnknownNetworkError(
        f"expected a {role} that is a folder or one of {', '.join(PUBLISHED)}, got {name}: "
        f"a plan downloads nothing, so fetch that pipeline's configs and name their folder with --set {role}=FOLDER"
    )


def read_architecture(network: Mapping[str, Any]) -> Architecture:
    """Read the sizes from a transformer's config.

    Raises:
        ConfigError: a size is missing, or the network takes an image too.
    """
    if network.get("image_dim") is not None or network.get("added_kv_proj_dim") is not None:
        raise ConfigError("expected a text-to-video Wan transformer, got one with image inputs: name another base")
    names = Architecture.__dataclass_fields__.keys()
    missing = sorted(names - network.keys())
    if missing:
        raise ConfigError(f"expected {missing[0]} in the transformer's config, which lacks it: repair the base")
    return Architecture(**{**{name: network[name] for name in names}, "patch_size": tuple(network["patch_size"])})


def count_parameters(network: Mapping[str, Any]) -> ParameterCounts:
    """Build the transformer of a config on the meta device, where it takes no memory, and count its parameters."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(dict(network))
    embedder = transformer.condition_embedder
    linears = [module for module in transformer.blocks.modules() if isinstance(module, nn.Linear)]
    kept = set(transformer._keep_in_fp32_modules)
    return ParameterCounts(
        total=_count(transformer),
        block=_count(transformer.blocks[0]),
        cast=sum(_count(module) for module in (*linears, embedder.text_embedder)),
        kept_fp32=sum(
            parameter.numel() for name, parameter in transformer.named_parameters() if kept & set(name.split("."))
        ),
        lora_width=sum(linear.in_features + linear.out_features for linear in linears),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""The base of a run, the teacher's diffusers pipeline: found and its configs read once; weights are loaded when asked.

What a run asks of its base is a method here. Another kind of base (networks/analytic.py) overrides them, and says by
`has_vae` and `has_blocks` what it cannot do. Knows neither losses nor the training loop.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

from codmd_serve.config import default_bundle_path
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import load_module, load_tokenizer, read_part_config
from codmd_serve.wan.hub import hub_snapshot, is_hub_id
from codmd_serve.wan.vae import vae_scales
from distill.config import DistillConfig, NativeConfig
from distill.networks.head import add_head
from distill.networks.start import load_start
from distill.settings import HeadConfig

ANALYTIC_PREFIX = "analytic:"
CONFIGURED_PARTS = ("transformer", "vae", "scheduler")
PARTS = (*CONFIGURED_PARTS, "tokenizer", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A diffusers Wan pipeline. Each config is read at its first use and kept.

    Attributes:
        source: its folder, or its hub id.
        is_local: whether source is a folder.
    """

    source: str
    is_local: bool
    # Latents decode to videos: previews, a diffusers folder.
    has_vae: ClassVar[bool] = True
    # Networks of Wan blocks: sharded, compiled, checkpointed and adapted block by block, and called in bf16.
    has_blocks: ClassVar[bool] = True

    def prepared(self, cache_dir: Path) -> "Base":
        """Return the base with all that a run needs beside its files, made in the cache folder; here nothing is."""
        del cache_dir
        return self

    def check_run(self, config: DistillConfig, world_size: int, *, compiled: bool) -> None:
        """Refuse a run that the base's networks cannot be trained in.

        Raises:
            ConfigError: names the setting.
        """

    def caption_embeds(self, prompts: list[str]) -> list[Tensor] | None:
        """Return embeddings (L, D) of prompts that the base knows without a text encoder; None where it has one.

        Raises:
            ConfigError: a prompt that it does not know.
        """
        del prompts
        return None

    @property
    def name(self) -> str:
        """The folder's own name, or the hub id."""
        return Path(self.source).name if self.is_local else self.source

    @cached_property
    def folder(self) -> Path:
        """The pipeline on disk: the source, or one snapshot of the hub id, which is downloaded unless it is cached.

        Raises:
            CheckpointError: the hub does not have it, or cannot be asked.
        """
        return Path(self.source) if self.is_local else hub_snapshot(self.source, PARTS, self._missing)

    @cached_property
    def config_folder(self) -> Path:
        """As `folder`, but of a hub id the configs are enough."""
        if self.is_local:
            return Path(self.source)
        return hub_snapshot(self.source, CONFIGURED_PARTS, self._missing, configs_only=True)

    @property
    def _missing(self) -> str:
        return f"there is no folder {Path(self.source).absolute()}"

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        """The architecture of the transformer.

        Raises:
            CheckpointError: missing or damaged.
        """
        return read_part_config(WanTransformer3DModel, self.config_folder, "transformer")

    @cached_property
    def vae_scales(self) -> tuple[int, int]:
        """Frames and pixels per side that one latent stands for.

        Raises:
            CheckpointError: the VAE's config is missing or damaged.
        """
        return vae_scales(read_part_config(AutoencoderKLWan, self.config_folder, "vae"))

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Latent frames, rows and columns of one token."""
        return tuple(self.transformer_entry("patch_size"))

    def transformer_entry(self, name: str) -> Any:
        """Return one entry of the transformer's config.

        Raises:
            CheckpointError: it has none of that name.
        """
        if name not in self.transformer_config:
            raise CheckpointError(f"transformer/config.json of {self.source} has no {name}")
        return self.transformer_config[name]

    def latent_shape(self, native: NativeConfig) -> tuple[int, ...]:
        """Return (C, F, H, W) of the latents of one native video.

        Raises:
            ConfigError: the size is not on the grid of VAE and patches.
            CheckpointError: a config cannot be read.
        """
        return latent_grid(native, self.transformer_entry("in_channels"), self.patch_size, *self.vae_scales)

    def num_tokens(self, native: NativeConfig) -> int:
        """Return the number of tokens of one native video; raises as `latent_shape`."""
        sizes = self.latent_shape(native)[1:]
        return math.prod(size // cell for size, cell in zip(sizes, self.patch_size, strict=True))

    def load(self, kind: Any, part: str, **options: Any) -> Any:
        """Load the module of one subfolder with `kind.from_pretrained`.

        Raises:
            CheckpointError: missing, truncated or of another kind; missing tensors count, which the libraries only log.
        """
        return load_module(kind, self.folder, part, **options)

    def load_transformer(self, dtype: torch.dtype) -> WanTransformer3DModel:
        """Load the transformer; raises as `load`."""
        transformer: WanTransformer3DModel = self.load(WanTransformer3DModel, "transformer", torch_dtype=dtype)
        return transformer

    def load_teacher(self, dtype: torch.dtype) -> WanTransformer3DModel:
        """Load the network of the teacher; raises as `load`."""
        return self.load_transformer(dtype)

    def load_start(self, transformer: WanTransformer3DModel, source: str, setting: str) -> WanTransformer3DModel:
        """Give a network the weights that student or critic start from; see `networks.start.load_start`."""
        return load_start(transformer, source, setting)

    def add_head(self, transformer: WanTransformer3DModel, head: HeadConfig) -> None:
        """Give a critic the head of a discriminator, in place; see `networks.head.add_head`."""
        add_head(transformer, head)

    def empty_transformer(self) -> WanTransformer3DModel:
        """Return a transformer of the base's architecture on the meta device, without weights."""
        with torch.device("meta"):
            transformer: WanTransformer3DModel = WanTransformer3DModel.from_config(self.transformer_config)
        return transformer

    def load_tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            CheckpointError: missing or damaged.
        """
        return load_tokenizer(self.folder)

    def scheduler_shift(self) -> float:
        """Return the noise shift that the pipeline's scheduler was saved with.

        Raises:
            CheckpointError: the scheduler is missing or damaged.
        """
        config = read_part_config(FlowMatchEulerDiscreteScheduler, self.config_folder, "scheduler")
        # Published Wan folders name a multistep scheduler, whose entry for the same number is flow_shift.
        return float(config.get("shift", config.get("flow_shift", 1.0)))


def open_base(name: str) -> Base:
    """Find the teacher's pipeline: a folder, one of the bundled weights, or a hub id. Nothing is downloaded.

    `analytic:NAME` is the exact teacher of an analytic world.

    Raises:
        CheckpointError: no such folder, and the text cannot be a hub id.
        ConfigError: no analytic world of that name.
    """
    if name.startswith(ANALYTIC_PREFIX):
        from distill.networks.analytic import AnalyticBase

        return AnalyticBase.of_world(name.removeprefix(ANALYTIC_PREFIX))
    folder, bundled = Path(name), default_bundle_path().parent / Path(name).name
    if folder.is_dir():
        return Base(source=str(folder), is_local=True)
    is_bundled_name = folder.parent == Path("weights")
    if is_bundled_name and bundled.is_dir():
        return Base(source=str(bundled), is_local=True)
    if is_bundled_name or not is_hub_id(name):
        raise CheckpointError(f"no pipeline at {name[:200]}: name a diffusers Wan folder or a hub id")
    return Base(source=name, is_local=False)


def latent_grid(
    native: NativeConfig, num_channels: int, patch_size: tuple[int, ...], temporal: int, spatial: int
) -> tuple[int, ...]:
    """Return (C, F, H, W) of the latents of one native video, for a VAE that shrinks by `temporal` and `spatial`.

    Raises:
        ConfigError: the size is not on the grid of VAE and patches.
    """
    for name, size, cell in (("height", native.height, patch_size[1]), ("width", native.width, patch_size[2])):
        if size % (spatial * cell):
            raise ConfigError(f"native.{name} must be a multiple of {spatial * cell}, got {size}")
    if (native.num_frames - 1) % temporal:
        raise ConfigError(f"native.num_frames must be 1 more than a multiple of {temporal}, got {native.num_frames}")
    num_latent_frames = (native.num_frames - 1) // temporal + 1
    return num_channels, num_latent_frames, native.height // spatial, native.width // spatial

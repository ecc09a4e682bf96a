"""The base of a run in an analytic world: the teacher is exact, student and critic start from one small network.

That network is regressed on the exact flow once per world and kept in the cache folder:

CACHE/analytic-NAME-KEY/transformer/     its config and weights; KEY tells worlds and settings apart
"""

import dataclasses
import hashlib
import json
import logging
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import atomic_folder, first_line
from codmd_serve.wan.checkpoint import load_module
from distill.config import DistillConfig, NativeConfig
from distill.networks.base import ANALYTIC_PREFIX, Base
from distill.networks.head import DiscriminatorHead
from distill.settings import HeadConfig
from distill.worlds.analytic.makers import make_world
from distill.worlds.analytic.network import AnalyticNetwork
from distill.worlds.analytic.pretrain import PretrainConfig, new_network, pretrain
from distill.worlds.analytic.world import ExactTeacher, GaussianWorld

PRETRAIN = PretrainConfig()

logger = logging.getLogger(__name__)


class HeadedAnalyticNetwork(AnalyticNetwork):
    """A critic with the head of a discriminator; made by `AnalyticBase.add_head`."""

    gan_head: DiscriminatorHead

    def forward(self, *args: Any, classify: bool = False, **options: Any) -> tuple[Tensor]:
        """Call the network; with `classify`, return (logits (B,),)."""
        if not classify:
            return super().forward(*args, **options)
        features: list[Tensor] = []
        handle = self.last.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
        try:
            super().forward(*args, **options)
        finally:
            handle.remove()
        return (self.gan_head(features[0][:, None]),)


@final
@dataclass(frozen=True, kw_only=True)
class AnalyticBase(Base):
    """An analytic world as a base. It has no VAE, no text encoder and no Wan blocks.

    Attributes:
        world_name: which world.
        start: folder of the network that student and critic start from; None before `prepared`.
    """

    world_name: str
    start: Path | None = None
    has_vae: ClassVar[bool] = False
    has_blocks: ClassVar[bool] = False

    @classmethod
    def of_world(cls, name: str) -> "AnalyticBase":
        """Return the base of a world by its name.

        Raises:
            ConfigError: there is none of that name.
        """
        make_world(name)
        return cls(source=ANALYTIC_PREFIX + name, is_local=False, world_name=name)

    @cached_property
    def world(self) -> GaussianWorld:
        """The world."""
        return make_world(self.world_name)

    def prepared(self, cache_dir: Path) -> "AnalyticBase":
        """Return the base with its start network, which is trained unless the cache has it.

        Raises:
            CheckpointError: the cache cannot be written.
        """
        folder = self.start_folder(cache_dir)
        if not (folder / "transformer").is_dir():
            logger.info("regressing the start network world=%s updates=%d", self.world_name, PRETRAIN.updates)
            network, error = pretrain(self.world, PRETRAIN)
            logger.info("start network world=%s flow_mse=%.4f", self.world_name, error)
            try:
                with atomic_folder(folder) as fresh:
                    network.save_pretrained(fresh / "transformer")
            except OSError as problem:
                raise CheckpointError(f"{folder} cannot be written: {first_line(problem)}") from problem
        return replace(self, start=folder)

    def start_folder(self, cache_dir: Path) -> Path:
        """Return the folder of the start network in a cache; its name follows from the law and the settings."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(PRETRAIN), sort_keys=True).encode())
        world = self.world
        for tensor in (world.means, world.prior, world.covariance):
            # Rounded: the last bits differ between machines.
            digest.update(tensor.double().mul(1e4).round().long().numpy().tobytes())
        return cache_dir / f"analytic-{self.world_name}-{digest.hexdigest()[:16]}"

    @cached_property
    def folder(self) -> Path:
        """The folder of the start network.

        Raises:
            CheckpointError: before `prepared`.
        """
        if self.start is None:
            raise CheckpointError(f"{self.source} has no files of its own: it is no pipeline")
        return self.start

    @cached_property
    def config_folder(self) -> Path:
        """As `folder`."""
        return self.folder

    @cached_property
    def transformer_config(self) -> dict[str, Any]:
        """The architecture of student and critic."""
        return dict(self.empty_transformer().config)

    def empty_transformer(self) -> AnalyticNetwork:
        """Return a network of the architecture of student and critic on the meta device, without weights."""
        world = self.world  # its own tensors are real
        with torch.device("meta"):
            return new_network(world, PRETRAIN.width)

    def latent_shape(self, native: NativeConfig) -> tuple[int, ...]:
        """Return (C, F, H, W) of the world.

        Raises:
            ConfigError: `native` is of another size.
        """
        _, num_frames, height, width = self.world.shape
        if (native.num_frames, native.height, native.width) != (num_frames, height, width):
            raise ConfigError(
                f"native must be {width}x{height}, {num_frames} frames, in world {self.world_name}, "
                f"got {native.width}x{native.height}, {native.num_frames} frames"
            )
        return self.world.shape

    def load_transformer(self, dtype: torch.dtype) -> AnalyticNetwork:
        """Load the start network.

        Raises:
            CheckpointError: missing or damaged.
        """
        network: AnalyticNetwork = load_module(AnalyticNetwork, self.folder, "transformer", torch_dtype=dtype)
        return network

    def load_teacher(self, dtype: torch.dtype) -> nn.Module:
        """Return the exact flow, which has no weights."""
        del dtype
        return ExactTeacher(self.world)

    def load_start(self, transformer: nn.Module, source: str, setting: str) -> nn.Module:
        """Give a network the weights of a bundle of the same world.

        Raises:
            CheckpointError: no bundle, or one of another architecture.
        """
        try:
            weights = load_module(AnalyticNetwork, source, "transformer").state_dict()
            transformer.load_state_dict(weights)
        except (CheckpointError, RuntimeError) as error:
            raise CheckpointError(f"{setting}: {first_line(error)}") from error
        return transformer

    def add_head(self, transformer: nn.Module, head: HeadConfig) -> None:
        """Give a critic the head of a discriminator, in place: on its last features, as one token."""
        assert isinstance(transformer, AnalyticNetwork)
        width = transformer.last.in_features
        transformer.__class__ = HeadedAnalyticNetwork
        transformer.gan_head = DiscriminatorHead(width, 0, head, transformer.last.weight.device)

    def caption_embeds(self, prompts: list[str]) -> list[Tensor]:
        """Return the one-hot embeddings (1, P + 1) of captions; the empty prompt stands for no caption.

        Raises:
            ConfigError: another text.
        """
        rows = self.world.embeds(torch.arange(self.world.num_captions + 1))
        return [rows[self._caption(prompt)] for prompt in prompts]

    def _caption(self, prompt: str) -> int:
        found = re.fullmatch(r"caption ([0-9]{1,4})", prompt)
        if prompt and (found is None or int(found[1]) >= self.world.num_captions):
            raise ConfigError(
                f"expected prompts caption 0 to caption {self.world.num_captions - 1} in world {self.world_name}, "
                f"got {prompt[:100]!r}"
            )
        return int(found[1]) if found else self.world.num_captions

    def check_run(self, config: DistillConfig, world_size: int, *, compiled: bool) -> None:
        """Refuse what needs Wan blocks.

        Raises:
            ConfigError: names the setting.
        """
        asked = {
            f"precision fp32, got {config.precision}": config.precision != "fp32",
            "lora_critic_rank 0": config.lora_critic_rank > 0,
            "lora_student_rank 0": config.lora_student_rank > 0,
            "activation_checkpointing false": config.activation_checkpointing,
            f"one process, got {world_size}": world_size > 1,
            "no --compile": compiled,
        }
        for wish, is_asked in asked.items():
            if is_asked:
                raise ConfigError(f"world {self.world_name} needs {wish}: its networks have no Wan blocks")

"""LoRA: a critic's adapters on the frozen teacher, which is the teacher while they are off, and those of a student.

Knows neither losses nor the training loop.

Legend: r is the rank of the adapters.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distill.config import DistillConfig
from distill.streams import named_rng

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Every linear layer of a block.
ADAPTED = (*(f"{name}.{part}" for name in ("attn1", "attn2") for part in _ATTENTION), "ffn.net.0.proj", "ffn.net.2")


class Switch:
    """Turns the adapters of one transformer on and off."""

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on

    @contextmanager
    def turned(self, is_on: bool) -> Iterator[None]:
        """Turn the adapters on or off inside the block."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """The adapters of one role: their switch, rank and alpha."""

    role: str
    switch: Switch
    rank: int
    alpha: float


def critic_adapters(config: DistillConfig) -> Adapters | None:
    """Return the adapters of a LoRA critic, off at first; None for a full critic."""
    rank, alpha = config.lora_critic_rank, config.lora_critic_alpha
    return Adapters(role="critic", switch=Switch(), rank=rank, alpha=alpha) if rank else None


def student_adapters(config: DistillConfig) -> Adapters | None:
    """Return the adapters of a LoRA student, which are always on; None for a full student."""
    rank, alpha = config.lora_student_rank, config.lora_student_alpha
    return Adapters(role="student", switch=Switch(is_on=True), rank=rank, alpha=alpha) if rank else None


class AdaptedLinear(nn.Linear):
    """A frozen linear layer, plus scale * up @ down while the switch is on; made by `add_adapters`.

    Attributes:
        lora_down: (r, in) float32, trained.
        lora_up: (out, r) float32, trained.
        lora_scale: alpha / r.
        switch: shared by all adapters of the transformer.
    """

    lora_down: nn.Parameter
    lora_up: nn.Parameter
    lora_scale: float
    switch: Switch

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in)."""
        output = super().forward(input)
        if not self.switch.is_on:
            return output
        update = functional.linear(functional.linear(input, self.lora_down), self.lora_up)
        return output + self.lora_scale * update


def add_adapters(
    transformer: WanTransformer3DModel, switch: Switch, rank: int, alpha: float, name: str = "critic"
) -> None:
    """Freeze a transformer and add an adapter, zero at first, to every linear layer of its blocks.

    Args:
        transformer: changed in place; on the meta device too.
        switch: turns all adapters on and off.
        rank: 1 or more.
        alpha: the adapters are scaled by alpha / rank.
        name: of the role, whose draw is its own.

    Source: LoRA (arXiv 2106.09685): down is uniform as nn.Linear's own weights, up is zero. The draw depends on the
    position of the layer alone, so all ranks and all runs start with the same adapters.
    """
    transformer.requires_grad_(False)
    for index, block in enumerate(transformer.blocks):
        for place, part in enumerate(ADAPTED):
            linear = block.get_submodule(part)
            rng = named_rng(0, f"lora {name}", index, place)
            bound = 1.0 / math.sqrt(linear.in_features)
            down = (2.0 * torch.rand(rank, linear.in_features, generator=rng) - 1.0) * bound
            device = linear.weight.device
            linear.__class__ = AdaptedLinear
            linear.lora_down = nn.Parameter(down.to(device))
            linear.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
            linear.lora_scale, linear.switch = alpha / rank, switch


class AdaptedCritic(nn.Module):
    """Calls the transformer of `add_adapters` with its adapters on."""

    def __init__(self, base: WanTransformer3DModel, switch: Switch) -> None:
        super().__init__()
        self.base, self.switch = base, switch

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the transformer with the same arguments."""
        with self.switch.turned(True):
            return self.base(*args, **options)


def merged_weights(
    base: WanTransformer3DModel, adapters: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a network whose adapters have become part of it, float32, by diffusers name.

    Args:
        base: the frozen network.
        adapters: lora_down and lora_up of each adapted layer, by parameter name; each is read once and not kept.
        scale: alpha / rank.
    """
    adapted = {name.rpartition(".")[0] for name in adapters}
    for name, tensor in base.state_dict().items():
        module, _, leaf = name.rpartition(".")
        weight = tensor.float()
        if leaf == "weight" and module in adapted:
            weight = weight + scale * (adapters[f"{module}.lora_up"].float() @ adapters[f"{module}.lora_down"].float())
        yield name, weight


def diffusers_lora(adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return adapters under diffusers' names, float32.

    The scale goes into lora_B, so that alpha equals the rank, which every reader takes where none is stated.

    Args:
        adapters: lora_down and lora_up by parameter name.
        scale: alpha / rank.

    Source: diffusers, WanLoraLoaderMixin: transformer.MODULE.lora_A.weight is down, lora_B up.
    """
    renamed = {}
    for name, tensor in adapters.items():
        module, _, leaf = name.rpartition(".")
        half, factor = ("lora_B", scale) if leaf == "lora_up" else ("lora_A", 1.0)
        renamed[f"transformer.{module}.{half}.weight"] = (factor * tensor.float()).contiguous()
    return renamed


def checkpoint_activations(transformer: WanTransformer3DModel, switch: Switch | None = None) -> None:
    """Turn on activation checkpointing: keep only the inputs of blocks, recompute the rest in the backward pass.

    Args:
        transformer: changed in place.
        switch: of its adapters; recomputation restores the state it had in the forward pass.
    """

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), nullcontext() if switch is None else switch.turned(switch.is_on)

    # A Wan block draws no random numbers, so there is no generator state to restore.
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    transformer.enable_gradient_checkpointing(lambda block, *args: recompute(block, *args))

"""A LoRA critic: adapters on the frozen teacher's own module, which is the teacher while they are off.

Knows neither losses nor the training loop.

Legend: r is the rank of the adapters.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Every linear layer of a block.
ADAPTED = (*(f"{name}.{part}" for name in ("attn1", "attn2") for part in _ATTENTION), "ffn.net.0.proj", "ffn.net.2")


class Switch:
    """Turns the adapters of one transformer on and off."""

    def __init__(self) -> None:
        self.is_on = False

    @contextmanager
    def turned(self, is_on: bool) -> Iterator[None]:
        """Turn the adapters on or off inside the block."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before


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


def add_adapters(transformer: WanTransformer3DModel, switch: Switch, rank: int, alpha: float) -> None:
    """Freeze a transformer and add an adapter, zero at first, to every linear layer of its blocks.

    Args:
        transformer: changed in place; on the meta device too.
        switch: turns all adapters on and off.
        rank: 1 or more.
        alpha: the adapters are scaled by alpha / rank.

    Source: LoRA (arXiv 2106.09685): down is uniform as nn.Linear's own weights, up is zero. The draw depends on the
    position of the layer alone, so all ranks and all runs start with the same adapters.
    """
    transformer.requires_grad_(False)
    for index, block in enumerate(transformer.blocks):
        for place, name in enumerate(ADAPTED):
            linear = block.get_submodule(name)
            rng = torch.Generator().manual_seed(index * len(ADAPTED) + place)
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

"""A critic of low rank on the weights of the frozen teacher, which is the same module with its adapters switched off.

Knows neither losses nor the training loop. r is the rank.
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
    """Whether the adapters of one transformer take part."""

    def __init__(self) -> None:
        self.is_on = False

    @contextmanager
    def turned(self, is_on: bool) -> Iterator[None]:
        """Switch the adapters on or off for a while."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before


class AdaptedLinear(nn.Linear):
    """A frozen linear layer plus scale * up @ down, where the switch is on; made by `add_adapters`.

    lora_down (r, in) and lora_up (out, r) are float32 and trained.
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
    """Freeze a transformer and give every linear layer of its blocks an adapter that changes nothing yet.

    Args:
        transformer: changed in place; on the meta device too.
        switch: of all its adapters.
        rank: 1 or more.
        alpha: the adapters weigh alpha / rank.

    Source: LoRA (arXiv 2106.09685), down uniform as a linear layer's own weights, up zero. The draw is a function of
    the layer's place, so all processes and all runs start alike.
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
    """The transformer that `add_adapters` changed, called with its adapters on."""

    def __init__(self, base: WanTransformer3DModel, switch: Switch) -> None:
        super().__init__()
        self.base, self.switch = base, switch

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call the transformer with the same arguments."""
        with self.switch.turned(True):
            return self.base(*args, **options)


def checkpoint_activations(transformer: WanTransformer3DModel, switch: Switch | None = None) -> None:
    """Keep only the inputs of every block for the backward pass, which computes the rest again.

    Args:
        transformer: changed in place.
        switch: of its adapters, which stand again as they stood in the forward pass while blocks are computed again.
    """

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), nullcontext() if switch is None else switch.turned(switch.is_on)

    # No random numbers are drawn in a Wan block, so there is no generator to put back.
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    transformer.enable_gradient_checkpointing(lambda block, *args: recompute(block, *args))

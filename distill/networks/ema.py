"""The exponential moving average of a network's parameters; knows neither losses nor the training loop."""

import functools
import math

import torch
from torch import nn

from distill.config import EmaConfig


def ema_decay(config: EmaConfig, update: int) -> float:
    """Return the decay of the average at update number `update`, counted from 1.

    kind "power": (1 - 1 / n)^(gamma + 1) at the n-th update after the start, which averages with weights that grow as
    n^gamma. Such weights have the standard deviation sqrt(gamma + 1) / ((gamma + 2) * sqrt(gamma + 3)) over n, and
    gamma is the number for which that is `length`: 6.94 for .1, 16.97 for .05.

    Source: EDM2 (arXiv 2312.02696), section 3.1, as rCM (arXiv 2510.08431) uses it.
    """
    num_averaged = update - config.start_after_updates
    if num_averaged <= 0:
        return 0.0
    if config.kind == "constant":
        return config.decay
    return math.pow(1.0 - 1.0 / num_averaged, _power_exponent(config.length) + 1.0)


@functools.cache
def _power_exponent(length: float) -> float:
    low, high = 0.0, 1.0 / length  # the spread falls with gamma and is below 1 / gamma
    for _ in range(100):
        middle = 0.5 * (low + high)
        spread = math.sqrt(middle + 1.0) / ((middle + 2.0) * math.sqrt(middle + 3.0))
        low, high = (middle, high) if spread > length else (low, middle)
    return low


class Ema:
    """The moving average of a network's trained parameters, in float32, `shadow` by name.

    For the first `start_after_updates` it is a copy.
    """

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.num_updates = 0
        self.shadow = {name: tensor.detach().float().clone() for name, tensor in _trained(network)}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Add the network's current parameters to the average; call once after each update."""
        self.num_updates += 1
        # lerp towards the network; weight 1 copies.
        weight = 1.0 - ema_decay(self.config, self.num_updates)
        sources = [tensor.detach().float() for _, tensor in _trained(network)]
        torch._foreach_lerp_(list(self.shadow.values()), sources, weight)


def _trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]

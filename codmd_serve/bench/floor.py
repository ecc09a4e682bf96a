"""The least work of a request, counted on the diffusers modules, and the measured peak rates of the machine.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, L prompt positions, D width.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5EncoderModel

from codmd_serve.wan.text import MAX_SEQUENCE_LENGTH

MATMUL_SIDE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
CEILING_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Work:
    """The least work of a stage: floating-point operations, and bytes that it must read or write.

    The bytes are weights once per call, inputs and outputs; activations in between are not counted, because a better
    kernel keeps them out of memory.
    """

    flop: int
    num_bytes: int

    def times(self, calls: int) -> "Work":
        """Return the work of several calls."""
        return Work(self.flop * calls, self.num_bytes * calls)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Best rates measured in this run: a large matrix product (FLOP/s) and a large copy (bytes/s, both ways)."""

    flop_per_s: float
    bytes_per_s: float

    def floor_s(self, work: Work) -> float:
        """Return the least time of the work at these rates, in seconds."""
        return max(work.flop / self.flop_per_s, work.num_bytes / self.bytes_per_s)

    def best(self, other: "Ceilings") -> "Ceilings":
        """Return the higher of each rate."""
        return Ceilings(max(self.flop_per_s, other.flop_per_s), max(self.bytes_per_s, other.bytes_per_s))


def transformer_work(config: Any, latent_shape: Sequence[int], dtype: torch.dtype) -> Work:
    """Count the work of one forward pass with all 512 prompt positions, batch 1.

    Args:
        config: of a WanTransformer3DModel.
        latent_shape: (C, F, H, W).
        dtype: of the weights.

    Counted on one and on two layers, because layers are alike: 30 of them take a minute on a slow CPU.
    """

    def count(num_layers: int) -> tuple[int, int]:
        with torch.device("meta"):
            network = WanTransformer3DModel.from_config({**config, "num_layers": num_layers})
            prompt = torch.empty(1, MAX_SEQUENCE_LENGTH, config["text_dim"])
            latents, timestep = torch.empty(1, *latent_shape), torch.empty(1)
            return _flop(lambda: network(latents, timestep, prompt, return_dict=False)), num_parameters(network)

    flop, num_weights = _extended(count, config["num_layers"])
    num_latents = torch.Size(latent_shape).numel()
    return Work(flop, num_weights * dtype.itemsize + 2 * num_latents * torch.float32.itemsize)


def vae_work(config: Any, latent_shape: Sequence[int], dtype: torch.dtype) -> Work:
    """Count the work of decoding one video.

    Args:
        config: of an AutoencoderKLWan.
        latent_shape: (C, F, H, W).
        dtype: of the weights.

    Counted on up to three latent frames, because every one after the first is alike.
    """
    channels, frames, height, width = latent_shape
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(dict(config))

        def count(num_frames: int) -> tuple[int, int]:
            latents = torch.empty(1, channels, num_frames, height, width)
            return _flop(lambda: vae.decode(latents, return_dict=False)), 0

        # The first one has no past, so the rule "alike" starts at the second.
        flop = count(1)[0] if frames == 1 else _extended(lambda given: count(given + 1), frames - 1)[0]
    num_pixels = 3 * ((frames - 1) * config["scale_factor_temporal"] + 1) * height * width
    num_pixels *= config["scale_factor_spatial"] ** 2
    weights = num_parameters(vae.decoder) + num_parameters(vae.post_quant_conv)
    num_latents = torch.Size(latent_shape).numel()
    return Work(flop, weights * dtype.itemsize + num_latents * torch.float32.itemsize + num_pixels)


def text_work(config: Any, dtype: torch.dtype) -> Work:
    """Count the work of embedding one prompt, padded to 512 positions; the embedding table is not read as a whole.

    Args:
        config: of a UMT5EncoderModel.
        dtype: of the weights.
    """

    def count(num_layers: int) -> tuple[int, int]:
        shallow = copy.deepcopy(config)
        shallow.num_layers = num_layers
        with torch.device("meta"):
            encoder = UMT5EncoderModel(shallow)
            tokens = torch.empty(1, MAX_SEQUENCE_LENGTH, dtype=torch.long)
            return _flop(lambda: encoder(tokens)), num_parameters(encoder.encoder.block)

    flop, num_weights = _extended(count, config.num_layers)
    return Work(flop, (num_weights + 2 * MAX_SEQUENCE_LENGTH * config.d_model) * dtype.itemsize)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the best of several large matrix products in `dtype` and of several large copies; about a second."""
    side, size = MATMUL_SIDE[device.type], COPY_BYTES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    matmul_s = _best_s(lambda: torch.mm(left, right, out=product), device)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device)
    return Ceilings(2 * side**3 / matmul_s, 2 * size / copy_s)


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(CEILING_REPEATS + 1):
        _wait(device)
        start_s = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start_s)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flop(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    total: int = counter.get_total_flops()
    return total


def _extended(count: Callable[[int], tuple[int, int]], number: int) -> tuple[int, int]:
    """Extrapolate `count` linearly to `number` equal layers from one and two."""
    one = count(1)
    if number == 1:
        return one
    two = count(2)
    return one[0] + (number - 1) * (two[0] - one[0]), one[1] + (number - 1) * (two[1] - one[1])

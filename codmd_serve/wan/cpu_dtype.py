"""Chooses float32 or bfloat16 for a transformer on a CPU by measuring one step; knows no sampler.

bfloat16 pays where the processor multiplies it (AVX512-BF16, AMX), and only for matrices that are large enough. Its
step may differ from float32 by at most MAX_STEP_ERROR.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.transformer import FewStepTransformer

MIN_RACED_WEIGHTS = 1_000_000  # a smaller network waits for calls, not for products
NUM_RACED_BLOCKS = 8  # blocks are alike; all 30 of Wan 1.3B would take seconds and gigabytes
MAX_RACED_TOKENS = 2048
NUM_RACES = 3
MAX_TIME_RATIO = 0.9  # of the CPU time in float32; a smaller gain is not worth the rounding
MAX_STEP_ERROR = 0.02  # |difference| / |flow| of one step; bfloat16 itself rounds by .0017
NUM_PROMPT_POSITIONS_RACED = 32

logger = logging.getLogger(__name__)


@torch.inference_mode()
def fastest_dtype(
    source: WanTransformer3DModel, timesteps: Sequence[float], latents_shape: Sequence[int], verdicts: Verdicts
) -> torch.dtype:
    """Return bfloat16 where a step is faster in it and near enough to float32, else float32.

    Args:
        source: in float32 on a CPU that multiplies bfloat16; not changed.
        timesteps: of the student.
        latents_shape: (C, F, H, W) of the video that is served most.
        verdicts: of earlier loads; a known one is taken without measuring.
    """
    if sum(parameter.numel() for parameter in source.parameters()) < MIN_RACED_WEIGHTS:
        return torch.float32
    known = verdicts.get("dtype", ("float32", "bfloat16"))
    if known is not None:
        return torch.bfloat16 if known == "bfloat16" else torch.float32
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(1, *_bounded(latents_shape, source.config.patch_size), generator=rng)
    embeds = torch.randn(1, NUM_PROMPT_POSITIONS_RACED, source.config.text_dim, generator=rng)
    steps = [_step(source, dtype, timesteps, latents, embeds) for dtype in (torch.float32, torch.bfloat16)]
    want, got = (step().float() for step in steps)
    error = float((got - want).norm() / want.norm())
    wide_s, narrow_s = least_times_s(steps)
    is_chosen = narrow_s <= MAX_TIME_RATIO * wide_s and error <= MAX_STEP_ERROR
    logger.info("dtype race: float32_ms=%.1f bfloat16_ms=%.1f error=%.2g", 1e3 * wide_s, 1e3 * narrow_s, error)
    verdicts.put("dtype", "bfloat16" if is_chosen else "float32")
    return torch.bfloat16 if is_chosen else torch.float32


def least_times_s(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Return the least CPU seconds of each run, timed in turns.

    Not those of the clock: on a machine with other work, that is what would be measured.
    """
    times_s = [[float("inf")] for _ in runs]
    for _ in range(NUM_RACES):
        for run, taken_s in zip(runs, times_s, strict=True):
            start_s = time.process_time()
            run()
            taken_s.append(time.process_time() - start_s)
    return [min(taken_s) for taken_s in times_s]


def _bounded(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int, int]:
    """Return (C, F, H, W) of fewer frames, then of fewer rows, so that a step has at most MAX_RACED_TOKENS."""
    channels, frames, height, width = shape
    row_tokens = width // patch[2]
    frames = min(frames, patch[0] * max(1, MAX_RACED_TOKENS // (row_tokens * (height // patch[1]))))
    rows = max(1, MAX_RACED_TOKENS // (row_tokens * (frames // patch[0])))
    return channels, frames, min(height, patch[1] * rows), width


def _step(
    source: WanTransformer3DModel,
    dtype: torch.dtype,
    timesteps: Sequence[float],
    latents: Tensor,
    embeds: Tensor,
) -> Callable[[], Tensor]:
    """Return a function that runs the last step of a copy of the first blocks in `dtype`."""
    # By hand: from_config would draw weights, and compute rotary tables that are there already.
    part = copy.copy(source)
    parts = {name: copy.deepcopy(child) for name, child in source.named_children() if name not in ("rope", "blocks")}
    parts["blocks"] = nn.ModuleList(copy.deepcopy(block) for block in source.blocks[:NUM_RACED_BLOCKS])
    part._modules = {name: child.to(dtype) for name, child in parts.items()} | {"rope": source.rope}
    part._parameters = {
        name: nn.Parameter(values.detach().to(dtype, copy=True), requires_grad=False)
        for name, values in source.named_parameters(recurse=False)
    }
    network = FewStepTransformer(part, timesteps[-1:])
    prompt = network.encode_prompt(embeds)

    def run() -> Tensor:
        flow: Tensor = network(latents, 0, prompt)
        return flow

    return run

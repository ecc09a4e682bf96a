"""Bytes on a CUDA device: what is free, and what a run takes at its peak. On a CPU nothing is counted."""

from collections.abc import Callable
from typing import TypeVar

import torch

MEMORY_SHARE = 0.9  # of what is free; the rest is for fragments, workspaces and the driver
GIB = 2.0**30

ResultT = TypeVar("ResultT")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that new tensors may take, or None on a CPU; returns cached blocks to the driver first."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])


def run_with_peak(device: torch.device, run: Callable[[], ResultT]) -> tuple[ResultT, int]:
    """Return the result of a run, and the bytes it had allocated at its peak beyond those before; 0 on a CPU."""
    if device.type != "cuda":
        return run(), 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before

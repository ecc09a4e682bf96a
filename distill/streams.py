"""Named streams of random numbers: a run is a function of its config, so no generator state is ever saved.

Knows no network and no method.
"""

import hashlib

import torch
from torch import Tensor


def named_rng(seed: int, name: str, index: int, position: int = 0) -> torch.Generator:
    """Return a CPU generator that is a function of the arguments alone.

    Args:
        seed: of the run.
        name: what the numbers are for, for example the role whose turn it is.
        index: iteration, or another count.
        position: place in the batch, where each place has a stream of its own.
    """
    digest = hashlib.sha256(f"{seed} {name} {index} {position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_noise(rng: torch.Generator, shape: tuple[int, ...], positions: range) -> Tensor:
    """Draw N(0, 1) for some places of the batch, each from a stream of its own.

    Args:
        rng: in one state on all ranks; it advances by one number.
        shape: of one sample's noise.
        positions: places in the whole batch.

    Returns:
        (number of positions, *shape) float32. A place gets the same noise on whatever rank it is drawn, and no rank
        draws the noise of others, which takes seconds for 64 videos of Wan's size.
    """
    seed = int(torch.randint(2**62, (), generator=rng))
    rows = [torch.randn(shape, generator=named_rng(seed, "sample", 0, position)) for position in positions]
    return torch.stack(rows)

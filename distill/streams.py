"""Named streams of random numbers: a run is a function of its config, so no generator state is ever saved.

Knows no network and no method. A stream is named by what it is for, an index and a position; Philox, a counter-based
generator, turns the name into the whole state of a torch generator. Two names never give one stream: for one seed and
purpose, Philox permutes its counters, and the counter is (index, position). torch's own `manual_seed` keeps 32 bits, so
of the 200,000 streams of a run some would coincide.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

# Of torch's CPU generator: 64-bit words of its state before and in the Mersenne Twister's.
_HEAD_WORDS, _TWISTER_WORDS = 3, 624
_FRESH_STATE = torch.Generator().manual_seed(0).get_state()


def named_rng(seed: int, name: str, index: int, position: int = 0) -> torch.Generator:
    """Return a CPU generator that is a function of the arguments alone.

    Args:
        seed: of the run.
        name: what the numbers are for, for example the role whose turn it is.
        index: iteration, or another count; 0 or more.
        position: place in the batch, where each place has a stream of its own; 0 or more.
    """
    state = _FRESH_STATE.clone()
    state[8 * _HEAD_WORDS : 8 * (_HEAD_WORDS + _TWISTER_WORDS)] = _twister_words(seed, name, index, position)
    rng = torch.Generator()
    rng.set_state(state)
    return rng


def _twister_words(seed: int, name: str, index: int, position: int) -> Tensor:
    """Return the Mersenne Twister's state of a stream: its words, as torch stores them, as bytes."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    philox = np.random.Philox(
        key=np.frombuffer(digest[:16], dtype=np.uint64), counter=np.array([0, 0, position, index], dtype=np.uint64)
    )
    words = philox.random_raw(_TWISTER_WORDS // 2).view(np.uint32).astype(np.uint64)
    return torch.from_numpy(words.view(np.uint8))


def sample_noise(rng: torch.Generator, shape: tuple[int, ...], positions: range) -> Tensor:
    """Draw N(0, 1) for some places of the batch, each from a stream of its own.

    Args:
        rng: in one state on all ranks; it advances by two numbers.
        shape: of one sample's noise.
        positions: places in the whole batch.

    Returns:
        (number of positions, *shape) float32. A place gets the same noise on whatever rank it is drawn, and no rank
        draws the noise of others, which takes seconds for 64 videos of Wan's size.
    """
    # 126 bits: of 62, a billion draws would repeat one with a chance of a tenth.
    high, low = (int(number) for number in torch.randint(2**62, (2,), generator=rng))
    rows = [torch.randn(shape, generator=named_rng(high, f"sample {low}", 0, position)) for position in positions]
    return torch.stack(rows)

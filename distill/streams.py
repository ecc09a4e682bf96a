"""Named streams of random numbers: a run is a function of its config, so no generator state is ever saved.

Knows no network and no method. A stream is named by what it is for, an index and a position; Philox, a counter-based
generator, turns the name into the whole state of a torch generator. Two names never give one stream: for one seed and
purpose, Philox permutes its counters, and the counter is (index, position). torch's own `manual_seed` keeps 32 bits, so
of the 200,000 streams of a run some would coincide.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Of torch's CPU generator: 64-bit words of its state before and in the Mersenne Twister's.
_HEAD_WORDS, _TWISTER_WORDS = 3, 624
# Of Philox's counter, in the words of one state: a block is four numbers of 64 bits.
_BLOCKS = _TWISTER_WORDS // 8
_FRESH_STATE = torch.Generator().manual_seed(0).get_state()


def named_rng(seed: int, name: str, index: int, position: int = 0) -> torch.Generator:
    """Return a CPU generator that is a function of the arguments alone.

    Args:
        seed: of the run.
        name: what the numbers are for, for example the role whose turn it is.
        index: iteration, or another count; 0 or more.
        position: place in the batch, where each place has a stream of its own; 0 or more.
    """
    (rng,) = _rngs(seed, name, index, range(position, position + 1))
    return rng


def _rngs(seed: int, name: str, index: int, positions: range) -> Iterator[torch.Generator]:
    """Yield the generators of some places; each is one object's next state, so use it before the next one.

    The places follow each other in Philox's counter, so all are one call of it: for 64 of them .15 ms, against 1.7.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    philox = np.random.Philox(
        key=np.frombuffer(digest[:16], dtype=np.uint64),
        counter=np.array([positions.start * _BLOCKS, 0, 0, index], dtype=np.uint64),
    )
    words = philox.random_raw(len(positions) * _TWISTER_WORDS // 2).view(np.uint32).astype(np.uint64)
    # A tensor of its own: set_state reads from where the storage begins, also of a view.
    rng, state = torch.Generator(), _FRESH_STATE.clone()
    twister = state[8 * _HEAD_WORDS : 8 * (_HEAD_WORDS + _TWISTER_WORDS)]
    for row in torch.from_numpy(words.view(np.uint8)).view(len(positions), -1):
        twister.copy_(row)
        rng.set_state(state)
        yield rng


def sample_noise(rng: torch.Generator, shape: tuple[int, ...], positions: range) -> Tensor:
    """Draw N(0, 1) for some places of the batch, each from a stream of its own.

    Args:
        rng: in one state on all ranks; it advances by two numbers.
        shape: of one sample's noise.
        positions: places in the whole batch, without gaps.

    Returns:
        (number of positions, *shape) float32. A place gets the same noise on whatever rank it is drawn, and no rank
        draws the noise of others, which takes seconds for 64 videos of Wan's size.
    """
    # 126 bits: of 62, a billion draws would repeat one with a chance of a tenth.
    high, low = (int(number) for number in torch.randint(2**62, (2,), generator=rng))
    noise = torch.empty(len(positions), *shape)
    for row, own in zip(noise, _rngs(high, f"sample {low}", 0, positions), strict=True):
        row.normal_(generator=own)
    return noise

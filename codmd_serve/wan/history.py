"""What the causal convolutions of the VAE decoder remember from chunk to chunk, in tensors that never move.

A CUDA graph repeats kernels on the addresses that it was recorded with. So the last frames of a convolution's input are
copied into one tensor per convolution, made by the first chunk and written in place by all others.
"""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

HISTORY = 2  # frames that a causal convolution of 3 looks back


class History:
    """Last frames of the input of each causal convolution, of videos of one size, one video after the other."""

    def __init__(self) -> None:
        self._frames: dict[Hashable, Tensor] = {}
        self._kept: set[Hashable] = set()

    @property
    def kept(self) -> frozenset[Hashable]:
        """Return the convolutions that have seen a chunk of this video; the others look back at zeros."""
        return frozenset(self._kept)

    def restart(self, kept: Iterable[Hashable] = ()) -> None:
        """Begin another video, or take over what a replayed chunk did: its kernels write tensors, not `kept`."""
        self._kept = set(kept)

    def get(self, conv: Hashable) -> Tensor | None:
        """Return the last frames of a convolution, (B, C, 2, H, W); None when it has seen none of this video."""
        return self._frames[conv] if conv in self._kept else None

    def keep(self, conv: Hashable, room: Tensor) -> None:
        """Remember the last frames of the input `room` (B, C, T, H, W) of a convolution."""
        last = room[:, :, -HISTORY:]
        if conv not in self._frames:
            # An inference tensor could not be written in place outside of inference mode.
            with torch.inference_mode(False):
                self._frames[conv] = torch.empty(
                    last.shape, dtype=last.dtype, device=last.device, memory_format=torch.channels_last_3d
                )
        self._frames[conv].copy_(last)
        self._kept.add(conv)

    def addresses(self) -> dict[Hashable, int]:
        """Return where the frames of each convolution lie."""
        return {conv: frames.data_ptr() for conv, frames in self._frames.items()}

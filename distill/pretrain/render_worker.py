"""What a rendering process does: clips into slots of shared memory. Imports no torch, so that it starts in a second."""

import signal
from pathlib import Path

import numpy as np

from distill.pretrain.clips import BITS_SHAPE, CLIP_SHAPE, POINTS_PER_CLIP, ClipSource

_PIXEL_BYTES, _BIT_BYTES = int(np.prod(CLIP_SHAPE)), int(np.prod(BITS_SHAPE))
_POINT_BYTES = 2 * 3 * POINTS_PER_CLIP
CLIP_BYTES = _PIXEL_BYTES + _BIT_BYTES + _POINT_BYTES

_state: dict[str, tuple[np.memmap, ClipSource]] = {}


def split_slot(slot: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """View the bytes of a slot as pixels, object bits and points of `count` clips."""
    pixels_end = count * _PIXEL_BYTES
    bits_end = pixels_end + count * _BIT_BYTES
    return (
        slot[:pixels_end].reshape(count, *CLIP_SHAPE),
        slot[pixels_end:bits_end].reshape(count, *BITS_SHAPE),
        slot[bits_end : bits_end + count * _POINT_BYTES].view(np.int16).reshape(count, POINTS_PER_CLIP, 3),
    )


def open_slots(path: Path, shape: tuple[int, int], source: ClipSource) -> None:
    """Prepare a worker: map the slots. An interrupt is the main process's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _state["worker"] = (np.memmap(path, np.uint8, "r+", shape=shape), source)


def render_part(slot: int, start: int, count: int) -> list[str]:
    """Render clips start .. start + count into a slot; return their captions."""
    slots, source = _state["worker"]
    pixels, bits, points = split_slot(slots[slot], count)
    captions = []
    for place in range(count):
        clip = source.render(start + place)
        pixels[place], bits[place], points[place] = clip.pixels, clip.object_bits, clip.points
        captions.append(clip.caption)
    return captions

"""Clips as tensors for training: rendered in place for a CPU, or by all processes while a GPU trains.

Legend: P clips, T frames, H rows, W columns, K points, B windows of a batch.
"""

import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codmd_serve.errors import CodmdError, ConfigError
from distill.pretrain.clips import BITS_SHAPE, CLIP_SHAPE, POINTS_PER_CLIP, ClipSource
from distill.pretrain.render_worker import CLIP_BYTES, open_slots, render_part, split_slot

CLIPS_PER_PART = 16
SLOTS_PER_WORKER = 2
POLL_S = 0.02

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClipTensors:
    """Clips on the training device.

    Attributes:
        pixels: uint8 (P, T, H, W, 3).
        object_bits: uint8 (P, T, H, W / 8), most significant bit first.
        points: int16 (P, K, 3), object pixels as (frame, row, column).
    """

    pixels: Tensor
    object_bits: Tensor
    points: Tensor


def render_clips(source: ClipSource, indices: range, device: torch.device) -> tuple[ClipTensors, list[str]]:
    """Render clips in this process; return them with their captions."""
    clips = [source.render(index) for index in indices]
    tensors = (
        torch.from_numpy(np.stack([getattr(clip, name) for clip in clips])).to(device)
        for name in ("pixels", "object_bits", "points")
    )
    return ClipTensors(*tensors), [clip.caption for clip in clips]


class ClipPool:
    """Clips 0, 1, 2, ... of a source, rendered by worker processes into the device's memory, in this order.

    Workers write into shared slots; a thread copies finished parts to the device, so that training never waits for a
    clip that is there. The device holds `window` clips at once: clip i lies at i modulo window, and a later one takes
    its place once `release` has said that nobody reads it any more. Use as a context manager: leaving it ends the
    workers.

    Args:
        source: of the clips.
        num_clips: to render in all.
        num_workers: processes that render.
        device: that holds them.
        window: clips that it holds, a multiple of CLIPS_PER_PART; None is all of them.

    Attributes:
        clips: those of the window; before the first release only the first `num_ready` hold pixels yet.
        captions: of all clips that have been ready.
        num_ready: clips rendered so far, those that are gone included.
    """

    def __init__(
        self, source: ClipSource, num_clips: int, num_workers: int, device: torch.device, window: int | None = None
    ) -> None:
        self.source, self.num_clips, self.device = source, num_clips, device
        self.window = num_clips if window is None else min(window, num_clips)
        if self.window < num_clips and (self.window < 1 or self.window % CLIPS_PER_PART):
            raise ConfigError(f"a pool holds a multiple of {CLIPS_PER_PART} clips at once, got {self.window}")
        self.clips = ClipTensors(
            torch.empty((self.window, *CLIP_SHAPE), dtype=torch.uint8, device=device),
            torch.empty((self.window, *BITS_SHAPE), dtype=torch.uint8, device=device),
            torch.empty((self.window, POINTS_PER_CLIP, 3), dtype=torch.int16, device=device),
        )
        self.captions: list[str] = []
        self.num_ready = 0
        self._num_released = 0
        self._last_read: torch.cuda.Event | None = None
        self.error: Exception | None = None
        self._is_closed = threading.Event()
        self._folder = Path(tempfile.mkdtemp(prefix="codmd-clips-", dir=_roomy_folder()))
        num_slots = max(SLOTS_PER_WORKER * num_workers, 2)
        path = self._folder / "slots"
        self._slots = np.memmap(path, np.uint8, "w+", shape=(num_slots, CLIPS_PER_PART * CLIP_BYTES))
        self._executor = ProcessPoolExecutor(
            num_workers, multiprocessing.get_context("spawn"), open_slots, (path, self._slots.shape, source)
        )
        self._thread = threading.Thread(target=self._fill, name="clip-pool", daemon=True)

    def __enter__(self) -> "ClipPool":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and let go of the clips; a second call does nothing."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        self._thread.join()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.clips = ClipTensors(
            *(tensor[:0].clone() for tensor in (self.clips.pixels, self.clips.object_bits, self.clips.points))
        )
        del self._slots
        shutil.rmtree(self._folder, ignore_errors=True)

    def release(self, num_clips: int) -> None:
        """Give the places of the first `num_clips` clips to later ones, after what the device has been told so far."""
        if num_clips <= self._num_released:
            return
        if self.device.type == "cuda":
            # Kernels that read them may still wait in the stream: whoever writes there waits for this event.
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._last_read = event
        self._num_released = num_clips

    def pixels(self, indices: range) -> Tensor:
        """Return a copy of the pixels of clips that are ready and not released, uint8 (P, T, H, W, 3)."""
        if indices.stop > self.num_ready or indices.start < self._num_released:
            raise ValueError(
                f"clips {indices.start} to {indices.stop} are not in the window: "
                f"{self._num_released} released, {self.num_ready} ready"
            )
        return self.clips.pixels[torch.arange(indices.start, indices.stop, device=self.device) % self.window]

    def wait(self, num_clips: int, stop: Callable[[], bool], deadline: float | None = None) -> int:
        """Wait until `num_clips` are ready, `stop` says so or time.monotonic() passes `deadline`; return how many are.

        Raises:
            CodmdError: a worker failed.
        """
        wanted = min(num_clips, self.num_clips)
        while self.num_ready < wanted and not stop():
            if self.error is not None:
                raise CodmdError(f"rendering of training clips failed: {self.error}") from self.error
            if deadline is not None and time.monotonic() >= deadline:
                break
            time.sleep(POLL_S)
        return self.num_ready

    def _fill(self) -> None:
        try:
            self._copy_parts()
        except Exception as error:  # whatever a worker raised; `wait` raises it again where it is seen
            if not self._is_closed.is_set():
                self.error = error

    def _copy_parts(self) -> None:
        stream = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        starts = iter(range(0, self.num_clips, CLIPS_PER_PART))
        in_flight: list[tuple[int, int, Future[list[str]]]] = []

        def submit(slot: int) -> None:
            start = next(starts, None)
            if start is not None:
                count = min(CLIPS_PER_PART, self.num_clips - start)
                in_flight.append((slot, start, self._executor.submit(render_part, slot, start, count)))

        for slot in range(len(self._slots)):
            submit(slot)
        while in_flight and not self._is_closed.is_set():
            slot, start, future = in_flight.pop(0)
            while not self._is_closed.is_set():
                try:
                    captions = future.result(timeout=0.2)
                except TimeoutError:
                    continue
                if not self._wait_for_room(start + len(captions)):
                    return
                self._copy(slot, start, len(captions), stream)
                self.captions += captions
                self.num_ready = start + len(captions)
                submit(slot)
                break

    def _wait_for_room(self, end: int) -> bool:
        """Wait until the clips before `end` fit in the window; return False when the pool is closed."""
        while end - self.window > self._num_released:
            if self._is_closed.wait(POLL_S):
                return False
        return True

    def _copy(self, slot: int, start: int, count: int, stream: "torch.cuda.Stream | None") -> None:
        if stream is not None and self._last_read is not None:
            stream.wait_event(self._last_read)
        place = start % self.window
        with torch.cuda.stream(stream):  # None is no stream: on a CPU this is a plain copy
            targets = (self.clips.pixels, self.clips.object_bits, self.clips.points)
            for target, part in zip(targets, split_slot(self._slots[slot], count), strict=True):
                target[place : place + count].copy_(torch.from_numpy(part))
        if stream is not None:
            stream.synchronize()


def to_pixels(clips: Tensor) -> Tensor:
    """uint8 (..., T, H, W, 3) to float32 (..., 3, T, H, W) in [-1, 1]."""
    return clips.movedim(-1, -4).float() / 127.5 - 1.0


def cut_windows(
    clips: ClipTensors, indices_B: Tensor, num_frames: int, window: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cut pieces of clips, about a random pixel of an object.

    Args:
        clips: P of them.
        indices_B: clip of each piece.
        num_frames: of a piece, from a random moment at which the pixel is seen.
        window: side of a square about the pixel, up to a third of it off its centre; None keeps whole frames.
        generator: on the clips' device.

    Returns:
        Pixels float32 (B, 3, num_frames, h, w) in [-1, 1], and bool (B, 1, num_frames, h, w), True in object pixels.
    """
    device, (total, height, width) = clips.pixels.device, clips.pixels.shape[1:4]

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (len(indices_B), *shape), generator=generator, device=device)

    chosen = draw(0, clips.points.shape[1], 1)
    points_B3 = clips.points[indices_B].long().gather(1, chosen[..., None].expand(-1, -1, 3))[:, 0]
    first_B = (points_B3[:, 0] - draw(0, num_frames)).clamp(0, total - num_frames)

    def span(axis: int, size: int) -> tuple[int, Tensor]:
        """Length of the piece along an axis of the frame, and where it begins, (B,); no value waits for a GPU."""
        if window is None:
            return size, torch.zeros_like(first_B)
        jitter_B = draw(-(window // 3), window // 3 + 1)
        return window, (points_B3[:, axis] - window // 2 + jitter_B).clamp(0, size - window)

    (num_rows, top_B), (num_columns, left_B) = span(1, height), span(2, width)
    place = indices_B[:, None, None, None]
    frame = (first_B[:, None] + torch.arange(num_frames, device=device))[:, :, None, None]
    row = (top_B[:, None] + torch.arange(num_rows, device=device))[:, None, :, None]
    column = (left_B[:, None] + torch.arange(num_columns, device=device))[:, None, None, :]
    pixels = to_pixels(clips.pixels[place, frame, row, column])
    bits = clips.object_bits[place, frame, row, column // 8]
    is_object = (bits >> (7 - column % 8).to(torch.uint8)) & 1
    return pixels, is_object.bool()[:, None]


def _roomy_folder() -> str | None:
    """Shared memory where there is 2 GiB of it, else the folder for temporary files."""
    shared = Path("/dev/shm")
    is_usable = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2 << 30
    return str(shared) if is_usable else None

"""The stages of one request on one device: their times, frames on their way to the host, and want of memory.

Legend: T frames, H and W pixel rows and columns, C colours.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.errors import GenerationError

STAGES = ("text", "denoise", "decode", "encode")


@dataclass(frozen=True, slots=True)
class Span:
    """When a stage of a request was at work, in seconds of time.perf_counter."""

    stage: str
    start_s: float
    end_s: float


class StageClock:
    """Adds the time since the last stop to a stage, and keeps when the stages of the device were at work."""

    def __init__(self, device: torch.device) -> None:
        self.milliseconds = dict.fromkeys(STAGES, 0.0)
        self.spans: list[Span] = []
        self._device = device
        self._last_s = time.perf_counter()

    def stop(self, stage: str) -> None:
        """End a stage of the device; waits for it first, or the time would be the next one's."""
        if self._device.type == "cuda":
            # Not for the whole device: frames are copied beside this stream.
            torch.cuda.current_stream(self._device).synchronize()
        start_s = self._last_s
        self.wait(stage)
        self.spans.append(Span(stage, start_s, self._last_s))

    def wait(self, stage: str) -> None:
        """End a time in which nothing but `stage` was waited for."""
        now_s = time.perf_counter()
        self.milliseconds[stage] += 1000 * (now_s - self._last_s)
        self._last_s = now_s


class Download:
    """Frames on their way to the host: from a CUDA device into pinned memory, beside the decoding of the next ones.

    Args:
        frames_THWC: uint8, not written to any more.
        stream: that copies, in place of the one that decodes; None on a CPU, where there is nothing to copy.
    """

    def __init__(self, frames_THWC: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._host, self._copied = frames_THWC, None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(frames_THWC.device))
            with torch.cuda.stream(stream):
                self._host = torch.empty(frames_THWC.shape, dtype=torch.uint8, pin_memory=True)
                self._host.copy_(frames_THWC, non_blocking=True)
                self._copied = stream.record_event()
            # The allocator must not give the memory to the next chunk before it is copied.
            frames_THWC.record_stream(stream)

    def bytes(self) -> memoryview:
        """The frames as bytes; waits for the copy, and for nothing else that the device does."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.contiguous().numpy().data.cast("B")


@contextlib.contextmanager
def memory_errors(params: GenerateParams) -> Iterator[None]:
    """Turn what torch raises for want of memory into an error of the request.

    Raises:
        GenerationError: code out_of_memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        shape = f"{params.width}x{params.height}, {params.num_frames} frames"
        raise GenerationError(f"out of memory at {shape}; ask for fewer pixels", "out_of_memory") from error


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

"""The stages of one request on one device: times, host copies of frames, peak memory and device errors.

Legend: T frames, H and W pixel rows and columns, C colours.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.errors import GenerationError
from codmd_serve.messages import DEVICE_ERROR

STAGES = ("text", "denoise", "decode", "encode")


@dataclass(frozen=True, slots=True)
class Span:
    """Start and end of a stage of a request, in seconds of time.perf_counter."""

    stage: str
    start_s: float
    end_s: float


class StageClock:
    """Sums the time of each stage, and records the spans in which the device was busy with it."""

    def __init__(self, device: torch.device) -> None:
        self.milliseconds = dict.fromkeys(STAGES, 0.0)
        self.spans: list[Span] = []
        self._device = device
        self._last_s = time.perf_counter()

    def stop(self, stage: str) -> None:
        """End a stage of the device. Synchronises the stream first, or the next stage would be charged for it."""
        if self._device.type == "cuda":
            # Not for the whole device: frames are copied beside this stream.
            torch.cuda.current_stream(self._device).synchronize()
        start_s = self._last_s
        self.wait(stage)
        self.spans.append(Span(stage, start_s, self._last_s))

    def wait(self, stage: str) -> None:
        """Charge the time since the last call to `stage`, which was waited for."""
        now_s = time.perf_counter()
        self.milliseconds[stage] += 1000 * (now_s - self._last_s)
        self._last_s = now_s


class HostCopy:
    """Host copy of frames: from a CUDA device into a pinned buffer, while the next chunk decodes.

    Args:
        frames_THWC: uint8; nobody writes to it afterwards.
        stream: copy stream beside the one that decodes; None on a CPU, where nothing is copied.
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
        """Return the frames as bytes; waits for this copy only."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.contiguous().numpy().data.cast("B")


@contextlib.contextmanager
def device_errors(params: GenerateParams) -> Iterator[None]:
    """Convert torch's device errors into GenerationError.

    Raises:
        GenerationError: code out_of_memory; or device_error, after which every call to the device fails: the process
            has to end.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            shape = f"{params.width}x{params.height}, {params.num_frames} frames"
            raise GenerationError(f"out of memory at {shape}; ask for fewer pixels", "out_of_memory") from error
        if _is_device_error(error):
            raise GenerationError("the device failed; its worker is replaced", DEVICE_ERROR) from error
        raise


def peak_memory_mb(device: torch.device) -> float:
    """Return peak megabytes: allocated since `begin_memory_peak` on CUDA, resident since process start on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def begin_memory_peak(device: torch.device) -> None:
    """Reset the allocator's peak, where it keeps one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator and the CUDA libraries have no exception of their own.
    texts = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def _is_device_error(error: Exception) -> bool:
    # cuBLAS and cuDNN report what a kernel before them did in words of their own.
    texts = ("CUDA error", "_STATUS_EXECUTION_FAILED", "_STATUS_INTERNAL_ERROR")
    return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in texts)

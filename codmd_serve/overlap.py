"""Whether and where a video is decoded while the next one is denoised; knows no engine.

Both use one device. What is gained is the time in which one of them leaves it idle: waits for the host, launches of
small kernels, the tail of the encoder. What it costs is memory for both at once.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from codmd_serve.config import OVERLAPS
from codmd_serve.device import on_device
from codmd_serve.device_memory import GIB
from codmd_serve.errors import ConfigError

ResultT = TypeVar("ResultT")


def choose_overlap(name: str, device: torch.device) -> bool:
    """Return whether videos shall overlap; auto is yes on CUDA. On a CPU two videos only take cores from each other.

    Raises:
        ConfigError: not one of the names.
    """
    if name not in OVERLAPS:
        raise ConfigError(f"overlap must be one of {', '.join(OVERLAPS)}, got {name!r}")
    return name == "on" or (name == "auto" and device.type == "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapBudget:
    """Memory for two videos at once.

    Attributes:
        denoise_bytes, decode_bytes: that the native video takes at its peak, beyond what stays allocated.
        text_bytes: of a text encoder that is lent to the device before a video is denoised; else 0.
        free_bytes: for both.
        native_px: height * width * num_frames of the native video.
    """

    denoise_bytes: int
    decode_bytes: int
    text_bytes: int
    free_bytes: int
    native_px: int

    def fits(self, decoding_px: int, denoising_px: int) -> bool:
        """Return whether a video may be decoded while another one is embedded and denoised, by their pixels."""
        return self._needed_bytes(decoding_px, denoising_px) <= self.free_bytes

    @property
    def problem(self) -> str:
        """Return one sentence if two native videos do not fit, else nothing."""
        if self.fits(self.native_px, self.native_px):
            return ""
        needed = self._needed_bytes(self.native_px, self.native_px)
        return (
            f"a video is not decoded while the next one is denoised: {needed / GIB:.1f} GiB needed, "
            f"{self.free_bytes / GIB:.1f} free"
        )

    def _needed_bytes(self, decoding_px: int, denoising_px: int) -> float:
        # Activations grow with the number of tokens, and no other memory grows faster.
        denoise = max(self.text_bytes, self.denoise_bytes * denoising_px / self.native_px)
        return denoise + self.decode_bytes * decoding_px / self.native_px


class DecodeThread:
    """Runs functions one after the other in a thread and, on CUDA, on a stream of its own.

    One thread for warm-up and requests: what cuDNN chose for a shape is known to the thread that it chose it in.
    """

    def __init__(self, device: torch.device) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="codmd-decode")
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def leave_stream(self) -> None:
        """Run on the stream of all others from now on: cached blocks of one stream do not serve another."""
        self._stream = None

    def submit(self, run: Callable[[], ResultT]) -> "Future[ResultT]":
        """Run a function after those before it. Its inputs on the device have to be complete."""
        return self._executor.submit(self._run, run)

    @torch.inference_mode()
    def _run(self, run: Callable[[], ResultT]) -> ResultT:
        # Inference mode, device and stream belong to a thread, so they are entered in it.
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with on_device(self._device), stream:
            return run()

"""The chunks of the VAE decoder as CUDA graphs in a memory pool of their own; knows no network from inside.

A first chunk and a later one differ: the first has no past. Every chunk of the native video is recorded, two or three
shapes. All graphs share one `History`, whose tensors never move, so eager chunks may come between replayed ones: the
rest of a longer video, for example.

A graph pays where the device waits for the host: several hundred launches a chunk, on small frames most of its time.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import itertools
import logging
import time
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from codmd_serve.cuda_graph import CudaRecorder, GraphKey, Graphs, Record
from codmd_serve.device_memory import GIB, free_bytes, run_with_peak
from codmd_serve.files import first_line
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.history import History
from codmd_serve.wan.vae import StreamingDecoder

MAX_TIME_RATIO = 0.98  # of the eager time; a slower graph is not worth its memory
NUM_TIMED = 2
NUM_RACED_CHUNKS = 2  # a first and a later one
VERDICT = "vae_execution"
NAMES = ("eager", "graph")

logger = logging.getLogger(__name__)


class ChunkGraphs:
    """Recorded chunks of one decoder, for latents of one size. Not thread-safe: one decode at a time.

    Args:
        decoder: in the dtype that it keeps.
        record: `CudaRecorder`, whose pool all chunks share; tests have one that needs no device.

    Attributes:
        failure: why there are none, one sentence; empty while all could be recorded.
    """

    def __init__(self, decoder: StreamingDecoder, record: Record) -> None:
        self.failure = ""
        self._decoder = decoder
        self._graphs = {is_first: Graphs(record) for is_first in (True, False)}
        self._size: tuple[int, ...] = ()
        self._history = History()
        # What a chunk found in the history and left there, in terms of the convolutions that have seen something.
        self._kept: dict[tuple[bool, GraphKey], tuple[frozenset[Hashable], frozenset[Hashable]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._graphs.values()))

    @torch.inference_mode()
    def record(self, latents_BCFHW: Tensor) -> bool:
        """Record every chunk of a video; return whether it worked. What fails is logged and stands in `failure`."""
        self._size, start = _size_of(latents_BCFHW.shape), 0
        self._history.restart()
        for size in self._decoder.chunk_sizes(latents_BCFHW.shape):
            part = latents_BCFHW[:, :, start : start + size].float()
            if not self._record_chunk(part, is_first=start == 0):
                self.clear()
                return False
            start += size
        return True

    def _record_chunk(self, part: Tensor, is_first: bool) -> bool:
        graphs, history, before = self._graphs[is_first], self._history, self._history.kept
        if graphs.holds(part):
            return True

        def run(latents: Tensor) -> Tensor:
            history.restart(before)  # the recorder runs it more than once
            return self._decoder.decode_chunk(latents, history, is_first)

        try:
            run(part)  # on the caller's stream, which then owns the memory of the history
        except Exception as error:  # whatever a driver or a library raises, eager chunks are left
            self.failure = _sentence(first_line(error))
            return False
        if not graphs.record(run, part, keeps=history):
            self.failure = _sentence(graphs.failure)
            return False
        self._kept[is_first, graphs.key(part)] = (before, history.kept)
        return True

    def history(self, shape: Sequence[int]) -> History | None:
        """Return the history of the graphs, emptied, for latents of their size; None for others."""
        if not len(self) or _size_of(shape) != self._size:
            return None
        self._history.restart()
        return self._history

    def replay(self, latents_BCFHW: Tensor, history: History, is_first: bool) -> Tensor | None:
        """Return the uint8 frames of a chunk; None when none of its length, with this past, was recorded."""
        latents, graphs = latents_BCFHW.float(), self._graphs[is_first]
        before, after = self._kept.get((is_first, graphs.key(latents)), (None, frozenset()))
        if history is not self._history or history.kept != before:
            return None
        frames_BTHWC = graphs.replay(latents)
        history.restart(after)
        return frames_BTHWC

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        for graphs in self._graphs.values():
            graphs.clear()
        self._kept.clear()
        self._history = History()


def may_record(execution: str) -> bool:
    """Return whether an execution mode of the denoising loop asks for graphs, or leaves it to a race."""
    return execution == "auto" or execution.endswith("graph")


def warm_chunks(
    decoder: StreamingDecoder,
    latents_BCFHW: Tensor,
    execution: str,
    *,
    reserved_bytes: int = 0,
    verdicts: Verdicts | None = None,
    record: Record | None = None,
) -> tuple[str, str]:
    """Record the chunks of the decoder where that was asked for, fits in memory and is faster.

    Args:
        decoder: warm: its libraries have chosen their kernels on this thread.
        latents_BCFHW: of the native video.
        execution: as the denoising loop takes it; auto measures, a mode with `graph` records in any case.
        reserved_bytes: that must stay free beside the graphs, for what is not recorded.
        verdicts: of earlier loads, for auto; None remembers nothing.
        record: records graphs; tests have one of their own.

    Returns:
        eager or graph, and one sentence why it is not what was asked for, or empty.
    """
    verdicts = verdicts or Verdicts(None)
    plan = execution if execution != "auto" else verdicts.get(VERDICT, NAMES) or "auto"
    if not may_record(plan):
        return "eager", ""
    device = decoder.latents_mean.device
    num_raced = sum(itertools.islice(decoder.chunk_sizes(latents_BCFHW.shape), NUM_RACED_CHUNKS))
    raced = latents_BCFHW[:, :, :num_raced]
    num_timed = NUM_TIMED if plan == "auto" else 1
    eager_s, needed_bytes = run_with_peak(device, lambda: _least_s(decoder, raced, num_timed))
    free = free_bytes(device)
    if free is not None and needed_bytes + reserved_bytes > free:
        return "eager", _sentence(f"{(needed_bytes + reserved_bytes) / GIB:.1f} GiB needed, {free / GIB:.1f} free")
    graphs = ChunkGraphs(decoder, record or CudaRecorder(device))
    if not graphs.record(latents_BCFHW):
        free_bytes(device)
        return "eager", graphs.failure
    decoder.replays = graphs
    if plan == "auto":
        graph_s = _least_s(decoder, raced, num_timed)
        if graph_s > MAX_TIME_RATIO * eager_s:
            decoder.replays = None
            graphs.clear()
            free_bytes(device)
        logger.info("vae chunks: eager_ms=%.1f graph_ms=%.1f", 1e3 * eager_s, 1e3 * graph_s)
    name = "eager" if decoder.replays is None else "graph"
    if execution == "auto":
        verdicts.put(VERDICT, name)
    return name, ""


def _least_s(decoder: StreamingDecoder, latents: Tensor, num_timed: int) -> float:
    """Return the least seconds of a decode, after one warm-up run."""
    times_s = []
    for _ in range(num_timed + 1):
        start_s = time.perf_counter()
        for frames in decoder.frames(latents):
            _wait(frames.device)
        times_s.append(time.perf_counter() - start_s)
    return min(times_s[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _sentence(reason: str) -> str:
    return f"VAE chunks without a CUDA graph: {reason}"


def _size_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return batch, rows and columns: what the tensors of a history are as large as."""
    return shape[0], *shape[3:]

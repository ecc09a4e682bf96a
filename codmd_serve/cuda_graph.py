"""Records functions of tensors as CUDA graphs, once per shape at warm-up, and replays them; knows nothing of networks.

Requests never record: one client could spend minutes and memory on a shape that nobody asks for again. The caller runs
an unrecorded shape eagerly.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codmd_serve.files import first_line

MAX_GRAPHS = 6
NUM_WARM_RUNS = 2
MAX_WARNED_SHAPES = 256

# Runs a function once or more to record it; returns what repeats it, and the tensor it then writes to.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
# (identity of the weights, (shape, dtype) of every input)
GraphKey = tuple[str, tuple[tuple[tuple[int, ...], torch.dtype], ...]]

logger = logging.getLogger(__name__)


class CudaRecorder:
    """Records CUDA graphs on one device. They share one memory pool, so only one of them runs at a time.

    Args:
        device: a CUDA device; recording on another raises RuntimeError.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Run `run` until its kernels are chosen, then record it."""
        if self.device.type != "cuda":
            raise RuntimeError(f"CUDA graphs need a CUDA device, got {self.device.type}")
        with torch.cuda.device(self.device):
            # Libraries choose kernels and workspaces per stream at the first calls, which cannot be recorded.
            # One stream for all recordings: cuBLAS keeps 32 MiB for every stream that it has seen.
            self._side = self._side or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                for _ in range(NUM_WARM_RUNS):
                    run()
            torch.cuda.current_stream().wait_stream(self._side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool):
                    output = run()
            except Exception:
                end_failed_capture(self.device)
                raise
        return graph.replay, output


def end_failed_capture(device: torch.device) -> None:
    """Give a device its default generator back after a capture that failed.

    torch 2.11 leaves it in the state of a capture, and each later draw from it raises "Offset increment outside graph
    capture encountered unexpectedly", in this process for good (pytorch issue 171263). A capture that works ends that
    state. Where even that fails, what comes next will say so.
    """
    with contextlib.suppress(RuntimeError):
        value, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value.add_(1)


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: tuple[Tensor, ...]
    replay: Callable[[], object]
    output: Tensor
    # What the kernels read besides inputs and weights: a graph knows addresses, and keeps nothing alive.
    keeps: object


class Graphs:
    """Recorded calls of one function, by the shapes and dtypes of its inputs. Not thread-safe.

    Args:
        record: `CudaRecorder`; tests have one that records nothing.
        identity: of the weights that the function runs; a part of every key.
        max_graphs: recording one more drops the one that was used longest ago.
    """

    def __init__(self, record: Record, *, identity: str = "", max_graphs: int = MAX_GRAPHS) -> None:
        self.failure = ""
        self._record, self._identity, self._max_graphs = record, identity, max_graphs
        self._graphs: OrderedDict[GraphKey, _Graph] = OrderedDict()
        self._warned: set[GraphKey] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def key(self, *inputs: Tensor) -> GraphKey:
        """Return the key of a recorded call."""
        return self._identity, tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)

    def holds(self, *inputs: Tensor) -> bool:
        """Return whether a call of these shapes and dtypes was recorded."""
        return self.key(*inputs) in self._graphs

    @torch.inference_mode()
    def record(self, function: Callable[..., Tensor], *inputs: Tensor, keeps: object = None) -> bool:
        """Record function(*inputs) for later inputs of these shapes and dtypes.

        Args:
            function: of tensors on the device; neither waits for it nor depends on values.
            inputs: examples; copied.
            keeps: kept alive as long as the graph; tensors that `function` reads besides inputs and weights.

        Returns:
            Whether it worked. A failure is logged, stands in `failure`, and ends recording for good: what was recorded
            before is dropped too, so that a server is either quick at all its shapes or says that it is not.
        """
        key = self.key(*inputs)
        if self.failure:
            return False
        if key in self._graphs:
            return True
        while len(self._graphs) >= self._max_graphs:
            self._graphs.popitem(last=False)
        static = tuple(tensor.clone() for tensor in inputs)
        try:
            replay, output = self._record(lambda: function(*static))
        except Exception as error:  # whatever a driver, a library or the network raises, eager execution is left
            self.failure = first_line(error)
            self._graphs.clear()
            logger.warning("execution=eager reason=%r", self.failure)
            return False
        self._graphs[key] = _Graph(static, replay, output, keeps)
        return True

    @torch.inference_mode()
    def replay(self, *inputs: Tensor) -> Tensor | None:
        """Replay a recorded call with new values.

        Returns:
            A tensor of the caller's own, or None when nothing of these shapes was recorded, which is logged once.
        """
        key = self.key(*inputs)
        graph = self._graphs.get(key)
        if graph is None:
            if not self.failure and key not in self._warned and len(self._warned) < MAX_WARNED_SHAPES:
                self._warned.add(key)
                logger.warning("execution=eager reason=not_warmed shape=%s", "x".join(map(str, inputs[0].shape)))
            return None
        self._graphs.move_to_end(key)
        for buffer, given in zip(graph.inputs, inputs, strict=True):
            buffer.copy_(given)
        graph.replay()
        # The next replay of any graph of the pool may write where this output lies.
        return graph.output.clone()

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        self._graphs.clear()

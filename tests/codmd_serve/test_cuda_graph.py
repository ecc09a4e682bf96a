"""What is above the recording itself: keys, static buffers, copies, eviction, and falling back when it fails.

`PassThrough` stands for the device: its replay runs the function again on the static inputs and writes to the same
output, which is what a graph does.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from codmd_serve.cuda_graph import CudaRecorder, Graphs


class PassThrough:
    """Records nothing and counts."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.num_recorded += 1
        output = run()

        def replay() -> None:
            self.num_replayed += 1
            output.copy_(run())

        return replay, output


def scaled_sum(first: Tensor, second: Tensor) -> Tensor:
    return 2 * first + second


def pair(size: int, value: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.full((size,), value), torch.full((size,), 10 * value)


def test_replay_runs_on_the_values_that_are_given() -> None:
    graphs = Graphs(PassThrough())
    inputs = pair(3)
    assert graphs.record(scaled_sum, *inputs)
    inputs[0].fill_(99.0)  # the example is not what is read later
    for value in (1.0, -2.0):
        assert torch.equal(graphs.replay(*pair(3, value)), torch.full((3,), 12 * value))


def test_the_output_is_the_callers_own() -> None:
    graphs = Graphs(PassThrough())
    graphs.record(scaled_sum, *pair(3))
    first = graphs.replay(*pair(3, 1.0))
    graphs.replay(*pair(3, 5.0))
    assert first.tolist() == [12.0] * 3


def test_inputs_are_neither_changed_nor_kept() -> None:
    graphs = Graphs(PassThrough())
    graphs.record(scaled_sum, *pair(3))
    first, second = pair(3, 4.0)
    graphs.replay(first, second)
    assert first.tolist() == [4.0] * 3 and second.tolist() == [40.0] * 3
    strided = torch.arange(6.0)[::2]
    assert graphs.replay(strided, second).tolist() == [40.0, 44.0, 48.0]


def test_shapes_may_alternate() -> None:
    record = PassThrough()
    graphs = Graphs(record)
    for size in (2, 3):
        graphs.record(scaled_sum, *pair(size))
    for size, value in ((2, 1.0), (3, 2.0), (2, 3.0), (3, 4.0)):
        assert graphs.replay(*pair(size, value)).tolist() == [12 * value] * size
    assert (record.num_recorded, record.num_replayed) == (2, 4)


def test_the_key_is_made_of_shapes_dtypes_and_weights() -> None:
    graphs, others = Graphs(PassThrough(), identity="a"), Graphs(PassThrough(), identity="b")
    first, second = pair(3)
    key = graphs.key(first, second)
    assert key == graphs.key(first + 1, second)
    different = [
        graphs.key(first.double(), second),
        graphs.key(first[None], second),
        graphs.key(first),
        others.key(first, second),
    ]
    assert len({key, *different}) == 5


def test_recording_a_shape_twice_records_once() -> None:
    record = PassThrough()
    graphs = Graphs(record)
    assert graphs.record(scaled_sum, *pair(3)) and graphs.record(scaled_sum, *pair(3, 2.0))
    assert record.num_recorded == 1 and len(graphs) == 1


def test_a_shape_that_was_not_recorded_is_the_callers_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    graphs = Graphs(PassThrough())
    graphs.record(scaled_sum, *pair(3))
    for _ in range(2):
        assert graphs.replay(*pair(4)) is None
    assert [entry.message for entry in caplog.records] == ["execution=eager reason=not_warmed shape=4"]


def test_the_one_used_longest_ago_goes_and_what_it_kept_with_it() -> None:
    class Kept:
        pass

    graphs = Graphs(PassThrough(), max_graphs=2)
    kept = Kept()
    alive = weakref.ref(kept)
    graphs.record(scaled_sum, *pair(1))
    graphs.record(scaled_sum, *pair(2), keeps=kept)
    del kept
    assert alive() is not None
    graphs.replay(*pair(1))
    graphs.record(scaled_sum, *pair(3))
    assert len(graphs) == 2 and alive() is None
    assert graphs.replay(*pair(2)) is None
    assert graphs.replay(*pair(1)) is not None and graphs.replay(*pair(3)) is not None


def test_a_failure_is_logged_once_and_ends_recording(caplog: pytest.LogCaptureFixture) -> None:
    record = PassThrough()
    graphs = Graphs(record)
    graphs.record(scaled_sum, *pair(3))

    def not_capturable(*_: Tensor) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    with caplog.at_level(logging.WARNING):
        assert not graphs.record(not_capturable, *pair(4))
        assert not graphs.record(scaled_sum, *pair(5))
    assert graphs.failure == "RuntimeError: operation not permitted when stream is capturing"
    assert len(caplog.records) == 1 and "execution=eager" in caplog.text
    assert record.num_recorded == 2 and len(graphs) == 0
    assert graphs.replay(*pair(3)) is None


def test_without_cuda_the_failure_says_so() -> None:
    graphs = Graphs(CudaRecorder(torch.device("cpu")))
    assert not graphs.record(scaled_sum, *pair(3))
    assert graphs.failure == "RuntimeError: CUDA graphs need a CUDA device, got cpu"


class FakeCuda:
    """torch.cuda as far as a recorder needs it: counts streams and captures, and fails the captures it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = ()) -> None:
        self.num_streams = self.num_captures = 0
        self.failing = failing

        class Stream:
            def __init__(stream) -> None:  # noqa: N805
                self.num_streams += 1

            def wait_stream(stream, other: object) -> None:  # noqa: N805
                pass

        class Graph:
            def replay(graph) -> None:  # noqa: N805
                pass

        @contextlib.contextmanager
        def capture(graph: object, pool: object = None) -> Iterator[None]:
            self.num_captures += 1
            yield
            if self.num_captures in self.failing:
                raise RuntimeError("operation failed due to a previous error during capture")

        current = Stream()
        self.num_streams = 0
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": capture,
            "graph_pool_handle": object,
            "current_stream": lambda: current,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def recorder(monkeypatch: pytest.MonkeyPatch) -> CudaRecorder:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
    return CudaRecorder(torch.device("cuda"))


def test_all_recordings_warm_up_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, record = FakeCuda(monkeypatch), recorder(monkeypatch)
    for size in (3, 4, 5):
        record(lambda size=size: torch.ones(size))
    assert (fake.num_streams, fake.num_captures) == (1, 3)


def test_after_a_failed_capture_one_that_works_frees_the_default_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, record = FakeCuda(monkeypatch, failing=(1,)), recorder(monkeypatch)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        record(lambda: torch.ones(3))
    assert fake.num_captures == 2
    # Where that one fails too, the first error is the one that is told.
    fake.failing = (3, 4)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        record(lambda: torch.ones(3))
    assert fake.num_captures == 4

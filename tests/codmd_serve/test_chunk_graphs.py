"""Chunks of the VAE as graphs: on a CPU by tapes, which repeat operators on the tensors that they were recorded on."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from tape import TapeRecorder
from torch import Tensor

from codmd_serve import chunk_graphs as chunk_graphs_module
from codmd_serve.chunk_graphs import ChunkGraphs, warm_chunks
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan import vae as vae_module
from codmd_serve.wan.history import History
from codmd_serve.wan.vae import StreamingDecoder

NATIVE_FRAMES = 41  # chunks of 5, 4 and 2 latent frames
OTHER_FRAMES = (57, 9, 41, 33, 1, 45, 41)


@pytest.fixture(params=["residual with patches", "plain"], scope="module")
def decoder(request: pytest.FixtureRequest, tiny_pipeline: WanPipeline) -> StreamingDecoder:
    if request.param != "plain":
        return StreamingDecoder(tiny_pipeline.vae)
    torch.manual_seed(1)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return StreamingDecoder(vae.eval().requires_grad_(False))


@pytest.fixture(scope="module")
def recorded(decoder: StreamingDecoder) -> ChunkGraphs:
    """Graphs of 32 x 32 pixels and 41 frames."""
    graphs = ChunkGraphs(decoder, TapeRecorder())
    assert graphs.record(latents_of(decoder, NATIVE_FRAMES)) and graphs.failure == "" and len(graphs) == 3
    return graphs


@pytest.fixture
def graphs(decoder: StreamingDecoder, recorded: ChunkGraphs) -> Iterator[ChunkGraphs]:
    """The same, used by the decoder."""
    decoder.replays = recorded
    yield recorded
    decoder.replays = None


def latents_of(decoder: StreamingDecoder, num_frames: int, seed: int = 0, width: int = 32) -> Tensor:
    channels = decoder.latents_mean.shape[1]
    pixels = 8 if decoder.patch_size == 1 else 16
    shape = (1, channels, (num_frames - 1) // 4 + 1, 32 // pixels, width // pixels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    return torch.cat(list(decoder.frames(latents)), dim=1)


def eagerly(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    replays, decoder.replays = decoder.replays, None
    try:
        return decoded(decoder, latents)
    finally:
        decoder.replays = replays


def test_replayed_frames_equal_eager_ones_for_any_number_of_chunks(
    decoder: StreamingDecoder, graphs: ChunkGraphs
) -> None:
    for seed, num_frames in enumerate(OTHER_FRAMES):
        latents = latents_of(decoder, num_frames, seed)
        assert torch.equal(decoded(decoder, latents), eagerly(decoder, latents)), num_frames


def test_chunks_of_the_native_video_are_replayed_and_no_others(decoder: StreamingDecoder) -> None:
    record = TapeRecorder()
    graphs = ChunkGraphs(decoder, record)
    graphs.record(latents_of(decoder, NATIVE_FRAMES))
    decoder.replays = graphs
    try:
        # Chunks of 5, 4 and 2; 5 and 4; 5, 4, 4 and 2; 5, 4 and 3, of which the last runs eagerly; 3.
        for num_frames, num_replayed in ((41, 3), (33, 2), (57, 4), (45, 2), (9, 0)):
            before = record.num_replayed
            decoded(decoder, latents_of(decoder, num_frames))
            assert record.num_replayed - before == num_replayed, num_frames
    finally:
        decoder.replays = None
    assert record.num_recorded == 3


def test_the_history_is_written_in_place(decoder: StreamingDecoder, graphs: ChunkGraphs) -> None:
    latents = latents_of(decoder, 57)
    decoded(decoder, latents)
    history = graphs.history(latents.shape)
    assert history is not None
    addresses = history.addresses()
    assert len(addresses) > 5
    for seed in range(3):
        decoded(decoder, latents_of(decoder, 57, seed))
        assert history.addresses() == addresses


def test_a_history_that_moves_makes_wrong_frames(decoder: StreamingDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage: were a tensor bound anew instead of written in place, this is what the tests above would see."""
    keep = History.keep

    def moving(self: History, conv: torch.nn.Module, room: Tensor) -> None:
        self._frames.pop(conv, None)
        keep(self, conv, room)

    monkeypatch.setattr(History, "keep", moving)
    graphs = ChunkGraphs(decoder, TapeRecorder())
    latents = latents_of(decoder, NATIVE_FRAMES, 5)
    assert graphs.record(torch.zeros_like(latents))
    decoder.replays = graphs
    try:
        got, want = decoded(decoder, latents), eagerly(decoder, latents)
    finally:
        decoder.replays = None
    assert torch.equal(got[:, :17], want[:, :17]), "the first chunk has no past"
    assert not torch.equal(got[:, 17:], want[:, 17:])


def test_an_abandoned_decode_does_not_disturb_the_next(decoder: StreamingDecoder, graphs: ChunkGraphs) -> None:
    latents = latents_of(decoder, NATIVE_FRAMES)
    for num_chunks in (1, 2):
        abandoned = decoder.frames(-latents)
        for _ in range(num_chunks):
            next(abandoned)
        assert torch.equal(decoded(decoder, latents), eagerly(decoder, latents))


def test_frames_are_the_callers_own(decoder: StreamingDecoder, graphs: ChunkGraphs) -> None:
    latents = latents_of(decoder, NATIVE_FRAMES)
    chunks = list(decoder.frames(latents))
    kept = [chunk.clone() for chunk in chunks]
    decoded(decoder, -latents)
    assert all(torch.equal(chunk, other) for chunk, other in zip(chunks, kept, strict=True))


def test_another_size_runs_eagerly(decoder: StreamingDecoder, graphs: ChunkGraphs) -> None:
    wide = latents_of(decoder, NATIVE_FRAMES, width=64)
    assert graphs.history(wide.shape) is None
    assert torch.equal(decoded(decoder, wide), eagerly(decoder, wide))


def test_another_dtype_drops_the_graphs(tiny_pipeline: WanPipeline) -> None:
    decoder = StreamingDecoder(tiny_pipeline.vae)
    decoder.replays = ChunkGraphs(decoder, TapeRecorder())
    decoder.set_dtype(torch.float32)
    assert decoder.replays is None


def test_an_overflow_of_a_replayed_chunk_is_seen_and_the_next_video_starts_without(
    decoder: StreamingDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = copy.deepcopy(decoder)
    half.set_dtype(torch.float16)
    convolve, doubled = vae_module.convolve, vae_module.functional.conv_transpose2d

    # A CPU has no convolutions in float16.
    def wide(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        return convolve(hidden.float(), weight.float(), None if bias is None else bias.float(), padding).half()

    def wide_doubled(hidden: Tensor, weight: Tensor, bias: Tensor, **options: int) -> Tensor:
        return doubled(hidden.float(), weight.float(), bias.float(), **options).half()

    monkeypatch.setattr(vae_module, "convolve", wide)
    monkeypatch.setattr(vae_module.functional, "conv_transpose2d", wide_doubled)
    latents = latents_of(half, NATIVE_FRAMES)
    graphs = ChunkGraphs(half, TapeRecorder())
    assert graphs.record(latents)
    half.replays = graphs
    loud = latents.clone()
    loud[:, :, 7] = 1e9  # in the second chunk
    for given, is_loud in ((latents, False), (loud, True), (latents, False)):
        assert torch.equal(decoded(half, given), eagerly(half, given))
        assert half.has_overflowed() == is_loud
        decoded(half, given)
        assert half.has_overflowed() == is_loud


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_only_modes_with_a_graph_record(decoder: StreamingDecoder, execution: str) -> None:
    record = TapeRecorder()
    assert warm_chunks(decoder, latents_of(decoder, 17), execution, record=record) == ("eager", "")
    assert (record.num_recorded, decoder.replays) == (0, None)


@pytest.mark.parametrize("execution", ["graph", "compiled+graph"])
def test_a_mode_with_a_graph_records_without_a_race(decoder: StreamingDecoder, execution: str) -> None:
    latents = latents_of(decoder, 33)
    assert warm_chunks(decoder, latents, execution, record=TapeRecorder()) == ("graph", "")
    assert isinstance(decoder.replays, ChunkGraphs) and len(decoder.replays) == 2
    decoder.replays = None


@pytest.mark.parametrize(("ratio", "chosen"), [(1e9, "graph"), (0.0, "eager")])
def test_auto_keeps_only_what_pays_and_remembers_it(
    decoder: StreamingDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, chosen: str
) -> None:
    monkeypatch.setattr(chunk_graphs_module, "MAX_TIME_RATIO", ratio)
    latents, verdicts = latents_of(decoder, 33), Verdicts(tmp_path, "this device")
    assert warm_chunks(decoder, latents, "auto", verdicts=verdicts, record=TapeRecorder()) == (chosen, "")
    assert (decoder.replays is None) == (chosen == "eager")
    assert verdicts.get("vae_execution", ("eager", "graph")) == chosen
    decoder.replays = None
    monkeypatch.setattr(chunk_graphs_module, "MAX_TIME_RATIO", -1.0)  # a second race would choose eager
    again = TapeRecorder()
    assert warm_chunks(decoder, latents, "auto", verdicts=verdicts, record=again) == (chosen, "")
    assert again.num_recorded == (2 if chosen == "graph" else 0)
    decoder.replays = None


def test_want_of_memory_leaves_eager_chunks_and_says_so(
    decoder: StreamingDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_peak(_: torch.device, run: Callable[[], float]) -> tuple[float, int]:
        return run(), 5 * 2**30

    monkeypatch.setattr(chunk_graphs_module, "run_with_peak", with_peak)
    monkeypatch.setattr(chunk_graphs_module, "free_bytes", lambda _: 7 * 2**30)
    record, latents = TapeRecorder(), latents_of(decoder, 33)
    name, fallback = warm_chunks(decoder, latents, "graph", reserved_bytes=3 * 2**30, record=record)
    assert (name, fallback) == ("eager", "VAE chunks without a CUDA graph: 8.0 GiB needed, 7.0 free")
    assert (record.num_recorded, decoder.replays) == (0, None)
    assert warm_chunks(decoder, latents, "graph", reserved_bytes=2**30, record=record) == ("graph", "")
    decoder.replays = None


def test_a_capture_that_fails_leaves_eager_chunks_and_says_so(
    decoder: StreamingDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latents = latents_of(decoder, 33)
    want = eagerly(decoder, latents)
    with caplog.at_level(logging.WARNING):
        name, fallback = warm_chunks(decoder, latents, "graph")  # this device has no graphs
    assert (name, fallback) == (
        "eager",
        "VAE chunks without a CUDA graph: RuntimeError: CUDA graphs need a CUDA device, got cpu",
    )
    assert decoder.replays is None and torch.equal(decoded(decoder, latents), want)

    run = decoder.decode_chunk

    def syncing(part: Tensor, history: History, is_first: bool) -> Tensor:
        frames = run(part, history, is_first)
        return frames if is_first else frames + 0 * int(frames.sum())

    monkeypatch.setattr(decoder, "decode_chunk", syncing)
    name, fallback = warm_chunks(decoder, latents, "graph", record=TapeRecorder())
    assert name == "eager" and "operation not permitted when stream is capturing" in fallback
    assert decoder.replays is None and torch.equal(decoded(decoder, latents), want)


def test_memory_that_runs_out_on_the_way_leaves_eager_chunks(
    decoder: StreamingDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted:
        def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    name, fallback = warm_chunks(decoder, latents_of(decoder, 33), "graph", record=Exhausted())
    assert name == "eager"
    assert fallback == (
        "VAE chunks without a CUDA graph: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    )


def test_the_shortcut_of_the_other_layout_copies_nothing_from_the_host(tiny_pipeline: WanPipeline) -> None:
    decoder = StreamingDecoder(tiny_pipeline.vae)
    assert any(name.endswith("shortcut.channels") for name, _ in decoder.named_buffers())
    assert {buffer.device for buffer in decoder.buffers()} == {tiny_pipeline.vae.device}

"""A video is decoded while the next one is denoised: order, bytes, failures of one, memory for both."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codmd_serve import warm as warm_module
from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine
from codmd_serve.errors import CancelledError, ConfigError, GenerationError
from codmd_serve.loading import load_engine
from codmd_serve.overlap import DecodeThread, OverlapBudget, choose_overlap
from codmd_serve.wan.vae import StreamingDecoder

PARAMS = GenerateParams(prompt="a red circle moves right", seed=7, height=32, width=32, num_frames=9, fps=16, crf=18)
OTHER = replace(PARAMS, seed=8, prompt="a blue ring")
DEADLINE_S = 120.0
GIB = 2**30


@pytest.fixture(scope="module")
def in_a_row(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[GenerateParams, bytes]:
    """The files of an engine that overlaps nothing."""
    engine, path = load_engine(tiny_bundle, "cpu"), tmp_path_factory.mktemp("row") / "a.mp4"
    assert not engine.facts.is_decoding_overlapped
    videos = {}
    for params in (PARAMS, OTHER):
        engine.generate(params, path)
        videos[params] = path.read_bytes()
    return videos


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    engine = load_engine(tiny_bundle, "cpu", overlap="on")
    assert engine.facts.is_decoding_overlapped and engine.facts.fallback == ""
    return engine


class Events:
    """What happened in which order, in all threads, and gates that decoding waits at."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []
        self.may_decode = threading.Event()

    def of(self, number: int, then: Callable[[str, int], None] = lambda *_: None) -> Callable[[str, int, int], None]:
        """Return an on_progress of one video."""

        def on_progress(stage: str, done: int, _total: int) -> None:
            self.seen.append((number, stage))
            then(stage, done)

        return on_progress


@pytest.fixture
def events(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Events]:
    """Hold every decode before its first chunk until the gate is open."""
    events, frames = Events(), StreamingDecoder.frames

    def held(self: StreamingDecoder, latents: Tensor) -> Iterator[Tensor]:
        assert events.may_decode.wait(DEADLINE_S)
        return frames(self, latents)

    monkeypatch.setattr(StreamingDecoder, "frames", held)
    yield events
    events.may_decode.set()
    engine._finish_decoding()


def test_the_next_video_is_denoised_before_the_one_before_is_decoded_and_both_are_right(
    engine: Engine, events: Events, tmp_path: Path, in_a_row: dict[GenerateParams, bytes]
) -> None:
    def open_gate(stage: str, done: int) -> None:
        if (stage, done) == ("denoise", 4):
            events.may_decode.set()

    videos = [
        engine.begin(PARAMS, tmp_path / "a.mp4", events.of(1)),
        engine.begin(OTHER, tmp_path / "b.mp4", events.of(2, open_gate)),
        engine.begin(PARAMS, tmp_path / "c.mp4", events.of(3)),
    ]
    results = [video.result(DEADLINE_S) for video in videos]
    seen = events.seen
    assert seen.index((2, "denoise")) < seen.index((1, "decode"))
    assert seen.index((1, "encode")) < seen.index((2, "decode")), "at most one is left to decode or encode"
    denoise = next(span for span in results[1].spans if span.stage == "denoise")
    decode = next(span for span in results[0].spans if span.stage == "decode")
    assert denoise.start_s < decode.end_s and decode.start_s < denoise.end_s
    assert list(results[0].timings_ms) == ["text", "denoise", "decode", "encode"]
    for name, params in (("a", PARAMS), ("b", OTHER), ("c", PARAMS)):
        assert (tmp_path / f"{name}.mp4").read_bytes() == in_a_row[params]


def test_a_video_that_is_given_up_while_it_is_decoded_leaves_the_next_one_alone(
    engine: Engine, events: Events, tmp_path: Path, in_a_row: dict[GenerateParams, bytes]
) -> None:
    def give_up(stage: str, _: int) -> None:
        if stage == "decode":
            raise CancelledError("enough")

    def open_gate(stage: str, done: int) -> None:
        if (stage, done) == ("denoise", 2):
            events.may_decode.set()

    first = engine.begin(PARAMS, tmp_path / "a.mp4", events.of(1, give_up))
    second = engine.begin(OTHER, tmp_path / "b.mp4", events.of(2, open_gate))
    assert isinstance(first.exception(DEADLINE_S), CancelledError)
    second.result(DEADLINE_S)
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]
    assert (tmp_path / "b.mp4").read_bytes() == in_a_row[OTHER]


def test_a_video_that_is_given_up_while_it_is_denoised_leaves_the_one_before_alone(
    engine: Engine, events: Events, tmp_path: Path, in_a_row: dict[GenerateParams, bytes]
) -> None:
    def give_up(stage: str, done: int) -> None:
        if (stage, done) == ("denoise", 2):
            raise CancelledError("enough")

    first = engine.begin(PARAMS, tmp_path / "a.mp4", events.of(1))
    with pytest.raises(CancelledError):
        engine.begin(OTHER, tmp_path / "b.mp4", events.of(2, give_up))
    events.may_decode.set()
    first.result(DEADLINE_S)
    assert (tmp_path / "a.mp4").read_bytes() == in_a_row[PARAMS]


@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"), (RuntimeError("CUDA error: x"), "device_error")],
)
def test_a_decode_that_fails_is_an_error_of_its_video_only(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_a_row: dict[GenerateParams, bytes],
    error: Exception,
    code: str,
) -> None:
    frames, may_fail, numbers = StreamingDecoder.frames, threading.Event(), itertools.count()

    def fails_first(self: StreamingDecoder, latents: Tensor) -> Iterator[Tensor]:
        if next(numbers) == 0:
            assert may_fail.wait(DEADLINE_S)
            raise error
        return frames(self, latents)

    monkeypatch.setattr(StreamingDecoder, "frames", fails_first)
    first = engine.begin(PARAMS, tmp_path / "a.mp4")
    second = engine.begin(OTHER, tmp_path / "b.mp4", lambda *_: may_fail.set())
    failure = first.exception(DEADLINE_S)
    assert isinstance(failure, GenerationError) and failure.code == code
    second.result(DEADLINE_S)
    assert (tmp_path / "b.mp4").read_bytes() == in_a_row[OTHER]


def test_an_overflow_is_decoded_again_in_the_thread(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_row: dict[GenerateParams, bytes]
) -> None:
    overflows, facts = iter([True]), engine.facts
    monkeypatch.setattr(engine.decoder, "has_overflowed", lambda: next(overflows, False))
    engine.begin(PARAMS, tmp_path / "a.mp4").result(DEADLINE_S)
    assert (tmp_path / "a.mp4").read_bytes() == in_a_row[PARAMS]
    assert engine.facts.vae_dtype == "float32" and "left the range of float16" in engine.facts.fallback
    engine.facts, engine.decoder.problem = facts, ""


def test_an_interrupt_ends_the_decode_and_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, num_chunks = StreamingDecoder.frames, list[int]()

    def endless(self: StreamingDecoder, latents: Tensor) -> Iterator[Tensor]:
        (chunk,) = frames(self, latents)
        while True:
            num_chunks.append(1)
            yield chunk

    class Interrupted(threading.Event):
        def result(self) -> object:
            while len(num_chunks) < 3:
                self.wait(0.002)
            raise KeyboardInterrupt

    decode_beside = engine._decode_beside

    def interrupted(*words: Any) -> Any:
        decode_beside(*words)
        return Interrupted()

    with monkeypatch.context() as patch:
        patch.setattr(StreamingDecoder, "frames", endless)
        patch.setattr(engine, "_decode_beside", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PARAMS, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
    engine.generate(PARAMS, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").stat().st_size > 500


def test_g11_noise_is_drawn_while_the_text_is_encoded(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, is_drawn = engine.draw, threading.Event()

    def watched(params: GenerateParams) -> Tensor:
        noise = draw(params)
        is_drawn.set()
        return noise

    class Embedder:
        lend_to = None

        def __call__(self, prompt: str) -> Tensor:
            assert is_drawn.wait(DEADLINE_S)
            return embedder(prompt)

    embedder = engine.embedder
    monkeypatch.setattr(engine, "draw", watched)
    monkeypatch.setattr(engine, "embedder", Embedder())
    engine.generate(replace(PARAMS, prompt="a white triangle stays still"), tmp_path / "a.mp4")


def budget(free_gib: float, text_gib: float = 0.0) -> OverlapBudget:
    return OverlapBudget(
        denoise_bytes=6 * GIB,
        decode_bytes=4 * GIB,
        text_bytes=int(text_gib * GIB),
        free_bytes=int(free_gib * GIB),
        native_px=100,
    )


def test_memory_is_counted_for_both_videos_by_their_sizes() -> None:
    assert budget(10.0).fits(100, 100) and budget(10.0).problem == ""
    assert not budget(10.0).fits(200, 100) and not budget(10.0).fits(100, 200)
    assert budget(10.0).fits(25, 150), "a small one leaves room for a large one"
    assert budget(9.9).problem == ("a video is not decoded while the next one is denoised: 10.0 GiB needed, 9.9 free")
    assert not budget(12.0, text_gib=11.0).fits(100, 100), "the text encoder comes to the device as well"


def test_a_video_that_does_not_fit_beside_waits_and_so_does_a_teachers(engine: Engine) -> None:
    large = replace(PARAMS, num_frames=41)
    engine.budget, engine._decoding_px = replace(budget(10.0), native_px=32 * 32 * 9), 32 * 32 * 9
    try:
        assert engine._fits_beside(PARAMS) and not engine._fits_beside(large)
        assert not engine._fits_beside(replace(PARAMS, teacher="f" * 8))
    finally:
        engine.budget = None
    assert engine._fits_beside(large), "nothing is counted on a CPU"


def test_what_does_not_fit_beside_begins_when_the_one_before_is_decoded(
    engine: Engine, events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "budget", replace(budget(1.0), native_px=32 * 32 * 9))
    first = engine.begin(PARAMS, tmp_path / "a.mp4", events.of(1))
    threading.Timer(0.0, events.may_decode.set).start()
    engine.begin(OTHER, tmp_path / "b.mp4", events.of(2)).result(DEADLINE_S)
    first.result(DEADLINE_S)
    assert events.seen.index((1, "decode")) < events.seen.index((2, "text"))


@pytest.mark.parametrize(("free_gib", "overlaps"), [(10.0, True), (9.0, False)])
def test_want_of_memory_switches_overlap_off_and_health_says_so(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, overlaps: bool
) -> None:
    peaks = iter([0, 6 * GIB, 4 * GIB])  # of what fits the dtype, of denoising and of decoding
    monkeypatch.setattr(warm_module, "chooses_kernels", lambda _: True)
    monkeypatch.setattr(warm_module, "fit_dtype", lambda *_: None)
    monkeypatch.setattr(warm_module, "run_with_peak", lambda _, run: (run(), next(peaks)))
    monkeypatch.setattr(warm_module, "free_bytes", lambda _: int(free_gib * GIB))
    engine = load_engine(tiny_bundle, "cpu", overlap="on")
    assert engine.facts.is_decoding_overlapped == engine.overlaps == overlaps
    expected = "" if overlaps else "a video is not decoded while the next one is denoised: 10.0 GiB needed, 9.0 free"
    assert engine.facts.fallback == expected
    if not overlaps:
        seen: list[str] = []
        first = engine.begin(PARAMS, tmp_path / "a.mp4", lambda stage, *_: seen.append(stage))
        assert "decode" in seen, "it is decoded when begin returns"
        first.result(DEADLINE_S)


def test_overlap_is_for_devices_unless_asked_for() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [choose_overlap(name, cpu) for name in ("auto", "on", "off")] == [False, True, False]
    assert [choose_overlap(name, cuda) for name in ("auto", "on", "off")] == [True, True, False]
    with pytest.raises(ConfigError, match="overlap must be one of auto, on, off, got 'maybe'"):
        choose_overlap("maybe", cpu)


def test_one_thread_decodes_for_warm_up_and_requests_in_inference_mode() -> None:
    thread = DecodeThread(torch.device("cpu"))
    seen = [thread.submit(lambda: (threading.get_ident(), torch.is_inference_mode_enabled())).result() for _ in "ab"]
    assert seen[0] == seen[1] and seen[0][1] and seen[0][0] != threading.get_ident()


def test_the_decoder_is_warmed_in_the_thread_that_decodes(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm, seen = warm_module._warm_decoder, list[str]()

    def watched(engine: Engine, x0_pred: Tensor) -> None:
        seen.append(threading.current_thread().name)
        warm(engine, x0_pred)

    monkeypatch.setattr(warm_module, "_warm_decoder", watched)
    monkeypatch.setattr(warm_module, "chooses_kernels", lambda _: True)
    load_engine(tiny_bundle, "cpu", overlap="on")
    load_engine(tiny_bundle, "cpu")
    assert seen[0].startswith("codmd-decode") and seen[1] == threading.main_thread().name

"""The engine on a tiny random bundle of the real classes: the right frames, the same bytes, and clean failures."""

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from polling import wait_until

from codmd_serve import engine as engine_module
from codmd_serve.config import MAX_SEED, GenerateParams
from codmd_serve.engine import Engine, draw_noise
from codmd_serve.errors import CancelledError, GenerationError
from codmd_serve.loading import load_engine
from codmd_serve.sampler import rollout
from codmd_serve.video import write_video
from codmd_serve.wan import vae as vae_module
from codmd_serve.wan.checkpoint import StudentSpec
from codmd_serve.wan.vae import to_uint8
from distill.worlds.shapeworld.captions import grammar

PARAMS = GenerateParams(prompt="a red circle moves right", seed=7, height=32, width=48, num_frames=9, fps=16, crf=18)

DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return load_engine(tiny_bundle, "cpu")


def video_of(engine: Engine, path: Path, **changes: Any) -> bytes:
    engine.generate(replace(PARAMS, **changes), path)
    return path.read_bytes()


def test_generate_gives_the_frames_that_were_asked_for(
    engine: Engine, tmp_path: Path, read_video: Callable[[bytes], Any]
) -> None:
    frames, fps, _ = read_video(video_of(engine, tmp_path / "a.mp4", fps=24))
    assert frames.shape == (9, 32, 48, 3) and fps == 24
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_generate_equals_the_parts_of_diffusers_put_together(
    engine: Engine, tiny_pipeline: WanPipeline, tiny_spec: StudentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    monkeypatch.setattr(engine_module, "write_video", lambda frames, *_, **__: seen.extend(map(bytes, frames)))
    engine.generate(PARAMS, tmp_path / "a.mp4")

    noise = torch.randn(4, 1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(PARAMS.seed))
    embeds, _ = tiny_pipeline.encode_prompt(PARAMS.prompt, None, False, max_sequence_length=512)
    with torch.no_grad():
        x0_pred = rollout(
            lambda latents, timestep, prompt: tiny_pipeline.transformer(latents, timestep, prompt).sample,
            noise,
            embeds,
            tiny_spec.sigmas,
            tiny_spec.timesteps,
        )
        vae = tiny_pipeline.vae
        mean, std = (torch.tensor(vae.config[k]).reshape(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        whole = to_uint8(vae.decode(x0_pred * std + mean).sample).permute(0, 2, 3, 4, 1)
    got = torch.frombuffer(bytearray(b"".join(seen)), dtype=torch.uint8).reshape(9, 32, 48, 3)
    # The trimmed prompt is attended to in another order of sums; one level is the rounding of that.
    assert (got.int() - whole[0].int()).abs().max() <= 1


def test_same_seed_gives_the_same_bytes_whatever_ran_before(engine: Engine, tmp_path: Path) -> None:
    first = video_of(engine, tmp_path / "a.mp4")
    others: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue ring"},
        {"height": 16, "num_frames": 5},
        {"seed": 7 + 2**32},
    ]
    assert all(video_of(engine, tmp_path / "b.mp4", **other) != first for other in others)
    assert video_of(engine, tmp_path / "c.mp4") == first


def test_two_engines_give_the_same_bytes(engine: Engine, tiny_bundle: Path, tmp_path: Path) -> None:
    again = load_engine(tiny_bundle, "auto" if not torch.cuda.is_available() else "cpu")
    assert video_of(again, tmp_path / "a.mp4") == video_of(engine, tmp_path / "b.mp4")


def test_the_video_says_how_to_make_it_again(engine: Engine, tmp_path: Path) -> None:
    assert json.dumps({"bundle": "tiny-codmd", "prompt": PARAMS.prompt, "seed": 7}).strip("{}").encode() in video_of(
        engine, tmp_path / "a.mp4"
    )


def decode_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one latent frame, so that there is a time between two of them in a short video."""
    monkeypatch.setattr(vae_module, "FIRST_CHUNK", 1)
    monkeypatch.setattr(vae_module, "CHUNK", 1)


def test_progress_is_told_stage_by_stage_and_every_stage_is_timed(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_one_by_one(monkeypatch)
    seen: list[tuple[str, int, int]] = []
    num_encoded = 0
    result = engine.generate(PARAMS, tmp_path / "a.mp4", lambda *step: seen.append(step))
    while seen[-1][0] == "encode":
        assert seen.pop()[2] == 9
        num_encoded += 1
    assert num_encoded > 0, "the last one is asked whether the file may appear"
    assert seen == [
        ("text", 1, 1),
        *(("denoise", step, 4) for step in (1, 2, 3, 4)),
        *(("decode", frames, 9) for frames in (1, 5, 9)),
    ]
    assert list(result.timings_ms) == ["text", "denoise", "decode", "encode"]
    assert all(value > 0 for value in result.timings_ms.values())


@pytest.mark.parametrize("at", [("text", 1), ("denoise", 2), ("decode", 5), ("encode", 9)])
def test_cancelling_leaves_nothing_and_disturbs_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[str, int]
) -> None:
    decode_one_by_one(monkeypatch)
    before = video_of(engine, tmp_path / "a.mp4")
    folder = tmp_path / "cancelled"
    folder.mkdir()

    def on_progress(stage: str, done: int, _: int) -> None:
        if (stage, done) == at:
            raise CancelledError("enough")

    with pytest.raises(CancelledError, match="enough"):
        engine.generate(PARAMS, folder / "a.mp4", on_progress)
    assert not list(folder.iterdir())
    assert video_of(engine, tmp_path / "b.mp4") == before


def test_warnings_name_unknown_words_and_a_shape_that_was_not_trained(engine: Engine, tmp_path: Path) -> None:
    native = replace(PARAMS, width=32)
    assert engine.generate(native, tmp_path / "a.mp4").warnings == []
    assert engine.generate(replace(native, prompt="a red dragon"), tmp_path / "a.mp4").warnings == [
        "words outside the vocabulary of this model: dragon",
        "It knows a few words only.",
    ]
    (shape,) = engine.generate(PARAMS, tmp_path / "a.mp4").warnings
    assert shape == "trained at 32x32 with 9 frames, asked for 48x32 with 9: expect less of it"


def test_a_student_of_a_grammar_warns_of_prompts_outside_it(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "student"
    shutil.copytree(tiny_bundle, copy)
    spec = json.loads((copy / "student.json").read_text())
    (copy / "student.json").write_text(json.dumps({**spec, "base": str(tiny_bundle.parent / "tiny")}))
    grammar().save(copy)
    engine = load_engine(copy, "cpu")
    native = replace(PARAMS, width=32, prompt="a red circle moves right")
    warning, note = engine.generate(native, tmp_path / "a.mp4").warnings
    assert 'The nearest caption it knows: "a red circle moves right slowly on a black background"' in warning
    assert note == "It knows a few words only."
    native = replace(native, prompt="a red circle moves right quickly on a black background")
    assert engine.generate(native, tmp_path / "a.mp4").warnings == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_an_error_of_its_job_and_the_next_one_works(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhausted(*_: object) -> Iterator[torch.Tensor]:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "frames", exhausted)
        with pytest.raises(GenerationError, match="out of memory at 48x32, 9 frames; ask for fewer") as caught:
            engine.generate(PARAMS, tmp_path / "a.mp4")
    assert caught.value.code == "out_of_memory"
    assert not list(tmp_path.iterdir())
    assert video_of(engine, tmp_path / "a.mp4")


def test_another_runtime_error_is_not_taken_for_out_of_memory(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Iterator[torch.Tensor]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine.decoder, "frames", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine.generate(PARAMS, tmp_path / "a.mp4")


def test_facts_say_what_requests_are_judged_by(engine: Engine) -> None:
    facts = engine.facts
    assert (facts.name, facts.device, facts.dtype, facts.execution) == ("tiny-codmd", "cpu", "float32", "eager")
    assert facts.attention == "native"
    assert (facts.height, facts.width, facts.num_frames, facts.fps, facts.num_steps) == (32, 32, 9, 16, 4)
    assert (facts.size_multiple, facts.frame_multiple) == (16, 4)
    assert (facts.max_side_px, facts.max_num_frames) == (1024 * 16, 1023 * 4 + 1)
    assert 0 < facts.service_s < facts.load_s


def test_draw_noise_is_what_manual_seed_gives_for_small_seeds() -> None:
    assert torch.equal(draw_noise(7, (2, 3)), torch.randn(2, 3, generator=torch.Generator().manual_seed(7)))


def test_draw_noise_tells_seeds_apart_that_share_their_low_bits() -> None:
    seeds = [7, 7 + 2**32, 7 + 2**62, MAX_SEED, MAX_SEED - 2**32]
    drawn = {tuple(draw_noise(seed, (4,)).tolist()) for seed in seeds}
    assert len(drawn) == len(seeds)


def wait_for(gate: threading.Event) -> None:
    assert gate.wait(DEADLINE_S), "the other side never came"


@pytest.fixture
def held_encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every encoder, once it has all frames, until the event is set."""
    may_end = threading.Event()

    def held(frames: Iterator[memoryview], *args: Any, **options: Any) -> None:
        def all_frames() -> Iterator[memoryview]:
            yield from frames
            wait_for(may_end)

        write_video(all_frames(), *args, **options)

    monkeypatch.setattr(engine_module, "write_video", held)
    yield may_end
    may_end.set()


def test_the_next_video_is_denoised_while_the_one_before_is_encoded_and_bytes_stay(
    engine: Engine, tmp_path: Path, held_encoder: threading.Event
) -> None:
    seen: list[str] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        seen.append(stage)
        if (stage, done) == ("denoise", total):
            assert not first.done() and not (tmp_path / "a.mp4").exists()
            held_encoder.set()

    first = engine.begin(PARAMS, tmp_path / "a.mp4")
    second = engine.begin(replace(PARAMS, seed=8), tmp_path / "b.mp4", on_progress)
    assert first.done(), "at most one video is left to encode when another one is decoded"
    results = [video.result(DEADLINE_S) for video in (first, second)]
    assert seen.count("denoise") == 4
    denoise = next(span for span in results[1].spans if span.stage == "denoise")
    encode = next(span for span in results[0].spans if span.stage == "encode")
    assert encode.start_s < denoise.start_s < denoise.end_s < encode.end_s
    assert (tmp_path / "a.mp4").read_bytes() == video_of(engine, tmp_path / "c.mp4")
    assert (tmp_path / "b.mp4").read_bytes() == video_of(engine, tmp_path / "d.mp4", seed=8)


def test_chunks_are_decoded_while_one_before_is_being_written_and_no_more_than_two_wait(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_one_by_one(monkeypatch)
    decoded, num_taken, may_go_on = list[int](), list[int](), threading.Event()

    def slow(frames: Iterator[memoryview], *_: object, **__: object) -> None:
        for number, _frame in enumerate(frames):
            num_taken.append(number)
            wait_for(may_go_on)

    def on_progress(stage: str, done: int, _: int) -> None:
        if stage == "decode":
            decoded.append(done)
            if done == 13:  # the fourth chunk: one is with the writer, two wait, so this one has to
                assert len(num_taken) <= 1
                may_go_on.set()

    monkeypatch.setattr(engine_module, "write_video", slow)
    engine.generate(replace(PARAMS, num_frames=17), tmp_path / "a.mp4", on_progress)
    assert decoded == [1, 5, 9, 13, 17] and num_taken == [0, 1, 2, 3, 4]


def test_an_encoder_that_fails_ends_the_video_and_the_next_one_works(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_one_by_one(monkeypatch)
    with monkeypatch.context() as patch:
        program = tmp_path / "ffmpeg"
        program.write_text('#!/bin/sh\nfor last; do :; done; echo half > "$last"; echo disk full >&2; exit 1\n')
        program.chmod(0o755)
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
        with pytest.raises(GenerationError, match="ffmpeg failed: disk full") as caught:
            engine.generate(PARAMS, tmp_path / "a.mp4")
        program.unlink()
    assert caught.value.code == "encode_failed" and not list(tmp_path.iterdir())
    assert video_of(engine, tmp_path / "a.mp4")


def test_an_encoder_that_fails_later_is_an_error_of_its_video_only(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(frames: Iterator[memoryview], *_: object, **__: object) -> None:
        list(frames)
        raise GenerationError("ffmpeg failed: disk full", "encode_failed")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "write_video", fails)
        first = engine.begin(PARAMS, tmp_path / "a.mp4")
    second = engine.begin(PARAMS, tmp_path / "b.mp4")
    assert isinstance(first.exception(DEADLINE_S), GenerationError)
    assert second.result(DEADLINE_S).warnings and [path.name for path in tmp_path.iterdir()] == ["b.mp4"]


def test_an_interrupt_while_the_encoder_is_waited_for_ends_it_and_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor last; do :; done; echo half > "$last"; cat > /dev/null; exec sleep 600\n')
    program.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()

    result_of = Future.result

    def interrupted(future: Future[object], timeout: float | None = None) -> object:
        if engine._tail is None or future is not engine._tail.result:
            return result_of(future, timeout)  # the noise is waited for too
        wait_until(lambda: list(out.iterdir()), DEADLINE_S, "the encoder has begun its file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PARAMS, out / "a.mp4")
    assert not list(out.iterdir())
    assert video_of(engine, tmp_path / "a.mp4")


def test_a_prompt_is_prepared_beside_the_steps_of_another_and_costs_its_video_nothing(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    engine = load_engine(tiny_bundle, "cpu")
    expected = video_of(load_engine(tiny_bundle, "cpu"), tmp_path / "a.mp4", prompt="a blue ring")
    preparing = threading.Thread(target=engine.prepare, args=("a blue ring",))

    def on_progress(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("denoise", 1):
            preparing.start()
        if (stage, done) == ("denoise", 4):
            preparing.join()

    first = engine.generate(PARAMS, tmp_path / "b.mp4", on_progress)
    prepared = engine.generate(replace(PARAMS, prompt="a blue ring"), tmp_path / "c.mp4")
    text = next(span for span in prepared.spans if span.stage == "text")
    denoise = next(span for span in first.spans if span.stage == "denoise")
    assert denoise.start_s < text.start_s < text.end_s < denoise.end_s
    assert (tmp_path / "c.mp4").read_bytes() == expected
    assert (tmp_path / "b.mp4").read_bytes() == video_of(engine, tmp_path / "d.mp4")


def test_a_text_encoder_that_is_lent_to_the_device_is_not_lent_ahead(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(engine, "embed", asked.append)
    engine.prepare("one")
    monkeypatch.setattr(engine.embedder, "lend_to", torch.device("cpu"))
    engine.prepare("two")
    assert asked == ["one"]


def test_previews_come_after_each_step_and_change_no_bit(engine: Engine, tmp_path: Path) -> None:
    plain = video_of(engine, tmp_path / "a.mp4")
    order: list[str] = []
    previews: list[bytes] = []

    def on_preview(image: bytes) -> None:
        order.append("preview")
        previews.append(image)

    engine.begin(PARAMS, tmp_path / "b.mp4", lambda stage, *_: order.append(stage), on_preview).result(DEADLINE_S)
    assert (tmp_path / "b.mp4").read_bytes() == plain
    assert order[:9] == ["text", *["preview", "denoise"] * 4]
    assert len(set(previews)) == 4
    for image in previews:
        with Image.open(io.BytesIO(image)) as animation:
            # The latents of 48 x 32 pixels and 9 frames.
            assert animation.size == (6, 4) and animation.n_frames == 3  # type: ignore[attr-defined]


def test_the_peak_memory_of_a_video_is_told(engine: Engine, tmp_path: Path) -> None:
    result = engine.generate(PARAMS, tmp_path / "a.mp4")
    assert 10 < result.peak_memory_mb < 2**20, "megabytes"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "device_error"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "device_error"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device_error"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
    ],
)
def test_g4_a_device_error_is_told_from_want_of_memory(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "frames", fails)
        with pytest.raises(GenerationError) as caught:
            engine.generate(PARAMS, tmp_path / "a.mp4")
    assert caught.value.code == code
    assert video_of(engine, tmp_path / "b.mp4")

"""Warm-up: what is measured, what is made smaller where memory is short, and what a request does that does not fit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from codmd_serve import warm as warm_module
from codmd_serve.config import GenerateParams
from codmd_serve.errors import GenerationError
from codmd_serve.loading import load_engine
from codmd_serve.wan.vae import StreamingDecoder

PARAMS = GenerateParams(prompt="a red circle moves right", seed=7, height=32, width=48, num_frames=9, fps=16, crf=18)


def test_the_largest_video_follows_from_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, native_px = torch.device("cuda"), 32 * 48 * 9
    assert warm_module._affordable_px(PARAMS, torch.device("cpu"), 1000) == 0  # nobody counted
    assert warm_module._affordable_px(PARAMS, cuda, 0) == 0
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    for free_bytes, times in ((10_000, 9), (1_500, 1.35), (500, 1)):  # what was made once fits, whatever is free now
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, free=free_bytes: (free, 10**6))
        assert warm_module._affordable_px(PARAMS, cuda, 1000) == int(times * native_px)


def test_convolutions_are_measured_at_warm_up_only(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, seen = StreamingDecoder.frames, list[bool]()
    monkeypatch.setattr("codmd_serve.loading.fit_preview", lambda _: ())  # which decodes, too

    def watched(self: StreamingDecoder, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        seen.append(torch.backends.cudnn.benchmark)
        return frames(self, latents)

    monkeypatch.setattr(StreamingDecoder, "frames", watched)
    load_engine(tiny_bundle, "cpu")
    assert seen == [False]  # on a CPU the whole video that is timed, and nothing before it
    seen.clear()
    monkeypatch.setattr(warm_module, "chooses_kernels", lambda _: True)
    load_engine(tiny_bundle, "cpu")
    assert seen == [True, False]  # the decode of the warm-up, then the whole video that is timed
    assert not torch.backends.cudnn.benchmark


def test_an_overflow_of_the_half_precision_vae_decodes_again_in_float32(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_video: Callable[[Path], Any]
) -> None:
    engine = load_engine(tiny_bundle, "cpu")
    engine.generate(PARAMS, tmp_path / "want.mp4")
    overflows, dtypes = iter([True]), list[torch.dtype]()
    monkeypatch.setattr(engine.decoder, "has_overflowed", lambda: next(overflows, False))
    monkeypatch.setattr(engine.decoder, "set_dtype", dtypes.append)
    again = engine.generate(PARAMS, tmp_path / "again.mp4")
    assert dtypes == [torch.float32]
    assert engine.facts.fallback == "VAE in float32: the activations of a request left the range of float16"
    assert (read_video(tmp_path / "again.mp4").frames == read_video(tmp_path / "want.mp4").frames).all()
    assert [span.stage for span in again.spans].count("decode") == 2
    engine.generate(PARAMS, tmp_path / "next.mp4")
    assert dtypes == [torch.float32]


def test_a_chunk_that_does_not_fit_is_halved_at_load(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, sizes = StreamingDecoder.frames, list[int]()
    monkeypatch.setattr("codmd_serve.loading.fit_preview", lambda _: ())  # which decodes, too
    monkeypatch.setattr(warm_module, "chooses_kernels", lambda _: True)

    def short_of_memory(self: StreamingDecoder, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        sizes.append(self.max_chunk)
        if self.max_chunk > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return frames(self, latents)

    monkeypatch.setattr(StreamingDecoder, "frames", short_of_memory)
    engine = load_engine(tiny_bundle, "cpu")
    assert sizes == [4, 2, 1, 1]
    assert engine.facts.fallback == "the VAE decodes 1 latent frame(s) at a time for want of memory"
    engine.decoder.max_chunk, engine.decoder.problem = 2, "VAE norms unfused: no package triton"
    warm_module._warm_decoder(engine, engine.denoised(PARAMS))
    assert engine.decoder.problem == f"VAE norms unfused: no package triton; {engine.facts.fallback}"

    def no_memory(*_: object) -> Iterator[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StreamingDecoder, "frames", no_memory)
    with pytest.raises(GenerationError, match="cannot decode one latent frame"):
        load_engine(tiny_bundle, "cpu")


def test_a_cache_keeps_what_was_measured(tiny_bundle: Path, tmp_path: Path) -> None:
    engine = load_engine(tiny_bundle, "cpu", cache=str(tmp_path))
    assert engine.facts.attention == "native"
    assert "native" in (tmp_path / "verdicts.json").read_text()


def test_an_engine_decodes_in_the_dtype_that_was_asked_for(tiny_bundle: Path, tmp_path: Path) -> None:
    engine = load_engine(tiny_bundle, "cpu", vae_dtype="bfloat16")
    assert (engine.facts.vae_dtype, engine.decoder.dtype, engine.facts.fallback) == ("bfloat16", torch.bfloat16, "")
    engine.generate(PARAMS, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").stat().st_size > 1000

"""Warms up an engine: VAE precision, kernels and graphs of the native shape, largest video that fits in memory.

Knows neither bundles nor jobs.
"""

import contextlib
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from codmd_serve.chunk_graphs import may_record, warm_chunks
from codmd_serve.config import DEFAULT_CRF, GenerateParams, TeacherFacts
from codmd_serve.device import multiplies_bfloat16
from codmd_serve.device_memory import free_bytes, run_with_peak
from codmd_serve.engine import Engine, num_pixels
from codmd_serve.errors import CancelledError, GenerationError
from codmd_serve.overlap import OverlapBudget
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.precision import fit_dtype, joined, race_dtype
from codmd_serve.wan.teacher import GuidedPrompt

logger = logging.getLogger(__name__)


def warm_engine(engine: Engine, vae_dtype: torch.dtype | None, verdicts: Verdicts | None = None) -> None:
    """Make the native video, so that the first request is fast, and record the findings in the facts.

    On CUDA that is done twice: in the first run libraries choose kernels, the second one is timed. On a CPU the first
    run is as fast as any other.

    Args:
        engine: just made.
        vae_dtype: of the VAE, where its activations fit; the engine's decoder says in `problem` where they do not. None
            is what a CPU is faster in.
        verdicts: of earlier loads; None remembers nothing.
    """
    device = engine.transformer.device
    params = _native_params(engine)
    engine.embed(params.prompt)  # first, or an encoder that is lent to the device would be taken for activations
    peaks, vae_execution, fallbacks = _warm_stages(engine, params, vae_dtype, verdicts or Verdicts(None))
    fallbacks.append(_warm_overlap(engine, params, peaks))
    max_video_px = _affordable_px(params, device, max(astuple(peaks)))
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="codmd-warm-") as folder:
        engine.generate(params, Path(folder) / "warm.mp4")
    engine.facts = replace(
        engine.facts,
        execution=engine.loop.execution,
        vae_dtype=str(engine.decoder.dtype).removeprefix("torch."),
        vae_execution=vae_execution,
        is_decoding_overlapped=engine.overlaps,
        fallback="; ".join(filter(None, fallbacks)),
        max_video_px=max_video_px,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        num_devices=torch.cuda.device_count() if device.type == "cuda" else 1,
        service_s=time.perf_counter() - start_s,
    )
    _warm_teacher(engine, params)


@dataclass(frozen=True, slots=True)
class _Peaks:
    """Bytes that a stage of the native video has allocated at its peak, beyond what stays; 0 on a CPU."""

    denoise: int
    fit: int
    decode: int


def _warm_stages(
    engine: Engine, params: GenerateParams, vae_dtype: torch.dtype | None, verdicts: Verdicts
) -> tuple[_Peaks, str, list[str]]:
    """Warm up the loops and the decoder; return peaks, how VAE chunks run, and fallbacks, some of them empty."""
    device, decoder, denoise, decode = engine.transformer.device, engine.decoder, 0, 0

    @functools.cache
    def latents() -> Tensor:
        nonlocal denoise
        x0_pred, denoise = run_with_peak(device, lambda: engine.denoised(params))
        return x0_pred

    _, fit = run_with_peak(device, lambda: _fit_decoder(engine, vae_dtype, latents, verdicts))
    if chooses_kernels(device):
        # Before anything is recorded: libraries choose their kernels, and activations take what they take.
        x0_pred = latents()
        _, decode = run_with_peak(device, lambda: engine.in_decode_thread(lambda: _warm_decoder(engine, x0_pred)))
    engine.warm_loop(params)
    fallbacks = [engine.loop.fallback, engine.transformer.problem]
    if engine.lossy_loop is not None:
        # Libraries choose kernels, and what is broken shows.
        _, of_lossy = run_with_peak(device, lambda: engine.denoised(replace(params, may_be_lossy=True)))
        denoise = max(denoise, of_lossy)
        lossy = (engine.lossy_loop.fallback, engine.lossy_loop.transformer.problem)
        fallbacks += [f"lossy engine: {reason}" for reason in lossy if reason and reason not in fallbacks]
    execution, fallback = "eager", ""
    if may_record(engine.execution):
        x0_pred = latents()
        execution, fallback = engine.in_decode_thread(
            lambda: warm_chunks(
                decoder, x0_pred, engine.execution, reserved_bytes=max(denoise, decode), verdicts=verdicts
            )
        )
    return _Peaks(denoise, fit, decode), execution, [*fallbacks, decoder.problem, fallback]


@torch.inference_mode()
def _fit_decoder(
    engine: Engine, vae_dtype: torch.dtype | None, latents: Callable[[], Tensor], verdicts: Verdicts
) -> None:
    """Cast the VAE to the dtype that was asked for where its activations fit, or to what is faster."""
    if vae_dtype == torch.float16:
        fit_dtype(engine.decoder, vae_dtype, latents())
    elif vae_dtype is not None:
        engine.decoder.set_dtype(vae_dtype)
    elif multiplies_bfloat16(engine.transformer.device):
        race_dtype(engine.decoder, latents, verdicts)


def _warm_overlap(engine: Engine, params: GenerateParams, peaks: _Peaks) -> str:
    """Count memory for two videos at once; switch overlap off where there is too little, and say so in one sentence."""
    free = free_bytes(engine.transformer.device)
    if not engine.overlaps or free is None:
        return ""
    encoder = engine.bundle.text_encoder
    engine.budget = OverlapBudget(
        denoise_bytes=peaks.denoise,
        decode_bytes=peaks.decode,
        text_bytes=sum(p.nbytes for p in encoder.parameters()) if engine.embedder.lend_to is not None else 0,
        free_bytes=free,
        native_px=num_pixels(params),
    )
    if engine.budget.problem:
        engine.stop_overlap()
        logger.warning("overlap=off reason=%r", engine.budget.problem)
    return engine.budget.problem


def _warm_teacher(engine: Engine, params: GenerateParams) -> None:
    """Run two steps of the teacher, where there is one, and put what a video of it takes into the facts."""
    teacher = engine.teacher
    if teacher is None:
        return
    step_s: list[float] = []
    last_s = time.perf_counter()

    def on_step(step_index: int, x0_pred: Tensor) -> None:
        nonlocal last_s
        float(x0_pred.sum())  # waits for the device
        step_s.append(time.perf_counter() - last_s)
        last_s = time.perf_counter()
        if step_index >= 1:
            raise CancelledError("warm-up is over")

    text = engine.embed(params.prompt, for_teacher=True)
    noise = engine.draw(replace(params, teacher=teacher.fingerprint)).to(teacher.transformer.device)
    with contextlib.suppress(CancelledError):
        assert isinstance(text.prompt, GuidedPrompt)
        teacher(noise, text.prompt, on_step)
    facts = TeacherFacts(
        name=teacher.name,
        fingerprint=teacher.fingerprint,
        num_steps=teacher.spec.num_steps,
        guidance_scale=float(teacher.spec.guidance_scale),
        service_s=engine.facts.service_s + min(step_s) * teacher.spec.num_steps,
    )
    engine.facts = replace(engine.facts, teacher=facts)


def _native_params(engine: Engine) -> GenerateParams:
    facts = engine.facts
    return GenerateParams(
        prompt="warm up",
        seed=0,
        height=facts.height,
        width=facts.width,
        num_frames=facts.num_frames,
        fps=facts.fps,
        crf=DEFAULT_CRF,
    )


def chooses_kernels(device: torch.device) -> bool:
    """Return whether libraries choose kernels for a shape when they first see it."""
    return device.type == "cuda"


@torch.inference_mode()
def _warm_decoder(engine: Engine, x0_pred: Tensor) -> None:
    """Decode once, so that cuDNN picks its kernels; use smaller chunks when memory runs out.

    Raises:
        GenerationError: not even one latent frame at a time fits.
    """
    decoder, said_before = engine.decoder, engine.decoder.problem
    while True:
        try:
            with measured_convolutions():
                for _ in decoder.frames(x0_pred):
                    pass
        except torch.OutOfMemoryError as error:
            if decoder.max_chunk == 1:
                raise GenerationError(
                    "out of memory: the VAE cannot decode one latent frame", "out_of_memory"
                ) from error
        else:
            return
        decoder.max_chunk = max(1, decoder.max_chunk // 2)
        said = f"the VAE decodes {decoder.max_chunk} latent frame(s) at a time for want of memory"
        decoder.problem = joined(said_before, said)
        logger.warning("vae_chunk=%d reason=out_of_memory", decoder.max_chunk)
        torch.cuda.empty_cache()


@contextlib.contextmanager
def measured_convolutions() -> Iterator[None]:
    """Let cuDNN time its kernels for every shape that is new to this thread, and keep the fastest.

    Only here: a request of another shape would pay seconds for it. A shape that ran before keeps the kernel it has.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _affordable_px(params: GenerateParams, device: torch.device, needed_bytes: int) -> int:
    """Return the pixels of the largest video that fits, given that `params` needs `needed_bytes`; 0 is unknown.

    Activations grow with the number of tokens, and no other memory grows faster.
    """
    free = free_bytes(device) if needed_bytes > 0 else None
    if free is None:
        return 0
    return max(num_pixels(params), int(num_pixels(params) * free / needed_bytes))

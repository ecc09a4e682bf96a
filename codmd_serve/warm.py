"""Warms up an engine: VAE precision, kernels and graphs of the native shape, largest video that fits in memory.

Knows neither bundles nor jobs.
"""

import contextlib
import functools
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from codmd_serve.config import DEFAULT_CRF, GenerateParams, TeacherFacts
from codmd_serve.device import multiplies_bfloat16
from codmd_serve.engine import Engine
from codmd_serve.errors import CancelledError, GenerationError
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.precision import fit_dtype, race_dtype
from codmd_serve.wan.teacher import GuidedPrompt

MEMORY_SHARE = 0.9  # of what is free; the rest is for fragments, workspaces and the driver

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
    resident_bytes = _allocated_bytes(device)
    latents = functools.cache(lambda: engine.denoised(params))
    if vae_dtype == torch.float16:
        fit_dtype(engine.decoder, vae_dtype, latents())
    elif vae_dtype is not None:
        engine.decoder.set_dtype(vae_dtype)
    elif multiplies_bfloat16(device):
        race_dtype(engine.decoder, latents, verdicts or Verdicts(None))
    if chooses_kernels(device):
        _warm_decoder(engine, latents())
    latents.cache_clear()
    # Before anything is recorded: libraries have chosen their kernels, and activations took what they take.
    needed_bytes = _peak_bytes(device) - resident_bytes
    engine.warm_loop(params)
    fallbacks = [engine.loop.fallback, engine.transformer.problem, engine.decoder.problem]
    if engine.lossy_loop is not None:
        engine.denoised(replace(params, may_be_lossy=True))  # libraries choose kernels, and what is broken shows
        lossy = (engine.lossy_loop.fallback, engine.lossy_loop.transformer.problem)
        fallbacks += [f"lossy engine: {reason}" for reason in lossy if reason and reason not in fallbacks]
    max_video_px = _affordable_px(params, device, needed_bytes)
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="codmd-warm-") as folder:
        engine.generate(params, Path(folder) / "warm.mp4")
    engine.facts = replace(
        engine.facts,
        execution=engine.loop.execution,
        vae_dtype=str(engine.decoder.dtype).removeprefix("torch."),
        fallback="; ".join(filter(None, fallbacks)),
        max_video_px=max_video_px,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        num_devices=torch.cuda.device_count() if device.type == "cuda" else 1,
        service_s=time.perf_counter() - start_s,
    )
    _warm_teacher(engine, params)


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
    decoder = engine.decoder
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
        decoder.problem = f"the VAE decodes {decoder.max_chunk} latent frame(s) at a time for want of memory"
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


def _allocated_bytes(device: torch.device) -> int:
    """Return the bytes allocated now, the baseline of `_peak_bytes`; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _affordable_px(params: GenerateParams, device: torch.device, needed_bytes: int) -> int:
    """Return the pixels of the largest video that fits, given that `params` needs `needed_bytes`; 0 is unknown.

    Activations grow with the number of tokens, and no other memory grows faster.
    """
    native_px = params.height * params.width * params.num_frames
    if device.type != "cuda" or needed_bytes <= 0:
        return 0
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(native_px, int(MEMORY_SHARE * native_px * free_bytes / needed_bytes))

"""The pipelines that are measured: our engine, and the eager diffusers WanPipeline with the same weights."""

import time
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine
from codmd_serve.stages import STAGES
from codmd_serve.video import write_video
from codmd_serve.wan.checkpoint import Bundle, StudentSpec
from codmd_serve.wan.text import MAX_SEQUENCE_LENGTH

TEACHER_STEPS = 50
TEACHER_GUIDANCE = 5.0
# What the published pipelines of Wan2.1 sample 480p with.
TEACHER_SHIFT = 3.0


class Contestant(Protocol):
    """A pipeline that makes a video and reports the time of each stage."""

    @property
    def num_forwards(self) -> int:
        """Forward passes of the transformer per video."""

    def run(self, params: GenerateParams, path: Path) -> dict[str, float]:
        """Write the mp4 of one request to `path`; return milliseconds per stage of STAGES."""


class Ours:
    """The engine as the server runs it.

    Args:
        engine: warm.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine: Any = engine
        self.num_forwards = len(engine.bundle.spec.timesteps)

    def run(self, params: GenerateParams, path: Path) -> dict[str, float]:
        """Write the mp4 of one request to `path`; return milliseconds per stage of STAGES."""
        return dict(self.engine.generate(params, path).timings_ms)

    def release(self) -> None:
        """Release the engine and its memory; keep its facts."""
        self.engine = None


class Diffusers:
    """The stock WanPipeline, eager: its own prompt encoding, loop, VAE and conversion; the mp4 by our encoder.

    Called in three parts instead of one, so that stages can be timed apart; between them lies no work.

    Args:
        bundle: gives the modules; as loaded, with the attention that diffusers chooses.
        scheduler: see `student_scheduler` and `teacher_scheduler`.
        num_steps: of the scheduler.
        guidance: scale; 1 is one forward pass per step, any other two.
    """

    def __init__(self, bundle: Bundle, scheduler: Any, num_steps: int, guidance: float) -> None:
        self.pipeline = WanPipeline(
            tokenizer=bundle.tokenizer,
            text_encoder=bundle.text_encoder,
            vae=bundle.vae,
            scheduler=scheduler,
            transformer=bundle.transformer,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.num_steps, self.guidance = num_steps, guidance
        self.num_forwards = num_steps * (1 if guidance == 1.0 else 2)

    @torch.no_grad()
    def run(self, params: GenerateParams, path: Path) -> dict[str, float]:
        """Write the mp4 of one request to `path`; return milliseconds per stage of STAGES."""
        pipeline, device = self.pipeline, self.pipeline.transformer.device
        times = [_now_s(device)]
        embeds, negative = pipeline.encode_prompt(
            params.prompt,
            "",
            do_classifier_free_guidance=self.guidance > 1.0,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            device=device,
        )
        times.append(_now_s(device))
        latents = pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            height=params.height,
            width=params.width,
            num_frames=params.num_frames,
            num_inference_steps=self.num_steps,
            guidance_scale=self.guidance,
            generator=torch.Generator().manual_seed(params.seed),
            output_type="latent",
            return_dict=False,
        )[0]
        times.append(_now_s(device))
        frames = self._decoded(latents)
        times.append(_now_s(device))
        write_video([frames.tobytes()], path, height=params.height, width=params.width, fps=params.fps, crf=params.crf)
        times.append(_now_s(device))
        return {stage: 1000 * (times[index + 1] - times[index]) for index, stage in enumerate(STAGES)}

    def _decoded(self, latents: Tensor) -> Any:
        """As WanPipeline does it, then numbers in 0..1 to uint8, as diffusers' export_to_video does it."""
        vae = self.pipeline.vae
        raw = latents.to(vae.dtype)
        mean, std = (
            torch.tensor(vae.config[name], device=raw.device, dtype=raw.dtype).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        video = vae.decode(raw * std + mean, return_dict=False)[0]
        frames = self.pipeline.video_processor.postprocess_video(video, output_type="np")[0]
        return (frames * 255).round().astype("uint8")


def student_scheduler(spec: StudentSpec) -> Any:
    """Return a stock scheduler with the student's own noise levels.

    It feeds 1000 * sigma, which some students were trained to be fed rounded: that changes the picture, not the work.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=spec.sampler == "sde")
    set_timesteps = scheduler.set_timesteps

    def set_listed(num_inference_steps: int, device: Any = None) -> None:
        # WanPipeline passes on no list of its own.
        set_timesteps(num_inference_steps, device=device, sigmas=list(spec.sigmas[:-1]))

    scheduler.set_timesteps = set_listed
    return scheduler


def teacher_scheduler() -> Any:
    """Return the stock flow-matching scheduler of a Wan pipeline."""
    return FlowMatchEulerDiscreteScheduler(shift=TEACHER_SHIFT)


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

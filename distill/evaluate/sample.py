"""Draws the clips that are compared: teachers, students, ground truth, ground truth through the VAE.

Knows nothing of scores. Every arm gets the same captions and, from (bench seed, caption, seed), the same first noise.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns; S noise draws; T pixel frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import UMT5EncoderModel

from codmd_serve.errors import ConfigError
from codmd_serve.sampler import Denoise, rollout
from codmd_serve.wan.attention import compact_prompt_embeds, use_compact_cross_attention
from codmd_serve.wan.checkpoint import load_bundle
from codmd_serve.wan.text import encode_prompts
from codmd_serve.wan.vae import StreamingDecoder, latent_shape
from distill.networks.base import open_base
from distill.networks.build import denoiser, guided_teacher_flow
from distill.worlds.shapeworld.captions import parse_caption
from distill.worlds.shapeworld.render import sample_clip
from distill.worlds.shapeworld.schema import NATIVE_HEIGHT, NATIVE_NUM_FRAMES, NATIVE_WIDTH

BATCH_SIZE = 16
_NOISE_STREAM, _TRUTH_STREAM = 11, 12


@dataclass(frozen=True, slots=True)
class Request:
    """One clip to draw: a caption, its index in the bench, and a sample seed."""

    caption: str
    caption_index: int
    seed: int


@dataclass(frozen=True, slots=True)
class Canvas:
    """Size of the clips in pixels and frames."""

    height: int = NATIVE_HEIGHT
    width: int = NATIVE_WIDTH
    num_frames: int = NATIVE_NUM_FRAMES


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledModel:
    """A network with its text encoder, step grid and VAE.

    Attributes:
        denoise: the transformer, in float32, taking compact prompt embeddings.
        tokenizer, text_encoder, vae: modules of the pipeline.
        scheduler: of the pipeline, for a teacher; None for a student.
        sigmas, timesteps, sampler: the step grid of a student; empty for a teacher.
    """

    denoise: Denoise
    tokenizer: Any
    text_encoder: Any
    vae: Any
    device: torch.device
    scheduler: Any = None
    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    sampler: str = "ode"


# Called with the number of clips just finished.
OnClips = Callable[[int], object]


def load_teacher(folder: str, device: torch.device) -> SampledModel:
    """Load a diffusers Wan pipeline folder.

    Raises:
        CheckpointError: a part is missing, truncated or of another kind.
    """
    base = open_base(folder)
    transformer = base.load_transformer(torch.float32)
    vae = base.load(AutoencoderKLWan, "vae", torch_dtype=torch.float32)
    text_encoder = base.load(UMT5EncoderModel, "text_encoder", dtype=torch.float32)
    tokenizer = base.load_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=base.scheduler_shift())
    for module in (transformer, vae, text_encoder):
        module.requires_grad_(False).eval().to(device)
    return SampledModel(
        denoise=denoiser(use_compact_cross_attention(transformer), "fp32"),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        device=device,
        scheduler=scheduler,
    )


def load_student(folder: Path, device: torch.device) -> SampledModel:
    """Load a student bundle with its own step grid.

    Raises:
        CheckpointError: as `codmd_serve.wan.checkpoint.load_bundle`.
    """
    bundle = load_bundle(folder, torch.float32, device)
    return SampledModel(
        denoise=denoiser(use_compact_cross_attention(bundle.transformer), "fp32"),
        tokenizer=bundle.tokenizer,
        text_encoder=bundle.text_encoder,
        vae=bundle.vae,
        device=device,
        sigmas=bundle.spec.sigmas,
        timesteps=bundle.spec.timesteps,
        sampler=bundle.spec.sampler,
    )


def draw_bench_noise(
    requests: Sequence[Request], shape: Sequence[int], num_draws: int, bench_seed: int, repeat: int = 0
) -> Tensor:
    """Return N(0, 1) of shape (num_draws, B, *shape), float32, from (bench seed, caption, seed) alone.

    Args:
        requests: B of them.
        shape: (C, F, H, W).
        num_draws: S; the first is the same for every S.
        bench_seed: of the whole bench.
        repeat: another number, other noise: the second sample of an A/A comparison.
    """
    draws = [
        [
            np.random.default_rng(
                [bench_seed, _NOISE_STREAM, repeat, request.caption_index, request.seed, draw]
            ).standard_normal(tuple(shape), dtype=np.float32)
            for request in requests
        ]
        for draw in range(num_draws)
    ]
    return torch.from_numpy(np.array(draws))


def teacher_latents(
    model: SampledModel,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Sample a teacher by Euler steps on the shifted grid of its scheduler; equals diffusers.WanPipeline.

    Args:
        model: of `load_teacher`.
        noise: (1, B, C, F, H, W).
        prompt_embeds, negative_embeds: (B, L, D) and (1, L, D), compact, same L.
        num_steps: 1 or more.
        guidance_scale: 1.0 is no guidance.

    Returns:
        (B, C, F, H, W) float32.
    """
    model.scheduler.set_timesteps(num_steps)
    negative = negative_embeds.expand(prompt_embeds.shape[0], -1, -1)

    def denoise(latents: Tensor, timestep_B: Tensor, embeds_BLD: Tensor) -> Tensor:
        return guided_teacher_flow(model.denoise, latents, timestep_B, embeds_BLD, negative, guidance_scale)

    sigmas, timesteps = model.scheduler.sigmas.tolist(), model.scheduler.timesteps.tolist()
    return rollout(denoise, noise, prompt_embeds, sigmas, timesteps, sampler="ode")


def sample_teacher(
    model: SampledModel,
    requests: Sequence[Request],
    *,
    num_steps: int,
    guidance_scale: float,
    bench_seed: int,
    repeat: int = 0,
    canvas: Canvas | None = None,
    on_clips: OnClips | None = None,
) -> np.ndarray:
    """Draw clips from a teacher: uint8 (B, T, H, W, 3), in the order of `requests`."""
    if num_steps < 1:
        raise ConfigError(f"the number of steps must be 1 or more, got {num_steps}")

    def latents(batch: Sequence[Request], embeds: Tensor, negative: Tensor, shape: Sequence[int]) -> Tensor:
        noise = draw_bench_noise(batch, shape, 1, bench_seed, repeat).to(model.device)
        return teacher_latents(model, noise, embeds, negative, num_steps, guidance_scale)

    return _sample_clips(model, requests, latents, canvas or Canvas(), on_clips)


def sample_student(
    model: SampledModel,
    requests: Sequence[Request],
    *,
    bench_seed: int,
    canvas: Canvas | None = None,
    on_clips: OnClips | None = None,
) -> np.ndarray:
    """Draw clips from a student with its own steps, without guidance: uint8 (B, T, H, W, 3)."""
    num_draws = len(model.timesteps) if model.sampler == "sde" else 1

    def latents(batch: Sequence[Request], embeds: Tensor, negative: Tensor, shape: Sequence[int]) -> Tensor:
        noise = draw_bench_noise(batch, shape, num_draws, bench_seed).to(model.device)
        return rollout(model.denoise, noise, embeds, model.sigmas, model.timesteps, sampler=model.sampler)

    return _sample_clips(model, requests, latents, canvas or Canvas(), on_clips)


def render_truth(
    requests: Sequence[Request], bench_seed: int, repeat: int = 0, canvas: Canvas | None = None
) -> np.ndarray:
    """Draw clips from the world itself: uint8 (B, T, H, W, 3)."""
    size = canvas or Canvas()
    clips = []
    for request in requests:
        rng = np.random.default_rng([bench_seed, _TRUTH_STREAM, repeat, request.caption_index, request.seed])
        clips.append(sample_clip(parse_caption(request.caption), rng, size.height, size.width, size.num_frames))
    return np.stack(clips)


def through_vae(model: SampledModel, clips: np.ndarray, on_clips: OnClips | None = None) -> np.ndarray:
    """Encode and decode clips, the upper bound of any sampler; uint8 in, uint8 out, (B, T, H, W, 3)."""
    vae, parts = model.vae, []
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"], device=model.device).view(shape) for name in ("mean", "std")
    )
    with torch.inference_mode():
        for start in range(0, len(clips), BATCH_SIZE):
            pixels = torch.from_numpy(clips[start : start + BATCH_SIZE]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
            raw = vae.encode(pixels.to(model.device)).latent_dist.mode()
            parts.append(_decode(vae, (raw - mean) / std))
            if on_clips is not None:
                on_clips(len(parts[-1]))
    return np.concatenate(parts)


def _sample_clips(
    model: SampledModel,
    requests: Sequence[Request],
    latents: Callable[[Sequence[Request], Tensor, Tensor, Sequence[int]], Tensor],
    canvas: Canvas,
    on_clips: OnClips | None,
) -> np.ndarray:
    shape = latent_shape(model.vae, canvas.height, canvas.width, canvas.num_frames)
    clips = []
    with torch.inference_mode():
        captions, embeds_PLD = embed_captions(model, [request.caption for request in requests])
        for batch in _batches(requests):
            index = [captions[request.caption] for request in batch]
            x0 = latents(batch, embeds_PLD[index], embeds_PLD[:1], shape)
            clips.append(_decode(model.vae, x0))
            if on_clips is not None:
                on_clips(len(batch))
    return np.concatenate(clips)


def embed_captions(model: SampledModel, captions: Sequence[str]) -> tuple[dict[str, int], Tensor]:
    """Embed distinct captions, trimmed to the same length.

    Returns:
        The row of each caption, and (P, N, D) of them all; row 0 is the empty negative prompt.
    """
    distinct = list(dict.fromkeys(["", *captions]))
    parts = []
    for start in range(0, len(distinct), BATCH_SIZE):
        parts.append(encode_prompts(model.tokenizer, model.text_encoder, distinct[start : start + BATCH_SIZE]))
    return {caption: row for row, caption in enumerate(distinct)}, compact_prompt_embeds(torch.cat(parts))


def _batches(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    for start in range(0, len(requests), BATCH_SIZE):
        yield requests[start : start + BATCH_SIZE]


def _decode(vae: Any, latents_BCFHW: Tensor) -> np.ndarray:
    pixels: np.ndarray = torch.cat(list(StreamingDecoder(vae).frames(latents_BCFHW)), dim=1).cpu().numpy()
    return pixels

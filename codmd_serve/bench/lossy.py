"""The lossy variants of the engine: their settings, and the error of their output against the exact engine.

Times nothing; `row.py` does.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine, draw_noise
from codmd_serve.errors import ConfigError
from codmd_serve.loading import load_engine
from codmd_serve.wan.fp8 import check_quantization
from codmd_serve.wan.kernels import check_attention_name
from codmd_serve.wan.transformer import PromptCache
from codmd_serve.wan.vae import latent_shape

# Name in the table -> settings of the engine that differ.
LOSSY_SETTINGS: dict[str, dict[str, str]] = {
    "fp8": {"quantization": "fp8"},
    "sage": {"attention": "sage"},
    "fp8+sage": {"quantization": "fp8", "attention": "sage"},
}
NUM_SEEDS = 4
PEAK, MOST_DB = 255.0, 100.0


@dataclass(frozen=True, slots=True)
class LossyError:
    """Error of a variant against the exact engine, over some seeds.

    Attributes:
        latents: |variant - engine| / |engine| of the final latents (C, F, H, W), one number per seed.
        psnr_db: of the uint8 frames before they are encoded, one number per seed.
    """

    latents: list[float]
    psnr_db: list[float]


def unsupported(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return why variants cannot run here, by name; empty when all can."""
    problems = {}
    for name, settings in LOSSY_SETTINGS.items():
        try:
            check_quantization(settings.get("quantization", "none"), device, dtype)
            check_attention_name(settings.get("attention", "auto"), device)
        except ConfigError as error:
            problems[name] = str(error)
    return problems


def left_out(problems: dict[str, str]) -> list[str]:
    """Return one line for all variants that could not run; none when all could."""
    if not problems:
        return []
    reasons = "; ".join(dict.fromkeys(problems.values()))
    return [f"lossy {', '.join(problems)}, not supported here: {reasons}"]


def load_variant(name: str, bundle: Path, reference: Engine) -> Engine:
    """Load the same bundle again with a variant's settings; all others are those of `reference`.

    Raises:
        CodmdError: the variant does not work here, or there is no memory for it.
    """
    facts, device = reference.facts, str(reference.transformer.device)
    # What the reference found to be the fastest; a graph of its own, compiled code of its own.
    settings: dict[str, Any] = {"execution": facts.execution, **LOSSY_SETTINGS[name]}
    return load_engine(bundle, device, facts.dtype, **settings)


@torch.inference_mode()
def outputs(engine: Engine, params: GenerateParams) -> tuple[Tensor, Tensor]:
    """Return final latents (1, C, F, H, W) float32 and frames (T, H, W, 3) uint8 of a request, on the CPU."""
    shape = latent_shape(engine.bundle.vae, params.height, params.width, params.num_frames)
    noise = draw_noise(params.seed, (len(engine.bundle.spec.timesteps), 1, *shape)).to(engine.transformer.device)
    prompt = engine.embed(params.prompt).prompt
    assert isinstance(prompt, PromptCache)
    latents = engine.loop(noise, prompt)
    frames = torch.cat([chunk[0].cpu() for chunk in engine.decoder.frames(latents)])
    return latents.float().cpu(), frames


def compare_outputs(
    variant: Engine, wanted: Sequence[tuple[Tensor, Tensor]], asked: Sequence[GenerateParams]
) -> LossyError:
    """Compare a variant's outputs with the reference's outputs for the same requests."""
    latents, psnr_db = [], []
    for (want_latents, want_frames), params in zip(wanted, asked, strict=True):
        got_latents, got_frames = outputs(variant, params)
        latents.append(float((got_latents - want_latents).norm() / want_latents.norm()))
        psnr_db.append(capped_psnr_db(got_frames, want_frames))
    return LossyError(latents, psnr_db)


def capped_psnr_db(got: Tensor, want: Tensor) -> float:
    """Return the PSNR of uint8 frames in dB, capped at 100 so that equal frames stay finite in JSON."""
    mean_square = float((got.double() - want.double()).square().mean())
    return min(MOST_DB, 10 * math.log10(PEAK**2 / mean_square)) if mean_square else MOST_DB


def some(params: GenerateParams, prompts: Sequence[str]) -> list[GenerateParams]:
    """Return the requests that errors are measured on; the same in every run."""
    return [replace(params, prompt=prompts[seed % len(prompts)], seed=seed) for seed in range(NUM_SEEDS)]


def release(device: torch.device) -> None:
    """Free the memory of a variant that is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

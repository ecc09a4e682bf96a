"""Writes the trained parts as a diffusers WanPipeline folder, each part whole or not at all; knows no training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from codmd_serve.files import atomic_folder, write_json

# 16-bit files keep the repository small. float16 and not bfloat16: weights are far inside its range, and its three
# more mantissa bits keep the rounding at 2^-11.
STORED_DTYPE = torch.float16


def save_text(folder: Path, tokenizer: PreTrainedTokenizerFast, text_encoder: UMT5EncoderModel) -> None:
    """Write tokenizer/ and text_encoder/ (float32: it is small, and its errors would reach every step)."""
    _replace(folder / "tokenizer", lambda path: tokenizer.save_pretrained(path))
    _replace(folder / "text_encoder", lambda path: text_encoder.save_pretrained(path))
    _write_index(folder)


def save_vae(folder: Path, vae: AutoencoderKLWan, mean: list[float], std: list[float]) -> None:
    """Write vae/ with the statistics that normalise its latents; `vae` itself keeps its precision."""
    config = dict(vae.config) | {"latents_mean": mean, "latents_std": std}
    stored = AutoencoderKLWan.from_config(config)
    stored.load_state_dict(vae.state_dict())
    _replace(folder / "vae", lambda path: stored.to(STORED_DTYPE).save_pretrained(path))


def save_transformer(folder: Path, transformer: WanTransformer3DModel) -> None:
    """Write transformer/."""
    stored = WanTransformer3DModel.from_config(transformer.config)
    stored.load_state_dict(transformer.state_dict())
    _replace(folder / "transformer", lambda path: stored.to(STORED_DTYPE).save_pretrained(path))


def save_scheduler(folder: Path, shift: float) -> None:
    """Write scheduler/: Euler steps of the flow, noise levels shifted as in training."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    _replace(folder / "scheduler", lambda path: scheduler.save_pretrained(path))


def _write_index(folder: Path) -> None:
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(folder / "model_index.json", index)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    with atomic_folder(path) as fresh:
        write(fresh)

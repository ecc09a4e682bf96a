"""Fixtures of the importer: the golden Wan network in the original names, and a pipeline folder of its architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, Tensor]:
    """Weights by original name."""
    return load_file(GOLDEN / "wan_tiny_original.safetensors")


@pytest.fixture(scope="session")
def golden_io() -> dict[str, Tensor]:
    """latents, timestep and prompt embeddings, and the flow that the authors' code made of them."""
    return load_file(GOLDEN / "wan_tiny_io.safetensors")


@pytest.fixture(scope="session")
def golden_base(tiny_pipeline: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of the golden architecture, with other weights, and the tiny one's tokenizer."""
    torch.manual_seed(1)
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=32, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=16,
        out_channels=16,
        text_dim=40,
        freq_dim=64,
        ffn_dim=192,
        num_layers=3,
    )
    pipeline = WanPipeline(
        tokenizer=tiny_pipeline.tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )
    folder = tmp_path_factory.mktemp("golden") / "golden-base"
    pipeline.save_pretrained(folder)
    return folder


def as_rcm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As rCM stores them: "net." names, and the patch embedding as a linear layer."""
    flat = {f"net.{name}": tensor for name, tensor in weights.items()}
    flat["net.patch_embedding.weight"] = flat["net.patch_embedding.weight"].flatten(1)
    return flat


def as_codmd(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As CoDMD stores them: a generator, and a critic that is another network."""
    return {
        "generator": {f"model.{name}": tensor for name, tensor in weights.items()},
        "critic": {f"model.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()},
    }


def as_self_forcing(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As Self-Forcing stores them: wrapper names, and an EMA beside other raw weights."""
    wrapped = {
        "model._fsdp_wrapped_module."
        + name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._orig_mod."): tensor
        for name, tensor in weights.items()
    }
    return {"generator": as_codmd(weights)["critic"], "generator_ema": wrapped, "critic": {}}


STYLES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "original": dict,
    "generator": as_codmd,
    "generator_ema": as_self_forcing,
    "rcm": as_rcm,
}


@pytest.fixture
def write(golden_weights: dict[str, Tensor], tmp_path: Path) -> Callable[..., Path]:
    """Write the golden weights in a style, after `change` has been at the dictionary that is stored; returns the file.

    Names end in .bin whatever is inside: nothing may depend on them.
    """

    def written(style: str, change: Callable[[Any], Any] = lambda state: state, name: str = "weights.bin") -> Path:
        state = STYLES[style](golden_weights)
        state = change(state) or state
        if style == "original":
            save_file(state, tmp_path / name)
        else:
            torch.save(state, tmp_path / name)
        return tmp_path / name

    return written

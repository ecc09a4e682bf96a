"""Triton kernels and half precision on a device: they give what the plain code gives, and they are what runs."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.loading import load_engine
from codmd_serve.wan import fused, rows
from codmd_serve.wan.checkpoint import default_bundle_path, load_module
from codmd_serve.wan.fused import Sum
from codmd_serve.wan.precision import fit_dtype, psnr
from codmd_serve.wan.vae import StreamingDecoder, latent_shape

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernels_are_taken_and_give_what_the_plain_code_gives(dtype: torch.dtype) -> None:
    assert fused.choose_add_norm_silu(CUDA, dtype) == (fused.add_norm_silu_triton, "")
    assert rows.choose_rows(CUDA, dtype) == (rows.FUSED, "")


@pytest.mark.parametrize("channels", [96, 192, 384])
def test_a_norm_of_full_width_writes_behind_the_history(channels: int) -> None:
    rng = torch.Generator(CUDA).manual_seed(0)

    def drawn(frames: int) -> Tensor:
        values = torch.randn(1, channels, frames, 24, 40, generator=rng, device=CUDA).half()
        return values.contiguous(memory_format=torch.channels_last_3d)

    value, residual, room = drawn(5), drawn(5), drawn(7)
    history = room[:, :, :2].clone()
    weight, bias = torch.randn(channels, device=CUDA), torch.randn(channels, device=CUDA)
    want = torch.empty_like(value)
    total = fused.add_norm_silu(Sum(value.clone(), bias, residual), weight, want, True)
    got = fused.add_norm_silu_triton(Sum(value, bias, residual), weight, room[:, :, 2:], True)
    assert total is not None and got is not None
    torch.testing.assert_close(got, total, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(room[:, :, 2:], want, rtol=4e-3, atol=4e-3)
    assert torch.equal(room[:, :, :2], history)


def test_half_precision_of_the_embedded_vae_is_taken_and_near_float32() -> None:
    base = default_bundle_path().parent / "shapeworld"
    vae: AutoencoderKLWan = load_module(AutoencoderKLWan, base, "vae", torch_dtype=torch.float32)
    vae = vae.eval().requires_grad_(False).cuda()
    latents = torch.randn(1, *latent_shape(vae, 64, 64, 17), device=CUDA)
    decoder = StreamingDecoder(copy.deepcopy(vae))
    want = torch.cat(list(decoder.frames(latents)), 1)
    fit_dtype(decoder, torch.float16, latents)
    assert (decoder.dtype, decoder.problem) == (torch.float16, "")
    got = torch.cat(list(decoder.frames(latents)), 1)
    print(f"float16 against float32 (TF32 convolutions): {psnr(got, want):.1f} dB")
    assert psnr(got, want) >= 60.0 and not decoder.has_overflowed()


def test_an_engine_runs_in_half_precision_with_fused_norms(tmp_path: Path) -> None:
    params = GenerateParams(prompt="a red circle", seed=7, height=64, width=64, num_frames=17, fps=16, crf=18)
    engine = load_engine(default_bundle_path(), "cuda", cache=str(tmp_path / "cache"))
    assert engine.transformer.rows.is_fused
    assert (engine.facts.vae_dtype, engine.facts.fallback) == ("float16", "")
    engine.generate(params, tmp_path / "a.mp4")
    again = load_engine(default_bundle_path(), "cuda", cache=str(tmp_path / "cache"))
    assert again.facts.execution == engine.facts.execution
    print(f"execution={again.facts.execution} load_s={engine.facts.load_s:.1f} and again {again.facts.load_s:.1f}")


def test_compiled_is_what_runs_when_it_was_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = load_engine(default_bundle_path(), "cuda", "float32", execution="compiled")
    assert (engine.facts.execution, engine.facts.fallback) == ("compiled", "")

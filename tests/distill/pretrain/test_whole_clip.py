"""Whole-clip forward passes equal the chunk loop of the class, in value and gradient."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from distill.pretrain.config import VaeConfig
from distill.pretrain.vae import build_vae
from distill.pretrain.whole_clip import _norm_silu, decode_clip, encode_clip, fused_norm_silu


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = build_vae(VaeConfig(base_dim=8)).eval()
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)  # a fresh bias is too small to show where padding is wrong
    return vae


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_encode_equals_the_class(vae: AutoencoderKLWan, num_frames: int) -> None:
    pixels = torch.rand(2, 3, num_frames, 32, 48) * 2 - 1
    with torch.no_grad():
        wanted = vae.encode(pixels).latent_dist
        mean, logvar = encode_clip(vae, pixels)
    torch.testing.assert_close(mean, wanted.mean, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logvar, wanted.logvar, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_decode_equals_the_class_within_its_clamp(vae: AutoencoderKLWan, num_frames: int) -> None:
    latents = 3 * torch.randn(2, 16, num_frames, 4, 6)
    with torch.no_grad():
        wanted = vae.decode(latents).sample
        pixels = decode_clip(vae, latents)
    assert pixels.shape == wanted.shape
    torch.testing.assert_close(pixels.clamp(-1, 1), wanted, rtol=0, atol=2e-5)


def test_the_norm_of_a_gpu_equals_that_of_a_cpu(vae: AutoencoderKLWan) -> None:
    norm = vae.encoder.norm_out
    norm.gamma.data.normal_()
    hidden = torch.randn(2, norm.gamma.numel(), 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(fused_norm_silu(norm, hidden), _norm_silu(norm, hidden))
    assert fused_norm_silu(norm, hidden).is_contiguous(memory_format=torch.channels_last_3d)
    norm.gamma.data.fill_(1.0)


def test_bfloat16_stays_near_float32(vae: AutoencoderKLWan) -> None:
    pixels = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, _ = encode_clip(vae, pixels)
        decoded = decode_clip(vae, mean)
        with torch.autocast("cpu", torch.bfloat16):
            rough, _ = encode_clip(vae, pixels)
            again = decode_clip(vae, mean)
    assert (rough.float() - mean).norm() < 0.02 * mean.norm()
    assert (again.float() - decoded).norm() < 0.02 * decoded.norm()


def test_every_weight_that_the_mean_depends_on_gets_a_gradient(vae: AutoencoderKLWan) -> None:
    pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    mean, _ = encode_clip(vae, pixels)
    decode_clip(vae, mean).square().mean().backward()
    silent = [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()]
    vae.zero_grad()
    assert silent == []

"""The streaming decode against the whole decode of diffusers, bit for bit."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from codmd_serve.wan.vae import decode_frames, latent_shape, to_uint8


@pytest.fixture(params=["residual with patches", "plain"])
def vae(request: pytest.FixtureRequest, tiny_pipeline: WanPipeline) -> AutoencoderKLWan:
    if request.param != "plain":
        return tiny_pipeline.vae
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def test_decode_frames_equals_the_whole_decode(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(2, *latent_shape(vae, 32, 48, 13), generator=torch.Generator().manual_seed(0))
    chunks = list(decode_frames(vae, latents))
    assert [tuple(chunk.shape) for chunk in chunks] == [(2, 1, 32, 48, 3)] + [(2, 4, 32, 48, 3)] * 3
    mean, std = (torch.tensor(vae.config[k]).reshape(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    with torch.no_grad():
        whole = vae.decode(latents * std + mean).sample
    assert torch.equal(torch.cat(chunks, dim=1), to_uint8(whole))


def test_an_abandoned_decode_does_not_disturb_the_next(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(1, *latent_shape(vae, 32, 32, 9), generator=torch.Generator().manual_seed(0))
    whole = torch.cat(list(decode_frames(vae, latents)), dim=1)
    list(itertools.islice(decode_frames(vae, -latents), 2))
    assert torch.equal(torch.cat(list(decode_frames(vae, latents)), dim=1), whole)


def test_decode_frames_leaves_the_caller_in_its_gradient_mode(vae: AutoencoderKLWan) -> None:
    chunks = decode_frames(vae, torch.zeros(1, *latent_shape(vae, 16, 16, 5)))
    next(chunks)
    assert torch.is_grad_enabled()


def test_to_uint8_clamps_and_rounds() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 7.0]).reshape(1, 1, 1, 1, 6).expand(1, 3, 1, 1, 6)
    assert to_uint8(pixels)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (5, 2), (17, 5), (81, 21)])
def test_latent_shape(tiny_pipeline: WanPipeline, num_frames: int, latent_frames: int) -> None:
    assert latent_shape(tiny_pipeline.vae, 480, 832, num_frames) == (4, latent_frames, 60, 104)

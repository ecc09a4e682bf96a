"""The streaming decode against the whole decode of diffusers: both layouts, any chunks, bounded memory."""

import copy
import itertools

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from codmd_serve.wan import vae as vae_module
from codmd_serve.wan.vae import StreamingDecoder, latent_shape, to_uint8


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


def whole_decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, 3) in [-1, 1], as diffusers decodes."""
    mean, std = (torch.tensor(vae.config[k]).reshape(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    with torch.no_grad():
        pixels: torch.Tensor = vae.decode((latents * std + mean).to(vae.dtype)).sample.permute(0, 2, 3, 4, 1)
    return pixels


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17, 21, 41])
def test_frames_equal_the_whole_decode(vae: AutoencoderKLWan, num_frames: int) -> None:
    latents = torch.randn(2, *latent_shape(vae, 32, 48, num_frames), generator=torch.Generator().manual_seed(0))
    chunks = list(StreamingDecoder(vae).frames(latents))
    sizes = {1: [1], 5: [5], 9: [9], 17: [17], 21: [17, 4], 41: [17, 16, 8]}
    assert [chunk.shape[1] for chunk in chunks] == sizes[num_frames]
    got, want = torch.cat(chunks, dim=1), to_uint8(whole_decode(vae, latents))
    assert got.shape == (2, num_frames, 32, 48, 3)
    # Sums are rounded in another order: a value that lay on the edge between two levels may fall to the other side.
    differing = got != want
    assert float(differing.float().mean()) < 1e-3
    assert int((got.int() - want.int()).abs().max()) <= 1


def test_chunk_sizes_change_no_frame(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, *latent_shape(vae, 32, 32, 21), generator=torch.Generator().manual_seed(0))
    decoder = StreamingDecoder(vae)
    want = torch.cat(list(decoder.frames(latents)), dim=1)
    for first, size in ((1, 1), (2, 3), (1, 5)):
        monkeypatch.setattr(vae_module, "FIRST_CHUNK", first)
        monkeypatch.setattr(vae_module, "CHUNK", size)
        got = torch.cat(list(decoder.frames(latents)), dim=1)
        assert int((got.int() - want.int()).abs().max()) <= 1
        assert float((got != want).float().mean()) < 1e-3


def test_bfloat16_decodes_close_to_float32(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(1, *latent_shape(vae, 32, 32, 9), generator=torch.Generator().manual_seed(0))
    want = torch.cat(list(StreamingDecoder(vae).frames(latents)), dim=1).float()
    low = copy.deepcopy(vae).to(torch.bfloat16)
    got = torch.cat(list(StreamingDecoder(low).frames(latents)), dim=1).float()
    theirs = to_uint8(whole_decode(low, latents.bfloat16())).float()
    assert float((got - want).abs().mean()) <= 1.2 * float((theirs - want).abs().mean())


def test_every_convolution_sees_channels_last(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    strides: list[tuple[bool, bool]] = []
    convolve = vae_module.convolve

    def watched(hidden: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        strides.append(tuple(t.is_contiguous(memory_format=torch.channels_last_3d) for t in (hidden, weight)))  # type: ignore[arg-type]
        return convolve(hidden, weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(vae_module, "convolve", watched)
    list(StreamingDecoder(vae).frames(torch.randn(1, *latent_shape(vae, 32, 32, 21))))
    assert len(strides) > 20
    assert all(hidden and weight for hidden, weight in strides)


def test_an_abandoned_decode_does_not_disturb_the_next(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(1, *latent_shape(vae, 32, 32, 21), generator=torch.Generator().manual_seed(0))
    decoder = StreamingDecoder(vae)
    whole = torch.cat(list(decoder.frames(latents)), dim=1)
    list(itertools.islice(decoder.frames(-latents), 1))
    assert torch.equal(torch.cat(list(decoder.frames(latents)), dim=1), whole)


def test_the_vae_itself_decodes_as_before(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(1, *latent_shape(vae, 32, 32, 9), generator=torch.Generator().manual_seed(0))
    before = whole_decode(vae, latents)
    StreamingDecoder(vae)
    torch.testing.assert_close(whole_decode(vae, latents), before, rtol=1e-4, atol=1e-5)


def test_frames_leaves_the_caller_in_its_gradient_mode(vae: AutoencoderKLWan) -> None:
    chunks = StreamingDecoder(vae).frames(torch.zeros(1, *latent_shape(vae, 16, 16, 5)))
    next(chunks)
    assert torch.is_grad_enabled()


def test_g11_padded_outputs_and_separate_biases_change_no_frame(
    vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA's convolutions are given, on a CPU."""
    latents = torch.randn(1, *latent_shape(vae, 32, 32, 21), generator=torch.Generator().manual_seed(0))
    want = torch.cat(list(StreamingDecoder(copy.deepcopy(vae)).frames(latents)), dim=1)
    monkeypatch.setattr(vae_module, "CUDNN_OUTPUTS", {3: 8, 8: 24, 12: 16})
    monkeypatch.setattr(vae_module, "pads_outputs", lambda _: True)
    monkeypatch.setattr(vae_module, "adds_bias_apart", lambda _: True)
    decoder = StreamingDecoder(vae)
    padded = [conv.num_out for conv in decoder.modules() if isinstance(conv, vae_module._Conv)]
    assert decoder.conv_out.weight.shape[0] > decoder.conv_out.num_out and 8 in padded
    got = torch.cat(list(decoder.frames(latents)), dim=1)
    assert int((got.int() - want.int()).abs().max()) <= 1
    assert float((got != want).float().mean()) < 1e-3


def test_to_uint8_clamps_and_rounds() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 7.0]).reshape(1, 1, 1, 1, 6).expand(1, 3, 1, 1, 6)
    assert to_uint8(pixels)[0, 0, 0, 0].tolist() == [0, 0, 128, 128, 255, 255]


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (5, 2), (17, 5), (81, 21)])
def test_latent_shape(tiny_pipeline: WanPipeline, num_frames: int, latent_frames: int) -> None:
    assert latent_shape(tiny_pipeline.vae, 480, 832, num_frames) == (4, latent_frames, 60, 104)

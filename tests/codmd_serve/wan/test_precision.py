"""The VAE in half precision: how far from float32, and what happens where its activations do not fit."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

from codmd_serve.config import default_bundle_path
from codmd_serve.errors import ConfigError
from codmd_serve.wan import precision as precision_module
from codmd_serve.wan import vae as vae_module
from codmd_serve.wan.checkpoint import load_module
from codmd_serve.wan.fused import Sum
from codmd_serve.wan.precision import choose_vae_dtype, fit_dtype, psnr
from codmd_serve.wan.vae import StreamingDecoder, latent_shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def half_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions with float16 in and out and float32 sums, as tensor cores have them; a CPU has none of its own."""

    def emulated(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        wide = None if bias is None else bias.float()
        return torch.nn.functional.conv3d(hidden.float(), weight.float(), wide, padding=padding).to(hidden.dtype)

    monkeypatch.setattr(vae_module, "convolve", emulated)


@pytest.fixture(scope="module")
def embedded_vae() -> AutoencoderKLWan:
    base = default_bundle_path().parent / "shapeworld"
    return load_module(AutoencoderKLWan, base, "vae", torch_dtype=torch.float32).eval().requires_grad_(False)


def decoded(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    return torch.cat(list(decoder.frames(latents)), dim=1)


def latents_of(vae: AutoencoderKLWan, height: int, width: int, num_frames: int) -> Tensor:
    return torch.randn(1, *latent_shape(vae, height, width, num_frames), generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("half_on_a_cpu")
@pytest.mark.parametrize(("dtype", "least_db"), [(torch.float16, 60.0), (torch.bfloat16, 45.0)])
def test_half_precision_of_the_embedded_vae(
    embedded_vae: AutoencoderKLWan, dtype: torch.dtype, least_db: float
) -> None:
    latents = latents_of(embedded_vae, 64, 64, 9)
    decoder = StreamingDecoder(copy.deepcopy(embedded_vae))
    want = decoded(decoder, latents)
    fit_dtype(decoder, dtype, latents)
    assert (decoder.dtype, decoder.problem) == (dtype, "")
    got = decoded(decoder, latents)
    assert psnr(got, want) >= least_db
    assert not decoder.has_overflowed()


@pytest.mark.usefixtures("half_on_a_cpu")
def test_norms_and_separate_biases_stay_float32(embedded_vae: AutoencoderKLWan) -> None:
    decoder = StreamingDecoder(copy.deepcopy(embedded_vae))
    decoder.set_dtype(torch.float16)
    kept = {name for name, parameter in decoder.named_parameters() if parameter.dtype == torch.float32}
    assert kept and all("norm" in name for name in kept)
    assert all(p.dtype == torch.float16 for name, p in decoder.named_parameters() if name not in kept)


@pytest.mark.usefixtures("half_on_a_cpu")
def test_activations_that_do_not_fit_leave_float32(
    tiny_pipeline: WanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    vae = copy.deepcopy(tiny_pipeline.vae)
    vae.decoder.conv_in.weight.data.mul_(1e6)
    latents = latents_of(vae, 32, 32, 9)
    decoder = StreamingDecoder(vae)
    want = decoded(decoder, latents)
    with torch.inference_mode():
        fit_dtype(decoder, torch.float16, latents)
    assert decoder.dtype == torch.float32
    assert decoder.problem.startswith("VAE in float32: its activations reach")
    assert "vae_dtype=float32" in caplog.text
    assert torch.equal(decoded(decoder, latents), want)


@pytest.mark.usefixtures("half_on_a_cpu")
def test_a_picture_that_differs_leaves_float32(tiny_pipeline: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "LEAST_PSNR_DB", 1e9)
    latents = latents_of(tiny_pipeline.vae, 32, 32, 9)
    decoder = StreamingDecoder(copy.deepcopy(tiny_pipeline.vae))
    want = decoded(decoder, latents)
    with torch.inference_mode():
        fit_dtype(decoder, torch.float16, latents)
    assert decoder.dtype == torch.float32 and "dB from it" in decoder.problem
    assert torch.equal(decoded(decoder, latents), want)  # the weights are the unrounded ones again


@pytest.mark.usefixtures("half_on_a_cpu")
def test_an_overflow_in_a_request_is_seen_at_its_end(tiny_pipeline: WanPipeline) -> None:
    vae = copy.deepcopy(tiny_pipeline.vae)
    decoder = StreamingDecoder(vae)
    latents = latents_of(vae, 32, 32, 41)
    decoder.set_dtype(torch.float16)
    decoded(decoder, latents)
    assert not decoder.has_overflowed()
    for frame in (0, 3, 9):
        broken = latents.clone()
        broken[:, :, frame] *= 1e6
        decoded(decoder, broken)
        assert decoder.has_overflowed(), frame
    decoded(decoder, latents)
    assert not decoder.has_overflowed()


def test_largest_activation_sees_values_and_totals(tiny_pipeline: WanPipeline) -> None:
    decoder = StreamingDecoder(copy.deepcopy(tiny_pipeline.vae))
    latents, seen = latents_of(tiny_pipeline.vae, 32, 32, 9), list[float]()
    run = decoder.run_norm

    def watched(given: Sum, *rest: object) -> Tensor | None:
        seen.append(float(given.value.abs().max()))
        return run(given, *rest)  # type: ignore[arg-type]

    decoder.run_norm = watched
    largest, frames = decoder.largest_activation(latents)
    assert decoder.run_norm is watched
    assert largest >= max(seen) > 0
    assert torch.equal(frames, next(decoder.frames(latents)))


def test_choose_vae_dtype() -> None:
    assert choose_vae_dtype("auto", CUDA) == torch.float16
    assert choose_vae_dtype("auto", CPU) is None  # measured
    assert choose_vae_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="vae_dtype float16 needs a CUDA device"):
        choose_vae_dtype("float16", CPU)
    with pytest.raises(ConfigError, match="vae_dtype must be one of auto, float32"):
        choose_vae_dtype("int8", CUDA)


@pytest.mark.parametrize(("height", "width", "want"), [(480, 832, 4), (720, 1280, 4), (1088, 1920, 2), (2160, 3840, 1)])
def test_no_tensor_of_a_chunk_passes_32_bits(height: int, width: int, want: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    decoder = StreamingDecoder(vae)
    shape = latent_shape(vae, height, width, 81)
    assert decoder.chunk_size((1, *shape)) == want
    if want > 1:
        rows = (want * 4 + vae_module.HISTORY) * height * width * 96
        assert rows <= 2**31 - 1


def test_psnr() -> None:
    black = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


@pytest.mark.parametrize("built_in_inference_mode", [False, True])
@pytest.mark.parametrize("decoded_in_inference_mode", [False, True])
def test_a_converted_decoder_runs_in_every_mode(built_in_inference_mode: bool, decoded_in_inference_mode: bool) -> None:
    """Convolutions refuse a parameter that is half of inference mode, as one was on the first GPU run."""
    torch.manual_seed(0)
    with torch.inference_mode(built_in_inference_mode):
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval()
        decoder = StreamingDecoder(vae.requires_grad_(False))
        latents = torch.randn(1, 4, 3, 2, 2)
        want = decoded(decoder, latents)
        decoder.set_dtype(torch.bfloat16)
    with torch.inference_mode(decoded_in_inference_mode):
        assert psnr(decoded(decoder, latents), want) > 35
        decoder.set_dtype(torch.float32)
        assert psnr(decoded(decoder, latents), want) > 35


def test_weights_are_shared_after_conversion(tiny_pipeline: WanPipeline) -> None:
    vae = copy.deepcopy(tiny_pipeline.vae)
    StreamingDecoder(vae).set_dtype(torch.bfloat16)
    assert vae.decoder.conv_in.weight.dtype == torch.bfloat16  # no second copy stays in memory

"""float32 or bfloat16 on a CPU: what decides, what is remembered, and how far bfloat16 is off."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from codmd_serve.config import default_bundle_path
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan import cpu_dtype, precision
from codmd_serve.wan.checkpoint import load_module
from codmd_serve.wan.cpu_dtype import fastest_dtype
from codmd_serve.wan.precision import race_dtype
from codmd_serve.wan.vae import StreamingDecoder

STEPS, SHAPE = (1000.0, 500.0), (16, 7, 12, 12)


@pytest.fixture(scope="module")
def embedded() -> WanTransformer3DModel:
    return load_module(WanTransformer3DModel, default_bundle_path(), "transformer", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def embedded_vae() -> AutoencoderKLWan:
    folder = default_bundle_path().parent / "shapeworld"
    return load_module(AutoencoderKLWan, folder, "vae", torch_dtype=torch.float32).eval().requires_grad_(False)


def times_are(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Let the runs of every race take these seconds in turn, whatever the machine does."""
    left = list(seconds)
    for module in (cpu_dtype, precision):
        monkeypatch.setattr(module, "least_times_s", lambda runs: [left.pop(0) for _ in runs])


@pytest.mark.parametrize(("narrow_s", "want"), [(0.5, torch.bfloat16), (0.95, torch.float32), (2.0, torch.float32)])
def test_the_faster_one_is_taken_and_remembered(
    embedded: WanTransformer3DModel,
    narrow_s: float,
    want: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times_are(monkeypatch, 1.0, narrow_s)
    assert fastest_dtype(embedded, STEPS, SHAPE, Verdicts(tmp_path, "a")) == want
    # No time is left: what is asked again was remembered.
    assert fastest_dtype(embedded, STEPS, SHAPE, Verdicts(tmp_path, "a")) == want


def test_a_step_in_bfloat16_is_within_the_bound_and_one_beyond_it_is_not_taken(
    embedded: WanTransformer3DModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = {name: tensor.clone() for name, tensor in embedded.state_dict().items()}
    times_are(monkeypatch, 1.0, 0.5, 1.0, 0.5)
    fastest_dtype(embedded, STEPS, SHAPE, Verdicts(None))
    error = float(caplog.text.rpartition("error=")[2])
    assert 1e-4 < error <= cpu_dtype.MAX_STEP_ERROR
    assert all(torch.equal(tensor, before[name]) for name, tensor in embedded.state_dict().items())
    monkeypatch.setattr(cpu_dtype, "MAX_STEP_ERROR", error / 2)
    assert fastest_dtype(embedded, STEPS, SHAPE, Verdicts(None)) == torch.float32


def test_a_small_network_stays_float32_unmeasured(tiny_pipeline: object, monkeypatch: pytest.MonkeyPatch) -> None:
    times_are(monkeypatch)
    network = tiny_pipeline.transformer  # type: ignore[attr-defined]
    assert fastest_dtype(network, STEPS, (4, 3, 4, 6), Verdicts(None)) == torch.float32


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ((16, 7, 12, 12), (16, 7, 12, 12)),
        ((16, 21, 60, 104), (16, 1, 60, 104)),
        ((16, 1, 400, 400), (16, 1, 20, 400)),
    ],
)
def test_a_large_video_is_raced_by_a_part(shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    assert cpu_dtype._bounded(shape, (1, 2, 2)) == want


def test_the_vae_takes_bfloat16_where_it_is_faster_and_near(
    embedded_vae: AutoencoderKLWan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    times_are(monkeypatch, 1.0, 0.95, 1.0, 0.5, 1.0, 0.5)

    def raced(folder: Path | None) -> StreamingDecoder:
        decoder = StreamingDecoder(copy.deepcopy(embedded_vae))
        race_dtype(decoder, lambda: latents, Verdicts(folder, "v"))
        return decoder

    want = next(StreamingDecoder(copy.deepcopy(embedded_vae)).frames(latents))
    slow = raced(None)
    assert slow.dtype == torch.float32 and torch.equal(next(slow.frames(latents)), want)  # unrounded weights again
    monkeypatch.setattr(precision, "LEAST_CPU_PSNR_DB", 1e9)
    assert raced(None).dtype == torch.float32
    monkeypatch.setattr(precision, "LEAST_CPU_PSNR_DB", 50.0)
    for _ in range(2):  # measured, then remembered
        fast = raced(tmp_path)
        assert fast.dtype == torch.bfloat16
        assert fast.conv_out.weight.dtype == torch.float32 and fast.conv_in.weight.dtype == torch.bfloat16
        assert precision.psnr(next(fast.frames(latents)), want) > 50.0

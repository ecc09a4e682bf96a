"""The floor: operations of the published sizes, counted without weights, and the arithmetic of ceilings."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from codmd_serve.bench.floor import (
    Ceilings,
    Work,
    measure_ceilings,
    num_parameters,
    text_work,
    transformer_work,
    vae_work,
)
from codmd_serve.bench.weights import preset

LATENTS_480P = (16, 21, 60, 104)


def test_work_of_wan_1_3b_is_that_of_the_plan() -> None:
    with torch.device("meta"):
        network = WanTransformer3DModel(**preset("wan-1.3b").transformer)
    work = transformer_work(network.config, LATENTS_480P, torch.bfloat16)
    assert work.flop / 1e12 == pytest.approx(283.0, abs=0.05)
    # Read once per pass: the weights in bfloat16 and float32 latents twice.
    assert work.num_bytes == 2 * num_parameters(network) + 8 * torch.Size(LATENTS_480P).numel()


def test_work_of_the_wan_vae_is_that_of_the_plan() -> None:
    with torch.device("meta"):
        config = AutoencoderKLWan(**preset("wan-1.3b").vae).config
    assert vae_work(config, LATENTS_480P, torch.float32).flop / 1e12 == pytest.approx(275, abs=0.5)


def test_counting_few_layers_and_frames_equals_counting_all(tiny_pipeline: WanPipeline) -> None:
    latents = torch.randn(1, 4, 5, 4, 4)
    deep = WanTransformer3DModel.from_config({**tiny_pipeline.transformer.config, "num_layers": 5})
    with FlopCounterMode(display=False) as whole, torch.no_grad(), torch.nn.attention.sdpa_kernel(MATH):
        deep(latents, torch.zeros(1), torch.randn(1, 512, 16))
    assert transformer_work(deep.config, latents.shape[1:], torch.float32).flop == whole.get_total_flops()
    with FlopCounterMode(display=False) as whole, torch.no_grad(), torch.nn.attention.sdpa_kernel(MATH):
        tiny_pipeline.vae.decode(latents)
    assert vae_work(tiny_pipeline.vae.config, latents.shape[1:], torch.float32).flop == whole.get_total_flops()


# The one kernel of torch whose operations are counted on every device.
MATH = torch.nn.attention.SDPBackend.MATH


def test_work_of_text_grows_with_its_layers(tiny_pipeline: WanPipeline) -> None:
    config = tiny_pipeline.text_encoder.config
    assert text_work(config, torch.float32).flop > 2 * 512 * num_parameters(tiny_pipeline.text_encoder.encoder.block)


def test_floor_is_the_slower_of_the_two_ceilings() -> None:
    ceilings = Ceilings(flop_per_s=100.0, bytes_per_s=10.0)
    assert ceilings.floor_s(Work(200, 5)) == 2.0
    assert ceilings.floor_s(Work(200, 50)) == 5.0
    assert ceilings.floor_s(Work(200, 5).times(4)) == 8.0
    assert ceilings.best(Ceilings(50.0, 20.0)) == Ceilings(100.0, 20.0)


def test_ceilings_are_measured_in_flop_and_bytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codmd_serve.bench.floor.MATMUL_SIDE", {"cpu": 64})
    monkeypatch.setattr("codmd_serve.bench.floor.COPY_BYTES", {"cpu": 2**20})
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    # Between a pocket calculator and the largest processor there is.
    assert 1e6 < ceilings.flop_per_s < 1e14 and 1e6 < ceilings.bytes_per_s < 1e13

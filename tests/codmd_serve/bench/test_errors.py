"""The table of errors: its numbers are those of the arithmetic, and every decoder is left as it was."""

import re

import torch
from diffusers import WanPipeline

from codmd_serve.bench.errors import activations, decoded, layer_table, quantized, random_network, relative, traffic_of
from codmd_serve.wan import vae as vae_module
from codmd_serve.wan.vae import StreamingDecoder


def latents_of(frames: int) -> torch.Tensor:
    return torch.randn(1, 4, frames, 4, 4, generator=torch.Generator().manual_seed(0))


def test_layers_are_compared_in_order_and_float16_is_nearer_than_bfloat16(tiny_pipeline: WanPipeline) -> None:
    convolve = vae_module.convolve
    table = layer_table(tiny_pipeline.vae, latents_of(2))
    rows = re.findall(r"^\| (\d+) \| \d+ \| \S+ \| (\S+) \| (\S+) \|$", table, re.MULTILINE)
    assert [int(index) for index, _, _ in rows] == list(range(len(rows))) and len(rows) > 10
    assert all(0 < float(half) < float(brain) < 0.1 for _, half, brain in rows)
    assert vae_module.convolve is convolve
    assert next(tiny_pipeline.vae.decoder.parameters()).dtype == torch.float32


def test_activations_of_float32_are_exact(tiny_pipeline: WanPipeline) -> None:
    first, again = (activations(tiny_pipeline.vae, latents_of(1), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert decoded(tiny_pipeline.vae, latents_of(2), torch.float16).shape == (5, 32, 32, 3)


def test_our_decoder_moves_fewer_bytes_in_fewer_calls(tiny_pipeline: WanPipeline) -> None:
    decoder, latents = StreamingDecoder(tiny_pipeline.vae), latents_of(5)
    ours = traffic_of(lambda: list(decoder.frames(latents)))
    theirs = traffic_of(lambda: tiny_pipeline.vae.decode(latents))
    assert ours.calls < theirs.calls / 2 and ours.num_bytes < theirs.num_bytes


def test_traffic_counts_bytes_and_not_views() -> None:
    a = torch.ones(4, 4)
    traffic = traffic_of(lambda: a.t()[1:].reshape(-1, 2).add(1.0))
    # The copy that reshape makes (in and out 12 numbers), and the sum.
    assert traffic.num_bytes == 4 * (2 * 12 + 2 * 12)


def test_both_kinds_of_scales_are_near_at_the_widths_of_wan() -> None:
    network = random_network()
    latents, prompt = torch.randn(1, 16, 1, 8, 8), network.encode_prompt(torch.randn(1, 4, 512))
    want = network(latents, 0, prompt)
    rows, tensor = (relative(quantized(network, each)(latents, 0, prompt), want) for each in (False, True))
    # Random layers add little to what they pass on: .037 of a product is far less of the flow.
    assert 1e-4 < rows < 0.037 and 1e-4 < tensor < 0.037 and rows != tensor

"""The Triton kernels of `fused` and `rows` against the plain code, run by Triton's interpreter; a process of its own.

TRITON_INTERPRET has to be set before triton is imported, which another test may have done.
"""

import random

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from codmd_serve.wan import fused, rows
from codmd_serve.wan import vae as vae_module
from codmd_serve.wan.fused import Sum, add_norm_silu, add_norm_silu_triton
from codmd_serve.wan.transformer import FewStepTransformer

NUM_CASES = 24
CHANNELS = (1, 3, 8, 17, 24, 32, 96, 192)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> Tensor:
    values = size * torch.randn(shape)
    return values.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def copied(tensor: Tensor) -> Tensor:
    """With the same strides, which `clone` keeps of dense tensors only."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def check(case: int) -> None:
    rng = random.Random(case)
    torch.manual_seed(case)
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32])
    batch, channels, frames = rng.choice([1, 2]), rng.choice(CHANNELS), rng.randint(1, 4)
    shape = (batch, channels, frames, rng.randint(1, 6), rng.randint(1, 7))
    size = rng.choice([1e-4, 1.0, 300.0])
    # As a padded convolution leaves it: more channels are stored than there are.
    stored = channels + rng.choice([0, 5])
    value = drawn((batch, stored, *shape[2:]), dtype, size)[:, :channels]
    bias = torch.randn(channels) if rng.random() < 0.6 else None
    residual = drawn(shape, dtype, size) if rng.random() < 0.6 else None
    weight = torch.randn(channels) * channels**0.5
    keep, norm = rng.choice([(True, True), (False, True), (True, False)])
    # The buffer of the next convolution: two frames of history lie before what is written.
    room = drawn((batch, channels, frames + 2, *shape[3:]), dtype, 1.0)
    untouched = room[:, :, :2].clone()
    outs = [torch.empty_like(room[:, :, 2:]) if norm else None, room[:, :, 2:] if norm else None]
    runs = (add_norm_silu, add_norm_silu_triton)
    totals = [run(Sum(copied(value), bias, residual), weight, out, keep) for run, out in zip(runs, outs, strict=True)]
    assert all((total is not None) == keep for total in totals)
    tolerance = fused.NORM_SILU_TOLERANCE[dtype]
    for want, got in (outs, totals):
        if want is not None and got is not None:
            torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance * max(1.0, size))
    assert torch.equal(room[:, :, :2], untouched)


def check_zero_rows() -> None:
    out = torch.full((1, 8, 1, 2, 2), 7.0)
    out = out.contiguous(memory_format=torch.channels_last_3d)
    add_norm_silu_triton(Sum(torch.zeros_like(out)), torch.ones(8), out, False)
    assert torch.equal(out, torch.zeros_like(out))


def check_strides() -> None:
    plain = torch.zeros(1, 8, 2, 3, 4)
    with pytest.raises(ValueError, match="channels last"):
        add_norm_silu_triton(Sum(plain), torch.ones(8), torch.zeros_like(plain), False)


def check_rows(case: int) -> None:
    rng = random.Random(case)
    torch.manual_seed(case)
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32])
    batch, tokens, heads = rng.choice([1, 2]), rng.randint(1, 5), rng.choice([1, 2, 3, 5])
    width = heads * rng.choice([8, 12, 64])
    hidden, update = (torch.randn(batch, tokens, width).to(dtype) for _ in range(2))
    vectors = [torch.randn(width) for _ in range(3)]
    gate, weight, bias = (vector if rng.random() < 0.6 else None for vector in vectors)
    bias = vectors[2] if weight is not None else None
    added = update if rng.random() < 0.7 else None
    gate = gate if added is not None else None
    parts = rng.choice([1, 2])
    features = torch.randn(batch, tokens, 3 * width).to(dtype).reshape(batch, tokens, 3, width)[:, :, :parts]
    factors = torch.randn(parts, width)
    table = torch.randn(1, tokens, 1, width // heads // 2, 2) if rng.random() < 0.6 else None
    tolerance = rows.ROW_TOLERANCE[dtype]
    wanted, got = (
        [
            *ops.add_norm(hidden, added, gate, weight, bias, 1e-6),
            ops.norm_rotate(features, factors, 1e-6, heads, table),
        ]
        for ops in (rows.PLAIN, rows.FUSED)
    )
    for want, other in zip(wanted, got, strict=True):
        assert want.shape == other.shape and want.dtype == other.dtype
        torch.testing.assert_close(other.float(), want.float(), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def check_transformer() -> None:
    """Two blocks of the real class, with the kernels and without."""
    source = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
    )
    network = FewStepTransformer(source.eval(), (1000.0, 500.0))
    latents, prompt = torch.randn(1, 4, 2, 4, 6), network.encode_prompt(torch.randn(1, 5, 16))
    want = network(latents, 1, prompt)
    network.rows = rows.FUSED
    torch.testing.assert_close(network(latents, 1, prompt), want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def check_decoder() -> None:
    """A decoder of Wan 2.1's form whose norms, biases and residuals run through the kernel alone."""
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    latents = torch.randn(1, 4, 6, 2, 3)
    want = torch.cat(list(vae_module.StreamingDecoder(vae).frames(latents)), dim=1)
    vae_module.adds_bias_apart = lambda _hidden: True
    decoder = vae_module.StreamingDecoder(vae)
    decoder.run_norm = add_norm_silu_triton
    got = torch.cat(list(decoder.frames(latents)), dim=1)
    assert int((got.int() - want.int()).abs().max()) <= 1
    assert float((got != want).float().mean()) < 1e-3


if __name__ == "__main__":
    for number in range(NUM_CASES):
        check(number)
        check_rows(number)
    check_zero_rows()
    check_strides()
    check_transformer()
    check_decoder()
    print(f"{NUM_CASES} cases")

"""Trimmed prompts give what all 512 padded positions give: outputs, gradients, autocast, compile."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

from codmd_serve.errors import ConfigError
from codmd_serve.wan.attention import (
    CompactCrossAttnProcessor,
    compact_prompt_embeds,
    pad_logit_bias,
    prompt_lengths,
    use_compact_cross_attention,
)

LENGTHS = [5, 11, 1]


def build_transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # biases not zero: padding keys must matter
    return model.eval()


def padded_embeds() -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    embeds = torch.randn(3, 512, 12, generator=rng)
    for row, length in enumerate(LENGTHS):
        embeds[row, length:] = 0
    return embeds


def run(model: WanTransformer3DModel, embeds: torch.Tensor) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    latents = torch.randn(3, 4, 2, 4, 4, generator=rng).to(embeds.dtype)
    timestep = torch.tensor([1000.0, 757.0, 522.0])
    return model(latents, timestep, embeds, return_dict=False)[0]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got - want).norm() / want.norm()).detach())


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_compact_forward_equals_stock_on_512_positions(multiple: int) -> None:
    stock = build_transformer()
    compact = use_compact_cross_attention(copy.deepcopy(stock))
    with torch.no_grad():
        want = run(stock, padded_embeds())
        got = run(compact, compact_prompt_embeds(padded_embeds(), LENGTHS, multiple=multiple))
    assert relative_error(got, want) < 1e-5


def test_compact_processor_accepts_untrimmed_embeddings() -> None:
    stock = build_transformer()
    compact = use_compact_cross_attention(copy.deepcopy(stock))
    with torch.no_grad():
        assert relative_error(run(compact, padded_embeds()), run(stock, padded_embeds())) < 1e-6


def test_padding_matters_so_that_the_equality_is_not_empty() -> None:
    stock = build_transformer()
    with torch.no_grad():
        trimmed = run(stock, compact_prompt_embeds(padded_embeds(), LENGTHS))
        assert relative_error(trimmed, run(stock, padded_embeds())) > 1e-3


def test_compact_attention_is_exact_in_float64() -> None:
    """The trick is algebra, not an approximation: output and every gradient agree to float64 rounding."""
    stock = build_transformer().blocks[0].attn2.double()
    compact = copy.deepcopy(stock)
    compact.set_processor(CompactCrossAttnProcessor())
    hidden = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    text = torch.nn.functional.pad(padded_embeds(), (0, 20)).double()
    outputs = [stock(hidden, text), compact(hidden, compact_prompt_embeds(text, LENGTHS))]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-13)
    for out in outputs:
        out.square().mean().backward()
    for (name, a), b in zip(stock.named_parameters(), compact.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-13, msg=name)


def test_compact_gradients_of_the_network_equal_stock() -> None:
    stock = build_transformer()
    compact = use_compact_cross_attention(copy.deepcopy(stock))
    full, short = padded_embeds(), compact_prompt_embeds(padded_embeds(), LENGTHS)
    run(stock, full).square().mean().backward()
    run(compact, short).square().mean().backward()
    scale = max(float(p.grad.norm()) for p in stock.parameters() if p.grad is not None)
    for (name, a), b in zip(stock.named_parameters(), compact.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).norm() <= 1e-5 * scale, name


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")  # torch's own, from Wan's RMSNorm under autocast
def test_compact_under_bf16_autocast_stays_within_bf16_of_fp32() -> None:
    stock = build_transformer()
    compact = use_compact_cross_attention(copy.deepcopy(stock))
    want = run(stock, padded_embeds())
    with torch.autocast("cpu", torch.bfloat16):
        stock_bf16 = run(stock, padded_embeds())
        got = run(compact, compact_prompt_embeds(padded_embeds(), LENGTHS))
    got.float().square().mean().backward()
    assert relative_error(got.float(), want) < 2 * relative_error(stock_bf16.float(), want)


def test_compact_in_bf16_weights() -> None:
    compact = use_compact_cross_attention(build_transformer()).to(torch.bfloat16)
    with torch.no_grad():
        got = run(compact, compact_prompt_embeds(padded_embeds(), LENGTHS).to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compact_traces_as_one_graph(dynamic: bool) -> None:
    compact = use_compact_cross_attention(build_transformer())
    block = compact.blocks[0].attn2
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=dynamic)
    hidden = torch.randn(2, 6, 32)
    with torch.no_grad():
        for num_kept in (9, 16):
            text = torch.randn(2, num_kept, 32)
            torch.testing.assert_close(compiled(hidden, text), block(hidden, text))


def test_prompt_lengths_finds_the_last_row_that_is_not_zero() -> None:
    embeds = padded_embeds()
    embeds[1, 3] = 0  # a zero row inside a prompt does not end it
    assert prompt_lengths(embeds) == LENGTHS
    assert prompt_lengths(torch.zeros(2, 8, 4)) == [0, 0]


def test_compact_lengths_default_to_those_read_off() -> None:
    torch.testing.assert_close(
        compact_prompt_embeds(padded_embeds()), compact_prompt_embeds(padded_embeds(), LENGTHS), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("num_given", "length", "num_kept"), [(512, 7, 8), (512, 8, 16), (512, 511, 512), (512, 512, 512), (3, 3, 8)]
)
def test_compact_keeps_one_zero_row_where_there_is_room(num_given: int, length: int, num_kept: int) -> None:
    embeds = torch.ones(1, num_given, 2)
    embeds[:, length:] = 0
    out = compact_prompt_embeds(embeds, [length])
    assert out.shape == (1, num_kept, 2)
    assert float(out.sum()) == 2 * length
    assert length == 512 or float(out[:, -1].abs().sum()) == 0


def test_pad_logit_bias_is_the_log_of_the_positions_it_stands_for() -> None:
    bias = pad_logit_bias(16, 512, like=torch.zeros(1))
    assert float(bias[:-1].abs().sum()) == 0
    assert float(bias[-1].exp()) == pytest.approx(497, rel=1e-5)
    assert float(pad_logit_bias(512, 512, like=torch.zeros(1))[-1]) == 0


@pytest.mark.parametrize(("num_given", "lengths"), [(8, [9]), (8, [-1]), (600, [5])])
def test_compact_refuses_impossible_lengths(num_given: int, lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="prompt lengths"):
        compact_prompt_embeds(torch.zeros(1, num_given, 2), lengths)


def test_compact_refuses_image_conditioned_networks() -> None:
    model = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1,
        added_kv_proj_dim=16, image_dim=8, in_channels=4, out_channels=4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="text-to-video"):
        use_compact_cross_attention(model)

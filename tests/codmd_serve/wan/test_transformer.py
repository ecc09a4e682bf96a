"""The rebuilt forward pass equals diffusers' own, at any size, for full and trimmed prompts."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from codmd_serve.errors import ConfigError
from codmd_serve.wan.attention import compact_prompt_embeds
from codmd_serve.wan.transformer import FewStepTransformer

TIMESTEPS = (1000.0, 937.5, 833.3, 625.0)
TEXT_DIM = 12
# (heads, width of a head, layers, ffn width, patch)
SHAPES = (
    (1, 12, 1, 16, (1, 2, 2)),
    (2, 12, 2, 40, (1, 2, 2)),
    (3, 16, 1, 32, (1, 1, 1)),
    (2, 20, 3, 24, (1, 2, 2)),
    (4, 24, 1, 64, (1, 2, 1)),
)


def stock(
    shape: tuple[int, int, int, int, tuple[int, int, int]], seed: int = 0, **changes: object
) -> WanTransformer3DModel:
    heads, width, layers, ffn_dim, patch = shape
    torch.manual_seed(seed)
    settings_of_model = {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": width,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        **changes,
    }
    model = WanTransformer3DModel(**settings_of_model).eval().requires_grad_(False)
    # Norm weights of 1 would hide that one of them was left out.
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def in_bfloat16(exact: WanTransformer3DModel) -> WanTransformer3DModel:
    """As diffusers loads it: the parts its class lists stay float32."""
    low = copy.deepcopy(exact).to(torch.bfloat16)
    kept = WanTransformer3DModel._keep_in_fp32_modules
    for name, parameter in low.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = exact.get_parameter(name).data.clone()
    return low


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    size=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(1, 2),
    num_words=st.integers(0, 9),
    trimmed=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_equals_diffusers_in_float32(shape, seed, size, batch, num_words, trimmed) -> None:  # type: ignore[no-untyped-def]
    model = stock(shape, seed)
    latents = torch.randn(batch, 4, size[0], 2 * size[1], 2 * size[2])
    embeds = torch.zeros(batch, 512, TEXT_DIM)
    embeds[:, :num_words] = torch.randn(batch, num_words, TEXT_DIM)
    fast = FewStepTransformer(copy.deepcopy(model), TIMESTEPS)
    prompt = fast.encode_prompt(compact_prompt_embeds(embeds) if trimmed else embeds)
    for step, timestep in enumerate(TIMESTEPS):
        want = model(latents, torch.full((batch,), timestep), embeds, return_dict=False)[0]
        assert relative_error(fast(latents, step, prompt), want) < 1e-5


def test_bfloat16_is_no_further_from_float32_than_diffusers_is() -> None:
    errors_fast, errors_stock = [], []
    for seed in range(6):
        exact = stock(SHAPES[3], seed)
        low = in_bfloat16(exact)
        latents, embeds = torch.randn(1, 4, 3, 6, 6), torch.zeros(1, 512, TEXT_DIM)
        embeds[:, :7] = torch.randn(1, 7, TEXT_DIM)
        fast = FewStepTransformer(copy.deepcopy(low), TIMESTEPS)
        prompt = fast.encode_prompt(embeds)
        for step, timestep in enumerate(TIMESTEPS):
            time = torch.full((1,), timestep)
            want = exact(latents, time, embeds, return_dict=False)[0]
            theirs = low(latents.bfloat16(), time, embeds.bfloat16(), return_dict=False)[0]
            errors_stock.append(float((theirs.float() - want).norm() / want.norm()))
            errors_fast.append(float((fast(latents, step, prompt).float() - want).norm() / want.norm()))
    assert sum(errors_fast) <= sum(errors_stock)
    assert max(errors_fast) < 0.05


def test_holds_no_second_copy_of_the_weights() -> None:
    model = stock(SHAPES[1])
    before = sum(parameter.numel() for parameter in model.blocks.parameters())
    fast = FewStepTransformer(model, TIMESTEPS)
    assert sum(parameter.numel() for parameter in model.blocks.parameters()) == 0
    tables = 2 * 6 * len(fast.blocks) * 24  # the scale_shift_tables, which became buffers
    assert sum(parameter.numel() for parameter in fast.blocks.parameters()) == before - tables // 2


def test_works_without_cross_attention_norm() -> None:
    model = stock(SHAPES[1], cross_attn_norm=False)
    latents, embeds = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 512, TEXT_DIM)
    fast = FewStepTransformer(copy.deepcopy(model), TIMESTEPS)
    want = model(latents, torch.full((1,), TIMESTEPS[2]), embeds, return_dict=False)[0]
    assert relative_error(fast(latents, 2, fast.encode_prompt(embeds)), want) < 1e-5


def test_refuses_image_networks_and_empty_grids() -> None:
    with pytest.raises(ConfigError, match="also reads an image"):
        FewStepTransformer(stock(SHAPES[0], image_dim=8, added_kv_proj_dim=12), TIMESTEPS)
    with pytest.raises(ConfigError, match="at least one step"):
        FewStepTransformer(stock(SHAPES[0]), ())


def test_shapes_may_alternate_and_old_tables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codmd_serve.wan.transformer.NUM_SHAPES_CACHED", 2)
    model = stock(SHAPES[1])
    fast = FewStepTransformer(copy.deepcopy(model), TIMESTEPS)
    embeds = torch.randn(1, 512, TEXT_DIM)
    prompt = fast.encode_prompt(embeds)
    for size in (2, 4, 6, 2, 4):
        latents = torch.randn(1, 4, 2, size, 4)
        want = model(latents, torch.full((1,), TIMESTEPS[0]), embeds, return_dict=False)[0]
        assert relative_error(fast(latents, 0, prompt), want) < 1e-5
    assert len(fast._tables) == 2

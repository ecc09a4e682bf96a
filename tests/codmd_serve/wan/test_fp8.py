"""8-bit products: the arithmetic against its definition on a CPU, which layers are meant, and who is refused."""

import copy
import math
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from codmd_serve.errors import ConfigError
from codmd_serve.wan import fp8
from codmd_serve.wan.checkpoint import StudentSpec
from codmd_serve.wan.fp8 import Float8Linear, check_quantization, quantize_blocks, quantize_rows
from codmd_serve.wan.transformer import FewStepTransformer

CUDA = torch.device("cuda")
# Numbers of four significant bits, from 2^-9 to 448: what the standard calls E4M3.
GRID = sorted({m * 2.0**e for m in range(8, 16) for e in range(-9, 6)} | {m * 2.0**-9 for m in range(8)} - {480.0})
ROUNDING = 0.0265  # root mean square of relative errors that are even in +-1/16 ... 1/32 of a binade


def nearest_on_grid(values: Tensor) -> Tensor:
    grid = torch.tensor([number for number in GRID if number <= 448.0])
    return values.sign() * grid[(values.abs()[..., None] - grid).abs().argmin(-1)]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def layer_of(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).requires_grad_(False).to(torch.bfloat16)


def test_rows_are_the_nearest_numbers_of_the_format() -> None:
    values = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    rounded, scale = quantize_rows(values)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (40, 1) and scale.dtype == torch.float32
    assert rounded.float().abs().amax(-1).tolist() == [448.0] * 40
    want = nearest_on_grid(values / scale)
    # On a tie both neighbours are nearest: the distance is what counts.
    got_off, want_off = ((numbers - values / scale).abs() for numbers in (rounded.float(), want))
    torch.testing.assert_close(got_off, want_off, rtol=0, atol=1e-4)


def test_rounding_is_off_by_what_four_bits_are() -> None:
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    rounded, scale = quantize_rows(values)
    assert relative(rounded.float() * scale, values) == pytest.approx(ROUNDING, rel=0.1)


@pytest.mark.parametrize("row", [0.0, 1e-30, 3e38])
def test_extreme_rows_stay_in_range(row: float) -> None:
    rounded, scale = quantize_rows(torch.full((1, 16), row))
    back = rounded.float() * scale
    assert bool(back.isfinite().all()) and float((back - row).abs().max()) <= max(row / 16, 1e-12)


def test_numbers_that_are_not_finite_do_not_become_plausible() -> None:
    for bad in (math.inf, math.nan):
        values = torch.ones(2, 16)
        values[0, 3] = bad
        rounded, scale = quantize_rows(values)
        back = rounded.float() * scale
        assert bool(back[0].isnan().any()) and torch.equal(back[1], torch.ones(16))


def test_a_layer_is_the_product_of_its_rounded_factors() -> None:
    source, features = layer_of(64, 48), torch.randn(2, 9, 64).to(torch.bfloat16)
    layer = Float8Linear(source)
    (weight, weight_scale), (rows, row_scale) = quantize_rows(source.weight), quantize_rows(features.reshape(18, 64))
    want = (rows.float() * row_scale) @ (weight.float() * weight_scale).t() + source.bias.float()
    out = layer(features)
    assert out.shape == (2, 9, 48) and out.dtype == torch.bfloat16
    assert relative(out.reshape(18, 48), want) < 4e-3  # bfloat16 rounds the output once: 2^-8 / sqrt(12) of it
    assert layer.weight.nbytes == source.weight.nbytes // 2


def test_a_layer_is_off_by_both_roundings_and_no_more() -> None:
    source, features = layer_of(512, 256), torch.randn(64, 512).to(torch.bfloat16)
    nn.init.normal_(source.weight)
    nn.init.zeros_(source.bias)
    error = relative(Float8Linear(source)(features), source(features))
    assert error == pytest.approx(math.sqrt(2) * ROUNDING, rel=0.15)


def test_outliers_cost_only_their_own_row() -> None:
    # One scale for the whole tensor would push every other token to the smallest numbers of the format.
    source, features = layer_of(64, 32), torch.randn(16, 64).to(torch.bfloat16)
    loud = features.clone()
    loud[0] *= 1e4
    layer = Float8Linear(source)
    assert torch.equal(layer(loud)[1:], layer(features)[1:])


def test_one_scale_per_tensor_is_where_row_scales_do_not_run(
    transformer: FewStepTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, embeds = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 5, 16)
    want = transformer(latents, 1, transformer.encode_prompt(embeds))
    monkeypatch.setattr(fp8, "row_scales_problem", lambda _: "RuntimeError: no such kernel")
    quantize_blocks(transformer)
    assert transformer.problem == "fp8 with one scale per tensor, which is less exact: RuntimeError: no such kernel"
    assert transformer.blocks[0].qkv.scale.shape == ()
    got = transformer(latents, 1, transformer.encode_prompt(embeds))
    assert 1e-4 < relative(got, want) < 0.1


def test_a_device_without_row_scales_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8.row_scales_problem(torch.device("cpu")) == ""

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("row-wise scaling needs compute capability 9.0\nand a long story")

    monkeypatch.setattr(fp8, "scaled_product", refuse)
    assert fp8.row_scales_problem(torch.device("meta")) == "RuntimeError: row-wise scaling needs compute capability 9.0"


def test_an_outlier_costs_all_rows_where_there_is_one_scale() -> None:
    source, features = layer_of(64, 32), torch.randn(16, 64).to(torch.bfloat16)
    features[0] *= 1e6
    want = source(features)[1:]
    by_rows, by_tensor = (Float8Linear(source, per_tensor)(features)[1:] for per_tensor in (False, True))
    assert relative(by_rows, want) < 0.06 < relative(by_tensor, want)


def test_sides_that_the_kernels_cannot_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs layers whose sides are multiples of 16, got 24 and 32"):
        Float8Linear(layer_of(32, 24))


def has_row_scales_on_a_cpu() -> bool:
    rows, scale = quantize_rows(torch.ones(16, 16))
    try:
        fp8.device_product(rows, scale, rows, scale.t().contiguous(), torch.zeros(16, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not has_row_scales_on_a_cpu(), reason="needs torch._scaled_mm with row scales on a CPU: torch 2.13")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_compiled_block_has_no_graph_breaks_and_its_quantisation_is_fused(
    transformer: FewStepTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device compiles, with the kernels that inductor makes on a CPU: `fullgraph` raises at a graph break."""
    monkeypatch.setattr(fp8, "scaled_product", fp8.device_product)
    quantize_blocks(transformer)
    block, prompt = transformer.blocks[0], transformer.encode_prompt(torch.randn(1, 512, 16))
    table, (key, value) = transformer.rotary_table((1, 4, 2, 8, 8)), prompt.keys_values[0]
    given = (torch.randn(1, 32, 64).to(torch.bfloat16), block.modulation(1), table, key, value, prompt.logit_bias)
    torch._dynamo.reset()
    with torch.no_grad():
        want = block(*given)
        got, (code,) = run_and_get_code(torch.compile(block.forward, fullgraph=True), *given)
    assert relative(got, want) < 0.01
    body = code[code.index("def call(") :]
    assert body.count("extern_kernels._scaled_mm(") == len(fp8.LAYERS)
    launches = re.findall(r"^ +cpp_fused_(\w+)\(", body, re.MULTILINE)
    # The same block in bfloat16 has 7. What comes out of an attention is quantised by a pass of its own; every other
    # input of a product in the pass that makes it: a norm, or GELU.
    assert len(launches) == 7 + 2
    quantising = [name for name in launches if "amax" in name]
    assert len(quantising) == len(fp8.LAYERS)
    assert sum("native_layer_norm" in name or "gelu" in name for name in quantising) == len(fp8.LAYERS) - 2


@pytest.fixture
def transformer(tiny_spec: StudentSpec) -> FewStepTransformer:
    torch.manual_seed(0)
    source = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=128,
        num_layers=2,
    )
    return FewStepTransformer(source.eval().to(torch.bfloat16), tiny_spec.timesteps)


def test_only_the_large_layers_of_blocks_are_quantized(transformer: FewStepTransformer) -> None:
    before = copy.deepcopy(transformer)
    quantize_blocks(transformer)
    changed = {name for name, tensor in transformer.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    assert changed == {f"blocks.{index}.{name}.weight" for index in range(2) for name in fp8.LAYERS}
    kept = before.state_dict()
    for name in ("proj_out.weight", "patch_weight", "text_embedder.linear_1.weight", "blocks.1.cross_kv.weight"):
        assert torch.equal(transformer.state_dict()[name], kept[name]) and kept[name].dtype == torch.bfloat16
    assert transformer.blocks[0].gate.dtype == torch.float32


def test_a_quantized_network_is_near_the_one_it_was(transformer: FewStepTransformer) -> None:
    latents, embeds = torch.randn(1, 4, 2, 4, 6), torch.randn(1, 5, 16)
    want = transformer(latents, 1, transformer.encode_prompt(embeds))
    quantize_blocks(transformer)
    got = transformer(latents, 1, transformer.encode_prompt(embeds))
    assert got.dtype == torch.bfloat16
    # A product is off by .037; what blocks add to the residual stream is the smaller part of it.
    assert 1e-4 < relative(got, want) < 0.05


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("int4", CUDA, torch.bfloat16, "quantization must be one of none, fp8, fp8-emulated, got 'int4'"),
        ("fp8", torch.device("cpu"), torch.float32, "needs a CUDA device of compute capability 8.9 or higher, got cpu"),
        ("fp8-emulated", CUDA, torch.bfloat16, "fp8-emulated is for CPUs, got cuda: say fp8"),
        ("fp8", CUDA, torch.bfloat16, "capability 8.9 or higher, got Old GPU of 8.0"),
    ],
)
def test_what_cannot_be_quantized_is_refused_in_one_sentence(
    name: str, device: torch.device, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Old GPU")
    with pytest.raises(ConfigError) as caught:
        check_quantization(name, device, dtype)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_fp8_gives_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    check_quantization("fp8", CUDA, torch.bfloat16)
    with pytest.raises(ConfigError, match="quantization fp8 gives bfloat16, got float16: leave --dtype out"):
        check_quantization("fp8", CUDA, torch.float16)


def test_none_is_possible_everywhere() -> None:
    check_quantization("none", torch.device("cpu"), torch.float32)

"""8-bit kernels on a device: what they give is what the arithmetic says, and engines with them make videos."""

import gc
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch._inductor.utils import run_and_get_code

from codmd_serve.bench.lossy import LOSSY_SETTINGS, outputs, unsupported
from codmd_serve.config import GenerateParams
from codmd_serve.loading import load_engine
from codmd_serve.wan.checkpoint import StudentSpec, default_bundle_path
from codmd_serve.wan.fp8 import LAYERS, Float8Linear, quantize_blocks, quantize_rows
from codmd_serve.wan.kernels import LOSSY_TOLERANCE, AttentionShape, measure_kernels
from codmd_serve.wan.transformer import FewStepTransformer

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and "fp8" in unsupported(CUDA, torch.bfloat16), reason="needs compute capability 8.9"
)
needs_sage = pytest.mark.skipif(not importlib.util.find_spec("sageattention"), reason="needs sageattention")


# 32,760 is no multiple of 256, and 1 is the smallest: both have been trouble in kernels of this kind.
@needs_fp8
@pytest.mark.parametrize("size", [(32_760, 1536, 8960), (75, 256, 768), (1, 64, 48)])
def test_a_layer_is_the_product_of_its_rounded_factors(size: tuple[int, int, int]) -> None:
    num_tokens, inputs, outputs_ = size
    torch.manual_seed(0)
    source = nn.Linear(inputs, outputs_, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    features = torch.randn(1, num_tokens, inputs, device="cuda", dtype=torch.bfloat16)
    (weight, weight_scale), (rows, row_scale) = quantize_rows(source.weight), quantize_rows(features[0])
    want = (rows.float() * row_scale) @ (weight.float() * weight_scale).t() + source.bias.float()
    got = Float8Linear(source)(features)[0].float()
    # bfloat16 output, and the fast accumulator, which keeps 14 bits of a partial sum.
    assert float((got - want).norm() / want.norm()) < 1e-2


@needs_fp8
def test_an_fp8_engine_makes_nearly_the_same_latents(tmp_path: Path) -> None:
    params = GenerateParams(
        prompt="a red circle moves right", seed=7, height=64, width=64, num_frames=17, fps=16, crf=18
    )
    made = {}
    for quantization in ("none", "fp8"):
        engine = load_engine(default_bundle_path(), "cuda", quantization=quantization)
        assert engine.facts.lossy == ("" if quantization == "none" else "fp8")
        engine.generate(params, tmp_path / "a.mp4")
        made[quantization], _ = outputs(engine, params)
    error = float((made["fp8"] - made["none"]).norm() / made["none"].norm())
    print(f"fp8 latents off by {error:.3g}")
    assert 1e-4 < error < 0.3


@needs_fp8
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_compiled_block_fuses_its_quantisation(tiny_spec: StudentSpec) -> None:
    torch.manual_seed(0)
    source = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=1024,
        num_layers=1,
    )
    network = FewStepTransformer(source.eval().to("cuda", torch.bfloat16), tiny_spec.timesteps)
    quantize_blocks(network)
    assert network.prefers_compiled and network.problem == ""
    block, prompt = network.blocks[0], network.encode_prompt(torch.randn(1, 512, 64))
    table, (key, value) = network.rotary_table((1, 16, 4, 32, 32)), prompt.keys_values[0]
    hidden = torch.randn(1, 1024, 256, device="cuda", dtype=torch.bfloat16)
    given = (hidden, block.modulation(1), table, key, value, prompt.logit_bias)
    torch._dynamo.reset()
    with torch.no_grad():
        want = block(*given)
        got, (code,) = run_and_get_code(torch.compile(block.forward, fullgraph=True), *given)
    assert float((got - want).float().norm() / want.float().norm()) < 0.02
    body = code[code.index("def call(") :]
    launches = re.findall(r"(triton_\w+)\.run\(", body)
    print(*launches, sep="\n")
    assert body.count("_scaled_mm(") == len(LAYERS)
    # Nine on a CPU; a wide row may be reduced by a kernel before the one that scales it.
    assert len(launches) <= 9 + len(LAYERS)


@needs_sage
@pytest.mark.parametrize("num_tokens", [4096, 32_760])
def test_sage_stays_within_its_tolerance(num_tokens: int) -> None:
    shape = AttentionShape(num_tokens=num_tokens, num_heads=12, head_width=128)
    (entry,) = measure_kernels(["sage"], shape, CUDA, torch.bfloat16)
    print(entry, f"tolerance {LOSSY_TOLERANCE}")
    assert entry.self_ms is not None


@pytest.mark.parametrize("name", LOSSY_SETTINGS)
def test_a_variant_that_is_not_refused_serves(name: str, tmp_path: Path) -> None:
    if name in unsupported(CUDA, torch.bfloat16):
        pytest.skip("refused on this device")
    engine = load_engine(default_bundle_path(), "cuda", **LOSSY_SETTINGS[name])  # type: ignore[arg-type]
    assert engine.facts.lossy == name


def test_fusing_takes_one_block_of_device_memory(tiny_spec: StudentSpec) -> None:
    gc.collect()
    others = torch.cuda.memory_allocated()  # of engines that other tests keep
    source = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=128,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=2048,
        num_layers=20,
    ).to("cuda", torch.bfloat16)
    before = torch.cuda.memory_allocated() - others
    torch.cuda.reset_peak_memory_stats()
    transformer = FewStepTransformer(source, tiny_spec.timesteps)
    quantize_blocks(transformer)
    # A block is a twentieth, what is fused of it a third of that; the rest is what allocations are rounded up by.
    assert torch.cuda.max_memory_allocated() - others - before < 0.1 * before
    assert torch.cuda.memory_allocated() - others < 0.7 * before

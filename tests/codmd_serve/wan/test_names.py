"""Names: the table is diffusers' own conversion, nothing is lost or made up, and updates add what they say."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.names import check_config, merge_lora, original_name, to_diffusers
from codmd_serve.wan.published import Published, read_published

RANK = 4


def original(weights: Mapping[str, Tensor]) -> Published:
    return Published(family="original", naming="original", weights=dict(weights), config={})


def lora(weights: Mapping[str, Tensor]) -> Published:
    return Published(family="lora", naming="lora", weights=dict(weights), config={})


@pytest.fixture(scope="module")
def base(golden_base: Path) -> dict[str, Tensor]:
    """Weights of the base, by diffusers name."""
    return read_published(golden_base).weights


@pytest.fixture(scope="module")
def shapes(base: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in base.items()}


def test_names_are_those_of_diffusers_own_conversion(
    golden_weights: dict[str, Tensor], golden_base: Path, shapes: dict[str, torch.Size]
) -> None:
    theirs = WanTransformer3DModel.from_single_file(
        dict(golden_weights), config=str(golden_base), subfolder="transformer", local_files_only=True
    ).state_dict()
    ours = to_diffusers(original(golden_weights), shapes, "FILE")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_original_name_keeps_what_both_call_the_same() -> None:
    assert original_name("patch_embedding.bias") == "patch_embedding.bias"
    assert original_name("blocks.12.scale_shift_table") == "blocks.12.modulation"
    assert original_name("scale_shift_table") == "head.modulation"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.ffn.0.bias": None}, r"FILE lacks 1 of 96 tensors, the first is blocks\.1\.ffn\.0\.bias"),
        ({"blocks.1.extra": torch.zeros(1)}, r"FILE has unknown 1 of 96 tensors, the first is blocks\.1\.extra"),
        ({"head.head.bias": torch.zeros(63)}, r"head\.head\.bias is \(63,\), the base has \(64,\)"),
        ({"head.head.bias": torch.full((64,), torch.nan)}, r"values that are not finite, in head\.head\.bias"),
        ({"blocks.3.modulation": torch.zeros(1, 6, 96)}, "it has 4 blocks of width 96 .*, the base 3 blocks"),
        ({"patch_embedding.weight": torch.zeros(64, 64)}, "3 blocks of width 64 and patches of 64 numbers, the base"),
        ({"patch_embedding.weight": torch.zeros(96, 36, 1, 2, 2)}, "patches of 144 numbers, the base .* of 64 numbers"),
    ],
)
def test_weights_that_are_not_those_of_the_base_are_refused(
    golden_weights: dict[str, Tensor], shapes: dict[str, torch.Size], change: dict[str, Any], message: str
) -> None:
    changed = {name: tensor for name, tensor in (golden_weights | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        to_diffusers(original(changed), shapes, "FILE")


@pytest.mark.parametrize("config", [{"num_heads": 4}, {"num_attention_heads": 4}, {"eps": 1e-5}])
def test_a_config_of_other_heads_is_refused(config: dict[str, Any]) -> None:
    base = {"num_attention_heads": 2, "eps": 1e-6}
    with pytest.raises(CheckpointError, match=rf"{next(iter(config))} is .*, the base has"):
        check_config(config, base, "FILE")
    check_config({"num_heads": 2, "eps": 1e-6}, base, "FILE")
    check_config({}, base, "FILE")


def updates(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors for every matrix of the blocks, by diffusers module."""
    rng = torch.Generator().manual_seed(2)
    return {
        name.removesuffix(".weight"): (
            torch.randn(RANK, shape[1], generator=rng),
            torch.randn(shape[0], RANK, generator=rng),
        )
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    }


def stored(factors: Mapping[str, tuple[Tensor, Tensor]], style: str, alpha: float | None) -> dict[str, Tensor]:
    """Name factors as LightX2V (prefixed or not), musubi or diffusers do."""
    state = {}
    for module, (down, up) in factors.items():
        name = original_name(f"{module}.weight").removesuffix(".weight")
        if style == "diffusers":
            state |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
            continue
        prefixed = {
            "lightx2v": f"diffusion_model.{name}",
            "bare": name,
            "musubi": "lora_unet_" + name.replace(".", "_"),
        }[style]
        state |= {f"{prefixed}.lora_down.weight": down, f"{prefixed}.lora_up.weight": up}
        if alpha is not None:
            state[f"{prefixed}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize(
    ("style", "alpha"), [("lightx2v", None), ("lightx2v", 2.0), ("bare", 8.0), ("musubi", 8.0), ("diffusers", None)]
)
def test_low_rank_updates_are_added(base: dict[str, Tensor], style: str, alpha: float | None) -> None:
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    merged = merge_lora(lora(stored(factors, style, alpha)), base, "FILE")
    assert merged.keys() == base.keys()
    scale = 1.0 if alpha is None else alpha / RANK
    for name, tensor in base.items():
        down, up = factors.get(name.removesuffix(".weight"), (None, None)) if name.endswith(".weight") else (None, None)
        wanted = tensor if down is None or up is None else tensor + scale * (up @ down)
        # alpha goes into the factors before they are multiplied: float32 rounding of sums of RANK products
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-5, msg=name)


def test_whole_differences_are_added_where_diffusers_drops_them(base: dict[str, Tensor]) -> None:
    state = stored(updates({name: tensor.shape for name, tensor in base.items()}), "lightx2v", None)
    before = merge_lora(lora(state), base, "FILE")
    differences = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.2.cross_attn.q.diff_b": "blocks.2.attn2.to_q.bias",
        "blocks.2.modulation.diff": "blocks.2.scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.head.diff": "proj_out.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    for key, name in differences.items():
        state[f"diffusion_model.{key}"] = torch.full_like(base[name], 0.5)
    after = merge_lora(lora(state), base, "FILE")
    changed = {name for name in base if not torch.equal(before[name], after[name])}
    assert changed == set(differences.values())
    for name in changed:
        torch.testing.assert_close(after[name], before[name] + 0.5)


def test_merged_weights_keep_the_dtype_of_the_base(base: dict[str, Tensor]) -> None:
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    merged = merge_lora(lora(stored(factors, "diffusers", None)), half, "FILE")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion_model.blocks.0.self_attn.q.lora_up.weight": None}, "low-rank tensors of which|half of an update"),
        ({"diffusion_model.blocks.0.self_attn.gate.lora_up.weight": torch.zeros(96, RANK)}, "no Wan LoRA|of which"),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(RANK, 40)},
            r"attn1\.to_q\.weight is \(96, 96\), its update \(96, 40\); name the diffusers folder",
        ),
        (
            {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(RANK + 1, 96)},
            r"halves of blocks\.0\.attn1\.to_q that do not fit each other: \(5, 96\) and \(96, 4\)",
        ),
        ({"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(7)}, r"norm_q\.weight is \(96,\), its update"),
        (
            {"diffusion_model.blocks.9.norm3.diff": torch.zeros(96)},
            r"blocks\.9\.norm3\.weight, which the base does not",
        ),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    base: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    state = {**stored(factors, "lightx2v", None), **change}
    with pytest.raises(CheckpointError, match=message):
        merge_lora(lora({name: tensor for name, tensor in state.items() if tensor is not None}), base, "FILE")


def test_updates_of_a_deeper_network_are_refused(base: dict[str, Tensor]) -> None:
    factors = updates({name: tensor.shape for name, tensor in base.items()})
    deeper = {re.sub(r"blocks\.2\.", "blocks.3.", module): pair for module, pair in factors.items()}
    with pytest.raises(CheckpointError, match=r"blocks\.3\..*, which the base does not have"):
        merge_lora(lora(stored(deeper, "lightx2v", None)), base, "FILE")

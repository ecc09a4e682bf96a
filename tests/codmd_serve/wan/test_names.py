"""Names: the table is diffusers' own conversion, and nothing is lost or made up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.names import check_config, original_name, to_diffusers
from codmd_serve.wan.published import Published, read_published


def original(weights: Mapping[str, Tensor]) -> Published:
    return Published(family="original", naming="original", weights=dict(weights), config={})


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

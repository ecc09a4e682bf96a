"""Published files: families told from keys alone, refusals with their reason, one sentence for what is broken."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.published import read_published

Write = Callable[..., Path]


@pytest.mark.parametrize("style", ["original", "generator", "generator_ema", "rcm"])
@pytest.mark.parametrize("name", ["model.pt", "lora.safetensors"])
def test_family_and_weights_come_from_the_keys(
    write: Write, golden_weights: dict[str, Tensor], style: str, name: str
) -> None:
    published = read_published(write(style, name=name))
    assert (published.family, published.naming) == (style, "original")
    assert published.weights.keys() == golden_weights.keys()
    for key, tensor in golden_weights.items():
        assert torch.equal(published.weights[key].reshape(tensor.shape), tensor), key


def test_old_torch_files_and_other_prefixes_are_read(golden_weights: dict[str, Tensor], tmp_path: Path) -> None:
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in golden_weights.items()}
    torch.save({"generator": prefixed}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert read_published(tmp_path / "old").weights.keys() == golden_weights.keys()


def test_scaling_factors_of_transformer_engine_are_left_out(write: Write) -> None:
    path = write("rcm", lambda state: {**state, "net.blocks.0.attn_op._extra_state": torch.zeros(3, dtype=torch.uint8)})
    assert not [name for name in read_published(path).weights if "_extra_state" in name]


def test_a_diffusers_folder_is_read_whole_or_in_parts(golden_base: Path, tmp_path: Path) -> None:
    whole = read_published(golden_base)
    assert (whole.family, whole.naming) == ("diffusers", "diffusers")
    assert whole.config["_class_name"] == "WanTransformer3DModel"
    names = sorted(whole.weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, part_names in parts.items():
        save_file({name: whole.weights[name] for name in part_names}, tmp_path / part)
    with pytest.raises(CheckpointError, match=r"one \.safetensors, or several and their index, got 2 of them and 0"):
        read_published(tmp_path)
    weight_map = {name: part for part, part_names in parts.items() for name in part_names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(read_published(tmp_path).weights) == names
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 parts, the first is b\.safetensors"):
        read_published(tmp_path)


def test_folders_that_are_no_wan_2_1_network_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a student bundle already"):
        read_published(tiny_bundle)
    with pytest.raises(CheckpointError, match=r"must hold one \.safetensors.*got 0"):
        read_published(tmp_path)
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(CheckpointError, match=r"two networks, for high and low noise \(Wan2\.2\)"):
        read_published(tmp_path)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("blocks.0.to_gate_compress.weight", "trained with VSA"),
        ("blocks.0.self_attn.attn_op.local_attn.proj_l.weight", "trained with SLA"),
        ("blocks.0.self_attn.q.int8_weight", "it is quantised"),
        ("blocks.0.self_attn.q.weight_scale", "it is quantised"),
        ("blocks.0.self_attn.q.scale", "it is quantised"),
        ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
        ("img_emb.proj.0.weight", "image-to-video"),
        ("vace_blocks.0.after_proj.bias", "VACE"),
        ("blocks.0.self_attn.causal_mask", "it is causal"),
    ],
)
@pytest.mark.parametrize("style", ["original", "rcm"])
def test_families_that_cannot_be_served_are_refused_with_the_reason(
    write: Write, style: str, key: str, reason: str
) -> None:
    prefix = "net." if style == "rcm" else ""
    path = write(style, lambda state: {**state, prefix + key: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=rf"cannot be served \({key}\): .*{reason}"):
        read_published(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rounded_weights_are_refused(write: Write, dtype: torch.dtype) -> None:
    path = write("rcm", lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match=rf"is {str(dtype)[6:]}\): it is quantised"):
        read_published(path)


def test_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match="GGUF is quantised"):
        read_published(tmp_path / "a")


@pytest.mark.parametrize("settings", [{"causal": True}, {"config": {"is_causal": True}}])
def test_settings_that_say_causal_are_believed(write: Write, settings: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"it is causal \(autoregressive\)"):
        read_published(write("generator", lambda state: {**state, **settings}))


def test_settings_that_deny_it_are_believed_too(write: Write) -> None:
    assert read_published(write("generator", lambda state: {**state, "config": {"causal": False}})).weights


def test_a_folder_of_a_causal_class_is_refused(write: Write, tmp_path: Path) -> None:
    write("original", name="model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "CausalWanModel"}')
    with pytest.raises(CheckpointError, match="it is causal"):
        read_published(tmp_path)


@pytest.mark.parametrize("style", ["original", "rcm"])
@pytest.mark.parametrize("size", [0, 5, 9, 100, 5000, 1_000_000])
def test_truncated_files_are_refused(write: Write, style: str, size: int) -> None:
    path = write(style)
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(
        CheckpointError, match=r"truncated|damaged|neither safetensors nor a torch file|pickled objects"
    ):
        read_published(path)


def test_pickled_objects_are_refused_by_name(write: Write) -> None:
    path = write("generator", lambda state: {**state, "args": argparse.Namespace(lr=1)})
    with pytest.raises(CheckpointError, match=r"holds the pickled object argparse\.Namespace: only tensors are read"):
        read_published(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(3), "holds one Tensor, no dictionary of tensors: expected a CoDMD"),
        ({}, "holds no Wan weights of a known family: .*; got nothing"),
        ({"epoch": 3, "lr": 0.1}, "; got epoch, lr"),
        ({"encoder.weight": torch.zeros(2)}, r"; got encoder\.weight"),
        ({"state_dict": {"a": torch.zeros(2)}}, "; got a"),
        ({"generator": {"a": torch.zeros(2)}}, "; got a"),
        ({3: torch.zeros(2)}, "; got 3"),
    ],
)
def test_torch_files_of_no_known_family_are_refused(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_published(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "an empty file"), (b"<html>not found", "starts with b'<html>no'")]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"neither safetensors nor a torch file: .*{found}"):
        read_published(tmp_path / "a.pt")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*nothing\.pt: expected"):
        read_published(tmp_path / "nothing.pt")


def test_a_broken_index_or_config_is_refused(write: Write, tmp_path: Path) -> None:
    write("original", name="a.safetensors")
    index = tmp_path / "a.safetensors.index.json"
    for content, message in (("{", "cannot be read as JSON"), ("[]", "one JSON object"), ("{}", "has no weight_map")):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_published(tmp_path)

"""Published files: families told from keys alone, refusals with their reason, one sentence for what is broken."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("said", [{"causal": True}, {"config": {"is_causal": True}}])
def test_settings_that_say_causal_are_believed(write: Write, said: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"it is causal \(autoregressive\)"):
        read_published(write("generator", lambda state: {**state, **said}))


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


# containers, prefixes, and files that hold several networks


@pytest.mark.parametrize("container", ["state_dict", "model", "module", "ema", "net", "params"])
def test_containers_are_opened(golden_weights: dict[str, Tensor], tmp_path: Path, container: str) -> None:
    torch.save({container: golden_weights, "epoch": 3}, tmp_path / "a.pt")
    published = read_published(tmp_path / "a.pt")
    assert published.weights.keys() == golden_weights.keys() and published.part == container
    assert published.is_ema == (container == "ema") and published.family == "original"


@pytest.mark.parametrize(
    "prefix",
    ["transformer.", "dit.", "student.", "net_ema.", "model.model.", "module.model.", "generator.model.", "pipe.dit."],
)
def test_prefixes_are_taken_off(golden_weights: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    flat = {prefix + name: tensor for name, tensor in golden_weights.items()}
    save_file(flat, tmp_path / "a.safetensors")
    torch.save({"model": flat}, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        published = read_published(path)
        assert published.weights.keys() == golden_weights.keys()
        for name, tensor in golden_weights.items():
            assert torch.equal(published.weights[name], tensor), name


def numbered(weights: dict[str, Tensor], number: float) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, number) for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("parts", "key", "value"),
    [
        ({"model": 1, "ema": 2}, None, 2),
        ({"model": 1, "ema": 2}, "model", 1),
        ({"student": 1, "teacher": 2, "fake_score": 3}, None, 1),
        ({"generator": 1, "critic": 2, "generator_ema": 3}, "generator", 1),
        ({"net": 1, "net_ema": 2}, None, 2),
        ({"state_dict": 1, "critic": 2}, "critic", 2),
    ],
)
@pytest.mark.parametrize("is_flat", [True, False])
def test_of_several_networks_the_student_is_taken(
    golden_weights: dict[str, Tensor],
    tmp_path: Path,
    parts: dict[str, float],
    key: str | None,
    value: float,
    is_flat: bool,
) -> None:
    nested = {name: numbered(golden_weights, number) for name, number in parts.items()}
    flat = {f"{name}.{key}": tensor for name, state in nested.items() for key, tensor in state.items()}
    torch.save(flat if is_flat else nested, tmp_path / "a.pt")
    published = read_published(tmp_path / "a.pt", key)
    assert {float(tensor.flatten()[0]) for tensor in published.weights.values()} == {value}
    assert set(published.left_out) == parts.keys() - {published.part}


@pytest.mark.parametrize(
    ("parts", "key", "message"),
    [
        (["model", "student"], None, "holds 2 networks: 'model', 'student'; say which with --key"),
        (["ema", "net_ema"], None, "holds 2 networks: 'ema', 'net_ema'; say which"),
        (["critic", "teacher"], None, "holds no student, only 'critic', 'teacher'"),
        (["model"], "ema", "holds 0 Wan networks under --key 'ema'; it holds: 'model'"),
    ],
)
def test_networks_that_cannot_be_told_apart_are_refused(
    golden_weights: dict[str, Tensor], tmp_path: Path, parts: list[str], key: str | None, message: str
) -> None:
    torch.save(dict.fromkeys(parts, golden_weights), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_published(tmp_path / "a.pt", key)


def test_other_tensors_beside_a_prefixed_network_are_left_out_and_told(
    golden_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    flat = {f"model.diffusion_model.{name}": tensor for name, tensor in golden_weights.items()}
    save_file({**flat, "vae.decoder.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    published = read_published(tmp_path / "a.safetensors")
    assert published.weights.keys() == golden_weights.keys() and published.left_out == ("other tensors",)


# refusals by name


@pytest.mark.parametrize("key", ["blocks.0.self_attn.q.dora_scale", "blocks.0.self_attn.q.lora_magnitude_vector"])
def test_dora_is_refused_by_name(tmp_path: Path, key: str) -> None:
    pair = {f"blocks.0.self_attn.q.lora_{half}.weight": torch.zeros(4, 4) for half in ("down", "up")}
    save_file({**pair, key: torch.zeros(4)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"it is a DoRA, .*merge it with the tool that made it, as `merge_and_unl"
    ):
        read_published(tmp_path / "a.safetensors")


def test_image_to_video_shapes_are_refused_by_name(write: Write) -> None:
    path = write("original", lambda state: {**state, "patch_embedding.weight": torch.zeros(96, 36, 1, 2, 2)})
    with pytest.raises(CheckpointError, match=r"reads 36 channels\): it is an image-to-video model"):
        read_published(path)


@pytest.mark.parametrize("config", [{"model_type": "i2v"}, {"image_dim": 1280}])
def test_image_to_video_configs_are_refused_by_name(write: Write, tmp_path: Path, config: dict[str, Any]) -> None:
    write("original", name="diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(CheckpointError, match="image-to-video"):
            read_published(path)


def test_a_header_that_says_causal_is_believed(golden_weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(golden_weights, tmp_path / "a.safetensors", metadata={"is_causal": "true"})
    with pytest.raises(CheckpointError, match="it is causal"):
        read_published(tmp_path / "a.safetensors")
    save_file(golden_weights, tmp_path / "a.safetensors", metadata={"is_causal": "false"})
    assert read_published(tmp_path / "a.safetensors").says_attention


def test_folders_of_distributed_runs_are_refused_with_the_tool(tmp_path: Path) -> None:
    files = {
        "dcp/.metadata": r"DCP.*dcp_to_torch FOLDER student\.pt",
        "run/model/__0_0.distcp": r"DCP.*dcp_to_torch",
        "verl/model_world_size_8_rank_0.pt": "DTensors.*verl.model_merger merge",
        "zero/mp_rank_00_model_states.pt": r"DeepSpeed.*zero_to_fp32\.py",
    }
    for name, message in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=message):
            read_published(tmp_path / name.split("/")[0])


def test_dtensors_are_refused_with_the_tool(tmp_path: Path) -> None:
    code = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
shard = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
torch.save({"model": {"blocks.0.self_attn.q.weight": shard}}, sys.argv[1])
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pt")], check=True)
    with pytest.raises(CheckpointError, match=r"it holds DTensors, .*full_state_dict=True"):
        read_published(tmp_path / "a.pt")


def test_folders_of_bin_files_are_read(golden_weights: dict[str, Tensor], tmp_path: Path) -> None:
    names = sorted(golden_weights)
    torch.save(golden_weights, tmp_path / "pytorch_model.bin")
    assert read_published(tmp_path).weights.keys() == golden_weights.keys()
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    (tmp_path / "pytorch_model.bin").unlink()
    for part, part_names in parts.items():
        torch.save({name: golden_weights[name] for name in part_names}, tmp_path / part)
    weight_map = {name: part for part, part_names in parts.items() for name in part_names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(read_published(tmp_path).weights) == names


def test_a_folder_of_a_torch_file_names_it(write: Write, tmp_path: Path) -> None:
    write("generator", name="model.pt")
    with pytest.raises(CheckpointError, match=r"name a file in it, for example .*model\.pt"):
        read_published(tmp_path)


def test_one_part_of_a_network_names_its_folder(write: Write, tmp_path: Path) -> None:
    path = write("original", name="diffusion_pytorch_model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=f"is one of 3 parts of a network: name its folder, {tmp_path}"):
        read_published(path)


def test_an_index_that_does_not_fit_its_files_is_refused(write: Write, tmp_path: Path) -> None:
    write("original", name="a.safetensors")
    index = tmp_path / "a.safetensors.index.json"
    for value, message in (
        ("a.safetensors", "lacks 1 tensors that its index names, the first is gone"),
        ("../a.safetensors", "names no file of its folder for 'gone'"),
        (3, "names no file of its folder for 'gone', but 3"),
    ):
        index.write_text(json.dumps({"weight_map": {"gone": value}}))
        with pytest.raises(CheckpointError, match=message):
            read_published(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.binary(max_size=300), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"GGUF"]))
def test_any_bytes_are_refused_in_one_sentence(tmp_path: Path, data: bytes, start: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(start + data)
    with pytest.raises(CheckpointError):
        read_published(tmp_path / "a.pt")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
HEADER = st.dictionaries(
    st.sampled_from(["__metadata__", "blocks.0.self_attn.q.lora_down.weight", "a"]),
    JSON
    | st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "X"]), "shape": JSON, "data_offsets": JSON}
    )
    | st.dictionaries(
        st.sampled_from(["lora_adapter_metadata", "ss_network_alpha", "lora_alpha", "is_causal", "use_rslora"]),
        st.text(max_size=20) | JSON.map(json.dumps),
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(header=HEADER, body=st.binary(max_size=40))
def test_any_safetensors_header_is_refused_in_one_sentence(tmp_path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(CheckpointError):
        read_published(tmp_path / "a.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(metadata=st.dictionaries(st.sampled_from(["lora_adapter_metadata", "lora_alpha", "rank"]), JSON.map(json.dumps)))
def test_any_statement_in_a_header_is_a_number_or_one_sentence(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file({f"blocks.0.self_attn.q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, tmp_path / "a", metadata)
    try:
        published = read_published(tmp_path / "a")
    except CheckpointError:
        return
    numbers = [number for statement in published.statements for number in (statement.alpha, statement.rank)]
    assert all(number is None or math.isfinite(number) for number in numbers)

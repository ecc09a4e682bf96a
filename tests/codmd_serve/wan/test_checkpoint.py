"""Bundles on disk: round trip, and one clear sentence for everything that can be wrong with one."""

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from codmd_serve.config import default_bundle_path
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.wan.checkpoint import (
    NativeShape,
    StudentSpec,
    attention_shape,
    load_bundle,
    native_attention_shape,
    read_spec,
    resolve_base,
    save_bundle,
)

TRANSFORMER = Path("transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle beside its base, free to be damaged."""
    shutil.copytree(tiny_bundle.parent, tmp_path / "weights")
    return tmp_path / "weights" / tiny_bundle.name


def edit_spec(bundle: Path, **changes: Any) -> None:
    path = bundle / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_load_bundle_gives_back_what_was_saved(
    tiny_bundle: Path, tiny_pipeline: WanPipeline, tiny_spec: StudentSpec
) -> None:
    bundle = load_bundle(tiny_bundle)
    assert bundle.spec == tiny_spec
    for part in ("transformer", "vae", "text_encoder"):
        loaded, saved = getattr(bundle, part), getattr(tiny_pipeline, part)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        for (name, got), (_, wanted) in zip(loaded.state_dict().items(), saved.state_dict().items(), strict=True):
            assert torch.equal(got, wanted), f"{part}.{name}"


def test_load_bundle_keeps_the_vae_in_float32(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, dtype=torch.bfloat16)
    assert bundle.vae.dtype == torch.float32
    assert bundle.transformer.dtype == bundle.text_encoder.dtype == torch.bfloat16


def test_load_bundle_works_from_another_working_directory(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_bundle(Path(os.path.relpath(tiny_bundle))).spec.method == "codmd"


@pytest.mark.parametrize("size", [0, 5, 100, 5000])
def test_truncated_weights_are_refused(copy: Path, size: int) -> None:
    with (copy / TRANSFORMER).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=r"transformer of .* cannot be loaded, is it complete"):
        load_bundle(copy)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_truncated_base_is_refused(copy: Path, part: str) -> None:
    path = next((copy.parent / "tiny" / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"{part} of .* cannot be loaded"):
        load_bundle(copy)


def test_a_missing_tensor_is_an_error_and_not_a_random_one(copy: Path) -> None:
    tensors = load_file(copy / TRANSFORMER)
    del tensors["blocks.0.attn1.to_q.weight"]
    save_file(tensors, copy / TRANSFORMER, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn1\.to_q\.weight"):
        load_bundle(copy)


def test_a_tensor_of_another_network_is_an_error(copy: Path) -> None:
    tensors = {**load_file(copy / TRANSFORMER), "to_gate_compress.weight": torch.zeros(2)}
    save_file(tensors, copy / TRANSFORMER, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="unexpected keys, the first is to_gate_compress"):
        load_bundle(copy)


def test_a_missing_text_encoder_tensor_is_an_error(copy: Path) -> None:
    path = next((copy.parent / "tiny" / "text_encoder").glob("*.safetensors"))
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "DenseReluDense.wo" in name)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_encoder of .* missing keys"):
        load_bundle(copy)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_part_of_the_base_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy.parent / "tiny" / part)
    with pytest.raises(CheckpointError, match=part):
        load_bundle(copy)


def test_a_student_that_does_not_fit_its_base_is_refused(copy: Path) -> None:
    config = copy.parent / "tiny" / "vae" / "config.json"
    data = json.loads(config.read_text())
    vae_type = type(load_bundle(copy).vae)
    other = vae_type(**{**{k: v for k, v in data.items() if not k.startswith("_")}, "z_dim": 3})
    other.save_pretrained(copy.parent / "tiny" / "vae")
    with pytest.raises(CheckpointError, match="latent channels of transformer and VAE are 4 and 3"):
        load_bundle(copy)


def test_a_tokenizer_that_knows_more_words_than_the_text_encoder_is_refused(copy: Path) -> None:
    tokenizer = load_bundle(copy).tokenizer
    tokenizer.add_tokens([f"word{index}" for index in range(32)])
    tokenizer.save_pretrained(copy.parent / "tiny" / "tokenizer")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* has 5\d tokens, its text encoder 32"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": [1.0, 0.0]}, "one entry more"),
        ({"sigmas": [1.0, "x", 0.5, 0.2, 0.0]}, "expected a number"),
        ({"timesteps": 4}, "timesteps must be a list, got 4"),
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"native": {"height": 64}}, "missing 3 required"),
        ({"native": {"height": 64, "width": 64, "num_frames": 17, "fps": 0}}, "native.fps must be a positive"),
        ({"step": -1}, "step must be a count"),
        ({"ema": "yes"}, "ema true or false"),
        ({"base": 3}, "base must be text"),
        ({"base": ""}, "base must name"),
        ({"shift": 8}, "unknown fields: shift"),
        ({"preview_map": [[1.0, 2.0]]}, "preview_map must be rows of three finite numbers"),
        ({"preview_map": [["a", 2.0, 3.0]]}, "expected a number, got 'a'"),
        ({"preview_map": 3}, "preview_map must be a list, got 3"),
    ],
)
def test_a_senseless_student_json_is_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_spec(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_spec(copy)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read as JSON"), ("[]", "one JSON object"), ("{}", "missing 'sigmas'")]
)
def test_a_broken_student_json_is_refused(copy: Path, content: str, message: str) -> None:
    (copy / "student.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_spec(copy)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a student bundle: it has no student"):
        read_spec(tmp_path)
    with pytest.raises(CheckpointError, match="no student bundle at"):
        read_spec(tmp_path / "nowhere")


def test_resolve_base_finds_folders_beside_the_bundle(copy: Path) -> None:
    assert resolve_base(copy, "../tiny") == copy.parent / "tiny"
    with pytest.raises(CheckpointError, match=r"base pipeline of .* is missing: there is no folder .*gone: name a"):
        resolve_base(copy, "../gone")


def test_save_bundle_replaces_the_old_one_and_leaves_nothing_beside_it(
    copy: Path, tiny_pipeline: WanPipeline, tiny_spec: StudentSpec
) -> None:
    save_bundle(copy, tiny_pipeline.transformer, replace(tiny_spec, step=9))
    assert read_spec(copy).step == 9
    assert sorted(p.name for p in copy.parent.iterdir()) == ["tiny", "tiny-codmd"]


def test_save_bundle_that_fails_keeps_the_old_one(copy: Path, tiny_spec: StudentSpec) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_bundle(copy, Broken(), tiny_spec)
    assert load_bundle(copy).spec == tiny_spec
    assert sorted(p.name for p in copy.parent.iterdir()) == ["tiny", "tiny-codmd"]


def test_attention_shape_of_a_bundle_is_that_of_its_loaded_modules(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    loaded = native_attention_shape(bundle.transformer.config, bundle.vae.config, bundle.spec.native)
    assert attention_shape(tiny_bundle) == loaded
    assert (loaded.num_tokens, loaded.num_heads, loaded.head_width) == (3 * 2 * 2, 2, 12)
    assert attention_shape(tiny_bundle, max_tokens=7).num_tokens == 7


def test_attention_shape_reads_the_scales_of_the_vae(copy: Path) -> None:
    path = copy.parent / "tiny" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale_factor_temporal": 2, "scale_factor_spatial": 4}))
    assert attention_shape(copy).num_tokens == 5 * 4 * 4


def test_attention_shape_says_which_config_is_missing(copy: Path) -> None:
    (copy.parent / "tiny" / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae of .* has no readable config"):
        attention_shape(copy)
    (copy / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    shutil.copy(copy / "transformer" / "config.json", copy.parent / "tiny" / "vae" / "config.json")
    with pytest.raises(CheckpointError, match=r"transformer/config\.json of .* cannot be used: KeyError: 'patch_size'"):
        attention_shape(copy)


def test_native_shape_refuses_what_is_no_count() -> None:
    with pytest.raises(ConfigError, match=r"native\.width must be a positive whole number, got 0\.5"):
        NativeShape(height=64, width=0.5, num_frames=17, fps=16)  # type: ignore[arg-type]


def test_default_bundle_is_the_embedded_one() -> None:
    assert default_bundle_path().name == "shapeworld-dmd"


# student.json of strangers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [10**400, 3, 2, 1]}, "expected a number, got 1000"),
        ({"sigmas": [10**400, 0.5, 0.2, 0.1, 0.0]}, "expected a number, got 1000"),
        ({"timesteps": [-1.0, -2.0, -3.0, -4.0]}, r"timesteps must be descending numbers in \(0, 1000\], got \[-1"),
        ({"timesteps": [1e9, 900.0, 800.0, 700.0]}, "timesteps must be descending numbers"),
        ({"timesteps": [500.0, 900.0, 800.0, 700.0]}, "timesteps must be descending numbers"),
        ({"timesteps": [float("nan"), 900.0, 800.0, 700.0]}, "timesteps must be finite"),
        ({"base": "x" * 100_000}, r"base must be at most 4096 characters, got 'xxx.*\(100002 characters\)"),
        ({"base": "x" * 300}, "the base pipeline of .* is missing: there is no folder"),
        ({"base": "../a\0b"}, "base must be one line of text"),
        ({"method": "a\x1b[31m"}, "method must be one line of text"),
        ({"method": "m" * 257}, "method must be at most 256 characters"),
        ({"assumed": [3]}, "assumed must be text, got 3"),
        ({"assumed": "all"}, "assumed must be a list, got 'all'"),
        ({"native": [1, 2]}, r"native must be an object, got \[1, 2\]"),
        ({"native": {"height": 64, "width": 64, "num_frames": 17, "fps": 10**9}}, "native.fps must be at most 120"),
        (
            {"native": {"height": 10**400, "width": 64, "num_frames": 17, "fps": 8}},
            "native.height must be at most 16384",
        ),
        ({"step": 10**400}, "step must be a count"),
        (
            {"sigmas": [1 - i / 2000 for i in range(2000)] + [0.0], "timesteps": [1000 - i / 2 for i in range(2000)]},
            "at m",
        ),
        ({"x" * 100_000: 1}, "unknown fields: xxx"),
    ],
)
def test_extremes_of_student_json_are_one_short_sentence(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_spec(copy, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_bundle(copy)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_a_student_json_of_brackets_is_refused(copy: Path) -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 5000):
        (copy / "student.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"student\.json cannot be read as JSON"):
            read_spec(copy)


def test_a_student_json_of_another_system_is_read(copy: Path) -> None:
    text = (copy / "student.json").read_text()
    (copy / "student.json").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_spec(copy).method == "codmd"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(changes=st.dictionaries(st.sampled_from([entry.name for entry in fields(StudentSpec)]), VALUES, max_size=3))
def test_any_fields_of_student_json_are_a_spec_or_one_sentence(
    tiny_bundle: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    data = {**json.loads((tiny_bundle / "student.json").read_text()), **changes}
    (tmp_path / "student.json").write_text(json.dumps(data))
    try:
        spec = read_spec(tmp_path)
    except CheckpointError:
        return
    assert 0 < spec.timesteps[-1] <= spec.timesteps[0] <= 1000 and spec.sigmas[-1] == 0 and spec.base


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.binary(max_size=200))
def test_any_bytes_of_student_json_are_refused_in_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "student.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_spec(tmp_path)


def test_a_tokenizer_that_brings_code_is_refused_and_not_run(copy: Path, tmp_path: Path) -> None:
    folder = copy.parent / "tiny" / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match=r"tokenizer of .* cannot be loaded: .*"):
        load_bundle(copy)
    assert not (tmp_path / "ran").exists()

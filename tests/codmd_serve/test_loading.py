"""Loading an engine from a bundle: what is refused before and after, what was chosen, what fits in memory."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from codmd_serve import loading as loading_module
from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine
from codmd_serve.errors import CheckpointError, CodmdError, ConfigError, GenerationError
from codmd_serve.loading import load_engine
from codmd_serve.wan.checkpoint import StudentSpec, save_bundle

PARAMS = GenerateParams(prompt="a red circle moves right", seed=7, height=32, width=48, num_frames=9, fps=16, crf=18)


def video_of(engine: Engine, path: Path) -> bytes:
    engine.generate(PARAMS, path)
    return path.read_bytes()


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle beside its base, free to be damaged."""
    shutil.copytree(tiny_bundle.parent, tmp_path / "weights")
    return tmp_path / "weights" / tiny_bundle.name


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"height": 40}, {"num_frames": 10}, {"num_frames": 5001}])
def test_load_engine_refuses_a_native_shape_that_the_network_cannot_make(
    bundle: Path, tiny_pipeline: WanPipeline, tiny_spec: StudentSpec, changes: dict[str, int]
) -> None:
    save_bundle(bundle, tiny_pipeline.transformer, replace(tiny_spec, native=replace(tiny_spec.native, **changes)))
    with pytest.raises(CheckpointError, match=r"native must have sides that are multiples of 16 up to 16384 and 4k"):
        load_engine(bundle, "cpu")


def test_load_engine_refuses_weights_that_are_not_finite(bundle: Path) -> None:
    path = bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] = torch.full_like(tensors["proj_out.bias"], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(GenerationError, match="values that are not finite"):
        load_engine(bundle, "cpu")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vae", {"scale_factor_spatial": 4}),
        ("vae", {"patch_size": None}),
        ("vae", {"latents_mean": [0.0] * 3}),
        ("transformer", {"rope_max_seq_len": 2}),
    ],
)
def test_load_engine_refuses_parts_that_do_not_work_together(bundle: Path, part: str, changes: dict[str, Any]) -> None:
    folder = bundle if part == "transformer" else bundle.parent / "tiny"
    edit_json(folder / part / "config.json", **changes)
    with pytest.raises(CodmdError) as caught:
        load_engine(bundle, "cpu")
    assert "\n" not in str(caught.value)


def test_load_engine_uses_the_attention_that_was_named(tiny_bundle: Path, tmp_path: Path) -> None:
    named = load_engine(tiny_bundle, "cpu", attention="_native_math")
    assert named.facts.attention == "_native_math"
    assert video_of(named, tmp_path / "a.mp4")


def test_a_graph_that_cannot_be_recorded_is_told_and_the_video_is_made(tiny_bundle: Path, tmp_path: Path) -> None:
    asked = load_engine(tiny_bundle, "cpu", execution="graph")
    assert asked.facts.execution == "eager"
    reason = "RuntimeError: CUDA graphs need a CUDA device, got cpu"
    assert asked.facts.fallback == f"{reason}; VAE chunks without a CUDA graph: {reason}"
    assert video_of(asked, tmp_path / "a.mp4")


def test_an_engine_says_what_is_lossy_in_it(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_engine(tiny_bundle, "cpu").facts.lossy == ""
    quantized = list[object]()
    monkeypatch.setattr(loading_module, "check_quantization", lambda *_: None)
    monkeypatch.setattr(loading_module, "quantize_blocks", quantized.append)
    monkeypatch.setattr(loading_module, "LOSSY", ("_native_math",))
    named = load_engine(tiny_bundle, "cpu", attention="_native_math", quantization="fp8")
    assert named.facts.lossy == "fp8+_native_math" and quantized == [named.transformer]
    assert video_of(named, tmp_path / "a.mp4")


def test_load_engine_refuses_fp8_on_a_cpu_before_it_loads() -> None:
    with pytest.raises(ConfigError, match=r"fp8 needs a CUDA device of compute capability 8\.9 or higher, got cpu"):
        load_engine(Path("/nowhere"), "cpu", quantization="fp8")


def test_load_engine_refuses_an_unknown_attention_before_it_loads() -> None:
    with pytest.raises(ConfigError, match="attention 'flashy' is unknown for cpu; known: auto, native"):
        load_engine(Path("/nowhere"), "cpu", attention="flashy")

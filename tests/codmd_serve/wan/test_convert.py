"""Converted bundles: the recorded output comes out again, guesses are told, and nothing is left half written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.grid import causvid_grid, rcm_grid, wan_1_3b_grid, wan_14b_grid
from codmd_serve.loading import load_engine
from codmd_serve.wan.checkpoint import NativeShape, load_bundle, read_spec
from codmd_serve.wan.convert import CONTRACTS, FAMILIES, ConvertOptions, convert

Write = Callable[..., Path]
# Sums of 96 products in another order than in the authors' code; the recorded values go up to 2.
TOLERANCE = 1e-5


def converted(source: Path, base: Path, output: Path, **options: Any) -> Any:
    return convert(source, base, output, ConvertOptions(**options), "1.2.3")


def flow_of(bundle: Path, io: dict[str, Tensor]) -> Tensor:
    transformer = load_bundle(bundle).transformer
    with torch.no_grad():
        flow: Tensor = transformer(io["latents_BCFHW"], io["timestep"], io["prompt_embeds_BLD"]).sample
    return flow


@pytest.mark.parametrize("style", ["original", "generator", "generator_ema", "rcm"])
def test_convert_gives_the_output_that_the_authors_code_gave(
    write: Write, golden_base: Path, golden_io: dict[str, Tensor], tmp_path: Path, style: str
) -> None:
    done = converted(write(style), golden_base, tmp_path / "bundle")
    assert (flow_of(tmp_path / "bundle", golden_io) - golden_io["flow_pred_BCFHW"]).abs().max() < TOLERANCE
    assert read_spec(tmp_path / "bundle") == done.spec
    assert done.looks == FAMILIES[style].looks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "weights.bin"]


def test_convert_keeps_the_dtype_of_the_weights(write: Write, golden_base: Path, tmp_path: Path) -> None:
    source = write("rcm", lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    converted(source, golden_base, tmp_path / "bundle")
    stored = load_file(tmp_path / "bundle/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_convert_reads_the_folder_of_a_diffusers_pipeline(golden_base: Path, tmp_path: Path) -> None:
    done = converted(golden_base, golden_base, tmp_path / "bundle")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    stored, given = load_file(tmp_path / "bundle" / weights), load_file(golden_base / weights)
    assert stored.keys() == given.keys() and all(torch.equal(stored[name], given[name]) for name in given)
    assert done.spec.method == "fastwan" and "attention" not in done.spec.assumed


def test_convert_merges_a_lora_into_the_base(golden_base: Path, tmp_path: Path) -> None:
    down, up = torch.randn(4, 96), torch.randn(96, 4)
    prefix = "diffusion_model.blocks.1.self_attn.q"
    save_file({f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}, tmp_path / "lora")
    done = converted(tmp_path / "lora", golden_base, tmp_path / "bundle")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    stored, given = load_file(tmp_path / "bundle" / weights), load_file(golden_base / weights)
    changed = [name for name in given if not torch.equal(stored[name], given[name])]
    assert changed == ["blocks.1.attn1.to_q.weight"] and done.num_tensors == 2
    torch.testing.assert_close(stored[changed[0]], given[changed[0]] + up @ down)
    assert load_bundle(tmp_path / "bundle").spec.sampler == "ode"


def test_a_converted_bundle_makes_a_video(
    write: Write, golden_base: Path, tmp_path: Path, read_video: Callable[[Path], Any]
) -> None:
    converted(write("rcm"), golden_base, tmp_path / "bundle", height=32, width=48, num_frames=5, fps=8)
    engine = load_engine(tmp_path / "bundle", "cpu")
    assert engine.preview_map == read_spec(tmp_path / "bundle").preview_map != ()
    params = GenerateParams(prompt="a red circle", seed=1, height=32, width=48, num_frames=5, fps=8, crf=18)
    engine.generate(params, tmp_path / "a.mp4")
    assert read_video(tmp_path / "a.mp4").frames.shape == (5, 32, 48, 3)


# what is guessed


@pytest.mark.parametrize(
    ("style", "method", "sampler", "timesteps", "ema"),
    [
        ("generator", "codmd", "sde", wan_1_3b_grid().timesteps, False),
        ("generator_ema", "self-forcing", "sde", wan_14b_grid().timesteps, True),
        ("rcm", "rcm", "sde", rcm_grid().timesteps, True),
        ("original", "lightx2v", "ode", wan_14b_grid().timesteps, False),
    ],
)
def test_sampling_is_guessed_from_the_family_and_recorded_as_assumed(
    write: Write,
    golden_base: Path,
    tmp_path: Path,
    style: str,
    method: str,
    sampler: str,
    timesteps: tuple[float, ...],
    ema: bool,
) -> None:
    converted(write(style), golden_base, tmp_path / "bundle")
    spec = read_spec(tmp_path / "bundle")
    assert (spec.method, spec.sampler, spec.timesteps, spec.ema) == (method, sampler, timesteps, ema)
    assert spec.native == NativeShape(height=480, width=832, num_frames=81, fps=16)
    assert (spec.base_model, spec.package_version, spec.step) == ("golden-base", "1.2.3", 0)
    assert (tmp_path / "bundle" / spec.base).resolve() == golden_base.resolve()
    guessed = {"sigmas", "timesteps", "sampler", "native", "method", "step", "ema", "attention"}
    assert set(spec.assumed) == guessed - ({"ema"} if style.startswith("generator") else set())


def test_what_the_user_says_is_not_assumed(write: Write, golden_base: Path, tmp_path: Path) -> None:
    done = converted(
        write("generator"),
        golden_base,
        tmp_path / "bundle",
        method="causvid",
        sampler="ode",
        timesteps=(1000.0, 500.0),
        height=32,
        width=48,
        num_frames=5,
        fps=8,
    )
    assert done.spec.sigmas == (1.0, 0.5, 0.0) and done.spec.timesteps == (1000.0, 500.0)
    assert (done.spec.method, done.spec.sampler) == ("causvid", "ode")
    assert done.spec.native == NativeShape(height=32, width=48, num_frames=5, fps=8)
    assert done.spec.assumed == ("step", "attention")


def test_a_named_method_brings_its_own_steps(write: Write, golden_base: Path, tmp_path: Path) -> None:
    done = converted(write("generator"), golden_base, tmp_path / "bundle", method="causvid")
    assert done.spec.timesteps == causvid_grid().timesteps == (1000.0, 757.0, 522.0)
    assert "timesteps" in done.spec.assumed and "method" not in done.spec.assumed


def test_codmd_has_other_steps_at_14b() -> None:
    assert CONTRACTS["codmd"].grid(1536) == wan_1_3b_grid()
    assert CONTRACTS["codmd"].grid(5120) == wan_14b_grid()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method must be one of codmd, causvid, .*, got 'magic'"):
        ConvertOptions(method="magic")


# what cannot work


def test_an_output_that_exists_is_left_alone(write: Write, golden_base: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/mine").write_text("precious")
    with pytest.raises(ConfigError, match=r"bundle exists already: name another folder, or delete it first"):
        converted(write("rcm"), golden_base, tmp_path / "bundle")
    assert (tmp_path / "bundle/mine").read_text() == "precious"


def test_an_output_without_a_folder_is_refused(write: Write, golden_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere to write bundle to"):
        converted(write("rcm"), golden_base, tmp_path / "nowhere/bundle")


def test_a_full_disk_leaves_nothing(
    write: Write, golden_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("rcm")

    def full(self: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(bytes(100))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WanTransformer3DModel, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"bundle cannot be written: .*No space left.*; nothing was left there"):
        converted(source, golden_base, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.bin"]


def test_a_checkpoint_of_another_architecture_is_refused(write: Write, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has 3 blocks of width 96 .*, the base 2 blocks of width 24"):
        converted(write("generator"), tiny_base, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_folder_of_other_heads_is_refused(golden_base: Path, tmp_path: Path) -> None:
    shutil.copytree(golden_base / "transformer", tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    (tmp_path / "student/config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    with pytest.raises(CheckpointError, match="num_attention_heads is 4, the base has 2"):
        converted(tmp_path / "student", golden_base, tmp_path / "bundle")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_base_without_a_part_is_refused(write: Write, golden_base: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(golden_base, tmp_path / "base", ignore=shutil.ignore_patterns(part))
    with pytest.raises(CheckpointError, match=rf"has no {part}/: expected the diffusers folder of a Wan pipeline"):
        converted(write("rcm"), tmp_path / "base", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"transformer/config\.json of .* cannot be read"),
        ('{"_class_name": "UNet2DModel"}', "no text-to-video Wan pipeline: its transformer is UNet2DModel"),
        ('{"_class_name": "WanTransformer3DModel", "image_dim": 1280}', "is an image-to-video WanTransformer3DModel"),
    ],
)
def test_a_base_that_is_no_text_to_video_wan_is_refused(
    write: Write, golden_base: Path, tmp_path: Path, content: str, message: str
) -> None:
    shutil.copytree(golden_base, tmp_path / "base")
    (tmp_path / "base/transformer/config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        converted(write("rcm"), tmp_path / "base", tmp_path / "bundle")


def test_no_base_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*gone: expected the diffusers folder"):
        converted(write("rcm"), tmp_path / "gone", tmp_path / "bundle")

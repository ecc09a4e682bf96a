"""The base pipeline: where it is looked for, what its configs say, and that a run opens it once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from codmd_serve.errors import CheckpointError, ConfigError
from distill.config import DistillConfig, NativeConfig
from distill.networks import base as base_module
from distill.networks.base import Base, open_base
from distill.run.trainer import RunOptions, run_training

CPU = torch.device("cpu")


def native(height: int, width: int, num_frames: int) -> NativeConfig:
    return NativeConfig(height=height, width=width, num_frames=num_frames, fps=16)


def test_latent_shape_follows_vae_and_patches(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    assert base.latent_shape(native(32, 48, 9)) == (4, 3, 4, 6)
    assert base.num_tokens(native(32, 48, 9)) == 3 * 2 * 3


def test_latent_shape_reads_the_scales_of_the_vae(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    path = copy / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale_factor_temporal": 2, "scale_factor_spatial": 4}))
    assert open_base(str(copy)).latent_shape(native(32, 48, 9)) == (4, 5, 8, 12)


@pytest.mark.parametrize(
    ("size", "named"), [((40, 32, 9), "height"), ((32, 24, 9), "width"), ((32, 32, 10), "num_frames")]
)
def test_latent_shape_refuses_sizes_off_the_grid(tiny_base: Path, size: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        open_base(str(tiny_base)).latent_shape(native(*size))


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "weights/nothing-of-that-name", "a/b/c"])
def test_missing_base_is_refused_without_asking_a_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match="no pipeline"):
        open_base(name)


def test_hub_id_is_opened_without_asking_the_hub() -> None:
    assert open_base("some/pipeline") == Base(source="some/pipeline", is_local=False)
    assert open_base("some/pipeline").name == "some/pipeline"


def test_bundled_base_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = tmp_path / "somewhere" / "shapeworld"
    bundled.mkdir(parents=True)
    monkeypatch.setattr(base_module, "default_bundle_path", lambda: bundled.parent / "shapeworld-dmd")
    monkeypatch.chdir(tmp_path)
    base = open_base("weights/shapeworld")
    assert base == Base(source=str(bundled), is_local=True) and base.name == "shapeworld"


def test_truncated_weights_are_a_checkpoint_error(tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"transformer of .* cannot be loaded"):
        open_base(str(broken)).load_transformer(torch.float32)
    shutil.rmtree(broken / "transformer")
    with pytest.raises(CheckpointError, match="no transformer/ folder"):
        open_base(str(broken)).load_transformer(torch.float32)


def test_config_that_lacks_a_size_is_a_checkpoint_error(tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    path = broken / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["patch_size"]
    path.write_text(json.dumps(config))
    base = open_base(str(broken))
    with pytest.raises(CheckpointError, match="has no patch_size"):
        base.latent_shape(native(32, 32, 9))
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"transformer of .* has no readable config"):
        open_base(str(broken)).latent_shape(native(32, 32, 9))


def test_run_opens_the_base_and_reads_its_configs_once(
    tiny_config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read = [], []
    read_part_config = base_module.read_part_config

    def counted(kind: object, folder: Path, part: str) -> dict[str, object]:
        read.append(part)
        return read_part_config(kind, folder, part)

    def opened_once(name: str) -> Base:
        opened.append(name)
        return open_base(name)

    monkeypatch.setattr(base_module, "read_part_config", counted)
    monkeypatch.setattr("distill.run.trainer.open_base", opened_once)
    monkeypatch.setattr("distill.run.bundle.open_base", opened_once)
    options = RunOptions(out=tmp_path / "run", device=CPU, preview_every_iterations=2)
    assert run_training(tiny_config, options, resume=False).bundle
    assert opened == [tiny_config.base] and sorted(read) == ["transformer", "vae"]


def test_vae_without_scales_has_those_of_the_class(tiny_base: Path) -> None:
    """Published Wan2.1 folders leave them out."""
    assert open_base(str(tiny_base)).vae_scales == (4, 8)
    assert AutoencoderKLWan.load_config(str(tiny_base), subfolder="vae").get("scale_factor_spatial", 8) == 8

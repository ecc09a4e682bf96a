"""Random bundles load like any other, are kept, and are made again when half written."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from codmd_serve.bench.weights import preset, random_bundle
from codmd_serve.errors import ConfigError
from codmd_serve.grid import wan_14b_grid
from codmd_serve.wan.checkpoint import load_bundle

CPU = torch.device("cpu")


def test_random_bundle_loads_and_is_kept(tmp_path: Path) -> None:
    with random_bundle("tiny", tmp_path, CPU, torch.bfloat16) as path:
        bundle = load_bundle(path, torch.bfloat16)
    assert bundle.spec.method == "random" and bundle.spec.sigmas == wan_14b_grid().sigmas
    assert bundle.transformer.dtype == torch.bfloat16 and bundle.vae.dtype == torch.float32
    # A video of noise would measure x264: these pixels are a tenth as far from grey.
    scales = [float(conv.weight.std()) for conv in (bundle.vae.decoder.conv_out, bundle.vae.encoder.conv_out)]
    assert scales[0] < 0.3 * scales[1]
    files = sorted(tmp_path.rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 3
    with random_bundle("tiny", tmp_path, CPU, torch.bfloat16):
        assert [file.stat().st_mtime_ns for file in files] == before
    (path / "whole").unlink()
    with random_bundle("tiny", tmp_path, CPU, torch.bfloat16):
        changed = [file.stat().st_mtime_ns != old for file, old in zip(files, before, strict=True)]
    assert changed == [file.is_relative_to(path) for file in files]


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1000))
    with (
        pytest.raises(ConfigError, match=r"random weights need .* GiB"),
        random_bundle("tiny", tmp_path, CPU, torch.float32),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_published_sizes_are_1_3_and_14_billion() -> None:
    from diffusers import WanTransformer3DModel

    from codmd_serve.bench.floor import num_parameters

    with torch.device("meta"):
        small, large = (WanTransformer3DModel(**preset(name).transformer) for name in ("wan-1.3b", "wan-14b"))
    assert 1.3e9 < num_parameters(small) < 1.5e9
    assert 14.0e9 < num_parameters(large) < 14.5e9
    with pytest.raises(ConfigError, match="no preset 'wan-2b'"):
        preset("wan-2b")

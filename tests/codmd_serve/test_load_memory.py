"""Loading never holds two copies of the weights: the most memory it takes is little more than what it keeps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from codmd_serve.wan.checkpoint import StudentSpec, save_bundle

PEAKS = Path(__file__).with_name("load_peaks.py")
# Of what is kept. A second copy of everything would be 2; of the projections that are fused, 5 of 16 parts of a block,
# more than 1.3. The rest is one block in two forms, and some 30 MB of activations and workspaces whatever the weights.
MOST = {"float32": 1.25, "bfloat16": 1.5}


@pytest.fixture(scope="module")
def large_bundle(tiny_base: Path, tiny_spec: StudentSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 million numbers in float16, 100 MB, in 24 blocks; on a copy of the tiny base."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=96,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=1536,
            num_layers=24,
        )
    transformer = transformer.to_empty(device="cpu")
    for parameter in transformer.parameters():
        parameter.data = torch.full_like(parameter, 0.01, dtype=torch.float16)
    path = tmp_path_factory.mktemp("weights") / "large-codmd"
    shutil.copytree(tiny_base, path.parent / tiny_base.name)
    save_bundle(path, transformer, tiny_spec)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_load_engine_never_holds_two_copies_of_the_weights(large_bundle: Path, tiny_bundle: Path) -> None:
    command = [sys.executable, str(PEAKS), str(tiny_bundle)]
    for dtype in MOST:
        command += [str(large_bundle), dtype]
    # A script does not see the folder that it is started from.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    found = dict(zip(MOST, map(json.loads, done.stdout.splitlines()), strict=True))
    file_bytes = sum(file.stat().st_size for file in large_bundle.rglob("*.safetensors"))
    assert found["float32"]["kept_bytes"] == pytest.approx(2 * file_bytes, rel=0.05)
    assert found["bfloat16"]["kept_bytes"] == pytest.approx(file_bytes, rel=0.05)
    # The file is mapped and converted tensor by tensor, so float16 is never held beside the new form.
    for dtype, most in MOST.items():
        assert found[dtype]["kept_bytes"] / 2 < found[dtype]["peak_bytes"] < most * found[dtype]["kept_bytes"], found

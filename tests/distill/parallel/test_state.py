"""Sharded states: every process writes and reads its own shards, in its own memory, whatever number wrote them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from codmd_serve.errors import CheckpointError
from distill.parallel.processes import SINGLE_PROCESS
from distill.parallel.shard_files import BUFFER_BYTES, Part, new_scratch, read_box, read_index
from distill.parallel.state import load_shards, save_shards, stage

ROOT = Path(__file__).resolve().parents[3]
MEBIBYTES = 128
WORLD_SIZES = (4, 2, 1, 4)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process of `run_state.py` says."""
    out = tmp_path_factory.mktemp("state")
    script = str(Path(__file__).with_name("run_state.py"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(out), str(MEBIBYTES), *map(str, WORLD_SIZES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_state_is_the_same_bits_in_4_then_2_then_1_then_4_processes(told: list[dict[str, Any]]) -> None:
    assert len(told) == sum(WORLD_SIZES)
    assert all(one["is_as_saved"] for one in told)


def test_no_process_ever_holds_a_whole_state(told: list[dict[str, Any]]) -> None:
    """Saving takes a copy of the own shards, loading nothing but a buffer; the whole state would be 4 shards."""
    for one in told:
        assert one["shard_bytes"] < 1.1 * (MEBIBYTES << 20) / one["processes"]
        assert one["save_bytes"] < one["shard_bytes"] + 1.25 * BUFFER_BYTES, one
        assert one["load_bytes"] < 1.25 * BUFFER_BYTES, one


@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [
        ((0, 0, 0), (4, 3, 5)),
        ((1, 0, 0), (2, 3, 5)),
        ((1, 1, 0), (3, 2, 5)),
        ((0, 2, 1), (4, 1, 3)),
        ((3, 0, 4), (1, 3, 1)),
    ],
)
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_any_box_of_a_part_is_read(
    tmp_path: Path, offsets: tuple[int, ...], lengths: tuple[int, ...], is_contiguous: bool
) -> None:
    whole = torch.arange(60.0).reshape(4, 3, 5)
    (tmp_path / "part").write_bytes(b"head" + whole.numpy().tobytes())
    part = Part(offsets=(0, 0, 0), sizes=(4, 3, 5), file="part", start=4)
    target = torch.zeros(lengths) if is_contiguous else torch.zeros(lengths[::-1]).permute(2, 1, 0)
    with (tmp_path / "part").open("rb", buffering=0) as file:
        read_box(file, part, offsets, lengths, target, new_scratch())
    box = tuple(slice(first, first + length) for first, length in zip(offsets, lengths, strict=True))
    assert torch.equal(target, whole[box])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, "another network: it has no b"),
        ({"a": torch.zeros(4)}, r"another network: a is torch\.float32 \(3,\), expected torch\.float32 \(4,\)"),
        ({"a": torch.zeros(3).bfloat16()}, r"another network: a is .* expected torch\.bfloat16"),
    ],
)
def test_other_names_sizes_and_dtypes_are_refused(
    tmp_path: Path, targets: dict[str, torch.Tensor], message: str
) -> None:
    save_shards(tmp_path / "state", stage({"a": torch.ones(3)}), {}, SINGLE_PROCESS)
    with pytest.raises(CheckpointError, match=message):
        load_shards(read_index(tmp_path / "state"), targets, SINGLE_PROCESS)


def test_a_shard_that_ends_too_early_while_it_is_read_is_named(tmp_path: Path) -> None:
    save_shards(tmp_path / "state", stage({"a": torch.ones(300)}), {}, SINGLE_PROCESS)
    index = read_index(tmp_path / "state")
    shard = tmp_path / "state" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors ends too early"):
        load_shards(index, {"a": torch.zeros(300)}, SINGLE_PROCESS)

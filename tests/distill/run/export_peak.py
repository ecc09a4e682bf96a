"""Writes synthetic sharded checkpoints and measures what an export of each takes; started by test_export_peak.py.

A program of its own: the memory of pytest would hide the peak, and a fork of it would inherit its threads.

    python export_peak.py OUT CONFIG.json...

Each config is the run of one checkpoint, which two gloo processes save; then a process of its own exports all of them
and prints, for each but the first, {"dtype", "network_bytes", "state_bytes", "peak_bytes"}: of the bundle, the float32
network, all tensors of the checkpoint, and the most resident memory above what was there before. The first is to be
small: it brings in the libraries.
"""

import ctypes
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from diffusers import WanTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distill.methods.registry import config_from_dict
from distill.networks.base import open_base
from distill.parallel.processes import Processes
from distill.parallel.state import stage
from distill.run.bundle import EMA_PREFIX, export_bundle
from distill.run.checkpoint import list_checkpoints, load_checkpoint, read_config, save_checkpoint, write_config

WORLD_SIZE = 2
KINDS = ("networks/student", "networks/critic", "ema", "optimizers/student/exp_avg", "optimizers/student/exp_avg_sq")


def sharded(shape: torch.Size, seed: int, processes: Processes) -> DTensor:
    placement = [Shard(0)]
    assert processes.mesh is not None
    local_shape, _ = compute_local_shape_and_global_offset(shape, processes.mesh, placement)
    local = torch.randn(local_shape, generator=torch.Generator().manual_seed(2 * seed + processes.rank))
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return DTensor.from_local(local, processes.mesh, placement, run_check=False, shape=shape, stride=stride)


def write(rank: int, run: Path, config_file: Path, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    processes = Processes(
        rank=rank,
        world_size=WORLD_SIZE,
        mesh=init_device_mesh("cpu", (WORLD_SIZE,)),
        save_group=dist.new_group(backend="gloo"),
    )
    config = config_from_dict(json.loads(config_file.read_text()))
    if rank == 0:
        write_config(run, config)
    with torch.device("meta"):
        network = WanTransformer3DModel.from_config(open_base(config.base).transformer_config)
    tensors = {
        f"{kind}/{name}": sharded(parameter.shape, seed, processes)
        for kind in KINDS
        for seed, (name, parameter) in enumerate(network.named_parameters())
    }
    values = {"iteration": 1, "updates": {"student": 1, "critic": 1}}
    save_checkpoint(run, 1, stage(tensors), values, 1, processes)
    dist.destroy_process_group()


def resident_bytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024


def export(runs: list[Path], out: Path) -> None:
    torch.set_num_threads(1)
    for place, run in enumerate(runs):
        checkpoint = load_checkpoint(list_checkpoints(run)[-1])
        assert checkpoint.index is not None
        sizes = {name: 4 * math.prod(stored.size) for name, stored in checkpoint.index.tensors.items()}
        network_bytes = sum(size for name, size in sizes.items() if name.startswith(EMA_PREFIX))
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier export gave back shall not serve this one unseen
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        export_bundle(run, out / f"bundle-{place}")
        peak_bytes = resident_bytes("VmHWM") - before
        told = {
            "dtype": read_config(run).bundle_dtype,
            "network_bytes": network_bytes,
            "state_bytes": sum(sizes.values()),
            "peak_bytes": peak_bytes,
        }
        if place:
            os.write(1, (json.dumps(told) + "\n").encode())


def main() -> None:
    out, *config_files = map(Path, sys.argv[1:])
    context, runs = torch.multiprocessing.get_context("fork"), []
    for place, config_file in enumerate(config_files):
        runs.append(out / f"run-{place}")
        runs[-1].mkdir()
        with tempfile.TemporaryDirectory() as folder:
            arguments = (runs[-1], config_file, f"{folder}/store")
            torch.multiprocessing.start_processes(write, args=arguments, nprocs=WORLD_SIZE, start_method="fork")
    process = context.Process(target=export, args=(runs, out))
    process.start()
    process.join()
    sys.exit(process.exitcode)


if __name__ == "__main__":
    main()

"""Saves and loads a sharded state in several gloo processes and measures their memory; started by test_state.py.

A program of its own, which forks after importing once: a fork of pytest would inherit its threads.

    python run_state.py OUT MEBIBYTES WORLD_SIZE ...

The first number of processes saves a state of that size as OUT/0; each further one loads the checkpoint before and
saves it again as OUT/1, OUT/2 and so on. Prints a line of JSON per process: rank, world size, bytes of its own shards,
growth of its resident memory while saving and while loading, and whether what it loaded is what was saved.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distill.parallel.processes import SINGLE_PROCESS, Processes
from distill.parallel.shard_files import read_index
from distill.parallel.state import load_shards, local_part, save_shards, stage

COLUMNS = 1024
# Not a multiple of any number of processes, so that shards differ in size; 8 MiB in float32.
ROWS = 2047


def rows(number: int, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """The part of tensor `number` at some offsets: a function of the place, so nobody needs the whole."""
    first, second = (torch.arange(start, start + size) for start, size in zip(offsets, shape, strict=True))
    return ((first[:, None] * 31 + second[None] * 7 + number) % 65521).float()


def state(num_tensors: int, processes: Processes, is_filled: bool) -> dict[str, torch.Tensor]:
    """Tensors sharded over all processes, and a scalar that each has."""
    tensors = {"count": torch.tensor(3.0 if is_filled else 0.0)}
    for number in range(num_tensors):
        shape = torch.Size((ROWS, COLUMNS))
        if processes.mesh is None:
            tensors[f"t{number}"] = rows(number, (0, 0), shape) if is_filled else torch.zeros(shape).add_(1)
            continue
        # Split by columns too, as tensor parallelism does: a shard is then no run of bytes in another's.
        placement = [Shard(number % 2)]
        local_shape, offsets = compute_local_shape_and_global_offset(shape, processes.mesh, placement)
        local = rows(number, offsets, local_shape) if is_filled else torch.zeros(local_shape).add_(1)
        stride = (COLUMNS, 1)
        tensors[f"t{number}"] = DTensor.from_local(
            local, processes.mesh, placement, run_check=False, shape=shape, stride=stride
        )
    return tensors


def resident_bytes(entry: str) -> int:
    """VmRSS, or VmHWM, the largest since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def is_as_saved(tensors: dict[str, torch.Tensor]) -> bool:
    if float(tensors["count"]) != 3.0:
        return False
    for name, tensor in tensors.items():
        if name != "count":
            local, offsets = local_part(tensor)
            if not torch.equal(local, rows(int(name[1:]), offsets, tuple(local.shape))):
                return False
    return True


def run(rank: int, world_size: int, place: int, num_tensors: int, out: Path, store: str) -> None:
    torch.set_num_threads(1)
    processes = SINGLE_PROCESS
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        mesh, group = init_device_mesh("cpu", (world_size,)), dist.new_group(backend="gloo")
        processes = Processes(rank=rank, world_size=world_size, mesh=mesh, save_group=group)
    # Torch's own buffers and imports, before anything is measured.
    save_shards(out / f"warm-{place}", stage({"count": torch.zeros(())}), {}, processes)
    load_shards(read_index(out / f"warm-{place}"), {"count": torch.zeros(())}, processes)
    tensors = state(num_tensors, processes, is_filled=place == 0)
    told = {"rank": rank, "processes": world_size, "shard_bytes": 0, "load_bytes": 0, "is_as_saved": True}
    told["shard_bytes"] = sum(local_part(tensor)[0].nbytes for tensor in tensors.values())
    if place:
        before = resident_bytes("VmRSS")
        forget_peak()
        load_shards(read_index(out / str(place - 1)), tensors, processes)
        told["load_bytes"] = resident_bytes("VmHWM") - before
        told["is_as_saved"] = is_as_saved(tensors)
    before = resident_bytes("VmRSS")
    forget_peak()
    save_shards(out / str(place), stage(tensors), {"place": place}, processes)
    told["save_bytes"] = resident_bytes("VmHWM") - before
    os.write(1, (json.dumps(told) + "\n").encode())
    if world_size > 1:
        dist.destroy_process_group()


def main() -> None:
    out, mebibytes, *world_sizes = sys.argv[1:]
    context = torch.multiprocessing.get_context("fork")
    for place, world_size in enumerate(map(int, world_sizes)):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world_size, place, int(mebibytes) // 8, Path(out), f"{folder}/store")
            processes = [
                context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(world_size)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"{world_size} processes failed")


if __name__ == "__main__":
    main()

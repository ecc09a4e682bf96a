"""Packs prompts in two gloo processes; started by test_packed.py.

A program of its own, which forks after importing once: a fork of pytest would inherit its threads.

    python run_packing.py CONFIG.json CACHE OUT

Each process writes OUT/RANK.json: the parts that it encoded.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from distill.data import packing
from distill.data.prompts import cached_prompt_data
from distill.methods.registry import config_from_dict
from distill.networks.base import open_base
from distill.parallel.processes import join_processes

WORLD_SIZE = 2
CPU = torch.device("cpu")


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    config_path, cache, out = map(Path, sys.argv[1:])
    config = config_from_dict(json.loads(config_path.read_text()))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    processes = join_processes(CPU, config)
    packing.PROMPTS_PER_CALL, packing.PROMPTS_PER_PART = 1, 1
    encode, encoded = packing._Texts.encode, []

    def noted(self: Any, part: int, encoder: Any) -> Iterator[Any]:
        encoded.append(part)
        return encode(self, part, encoder)

    packing._Texts.encode = noted  # type: ignore[method-assign]
    cached_prompt_data(config, open_base(config.base), cache, CPU, processes)
    (out / f"{rank}.json").write_text(json.dumps(encoded))
    dist.destroy_process_group()


def main() -> None:
    context = torch.multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=run, args=(rank, f"{folder}/store")) for rank in range(WORLD_SIZE)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        sys.exit("packing failed")


if __name__ == "__main__":
    main()

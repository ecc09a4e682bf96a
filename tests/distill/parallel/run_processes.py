"""Runs the trainer in several gloo processes and writes down what each saw; started by test_processes.py.

A program of its own, which forks after importing once: a fork of pytest would inherit its threads.

    python run_processes.py SCENARIOS.json OUT

SCENARIOS.json holds a list of {"name", "config", "world_size", "iterations", "resumes"}. Each process writes
OUT/NAME-RANK.pt.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill.config import DistillConfig
from distill.data.prompts import cached_prompt_data
from distill.data.teacher_latents import cached_teacher_latents
from distill.methods.draws import ROLES
from distill.methods.registry import METHODS, config_from_dict
from distill.networks.base import open_base
from distill.networks.build import Networks, build_networks, trained_parameters
from distill.parallel.processes import SINGLE_PROCESS, Processes, join_processes
from distill.parallel.state import local_part, stage
from distill.run.checkpoint import load_checkpoint, save_checkpoint
from distill.run.checks import native_latents
from distill.run.trainer import Trainer

CPU = torch.device("cpu")


class Collectives(TorchDispatchMode):
    """Counts collective operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def new_trainer(config: DistillConfig, processes: Processes, cache: Path) -> Trainer:
    data = cached_prompt_data(config, open_base(config.base), cache, CPU)
    networks = build_networks(config, open_base(config.base), CPU, processes)
    part_ways(networks)
    shape = native_latents(config, open_base(config.base))
    latents = None
    sampling = METHODS[config.method].teacher_sampling(config)
    if sampling is not None:
        base = open_base(config.base)
        latents = cached_teacher_latents(config, sampling, base, networks, data, shape, cache, CPU, processes)
    return Trainer(config, networks, data, shape, CPU, latents, processes)


@torch.no_grad()
def part_ways(networks: Networks) -> None:
    """Move student and critic off the teacher: before that, the relational losses are 0 but for rounding."""
    rng = torch.Generator().manual_seed(1)
    for network in (networks.student, networks.critic):
        for parameter in trained_parameters(network).values():
            noise = 0.05 * torch.randn(parameter.shape, generator=rng)
            local, offsets = local_part(parameter)
            local += noise[tuple(slice(first, first + n) for first, n in zip(offsets, local.shape, strict=True))]


def student_gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradient of the whole batch's loss, before any update; leaves none behind."""
    trainer._differentiate("student")
    parameters = trainer.parameters["student"]
    gradient = gathered({name: item.grad for name, item in parameters.items() if item.grad is not None})
    trainer.optimizers["student"].zero_grad()
    return {name: item.clone() for name, item in gradient.items()}


def watched(config: DistillConfig, processes: Processes, cache: Path, iterations: int, resumes: bool) -> dict[str, Any]:
    trainer = new_trainer(config, processes, cache)
    seen: dict[str, Any] = {"gradient": student_gradient(trainer), "metrics": [], "exit_steps": []}
    seen["start"] = {role: gathered(trainer.parameters[role]) for role in ROLES}
    kind = type(METHODS[config.method])
    draw = kind.draw

    def noted(*args: Any) -> Any:
        draws = draw(*args)
        seen["exit_steps"].append(getattr(draws, "exit_step", None))
        return draws

    kind.draw = noted  # type: ignore[method-assign]
    with Collectives() as collectives:
        for _ in range(iterations):
            metrics = trainer.iterate()
            seen["metrics"].append({name: float(value) for name, value in metrics.items()})
    seen["collectives"] = collectives.counts
    seen["networks"] = {role: gathered(trainer.parameters[role]) for role in ROLES}
    seen["shadow"] = gathered(trainer.ema.shadow)
    seen["sharded"] = sum(item.numel() for item in map(local, trainer.parameters["student"].values()))
    if not resumes:
        return seen
    # Resumed from the checkpoint, the next iteration is the same as without a stop.
    run_dir = cache.parent / f"saved-{config.method}-{processes.world_size}"
    run_dir /= f"{config.lora_critic_rank}-{config.lora_student_rank}"
    saved = save_checkpoint(run_dir, 3, stage(trainer.state_tensors()), trainer.state_values(), 1, processes)
    again = new_trainer(config, processes, cache)
    again.load(load_checkpoint(saved))
    seen["next"], seen["next_resumed"] = ({k: float(v) for k, v in one.iterate().items()} for one in (trainer, again))
    return seen


def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the whole tensors, in every process."""
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def run(rank: int, scenario: dict[str, Any], store: str, out: Path) -> None:
    torch.set_num_threads(1)
    config, world_size = config_from_dict(scenario["config"]), scenario["world_size"]
    processes = SINGLE_PROCESS
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        processes = join_processes(CPU, config)
    seen = watched(config, processes, out / "cache", scenario["iterations"], scenario["resumes"])
    torch.save(seen, out / f"{scenario['name']}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def main() -> None:
    scenarios, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    context = torch.multiprocessing.get_context("fork")
    for scenario in scenarios:
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=run, args=(rank, scenario, f"{folder}/store", out), daemon=True)
                for rank in range(scenario["world_size"])
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"scenario {scenario['name']} failed")


if __name__ == "__main__":
    main()

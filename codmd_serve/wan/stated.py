"""Reads how a published pipeline folder is sampled: dmd2_config in model_index.json, or our own scheduler.

`dmd2_config` is the contract of FastGen's few-step folders, which vLLM-Omni and others read:
{"num_inference_steps": 4, "denoising_timesteps": [999, 937, 833, 624], "solver": "ode", "guidance_scale": 1.0}; the
state at timestep t is at sigma t / 1000. Source: vllm-project/vllm-omni pull requests 2749 (flat keys) and 2974.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from codmd_serve.errors import CheckpointError
from codmd_serve.grid import MAX_TIMESTEP, SAMPLERS
from codmd_serve.textfiles import read_json_object, shown
from codmd_serve.wan.hub import INDEX_FILE

DMD2_KEY = "dmd2_config"
# Flat spellings of the same, older ones first.
_FLAT = {
    "denoising_timesteps": ("dmd2_denoising_timesteps", "dmd_denoising_steps", "dmd_timesteps"),
    "num_inference_steps": ("dmd2_num_inference_steps",),
    "guidance_scale": ("dmd2_guidance_scale",),
    "solver": ("dmd2_solver",),
}
_SCHEDULER = "StudentScheduler"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """The sampling settings that a folder states; None where it does not.

    Attributes:
        timesteps: what the network is fed.
        sigmas: levels of the state, where they are not timesteps / 1000.
        num_steps: of them.
        sampler: sde or ode.
        where: which file says it.
    """

    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    num_steps: int | None = None
    sampler: str | None = None
    where: str = ""


def dmd2_config(timesteps: Sequence[float], sampler: str) -> dict[str, Any]:
    """Return the entry of model_index.json that says how a student is sampled."""
    # Whole numbers as such: readers of this contract take int() of them.
    steps = [int(timestep) if timestep == int(timestep) else timestep for timestep in timesteps]
    return {
        "num_inference_steps": len(steps),
        "denoising_timesteps": steps,
        "solver": sampler,
        "guidance_scale": 1.0,
    }


def read_sampling(source: Path) -> Sampling:
    """Read the sampling settings of the pipeline folder that a checkpoint is or lies in.

    Raises:
        CheckpointError: a malformed entry, one that needs guidance, or files that contradict each other.
    """
    folder = source.parent if source.name == "transformer" and not (source / INDEX_FILE).exists() else source
    if not (folder / INDEX_FILE).is_file():
        return Sampling()
    stated = _from_index(folder / INDEX_FILE)
    scheduler = _from_scheduler(folder / "scheduler" / "scheduler_config.json")
    for name in ("timesteps", "sampler", "num_steps"):
        first, second = getattr(stated, name), getattr(scheduler, name)
        if first is not None and second is not None and first != second:
            raise CheckpointError(
                f"{folder} says two things about its {name}: {shown(first)} in {stated.where}, {shown(second)} in "
                f"{scheduler.where}; say which with --timesteps and --sampler"
            )
    return scheduler if scheduler.timesteps is not None else stated


def _from_index(path: Path) -> Sampling:
    index = read_json_object(path, CheckpointError)
    block = index.get(DMD2_KEY)
    where = f"{DMD2_KEY} of {path.name}"
    if block is None:
        block = {name: index[key] for name, keys in _FLAT.items() for key in keys if index.get(key) is not None}
        where = path.name
    if not isinstance(block, Mapping):
        raise CheckpointError(f"{path}: {DMD2_KEY} must be an object, got {shown(block)}")
    guidance = block.get("guidance_scale")
    if guidance not in (None, 0, 1):
        raise CheckpointError(
            f"{path}: guidance_scale is {shown(guidance)}, so its student is sampled with guidance: only students that "
            "have the guidance built in are served"
        )
    timesteps = _stated_timesteps(block.get("denoising_timesteps"), str(path))
    num_steps = block.get("num_inference_steps")
    if num_steps is not None and (type(num_steps) is not int or num_steps < 1):
        raise CheckpointError(f"{path}: num_inference_steps must be a count, got {shown(num_steps)}")
    if timesteps is not None and num_steps not in (None, len(timesteps)):
        raise CheckpointError(
            f"{path} says two things about its steps: num_inference_steps {num_steps}, but {len(timesteps)} "
            "denoising_timesteps; say which with --timesteps and --sampler"
        )
    sampler = block.get("solver")
    if sampler is not None and str(sampler).lower() not in SAMPLERS:
        raise CheckpointError(f"{path}: solver must be one of {', '.join(SAMPLERS)}, got {shown(sampler)}")
    return Sampling(
        timesteps=timesteps,
        num_steps=num_steps if timesteps is None else len(timesteps),
        sampler=None if sampler is None else str(sampler).lower(),
        where=where,
    )


def _stated_timesteps(value: object, where: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    wanted = f"{where}: denoising_timesteps must be descending numbers in (0, 1000], got {shown(value)}"
    steps = _floats(value, wanted)
    # FastGen's own lists end at the clean state, which is no step.
    steps = steps[:-1] if len(steps) > 1 and steps[-1] == 0.0 else steps
    is_descending = all(math.isfinite(high) and high > low for high, low in pairwise((*steps, 0.0)))
    if not steps or not is_descending or not 1.0 < steps[0] <= MAX_TIMESTEP:
        raise CheckpointError(wanted)
    return steps


def _floats(value: object, message: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
        raise CheckpointError(message)
    try:
        return tuple(map(float, value))
    except OverflowError:  # an integer past 1.8e308
        raise CheckpointError(message) from None


def _from_scheduler(path: Path) -> Sampling:
    if not path.is_file():
        return Sampling()
    config = read_json_object(path, CheckpointError)
    if config.get("_class_name") != _SCHEDULER:
        return Sampling()
    numbers = {}
    for name in ("timesteps", "sigmas"):
        numbers[name] = _floats(
            config.get(name), f"{path}: {name} must be a list of numbers, got {shown(config.get(name))}"
        )
    sampler = config.get("sampler")
    if sampler not in SAMPLERS:
        raise CheckpointError(f"{path}: sampler must be one of {', '.join(SAMPLERS)}, got {shown(sampler)}")
    return Sampling(**numbers, num_steps=len(numbers["timesteps"]), sampler=sampler, where="scheduler_config.json")

"""The adapters of a LoRA student over a run: where they begin, as whole weights, and in a file of their own.

FOLDER/pytorch_lora_weights.safetensors     the adapters, under diffusers' names, in an adapter folder

Checkpoints hold the adapters alone, so a run needs the weights under them as long as it lives.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.errors import CheckpointError
from codmd_serve.grammar import Grammar
from codmd_serve.wan.checkpoint import StudentSpec, save_adapter
from distill.config import DistillConfig
from distill.networks.base import Base
from distill.networks.ema import Ema
from distill.networks.lora import diffusers_lora, merged_weights
from distill.parallel.processes import Processes
from distill.parallel.state import load_shards
from distill.run.checkpoint import list_checkpoints, load_checkpoint

EMA_PREFIX = "ema/"


def beginning(config: DistillConfig, started: Path | None, *, is_resumed: bool) -> DistillConfig:
    """Return a run's config with the weights that its networks are built from.

    Args:
        config: of the run.
        started: bundle of the regressed start, or None.
        is_resumed: a checkpoint replaces the trained weights, whose sources may be gone by now. The frozen weights
            under a LoRA student are not among them.
    """
    is_lora = config.lora_student_rank > 0
    if is_resumed:
        return replace(config, student_from=config.student_from if is_lora else "", critic_from="")
    # The start of a LoRA student hands its adapters over, see `begin_adapters`.
    return config if started is None or is_lora else replace(config, student_from=str(started))


def begin_adapters(parameters: Mapping[str, nn.Parameter], ema: Ema, start: Path, processes: Processes) -> None:
    """Set the adapters of a student, and their average, to the average that its regressed start ended with.

    Raises:
        CheckpointError: the start has no checkpoint, or one of other adapters.
    """
    checkpoints = list_checkpoints(start)
    if not checkpoints:
        raise CheckpointError(f"{start} has no checkpoint, which the adapters of the student begin from")
    checkpoint = load_checkpoint(checkpoints[-1])
    assert checkpoint.index is not None
    load_shards(checkpoint.index, {EMA_PREFIX + name: tensor for name, tensor in ema.shadow.items()}, processes)
    with torch.no_grad():
        for name, tensor in ema.shadow.items():
            parameters[name].copy_(tensor)


def lora_scale(config: DistillConfig) -> float:
    """Return the factor of a LoRA student's update."""
    return config.lora_student_alpha / config.lora_student_rank


def whole_weights(config: DistillConfig, base: Base, ema_weights: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Return the weights of a run's student, the adapters of a LoRA student merged into the network under them.

    Raises:
        CheckpointError: that network is gone.
    """
    if not config.lora_student_rank:
        return ema_weights.items()
    frozen = base.load_transformer(DTYPES_BY_NAME[config.frozen_dtype("student")])
    if config.student_from:
        frozen = base.load_start(frozen, config.student_from, "student_from")
    return merged_weights(frozen, ema_weights, lora_scale(config))


def write_lora(
    folder: Path,
    config: DistillConfig,
    ema_weights: Mapping[str, Tensor],
    spec: StudentSpec,
    grammar: Grammar | None = None,
) -> None:
    """Write the adapters of a LoRA student, float32, whole or not at all.

    Args:
        folder: where to; one that exists is replaced.
        config: of the run.
        ema_weights: moving average of the adapters, by parameter name.
        spec: of the student.
        grammar: of the captions that it knows, if of any.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    header = lora_header(config.lora_student_rank, spec)
    tensors = diffusers_lora(ema_weights, lora_scale(config))
    # Adapters on weights of a file are no update of the base that student.json names.
    save_adapter(folder, tensors, header, None if config.student_from else spec, grammar)


def lora_header(rank: int, spec: StudentSpec) -> dict[str, str]:
    """Return the header of a file of adapters, for readers that see no student.json beside it."""
    # Alpha equals the rank: the scale is part of lora_B.
    steps = " ".join(f"{timestep:g}" for timestep in spec.timesteps)
    facts = {"base": spec.base_model, "method": spec.method, "sampler": spec.sampler, "timesteps": steps}
    return {"lora_alpha": str(rank), "rank": str(rank), **facts}

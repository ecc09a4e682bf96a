"""One micro-batch of a run: its prompts and, for the roles whose turns want them, real latents.

Knows no method and no network.
"""

from dataclasses import replace

import torch

from distill.config import DistillConfig
from distill.data.prompts import Batch, PromptData, batch_indices
from distill.data.teacher_latents import TeacherLatents


def load_batch(
    config: DistillConfig,
    data: PromptData,
    latents: TeacherLatents | None,
    role: str,
    iteration: int,
    device: torch.device,
    positions: range,
) -> Batch:
    """Return the prompts of some places of an iteration's batch; with latents where `data_roles` has the role.

    Args:
        config: of the run.
        data: prompts, and latents that came with them.
        latents: samples of the teacher; None where the method needs none, or the prompts have latents.
        role: student or critic.
        iteration: counted from 0.
        device: where the batch goes.
        positions: places in the whole batch.

    Raises:
        CheckpointError: a sample of the teacher cannot be read.
    """
    num_prompts, has_data = data.num_prompts, role in config.method_settings.data_roles()
    samples = latents if has_data else None
    num_samples = num_prompts if samples is None else samples.num_samples
    indices = batch_indices(iteration, num_samples, config.batch_size, config.seed)
    own = indices[positions.start : positions.stop]
    batch = data.batch([index % num_prompts for index in own], device)
    if samples is not None:
        states = samples.states(own, device) if samples.has_states else None
        return replace(batch, x0=samples.batch(own, device), states=states)
    if has_data and data.latents is not None:
        return replace(batch, x0=data.x0(own, device))
    return batch

"""The methods by name: whose turn it is, what is drawn and which step is computed.

The mathematics is in the step modules, the loop in trainer.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distill.config import DistillConfig
from distill.step import StepDraws, StepResult, critic_step, draw_exit_step, draw_step, step_rng, student_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What the loop has to know of a method.

    turns: (config, step) -> roles trained in that iteration, in order.
    draw: (config, role, step, shape, device) -> the random numbers of one turn, a function of its arguments alone.
    steps: by role, (networks, batch, draws, config) -> loss and metrics.
    """

    turns: Callable[[DistillConfig, int], tuple[str, ...]]
    draw: Callable[[DistillConfig, str, int, tuple[int, ...], torch.device], Any]
    steps: Mapping[str, Callable[..., StepResult]]


def dmd_turns(config: DistillConfig, step: int) -> tuple[str, ...]:
    """Return the roles of an iteration: the critic's turn in each, the student's before it in every N-th."""
    due = step - config.critic_warmup_steps
    return ("student", "critic") if due >= 0 and due % config.student_every_steps == 0 else ("critic",)


def draw_dmd(config: DistillConfig, role: str, step: int, shape: tuple[int, ...], device: torch.device) -> StepDraws:
    """Draw one turn of codmd or dmd; student and critic of an iteration stop at the same exit step."""
    exit_step = draw_exit_step(step_rng(config.seed, "exit", step), len(config.grid().timesteps))
    return draw_step(config, step_rng(config.seed, role, step), shape, exit_step, device)


_MATCHING = Method(turns=dmd_turns, draw=draw_dmd, steps={"student": student_step, "critic": critic_step})
METHODS: dict[str, Method] = {
    "codmd": _MATCHING,
    "dmd": _MATCHING,
}

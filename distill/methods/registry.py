"""The methods by name: whose turn it is, what is drawn, which step is computed, and the settings published for each.

The mathematics is in the step modules, the loop in trainer.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill.config import CONSISTENCY_METHODS, DistillConfig
from distill.methods.consistency import draw_rcm, rcm_critic_step, rcm_student_step, rcm_turns
from distill.methods.matching import (
    StepDraws,
    StepResult,
    critic_step,
    draw_exit_step,
    draw_step,
    step_rng,
    student_step,
)
from distill.methods.trajectory import dp_dmd_student_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What the loop has to know of a method.

    turns: (config, step) -> roles trained in that iteration, in order.
    draw: (config, role, step, shape, device, positions) -> the random numbers of one turn for those places of the
        batch, a function of its arguments alone.
    steps: by role, (networks, batch, draws, config) -> loss and metrics.
    needs_x0: whether the student's batches carry samples of the teacher.
    relates_samples: whether the student's step takes `relate` of `student_step`.
    """

    turns: Callable[[DistillConfig, int], tuple[str, ...]]
    draw: Callable[[DistillConfig, str, int, tuple[int, ...], torch.device, range | None], Any]
    steps: Mapping[str, Callable[..., StepResult]]
    needs_x0: bool = False
    relates_samples: bool = False


def dmd_turns(config: DistillConfig, step: int) -> tuple[str, ...]:
    """Return the roles of an iteration: the critic's turn in each, the student's before it in every N-th."""
    due = step - config.critic_warmup_steps
    return ("student", "critic") if due >= 0 and due % config.student_every_steps == 0 else ("critic",)


def draw_dmd(
    config: DistillConfig,
    role: str,
    step: int,
    shape: tuple[int, ...],
    device: torch.device,
    positions: range | None = None,
) -> StepDraws:
    """Draw one turn of codmd, dmd or dp-dmd; student and critic of an iteration stop at the same exit step.

    dp-dmd never stops at the first: that is not matched, and the critic learns what is matched.
    """
    num_steps, first = len(config.grid().timesteps), int(config.method == "dp-dmd")
    exit_step = draw_exit_step(step_rng(config.seed, "exit", step), num_steps, first)
    return draw_step(config, step_rng(config.seed, role, step), shape, exit_step, device, positions)


_MATCHING = Method(turns=dmd_turns, draw=draw_dmd, steps={"student": student_step, "critic": critic_step})
_CONSISTENCY = Method(
    turns=rcm_turns, draw=draw_rcm, steps={"student": rcm_student_step, "critic": rcm_critic_step}, needs_x0=True
)
METHODS: dict[str, Method] = {
    "codmd": replace(_MATCHING, relates_samples=True),
    "dmd": _MATCHING,
    "rcm": _CONSISTENCY,
    "dcm": _CONSISTENCY,
    "dp-dmd": replace(_MATCHING, steps={"student": dp_dmd_student_step, "critic": critic_step}),
}


def with_method(config: DistillConfig, method: str) -> DistillConfig:
    """Return a recipe changed to a method, with what is published for that method or needed by it.

    Args:
        config: a recipe as it comes, made for codmd or dmd.
        method: codmd, dmd and dp-dmd change nothing else; rcm and dcm also change steps, noise levels, optimizer and
            average, and on the Wan recipes learning rates, batch, guidance and length.

    Raises:
        ConfigError: no such method.

    Source: rCM (arXiv 2510.08431) and rcm@5b41aa9: no clipping, betas (0, .999), a power average of length .05, steps
    at atan(80), 1.5, 1.4 and 1, scores at shift-5 levels without clamp, guidance 5, and for 14B the warm-up of the
    paper with the angles of the code. Deviation: score_sigma_min is 1e-4, since a level of 0 has no noise to judge by.
    """
    if method not in CONSISTENCY_METHODS:
        return replace(config, method=method)
    changed = replace(
        config,
        method=method,
        timesteps=(),
        score_window="full",
        score_sigma_min=1e-4,
        score_sigma_max=1.0,
        optimizer=replace(config.optimizer, betas=(0.0, 0.999), clip_norm=None),
        ema=replace(config.ema, kind="power", length=0.05, start_update=0),
    )
    if config.recipe == "wan_1_3b":
        return replace(
            changed,
            optimizer=replace(changed.optimizer, student_lr=2e-6, critic_lr=4e-7),
            rcm=replace(config.rcm, theta_mean=0.7, warmup_steps=1000, data_steps=100),
            guidance_scale=5.0,
            score_shift=5.0,
            batch_size=256,
            max_steps=10_000,
        )
    if config.recipe == "wan_14b":
        return replace(
            changed,
            optimizer=replace(changed.optimizer, student_lr=1e-6, critic_lr=1e-7),
            rcm=replace(config.rcm, theta_mean=1.5, warmup_steps=200, data_steps=100),
            guidance_scale=5.0,
            score_shift=5.0,
            batch_size=64,
            max_steps=10_000,
            student_every_steps=10,
        )
    # 5 latent frames: -.8 + .5 * log(5) = 0. The warm-up has about the published share of the run.
    return replace(changed, rcm=replace(config.rcm, theta_mean=0.0, warmup_steps=400, data_steps=25))

"""The few-step rollout that training and serving share; it draws no random numbers and owns no network.

Legend: B batch, L prompt tokens, D prompt width, C channels, F latent frames, H and W latent rows and columns.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.grid import check_step_grid
from codmd_serve.schedule import add_noise, flow_to_x0

# (latents_BCFHW float32, timestep_B float32, prompt_embeds_BLD) -> flow_pred_BCFHW
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# (step_index, x0_pred_BCFHW); may raise CancelledError to stop between two steps
OnStep = Callable[[int, Tensor], None]


def rollout(
    denoise: Denoise,
    noise: Tensor,
    prompt_embeds: Tensor,
    sigmas: Sequence[float],
    timesteps: Sequence[float],
    *,
    sampler: str = "sde",
    exit_step: int | None = None,
    grad_exit_step: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample a student: noise in, predicted clean latents out.

    Args:
        denoise: the network, eager or a CUDA graph replay.
        noise: N(0, 1), (num_steps, B, C, F, H, W), drawn by the caller. noise[0] is the initial state; `sde` re-noises
            with noise[k] before step k; `ode` reads noise[0] only.
        prompt_embeds: (B, L, D), passed to the network unchanged.
        sigmas: num_steps + 1 levels, descending, the last 0.0. The initial state is sigmas[0] * noise[0].
        timesteps: num_steps numbers fed to the network, as float32 of shape (B,).
        sampler: `sde` re-noises x0_pred with fresh noise, `ode` is an Euler step along the flow.
        exit_step: stop after this step index; None is the last one.
        grad_exit_step: compute the exit step with gradient, if gradients are enabled. Earlier steps never have one.
        on_step: called after each step with the step index and the detached x0_pred.

    Returns:
        x0_pred of the exit step, (B, C, F, H, W), float32 or wider.

    Raises:
        ConfigError: grid, sampler, exit step and noise do not fit each other.
        CancelledError: when on_step raises it.

    Source: the backward simulation of DMD2 (arXiv 2405.14867), section 4.5, written for the flow of schedule.py.
    """
    last_step = _check_inputs(noise, sigmas, timesteps, sampler, exit_step)
    latents = sigmas[0] * noise[0].to(torch.promote_types(noise.dtype, torch.float32))
    for step_index in range(last_step + 1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and grad_exit_step and step_index == last_step):
            timestep_B = torch.full((latents.shape[0],), timesteps[step_index], device=latents.device)
            flow_pred = denoise(latents, timestep_B, prompt_embeds)
            x0_pred = flow_to_x0(latents, flow_pred, sigmas[step_index])
        if on_step is not None:
            on_step(step_index, x0_pred.detach())
        if step_index < last_step:
            if sampler == "sde":
                latents = add_noise(x0_pred, noise[step_index + 1], sigmas[step_index + 1])
            else:
                latents = latents + (sigmas[step_index + 1] - sigmas[step_index]) * flow_pred.to(latents.dtype)
    return x0_pred


def _check_inputs(
    noise: Tensor, sigmas: Sequence[float], timesteps: Sequence[float], sampler: str, exit_step: int | None
) -> int:
    check_step_grid(sigmas, timesteps, sampler)
    num_steps = len(timesteps)
    last_step = num_steps - 1 if exit_step is None else exit_step
    if not 0 <= last_step < num_steps:
        raise ConfigError(f"exit_step must be in 0..{num_steps - 1}, got {exit_step}")
    num_draws = last_step + 1 if sampler == "sde" else 1
    if noise.ndim != 6 or noise.shape[0] < num_draws:
        raise ConfigError(
            f"noise must be ({num_draws} or more, B, C, F, H, W) for {sampler} up to step {last_step}, "
            f"got {tuple(noise.shape)}"
        )
    return last_step

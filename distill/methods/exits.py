"""Rollouts whose samples stop at denoising steps of their own, in one forward with gradient for the whole batch.

Draws no random number: exit steps and noise come in through `StepDraws`.

Legend: B batch, K denoising steps, C channels, F latent frames, H and W latent rows and columns, L prompt positions,
D text width.
"""

import torch
from torch import Tensor

from codmd_serve.grid import StepGrid
from codmd_serve.sampler import Denoise, rollout
from codmd_serve.schedule import flow_to_x0
from distill.data.prompts import Batch
from distill.methods.draws import StepDraws


def exit_levels(
    draws: StepDraws, grid: StepGrid, batch_size: int, device: torch.device
) -> tuple[float | Tensor, Tensor]:
    """Return the noise level at which samples leave their rollout, and what the student is fed there.

    Returns:
        sigma, one number or (B,) float32 on `device`; timesteps (B,) float32 on `device`.
    """
    if draws.exit_steps is None:
        timestep_B = torch.full((batch_size,), grid.timesteps[draws.exit_step], device=device)
        return grid.sigmas[draws.exit_step], timestep_B
    sigma_B, timestep_B = (
        torch.tensor([values[step] for step in draws.exit_steps.tolist()], dtype=torch.float32, device=device)
        for values in (grid.sigmas, grid.timesteps)
    )
    return sigma_B, timestep_B


def sample_at_exits(
    denoise: Denoise, batch: Batch, draws: StepDraws, grid: StepGrid, sampler: str, *, with_grad: bool
) -> Tensor:
    """Roll out, and predict x0 of each sample at its own exit step.

    The rollout runs without gradient to the last exit step of the whole batch, on every rank alike: sharded networks
    need the same number of forwards everywhere. The samples' exit states then go through the student together.

    Args:
        denoise: the student.
        batch: prompts.
        draws: with `exit_steps`.
        grid: denoising steps.
        sampler: sde or ode.
        with_grad: let the exit step carry gradient.

    Returns:
        x0_pred (B, C, F, H, W) of the exit steps, float32 or wider.

    Source: CoDMD, copula_dmd/dmd.py@aef0ec0 _run_generator. Deviation: the rollout stops at the last exit step in use.
    """
    assert draws.exit_steps is not None
    states: list[Tensor] = []

    def note_state(latents: Tensor, timestep_B: Tensor, prompt_embeds_BLD: Tensor) -> Tensor:
        states.append(latents)
        # Of the last step only the state is needed.
        return denoise(latents, timestep_B, prompt_embeds_BLD) if len(states) <= draws.exit_step else latents

    with torch.no_grad():
        rollout(
            note_state,
            draws.rollout_noise,
            batch.prompt_embeds,
            grid.sigmas,
            grid.timesteps,
            sampler=sampler,
            exit_step=draws.exit_step,
        )
    stacked_KBCFHW = torch.stack(states)
    device = stacked_KBCFHW.device
    places = torch.arange(stacked_KBCFHW.shape[1], device=device)
    latents = stacked_KBCFHW[draws.exit_steps.to(device), places]
    sigma, timestep_B = exit_levels(draws, grid, len(latents), device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and with_grad):
        return flow_to_x0(latents, denoise(latents, timestep_B, batch.prompt_embeds), sigma)

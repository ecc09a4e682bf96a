"""The authors' training iteration, reimplemented as a baseline for `bench-step`; nothing trains with it.

Source: CoDMD, copula_dmd/dmd.py@6a8259b. A rollout runs all steps but the last without gradient, picks one of the
states and calls the network on it again. The guided teacher takes two calls. Prompts keep their padding. x0 goes
through float64 and back, and the critic's flow is recovered from it. `Ablation` removes these one by one.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, L prompt positions, D text width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from codmd_serve.sampler import Denoise
from codmd_serve.schedule import add_noise, expand_sigma
from distill.config import DistillConfig
from distill.data.prompts import Batch
from distill.losses.copula import copula_terms
from distill.methods.draws import StepResult
from distill.methods.matching import MatchingDraws, copula_settings
from distill.methods.scores import student_sample
from distill.networks.build import Networks, denoiser

NUM_PADDED_POSITIONS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """The parts of the authors' iteration that are kept; all True is theirs. No part changes the losses."""

    padded_prompts: bool = True
    full_rollout: bool = True
    two_teacher_calls: bool = True


def padded_batch(batch: Batch) -> Batch:
    """Pad the prompts of a batch with zeros to 512 positions."""
    num_missing = NUM_PADDED_POSITIONS - batch.prompt_embeds.shape[1]
    return replace(
        batch,
        prompt_embeds=functional.pad(batch.prompt_embeds, (0, 0, 0, num_missing)),
        negative_prompt_embeds=functional.pad(batch.negative_prompt_embeds, (0, 0, 0, num_missing)),
    )


def authors_student_step(
    networks: Networks, batch: Batch, draws: MatchingDraws, config: DistillConfig, ablation: Ablation
) -> StepResult:
    """Compute the student's loss of codmd; equals `matching.student_step` under reference_compat up to rounding.

    Args:
        networks: the student gets the gradient.
        batch: padded if the ablation keeps the padding.
        draws: with rollout_noise for every step of the grid, whatever the exit step.
        config: method codmd, frame term only.
        ablation: parts of the authors' iteration to keep.
    """
    student_x0 = _authors_sample(
        denoiser(networks.student, networks.precision), batch, draws, config, ablation, with_grad=True
    )
    with torch.no_grad():
        latents = add_noise(student_x0, draws.score_noise, draws.score_sigma)
        timestep, sigma = draws.score_timestep, draws.score_sigma
        critic = denoiser(networks.critic, networks.precision)
        critic_x0 = _to_x0(latents, critic(latents, timestep, batch.prompt_embeds), sigma)
        cond_x0, uncond_x0 = _teacher_x0(networks, batch, latents, timestep, sigma, ablation)
        # Theirs is cond + g * (cond - uncond): g is one less than guidance_scale.
        teacher_x0 = cond_x0 + (config.guidance_scale - 1.0) * (cond_x0 - uncond_x0)
        distance = (student_x0 - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        direction = torch.nan_to_num((critic_x0 - teacher_x0) / distance)
        target = student_x0.double() - direction.double()
    loss_dmd = 0.5 * functional.mse_loss(student_x0.double(), target)
    copula = copula_settings(config)
    terms = copula_terms(
        student_x0,
        teacher_x0,
        critic_x0,
        use_frame=True,
        use_batch=False,
        temperature=copula.temperature,
        features=copula.features,
        grid=copula.grid,
        reference_compat=True,
    )
    return StepResult(loss=loss_dmd + copula.scale * copula.weight_frame * terms.frame, metrics={})


def authors_critic_step(
    networks: Networks, batch: Batch, draws: MatchingDraws, config: DistillConfig, ablation: Ablation
) -> StepResult:
    """Compute the critic's loss; equals `scores.critic_step` up to rounding. Arguments as above."""
    student_x0 = _authors_sample(
        denoiser(networks.student, networks.precision), batch, draws, config, ablation, with_grad=False
    )
    latents = add_noise(student_x0, draws.score_noise, draws.score_sigma)
    critic = denoiser(networks.critic, networks.precision)
    critic_x0 = _to_x0(latents, critic(latents, draws.score_timestep, batch.prompt_embeds), draws.score_sigma)
    flow_pred = (latents - critic_x0) / expand_sigma(draws.score_sigma, latents)
    return StepResult(loss=functional.mse_loss(flow_pred, draws.score_noise - student_x0), metrics={})


def _teacher_x0(
    networks: Networks, batch: Batch, latents: Tensor, timestep: Tensor, sigma: Tensor, ablation: Ablation
) -> tuple[Tensor, Tensor]:
    teacher = denoiser(networks.teacher, networks.precision)
    both = (batch.prompt_embeds, batch.negative_prompt_embeds)
    if ablation.two_teacher_calls:
        cond_x0, uncond_x0 = (_to_x0(latents, teacher(latents, timestep, embeds), sigma) for embeds in both)
        return cond_x0, uncond_x0
    flows = teacher(torch.cat([latents, latents]), torch.cat([timestep, timestep]), torch.cat(both)).chunk(2)
    return _to_x0(latents, flows[0], sigma), _to_x0(latents, flows[1], sigma)


def _authors_sample(
    denoise: Denoise, batch: Batch, draws: MatchingDraws, config: DistillConfig, ablation: Ablation, *, with_grad: bool
) -> Tensor:
    grid = config.grid()
    if not ablation.full_rollout:
        return student_sample(denoise, batch, draws, grid, "sde", with_grad=with_grad)
    states = [draws.rollout_noise[0]]
    with torch.no_grad():
        for step_index in range(len(grid.timesteps) - 1):
            sigma, timestep_B = (
                _level(grid.sigmas[step_index], states[0]),
                _level(grid.timesteps[step_index], states[0]),
            )
            x0_pred = _to_x0(states[-1], denoise(states[-1], timestep_B, batch.prompt_embeds), sigma)
            states.append(add_noise(x0_pred, draws.rollout_noise[step_index + 1], grid.sigmas[step_index + 1]))
    latents = torch.stack(states, dim=1)[:, draws.exit_step]
    sigma, timestep_B = _level(grid.sigmas[draws.exit_step], latents), _level(grid.timesteps[draws.exit_step], latents)
    with torch.set_grad_enabled(with_grad):
        return _to_x0(latents, denoise(latents, timestep_B, batch.prompt_embeds), sigma)


def _level(value: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), value, device=like.device)


def _to_x0(latents: Tensor, flow_pred: Tensor, sigma_B: Tensor) -> Tensor:
    level = expand_sigma(sigma_B, latents.double())
    return (latents.double() - level * flow_pred.double()).to(latents.dtype)

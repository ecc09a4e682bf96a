"""Distribution matching: the direction from critic and teacher flows, and the loss whose gradient it is.

Knows no network and no random number.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import torch
from torch import Tensor

from codmd_serve.schedule import expand_sigma, flow_to_x0
from distill.losses.flow import at_least_float32

NORMALISER_FLOOR = 1e-5


def guided_flow(cond_flow: Tensor, uncond_flow: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, uncond + guidance_scale * (cond - uncond), in float32 or wider.

    Args:
        cond_flow: (B, C, F, H, W) prediction for the prompt.
        uncond_flow: the same for the negative prompt.
        guidance_scale: 1.0 is no guidance. Sources that write cond + g * (cond - uncond) mean g + 1 here.

    Returns:
        (B, C, F, H, W), float32 or wider.
    """
    cond, uncond = at_least_float32(cond_flow), at_least_float32(uncond_flow)
    return uncond + guidance_scale * (cond - uncond)


def dmd_direction(
    reference: Tensor, latents: Tensor, teacher_flow: Tensor, critic_flow: Tensor, sigma: float | Tensor
) -> Tensor:
    """Return the normalised step, x0_critic - x0_teacher, whose negative moves the student towards the teacher.

    Args:
        reference: (B, C, F, H, W) whose distance to the teacher's clean prediction normalises: the student's sample in
            DMD2 and CoDMD, `latents` in DP-DMD.
        latents: the noisy state that teacher and critic saw.
        teacher_flow: guided flow of the teacher there.
        critic_flow: flow of the critic there.
        sigma: noise level of `latents`, a number or (B,).

    Returns:
        (B, C, F, H, W) direction without gradient, float32 or wider, each sample divided by its mean
        |reference - x0_teacher|, floored at 1e-5.

    Source: DMD2 as in CoDMD, copula_dmd/dmd.py@6a8259b; DP-DMD, dpdmd@d8f75c9 train_sd35_dpdmd.py compute_dmd_loss.
    Deviation: the difference is taken between flows, since two x0 rounded to bfloat16 differ by rounding alone at small
    sigma; and the normaliser has a floor.
    """
    with torch.no_grad():
        gap = expand_sigma(sigma, latents) * (at_least_float32(teacher_flow) - at_least_float32(critic_flow))
        teacher_x0 = flow_to_x0(latents, teacher_flow, sigma)
        distance = (reference - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        return gap / distance.clamp_min(NORMALISER_FLOOR)


def dmd_loss(student_x0: Tensor, direction: Tensor) -> Tensor:
    """Return 0.5 * mean((x0 - stopgrad(x0 - direction))^2), whose gradient is direction / number of elements.

    Args:
        student_x0: (B, C, F, H, W) with gradient.
        direction: from `dmd_direction`, same shape.

    Returns:
        Scalar, float32 or wider.
    """
    wide_x0 = at_least_float32(student_x0)
    target = (wide_x0 - direction).detach()
    return 0.5 * (wide_x0 - target).square().mean()

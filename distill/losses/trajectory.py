"""The diversity term of DP-DMD: the student's first flow should lead to where the teacher's first steps lead.

Knows no network and no random number.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import torch
from torch import Tensor


def trajectory_loss(
    first_flow: Tensor, start: Tensor, teacher_state: Tensor, start_sigma: float, teacher_sigma: float
) -> Tensor:
    """Return mean((first_flow - (start - teacher_state) / (start_sigma - teacher_sigma))^2).

    Args:
        first_flow: (B, C, F, H, W) the student's flow at its first step, with gradient.
        start: the noisy state that both start from, at `start_sigma`.
        teacher_state: where the teacher's Euler steps from `start` have led, a constant.
        start_sigma: noise level of `start`.
        teacher_sigma: noise level of `teacher_state`, below `start_sigma`.

    Returns:
        Scalar, float32 or wider. The target is the mean flow of the teacher on the way, so that one Euler step of the
        student from start_sigma to teacher_sigma ends at `teacher_state` exactly when the loss is 0.

    Source: DP-DMD, dpdmd@d8f75c9, written there for a start at sigma 1.
    """
    dtype = torch.promote_types(first_flow.dtype, torch.float32)
    mean_flow = (start.to(dtype) - teacher_state.to(dtype)) / (start_sigma - teacher_sigma)
    return (first_flow.to(dtype) - mean_flow.detach()).square().mean()

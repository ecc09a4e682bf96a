"""The loss of DMD2's discriminator, and the one that its verdict gives the student; knows no network.

Legend: B batch.
"""

import torch
from torch import Tensor
from torch.nn import functional

from distill.losses.flow import at_least_float32


def logistic_loss(logits_B: Tensor, *, is_real: bool) -> Tensor:
    """Return mean(softplus(-logit)) for samples that should be taken for real, mean(softplus(logit)) for others.

    Args:
        logits_B: of the discriminator, any float dtype; above 0 means real.
        is_real: the verdict that the loss rewards.

    Returns:
        Scalar, float32 or wider. The discriminator's loss is that of real samples plus that of the student's:

            L_D = E_real[softplus(-D)] + E_fake[softplus(D)]

        whose optimum is D = log(p_real / p_fake). The student's is E_fake[softplus(-D)]: it does not saturate where
        the discriminator is sure of a fake.

    Source: DMD2 (arXiv 2405.14867), main/sd_guidance.py@4e54501.
    """
    wide = at_least_float32(logits_B)
    return functional.softplus(-wide if is_real else wide).mean()


def with_gradient(value: Tensor, x0: Tensor, gradient: Tensor) -> Tensor:
    """Return `value` as a function of `x0` whose gradient is the given constant.

    Args:
        value: scalar, a constant.
        x0: (B, C, F, H, W) with gradient.
        gradient: of `value` with respect to `x0`, a constant of the same shape.
    """
    linear = (at_least_float32(x0) * gradient).sum()
    return value.detach() + linear - linear.detach()


def mean_of_verdicts(logits_B: Tensor) -> Tensor:
    """Return the mean logit, detached and in float32: 0 where the discriminator cannot tell."""
    return logits_B.detach().to(torch.float32).mean()

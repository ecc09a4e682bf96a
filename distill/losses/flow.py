"""The flow-matching loss that trains the critic on samples of the student; knows no network.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import torch
from torch import Tensor


def flow_loss(flow_pred: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return mean((flow_pred - (noise - x0))^2), unweighted over noise levels.

    Args:
        flow_pred: (B, C, F, H, W) network output, any float dtype.
        x0: clean latents; a target, so no gradient reaches it.
        noise: the N(0, 1) noise that made the noisy state from `x0`.

    Returns:
        Scalar, float32 or wider.

    Source: CoDMD, copula_dmd/dmd.py@6a8259b. Deviation: the flow itself is compared, where theirs is recovered from a
    bfloat16 x0 divided by sigma, which adds a rounding error of .08 at sigma .02.
    """
    dtype = torch.promote_types(flow_pred.dtype, torch.float32)
    target = (noise.to(dtype) - x0.to(dtype)).detach()
    return (flow_pred.to(dtype) - target).square().mean()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

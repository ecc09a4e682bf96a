"""The loss of a student that is regressed on the end of the teacher's own paths; knows no network.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

from torch import Tensor

from distill.losses.flow import at_least_float32


def regression_loss(x0_pred: Tensor, x0: Tensor) -> Tensor:
    """Return mean((x0_pred - x0)^2).

    Args:
        x0_pred: (B, C, F, H, W) clean prediction of the student at a state of the teacher's path.
        x0: where the path ends; a target, so no gradient reaches it.

    Returns:
        Scalar, float32 or wider.

    Source: CausVid (arXiv 2412.07772), section 4.3, and Self-Forcing (arXiv 2506.08009): ODE initialisation.
    """
    return (at_least_float32(x0_pred) - at_least_float32(x0).detach()).square().mean()

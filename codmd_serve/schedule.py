"""The rectified-flow algebra shared by training and serving; knows neither networks nor step grids.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
x_sigma = (1 - sigma) * x0 + sigma * noise, and the network predicts flow = noise - x0.
Every function computes in float32 or wider, whatever the dtype of its inputs: at sigma = 0.02 a bfloat16 rounding error
is as large as the signal.
"""

from typing import TypeVar

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


def shift_sigma(u: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Shift noise levels towards 1, as Wan does for large videos: shift * u / (1 + (shift - 1) * u).

    Args:
        u: unshifted noise levels in [0, 1], a float or a tensor of any shape.
        shift: > 0; 1 is the identity; Wan 1.3B students are trained with 8, 14B students with 5.

    Returns:
        Shifted levels in [0, 1], same type and shape; 0 and 1 are fixed points.
    """
    return shift * u / (1.0 + (shift - 1.0) * u)


def expand_sigma(sigma: float | Tensor, like: Tensor) -> Tensor:
    """Reshape sigma so that it broadcasts against a (B, ...) tensor.

    Args:
        sigma: a float, a 0-d tensor, or one level per sample of shape (B,).
        like: (B, ...), any floating dtype.

    Returns:
        Tensor of shape () or (B, 1, ..., 1) on the device of `like`, float32 or wider.

    Raises:
        ValueError: sigma has neither 0 nor 1 dimension, or not one level per sample.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(sigma, Tensor):
        # Not as_tensor: its host-to-device copy synchronises, which a CUDA graph cannot record.
        return torch.full((), sigma, dtype=dtype, device=like.device)
    level = sigma.to(like.device, dtype)
    if level.ndim == 0:
        return level
    if level.shape != like.shape[:1]:
        raise ValueError(f"sigma must be a scalar or of shape ({like.shape[0]},), got {tuple(level.shape)}")
    return level.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the noisy state at level sigma.

    Args:
        x0: clean latents (B, C, F, H, W), any floating dtype.
        noise: N(0, 1) of the same shape.
        sigma: level in [0, 1]; float, 0-d tensor or (B,).

    Returns:
        (1 - sigma) * x0 + sigma * noise, same shape, float32 or wider.
    """
    level = expand_sigma(sigma, x0)
    return (1.0 - level) * x0.to(level.dtype) + level * noise.to(level.dtype)


def flow_to_x0(latents: Tensor, flow_pred: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the predicted clean latents of a predicted flow.

    Args:
        latents: noisy state (B, C, F, H, W), any floating dtype.
        flow_pred: network output of the same shape, noise - x0.
        sigma: level of `latents`; float, 0-d tensor or (B,).

    Returns:
        latents - sigma * flow_pred, same shape, float32 or wider.
    """
    level = expand_sigma(sigma, latents)
    return latents.to(level.dtype) - level * flow_pred.to(level.dtype)

"""The terms that AVD adds to distribution matching: regression on real videos that trusts outliers less, and motion.

Knows no network and no random number.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

import torch
from torch import Tensor

from distill.losses.flow import at_least_float32

VARIANCE_FLOOR = 1e-6


def flow_errors(flow_pred: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Return mean((flow_pred - (noise - x0))^2) of each sample.

    Args:
        flow_pred: (B, C, F, H, W) of the student at a real video, noised to one of its levels.
        x0: the video; a target, so no gradient reaches it.
        noise: the N(0, 1) noise.

    Returns:
        (B,), float32 or wider.
    """
    target = (at_least_float32(noise) - at_least_float32(x0)).detach()
    return (at_least_float32(flow_pred) - target).square().flatten(1).mean(dim=1)


def adaptive_weights(error_B: Tensor, mean_B: Tensor, sharpness: float, rate: float) -> Tensor:
    """Return 1 - sigmoid(sharpness * (error - m)), with m the moving mean that already counts this error.

    A sample that the student predicts worse than is usual at its level pulls it far from where matching has brought
    it, and counts less; one that it predicts well counts up to 1.

    Args:
        error_B: from `flow_errors`; no gradient reaches it.
        mean_B: moving mean at each sample's level before this batch; below 0 where there is none yet: weight 1/2.
        sharpness: published 3.
        rate: share of the mean that stays, published .95: error - m is rate * (error - mean).

    Source: AVD (arXiv 2603.21864), causvid/train_distillation_adv.py@0a71f0e.
    """
    excess_B = rate * (error_B.detach() - mean_B)
    return 1.0 - torch.sigmoid(sharpness * torch.where(mean_B < 0, torch.zeros_like(excess_B), excess_B))


def moved_means(mean_K: Tensor, level_B: Tensor, error_B: Tensor, rate: float) -> Tensor:
    """Return the moving mean of the error at each level, after one batch.

    Args:
        mean_K: before; below 0 where no sample has been yet.
        level_B: of each sample of the whole batch, int64.
        error_B: from `flow_errors`; one that is not finite is left out.
        rate: share of the mean that stays.
    """
    is_finite = error_B.isfinite()
    level_B, error_B = level_B[is_finite], error_B[is_finite].to(mean_K.dtype)
    counts_K = torch.bincount(level_B, minlength=len(mean_K)).to(mean_K.dtype)
    batch_K = torch.zeros_like(mean_K).index_add(0, level_B, error_B) / counts_K.clamp(min=1.0)
    moved_K = torch.where(mean_K < 0, batch_K, rate * mean_K + (1.0 - rate) * batch_K)
    return torch.where(counts_K > 0, moved_K, mean_K)


def motion_loss(x0: Tensor, threshold: float) -> Tensor:
    """Return the mean over samples of -log(v + 1e-6), counted only where it is at least the threshold.

    v is the variance of the latents over frames, averaged over everything else: a clip that stands still has none.

    Args:
        x0: (B, C, F, H, W) sample of the student, with gradient.
        threshold: published .8, so that clips with v above .449 are left alone.

    Returns:
        Scalar, float32 or wider.

    Source: AVD (arXiv 2603.21864), causvid/dmd.py@0a71f0e, which has one sample per GPU.
    """
    variance_B = at_least_float32(x0).var(dim=2, unbiased=False).flatten(1).mean(dim=1)
    stillness_B = -(variance_B + VARIANCE_FLOOR).log()
    return torch.where(stillness_B >= threshold, stillness_B, torch.zeros_like(stillness_B)).mean()

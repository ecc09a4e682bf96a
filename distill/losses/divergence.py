"""The weights of f-distill: how much each sample of the student counts, by the f-divergence that is minimised.

Knows no network. The ratio of densities r = p_teacher / p_student at a noisy sample comes from a discriminator.

Legend: B batch, K bins of noise levels.
"""

import torch
from torch import Tensor

# Beyond this the exponential says nothing that the bounds of the ratio do not.
LARGEST_LOGIT = 10.0
REVERSE_KL, FORWARD_KL, JENSEN_SHANNON = "reverse_kl", "forward_kl", "js"
DIVERGENCES = (REVERSE_KL, JENSEN_SHANNON, FORWARD_KL)


def density_ratio(logits_B: Tensor, lowest: float, highest: float) -> Tensor:
    """Return exp(logit) within bounds, float32: p_teacher / p_student of the discriminator of `losses.gan`."""
    return logits_B.detach().float().clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp().clamp(lowest, highest)


def divergence_weight(ratio: Tensor, divergence: str) -> Tensor:
    """Return h(r) = f''(r) * r^2 of D_f(p || q) = E_q[f(p / q)], with p the teacher, q the student and r = p / q.

    The gradient of D_f with respect to the student is that of distribution matching with each sample weighted by h:

        reverse_kl  f = -log(r)                               h = 1        seeks modes; this is DMD
        js          f = r * log(r) - (r + 1) * log((r + 1)/2)   h = r / (r + 1)
        forward_kl  f = r * log(r)                            h = r        covers modes, at the price of variance

    Args:
        ratio: above 0.
        divergence: one of DIVERGENCES.

    Source: f-distill (arXiv 2502.15681), theorem 1 and table 1.
    """
    if divergence == FORWARD_KL:
        return ratio
    if divergence == JENSEN_SHANNON:
        return ratio / (1.0 + ratio)
    assert divergence == REVERSE_KL
    return torch.ones_like(ratio)


def level_bins(sigma_B: Tensor, num_bins: int) -> Tensor:
    """Return in which of equal bins of 0..1 each noise level lies, (B,) int64."""
    return (sigma_B * num_bins).floor().long().clamp(0, num_bins - 1)


def binned_means(ratio_B: Tensor, bin_B: Tensor, means_K: Tensor, rate: float) -> Tensor:
    """Return the moving mean of the ratio in each bin, after one batch.

    Args:
        ratio_B: of the whole batch.
        bin_B: from `level_bins`.
        means_K: before; a bin without samples keeps its own.
        rate: share of the mean before that stays; 0 takes the batch's own.
    """
    counts_K = torch.bincount(bin_B, minlength=len(means_K)).to(means_K.dtype)
    sums_K = torch.zeros_like(means_K).index_add(0, bin_B, ratio_B.to(means_K.dtype))
    moved_K = rate * means_K + (1.0 - rate) * sums_K / counts_K.clamp(min=1.0)
    return torch.where(counts_K > 0, moved_K, means_K)


def normalised_weights(ratio_B: Tensor, bin_B: Tensor, means_K: Tensor, divergence: str) -> Tensor:
    """Return the weights of a whole batch, whose mean is 1.

    Two stages: the ratio is divided by the mean of its noise level, so that levels at which the discriminator is sure
    do not outweigh the others; and h by its mean over the batch, so that the size of the gradient stays that of DMD.

    Args:
        ratio_B: of the whole batch.
        bin_B: from `level_bins`.
        means_K: from `binned_means`.
        divergence: one of DIVERGENCES.

    Source: f-distill (arXiv 2502.15681), section 3.3; FastGen@34f30e8, f_distill.py.
    """
    weight_B = divergence_weight(ratio_B / means_K[bin_B].clamp(min=1e-6), divergence)
    return weight_B / weight_B.mean().clamp(min=1e-6)

"""Entropic optimal transport between what critic and teacher predict: the term that VDOT adds to DMD.

Distribution matching moves a sample by x0_critic - x0_teacher: it compares each item with its own partner. Here the
partners are chosen: of all items of a group (the tokens of a frame, or the samples of a batch), the plan P moves the
critic's onto the teacher's at least cost,

    P = argmin sum_ij P_ij * |x_i - y_j|^2 - epsilon * H(P),   all rows of P sum to 1/N, all columns too,

and the gradient of that cost with respect to x_i is, up to a factor, x_i - T(x_i), T(x_i) = N * sum_j P_ij * y_j. With
P the identity it is the direction of distribution matching. It vanishes where critic and teacher agree, up to the blur
that epsilon leaves.

Knows no network and no random number.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns; G groups of N items with D features.
"""

import torch
from torch import Tensor

from distill.losses.dmd import NORMALISER_FLOOR
from distill.losses.flow import at_least_float32

# Latents per side of a token, where rows and columns are even: Wan's own patch.
TOKEN_SIDE = 2
# Entries of the plans that are made at once, of 4 bytes and a few times over: one sample of Wan has 51 million.
PLAN_ENTRIES = 2**20


def squared_distances(first_GND: Tensor, second_GMD: Tensor) -> Tensor:
    """Return |x_i - y_j|^2, (G, N, M) float32 or wider, computed from differences and so exact where they are small."""
    pair = at_least_float32(first_GND), at_least_float32(second_GMD)
    return torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist").square()


def transport_plan(cost_GNM: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the entropic plan between uniform marginals, by Sinkhorn's iterations in the log domain.

    Args:
        cost_GNM: finite, at least 0.
        epsilon: weight of the entropy, as a share of the mean cost of each group.
        iterations: each scales rows, then columns; the columns are exact at the end.

    Returns:
        (G, N, M), the dtype of the cost; it sums to 1 in each group.

    Source: Cuturi (arXiv 1306.0895).
    """
    scale = (epsilon * cost_GNM.mean(dim=(1, 2), keepdim=True)).clamp(min=torch.finfo(cost_GNM.dtype).tiny)
    kernel = -cost_GNM / scale
    # Logarithms of what rows and columns are scaled by; columns then sum to 1, and the whole to their number.
    row_G, column_G = torch.zeros_like(kernel[:, :, :1]), torch.zeros_like(kernel[:, :1])
    for _ in range(iterations):
        row_G = -torch.logsumexp(kernel + column_G, dim=2, keepdim=True)
        column_G = -torch.logsumexp(kernel + row_G, dim=1, keepdim=True)
    return (kernel + row_G + column_G).exp() / cost_GNM.shape[2]


def transported(plan_GNM: Tensor, targets_GMD: Tensor) -> Tensor:
    """Return T(x_i), the mean of the targets that the plan gives to each item, (G, N, D)."""
    weights = plan_GNM / plan_GNM.sum(dim=2, keepdim=True).clamp(min=torch.finfo(plan_GNM.dtype).tiny)
    return weights @ at_least_float32(targets_GMD)


def frame_tokens(x0: Tensor) -> Tensor:
    """Return the tokens of each frame, (B * F, N, D): cells of 2 x 2 latents, or of one where a side is odd."""
    batch, channels, frames, height, width = x0.shape
    rows, columns = _cell(height), _cell(width)
    cells = x0.reshape(batch, channels, frames, height // rows, rows, width // columns, columns)
    return cells.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch * frames, -1, channels * rows * columns)


def from_frame_tokens(tokens_GND: Tensor, shape: torch.Size) -> Tensor:
    """Return the (B, C, F, H, W) latents of the tokens that `frame_tokens` gave."""
    batch, channels, frames, height, width = shape
    rows, columns = _cell(height), _cell(width)
    cells = tokens_GND.reshape(batch, frames, height // rows, width // columns, channels, rows, columns)
    return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(shape)


def _cell(side: int) -> int:
    return TOKEN_SIDE if side % TOKEN_SIDE == 0 else 1


@torch.no_grad()
def transported_frames(critic_x0: Tensor, teacher_x0: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return where the plan between the tokens of each frame moves the critic's prediction, (B, C, F, H, W).

    As many samples at once as `PLAN_ENTRIES` allows, at least one.
    """
    num_entries = frame_tokens(critic_x0[:1]).shape[1] ** 2 * critic_x0.shape[2]
    at_once = max(1, PLAN_ENTRIES // num_entries)
    parts = []
    for some, their_targets in zip(torch.split(critic_x0, at_once), torch.split(teacher_x0, at_once), strict=True):
        tokens, targets = frame_tokens(some), frame_tokens(their_targets)
        plan = transport_plan(squared_distances(tokens, targets), epsilon, iterations)
        parts.append(from_frame_tokens(transported(plan, targets), some.shape))
    return torch.cat(parts)


@torch.no_grad()
def transported_samples(critic_x0: Tensor, teacher_x0: Tensor, epsilon: float, iterations: int, own: slice) -> Tensor:
    """Return where the plan between the samples of a whole batch moves some of the critic's predictions.

    Args:
        critic_x0: (B, C, F, H, W) of the whole batch.
        teacher_x0: the same.
        epsilon, iterations: of `transport_plan`.
        own: which samples are returned.
    """
    items, targets = critic_x0.flatten(1)[None], teacher_x0.flatten(1)[None]
    plan = transport_plan(squared_distances(items, targets), epsilon, iterations)
    return transported(plan[:, own], targets)[0].reshape(-1, *critic_x0.shape[1:])


@torch.no_grad()
def transport_direction(student_x0: Tensor, critic_x0: Tensor, teacher_x0: Tensor, partner: Tensor) -> Tensor:
    """Return (x0_critic - partner), divided per sample by mean |x0_student - x0_teacher| as `dmd_direction` is.

    Args:
        student_x0: (B, C, F, H, W); only its distance to the teacher is read.
        critic_x0: the critic's prediction.
        teacher_x0: the guided teacher's.
        partner: from `transported_frames` or `transported_samples`.
    """
    distance = (student_x0 - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return (critic_x0 - partner) / distance.clamp(min=NORMALISER_FLOOR)

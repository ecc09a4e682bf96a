"""The relational (copula) term: the student's frames and samples should relate to each other as the teacher's do.

Knows no network and no random number.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, V videos; G independent groups of N
related items with D features each: (B, F, D) for frames, (1, B, D) for the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FEATURES = ("mean", "spatial")


@dataclass(frozen=True, kw_only=True, slots=True)
class CopulaTerms:
    """The two relational losses, scalars; a term that is not used is 0."""

    frame: Tensor
    batch: Tensor


def copula_terms(
    student_x0: Tensor,
    teacher_x0: Tensor,
    critic_x0: Tensor,
    *,
    use_frame: bool,
    use_batch: bool,
    temperature: float,
    features: str = "mean",
    grid: int = 2,
    reference_compat: bool = False,
    frame_permutation_BF: Tensor | None = None,
    batch_permutation_B: Tensor | None = None,
    permute_critic: bool = False,
    relate: Callable[[Tensor], Tensor] | None = None,
) -> CopulaTerms:
    """Compare relations of the student with those of the teacher, corrected by the critic's.

    Args:
        student_x0: (B, C, F, H, W) clean prediction, with gradient.
        teacher_x0, critic_x0: guided teacher's and critic's at the same noisy state; no gradient reaches them.
        use_frame, use_batch: which terms to compute: over frames of each sample, over samples of the batch.
        temperature: of the softmax over similarities, > 0; published 0.1.
        features: "mean" averages over H, W (published; blind to motion that keeps channel means), "spatial" pools
            to grid x grid and centres over the related items.
        grid: cells per side for "spatial".
        reference_compat: keep the diagonal in the softmax of the batch term, as the authors' code does.
        frame_permutation_BF: control arms: index of the teacher frame put at each frame, int64.
        batch_permutation_B: control arms: index of the teacher sample put at each sample of the whole batch, int64.
        permute_critic: put the critic's frames and samples at the same places, so that the term has the size of the
            true one and vanishes with it; False shuffles the teacher alone, and the term never vanishes.
        relate: where the B samples are a part of a larger batch, turns their (B, 3, D) features, of student, teacher
            and critic, into those of the whole batch; None where they are the whole.

    Returns:
        The two losses, each >= 0, unweighted.

    Source: CoDMD, copula_loss.py@6a8259b. Deviations: log_softmax instead of log(softmax), which is NaN below a
    temperature of about .015; off-diagonal softmax in the batch term, because each item's similarity of 1 to itself
    otherwise takes nearly all the probability and the gradient shrinks some 26 times.
    """
    frame = batch = student_x0.new_zeros(())
    videos = (student_x0, teacher_x0.detach(), critic_x0.detach())
    shuffled = (1, 2) if permute_critic else (1,)
    if use_frame:
        trio = [frame_features(x0, features, grid) for x0 in videos]
        if frame_permutation_BF is not None:
            for place in shuffled:
                trio[place] = trio[place].gather(1, frame_permutation_BF[:, :, None].expand_as(trio[place]))
        frame = relational_kl(*trio, temperature=temperature, skip_diagonal=False)
    if use_batch:
        trio = batch_features(videos, features, grid, relate)
        if batch_permutation_B is not None:
            for place in shuffled:
                trio[place] = trio[place][:, batch_permutation_B]
        batch = relational_kl(*trio, temperature=temperature, skip_diagonal=not reference_compat)
    return CopulaTerms(frame=frame, batch=batch)


def frame_features(x0_BCFHW: Tensor, features: str, grid: int) -> Tensor:
    """Return (B, F, D) features of each frame, float32 or wider; D is C, or C * grid^2 for "spatial"."""
    pooled_BCFhw = _pool(x0_BCFHW, features, grid)
    return _centre(pooled_BCFhw.movedim(2, 1).flatten(2), features)


def batch_features(
    videos_BCFHW: tuple[Tensor, ...], features: str, grid: int, relate: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Return (1, N, D) features of each sample of each video, averaged over frames; dtype and D as `frame_features`.

    N is B, or what `relate` of `copula_terms` makes of it.
    """
    pooled_BVD = pooled_features(videos_BCFHW, features, grid)
    if relate is not None:
        pooled_BVD = relate(pooled_BVD)
    return [_centre(items_BD[None], features) for items_BD in pooled_BVD.unbind(1)]


def pooled_features(videos_BCFHW: tuple[Tensor, ...], features: str, grid: int) -> Tensor:
    """Return the (B, V, D) features of `batch_features` before they are completed and centred."""
    return torch.stack([_pool(x0, features, grid).mean(dim=2).flatten(1) for x0 in videos_BCFHW], dim=1)


def relational_kl(
    student_GND: Tensor, teacher_GND: Tensor, critic_GND: Tensor, *, temperature: float, skip_diagonal: bool
) -> Tensor:
    """Return the mean over rows of KL(P || Q) between softmaxes over cosine similarities.

    Args:
        student_GND: features with gradient.
        teacher_GND: same shape, a constant.
        critic_GND: same shape, a constant.
        temperature: > 0.
        skip_diagonal: leave each item's similarity to itself out of both softmaxes.

    Returns:
        Scalar. With S, R, Phi the similarity matrices of student, teacher and critic, Q = softmax(S / temperature) and
        P = stopgrad softmax((S - (Phi - R)) / temperature). Zero, as is its gradient, iff Phi - R is constant along
        every row; 0 when a row has no entry.
    """
    student, teacher, critic = (_similarity(items) for items in (student_GND, teacher_GND, critic_GND))
    target_logits = (student - (critic - teacher)).detach()
    if skip_diagonal:
        student, target_logits = _drop_diagonal(student), _drop_diagonal(target_logits)
    if student.shape[-1] == 0:
        return student.sum()
    log_q = functional.log_softmax(student / temperature, dim=-1)
    log_p = functional.log_softmax(target_logits / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def _pool(x0_BCFHW: Tensor, features: str, grid: int) -> Tensor:
    wide = x0_BCFHW.to(torch.promote_types(x0_BCFHW.dtype, torch.float32))
    if features == "mean":
        return wide.mean(dim=(3, 4), keepdim=True)
    pooled = functional.adaptive_avg_pool2d(wide.flatten(0, 2)[:, None], grid)
    return pooled.reshape(*wide.shape[:3], grid, grid)


def _centre(items_GND: Tensor, features: str) -> Tensor:
    # A still background is common to all items and would make every cosine nearly 1.
    return items_GND if features == "mean" else items_GND - items_GND.mean(dim=1, keepdim=True)


def _similarity(items_GND: Tensor) -> Tensor:
    unit = functional.normalize(items_GND, dim=-1)
    return unit @ unit.mT


def _drop_diagonal(matrix_GNN: Tensor) -> Tensor:
    num_groups, num_items, _ = matrix_GNN.shape
    # Without its first entry, the flattened matrix has the diagonal in every (N + 1)-th place, at the end of a row.
    shifted = matrix_GNN.flatten(1)[:, 1:].reshape(num_groups, max(num_items - 1, 0), num_items + 1)
    return shifted[:, :, :-1].reshape(num_groups, num_items, max(num_items - 1, 0))

"""Control arms of the relational term: terms of its size that know nothing of the teacher's relations.

If a control gains as much as the term, the gain is not relational.

- matched: teacher and critic are shuffled by one permutation of frames, and one of samples. The term has the size of
  the true one and vanishes, with its gradient, when critic and teacher agree.
- teacher_only: the teacher alone is shuffled. Its gradient is 5 to 38 times that of the true term and never vanishes,
  so that this arm does badly proves nothing; kept for comparison with runs of that kind.
- noise: the true term's gradient on each sample is replaced by noise of the same norm.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns, g cells per side of pooled features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distill.losses.copula import CopulaTerms

NO_CONTROL, MATCHED, TEACHER_ONLY, NOISE = "none", "matched", "teacher_only", "noise"
CONTROLS = (NO_CONTROL, MATCHED, TEACHER_ONLY, NOISE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlDraws:
    """What a control arm draws; None where the arm has no use for it.

    Attributes:
        frame_permutation: (B, F) int64, for each sample.
        batch_permutation: (B,) int64, of the whole batch whatever part of it is drawn.
        noise: (B, C, F + 1, g, g) N(0, 1): for the frame term, and in the last frame for the batch term.
    """

    frame_permutation: Tensor | None = None
    batch_permutation: Tensor | None = None
    noise: Tensor | None = None


def draw_control(
    control: str,
    rng: torch.Generator,
    shape: tuple[int, ...],
    cells: int,
    device: torch.device,
    positions: range | None = None,
) -> ControlDraws:
    """Draw what an arm needs.

    Args:
        control: one of CONTROLS.
        rng: on the CPU.
        shape: (B, C, F, H, W) of the whole batch.
        cells: g.
        device: of the result.
        positions: which samples of the batch; None is all.
    """
    batch_size, num_channels, num_frames, *_ = shape
    own = slice(None) if positions is None else slice(positions.start, positions.stop)
    if control in (MATCHED, TEACHER_ONLY):
        frames = torch.rand((batch_size, num_frames), generator=rng).argsort(dim=1)[own].to(device)
        samples = torch.randperm(batch_size, generator=rng).to(device)
        return ControlDraws(frame_permutation=frames, batch_permutation=samples)
    if control == NOISE:
        noise = torch.randn((batch_size, num_channels, num_frames + 1, cells, cells), generator=rng)
        return ControlDraws(noise=noise[own].to(device))
    return ControlDraws()


def replace_gradient(terms: CopulaTerms, student_x0: Tensor, draws: ControlDraws) -> CopulaTerms:
    """Return the same values with noise for gradients.

    The noise is constant over the cells that the features pool, and over frames for the batch term, as the term's own
    gradient is: white noise of that norm would average out in the network.

    Args:
        terms: of `copula_terms`, with gradient on `student_x0`.
        student_x0: (B, C, F, H, W).
        draws: with `noise`.
    """
    assert draws.noise is not None
    return CopulaTerms(
        frame=_with_noise(terms.frame, student_x0, draws.noise[:, :, :-1]),
        batch=_with_noise(terms.batch, student_x0, draws.noise[:, :, -1:]),
    )


def _with_noise(term: Tensor, student_x0: Tensor, noise: Tensor) -> Tensor:
    if not term.requires_grad:  # a term that is not used
        return term
    (gradient,) = torch.autograd.grad(term, student_x0, retain_graph=True)
    size = (student_x0.shape[2], *student_x0.shape[3:])
    spread = functional.interpolate(noise, size=size, mode="nearest").to(gradient.dtype)
    scale = _norms(gradient) / _norms(spread).clamp(min=1e-12)
    replaced = (student_x0 * (spread * scale).detach()).sum()
    return term.detach() + (replaced - replaced.detach())


def _norms(values: Tensor) -> Tensor:
    """Return the norm of each sample, broadcastable to (B, C, F, H, W)."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=(1, 2, 3, 4), keepdim=True)
    return norms

"""The relational term: where its gradient vanishes, what it can see, and that it stays finite."""

import pytest
import torch
from torch import Tensor

from distill.losses.copula import CopulaTerms, batch_features, copula_terms, frame_features, relational_kl

SHAPE = (4, 6, 5, 8, 8)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def terms(student: Tensor, teacher: Tensor, critic: Tensor, **options: object) -> CopulaTerms:
    settings: dict = {"use_frame": True, "use_batch": True, "temperature": 0.1} | options
    return copula_terms(student, teacher, critic, **settings)


@pytest.mark.parametrize("features", ["mean", "spatial"])
@pytest.mark.parametrize("reference_compat", [False, True])
def test_gradient_is_zero_when_critic_relates_as_the_teacher_does(features: str, reference_compat: bool) -> None:
    student = normal(0).requires_grad_()
    # Cosines ignore length, so a critic at half the teacher's amplitude has Phi - R = 0.
    result = terms(student, normal(1), 0.5 * normal(1), features=features, reference_compat=reference_compat)
    (result.frame + result.batch).backward()
    assert student.grad is not None
    assert float(result.frame.detach()) == pytest.approx(0, abs=1e-12)
    assert float(student.grad.abs().max()) < 1e-12


def test_gradient_is_zero_when_the_correction_is_constant_per_row() -> None:
    """Softmax ignores a constant: orthogonal teacher items against a critic of equal mutual cosines."""
    teacher = torch.eye(4, dtype=torch.float64)[None]
    cosine = 0.3
    critic = torch.linalg.cholesky((1 - cosine) * torch.eye(4, dtype=torch.float64) + cosine)[None]
    student = normal(0, (1, 4, 4)).requires_grad_()
    without = relational_kl(student, teacher, critic, temperature=0.1, skip_diagonal=True)
    assert float(without.detach()) == pytest.approx(0, abs=1e-12)
    # With the diagonal in, 0 there and 0.3 elsewhere is no constant any more.
    assert float(relational_kl(student, teacher, critic, temperature=0.1, skip_diagonal=False).detach()) > 1e-3


def test_gradient_of_the_similarities_is_q_minus_p() -> None:
    student, teacher, critic = (normal(seed, (1, 4, 3)) for seed in range(3))
    unit = [torch.nn.functional.normalize(items, dim=-1) for items in (student, teacher, critic)]
    s, r, phi = (items @ items.mT for items in unit)
    p = torch.softmax((s - phi + r) / 0.1, dim=-1)
    leaf = student.requires_grad_()
    relational_kl(leaf, teacher, critic, temperature=0.1, skip_diagonal=False).backward()
    other = student.detach().clone().requires_grad_()
    unit_other = torch.nn.functional.normalize(other, dim=-1)
    s_other = unit_other @ unit_other.mT
    s_other.backward((torch.softmax(s_other / 0.1, dim=-1) - p).detach() / (4 * 0.1))
    torch.testing.assert_close(leaf.grad, other.grad)


def test_terms_are_not_negative_and_positive_when_relations_differ() -> None:
    result = terms(normal(0), normal(1), normal(2))
    assert float(result.frame) > 0
    assert float(result.batch) > 0


def test_unused_terms_are_zero_and_not_computed() -> None:
    result = terms(normal(0), normal(1), normal(2), use_frame=False, use_batch=False)
    assert float(result.frame) == 0
    assert float(result.batch) == 0


def test_loss_descends_along_its_gradient() -> None:
    student = normal(0).requires_grad_()
    first = terms(student, normal(1), normal(2))
    (gradient,) = torch.autograd.grad(first.frame + first.batch, student)
    # The target moves with the student; hold it by comparing rows of P computed at the start.
    step = 1e-3 * gradient / gradient.norm()
    fixed = terms_with_fixed_target(student.detach(), student.detach() - step)
    assert fixed[1] < fixed[0]


def terms_with_fixed_target(before: Tensor, after: Tensor) -> tuple[float, float]:
    losses = []
    teacher, critic = frame_features(normal(1), "mean", 2), frame_features(normal(2), "mean", 2)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (frame_features(before, "mean", 2), teacher, critic)]
    s, r, phi = (x @ x.mT for x in unit)
    log_p = torch.log_softmax((s - phi + r) / 0.1, dim=-1)
    for x0 in (before, after):
        features = torch.nn.functional.normalize(frame_features(x0, "mean", 2), dim=-1)
        log_q = torch.log_softmax(features @ features.mT / 0.1, dim=-1)
        losses.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    return losses[0], losses[1]


@pytest.mark.parametrize("temperature", [0.1, 0.015, 0.01, 0.001])
def test_small_temperatures_stay_finite(temperature: float) -> None:
    student = normal(0).float().requires_grad_()
    result = terms(student, normal(1).float(), normal(2).float(), temperature=temperature)
    (result.frame + result.batch).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert bool(torch.isfinite(result.frame + result.batch))


def test_zero_features_stay_finite() -> None:
    student = torch.zeros(SHAPE).requires_grad_()
    result = terms(student, torch.zeros(SHAPE), normal(2).float())
    (result.frame + result.batch).backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_dropping_the_diagonal_restores_the_batch_gradient() -> None:
    """Near-orthogonal samples, all three networks close: each sample's similarity to itself swallows the softmax."""
    shape = (32, 16, 3, 4, 4)
    teacher, critic = (normal(0, shape) + 0.1 * normal(seed, shape) for seed in (1, 2))
    norms = {}
    for compat in (False, True):
        student = normal(0, shape).requires_grad_()
        result = terms(student, teacher, critic, use_frame=False, reference_compat=compat)
        (gradient,) = torch.autograd.grad(result.batch, student)
        norms[compat] = float(gradient.norm())
    assert norms[False] > 20 * norms[True]


def test_reference_compat_changes_the_batch_term_only() -> None:
    ours, theirs = (terms(normal(0), normal(1), normal(2), reference_compat=compat) for compat in (False, True))
    assert float(ours.frame) == float(theirs.frame)
    assert float(ours.batch) != float(theirs.batch)


def test_batch_of_one_has_no_relation_and_a_zero_gradient() -> None:
    student = normal(0)[:1].requires_grad_()
    result = terms(student, normal(1)[:1], normal(2)[:1], use_frame=False)
    result.batch.backward()
    assert float(result.batch.detach()) == 0
    assert student.grad is not None
    assert float(student.grad.abs().max()) == 0


def moving_dot(step: int) -> Tensor:
    """One bright cell that moves by `step` cells per frame on a dark ground: channel means never change."""
    video = torch.zeros(1, 1, 4, 8, 8, dtype=torch.float64)
    for frame in range(4):
        video[0, 0, frame, 3, (frame * step) % 8] = 1.0
    return video


def test_mean_features_are_blind_to_motion_and_spatial_features_are_not() -> None:
    def loss(features: str) -> float:
        result = terms(moving_dot(0), moving_dot(2), moving_dot(0), features=features, use_batch=False)
        return float(result.frame)

    assert loss("mean") == pytest.approx(0, abs=1e-12)
    assert loss("spatial") > 1e-3


@pytest.mark.parametrize(("features", "grid", "width"), [("mean", 2, 6), ("spatial", 2, 24), ("spatial", 3, 54)])
def test_feature_shapes(features: str, grid: int, width: int) -> None:
    assert frame_features(normal(0), features, grid).shape == (4, 5, width)
    videos = (normal(0), normal(1))
    assert [items.shape for items in batch_features(videos, features, grid)] == [(1, 4, width)] * 2


def test_features_of_bf16_are_float32() -> None:
    assert frame_features(normal(0).bfloat16(), "mean", 2).dtype == torch.float32


def test_permutation_equals_permuting_the_teacher_video() -> None:
    order_BF = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    order_B = torch.tensor([2, 0, 3, 1])
    teacher = normal(1)
    by_frame = torch.stack([sample[:, order] for sample, order in zip(teacher, order_BF, strict=True)])
    got = terms(normal(0), teacher, normal(2), frame_permutation_BF=order_BF, batch_permutation_B=order_B)
    assert float(got.frame) == pytest.approx(float(terms(normal(0), by_frame, normal(2)).frame), rel=1e-12)
    assert float(got.batch) == pytest.approx(float(terms(normal(0), teacher[order_B], normal(2)).batch), rel=1e-12)
    assert float(got.frame) != pytest.approx(float(terms(normal(0), teacher, normal(2)).frame), rel=1e-6)


def test_no_gradient_reaches_teacher_or_critic() -> None:
    student, teacher, critic = (normal(seed).requires_grad_() for seed in range(3))
    result = terms(student, teacher, critic)
    (result.frame + result.batch).backward()
    assert teacher.grad is None
    assert critic.grad is None
    assert student.grad is not None

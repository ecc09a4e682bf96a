"""Control arms: the size of the true term, none of its content, and drawn alike in parts and as a whole."""

import pytest
import torch
from torch import Tensor

from distill.losses.copula import CopulaTerms, copula_terms
from distill.methods.controls import (
    CONTROLS,
    MATCHED,
    NOISE,
    TEACHER_ONLY,
    ControlDraws,
    draw_control,
    replace_gradient,
)

SHAPE = (16, 4, 8, 4, 4)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(control: str, seed: int = 0, cells: int = 2) -> ControlDraws:
    return draw_control(control, torch.Generator().manual_seed(seed), SHAPE, cells, torch.device("cpu"))


def terms_of(
    control: str, student: Tensor, teacher: Tensor, critic: Tensor, features: str, seed: int = 0
) -> CopulaTerms:
    draws = drawn(control, seed, 1 if features == "mean" else 2)
    terms = copula_terms(
        student,
        teacher,
        critic,
        use_frame=True,
        use_batch=True,
        temperature=0.1,
        features=features,
        frame_permutation_BF=draws.frame_permutation,
        batch_permutation_B=draws.batch_permutation,
        permute_critic=control == MATCHED,
    )
    return replace_gradient(terms, student, draws) if control == NOISE else terms


def gradients(control: str, features: str, gap: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of the frame and batch terms where critic and teacher differ by `gap`, around a common scene."""
    scene = normal(10)
    student = (scene + 0.3 * normal(1)).requires_grad_()
    teacher = scene + 0.3 * normal(2)
    terms = terms_of(control, student, teacher, teacher + gap * normal(3), features, seed)
    frame, batch = (torch.autograd.grad(term, student, retain_graph=True)[0] for term in (terms.frame, terms.batch))
    return frame, batch


@pytest.mark.parametrize("features", ["mean", "spatial"])
def test_size_matched_controls_have_the_size_of_the_term_and_the_old_one_has_not(features: str) -> None:
    true = gradients("none", features, gap=0.1)
    ratios = {
        control: [
            sum(float(gradients(control, features, 0.1, seed)[place].norm()) for seed in range(4)) / 4 / float(norm)
            for place, norm in enumerate(term.norm() for term in true)
        ]
        for control in (MATCHED, TEACHER_ONLY, NOISE)
    }
    assert ratios[NOISE] == pytest.approx([1.0, 1.0], rel=1e-9)
    assert all(0.4 < ratio < 2.5 for ratio in ratios[MATCHED]), ratios
    assert all(ratio > 3.0 for ratio in ratios[TEACHER_ONLY]), ratios


@pytest.mark.parametrize("control", [MATCHED, NOISE])
@pytest.mark.parametrize("features", ["mean", "spatial"])
def test_size_matched_controls_vanish_when_critic_and_teacher_agree(control: str, features: str) -> None:
    assert all(float(gradient.norm()) < 1e-12 for gradient in gradients(control, features, gap=0.0))
    assert all(float(gradient.norm()) > 1e-3 for gradient in gradients(TEACHER_ONLY, features, gap=0.0))


@pytest.mark.parametrize("features", ["mean", "spatial"])
def test_noise_has_each_samples_own_norm_the_terms_form_and_no_direction_of_it(features: str) -> None:
    true, noise = gradients("none", features, 0.1), gradients(NOISE, features, 0.1)
    for ours, theirs in zip(noise, true, strict=True):
        torch.testing.assert_close(ours.flatten(1).norm(dim=1), theirs.flatten(1).norm(dim=1))
        # Constant over the pooled cells, as the term's own gradient.
        side = 4 if features == "mean" else 2
        for gradient in (ours, theirs):
            cells = gradient.unfold(3, side, side).unfold(4, side, side).flatten(5)
            torch.testing.assert_close(cells, cells[..., :1].expand_as(cells))
    others = [gradients(NOISE, features, 0.1, seed) for seed in range(48)]
    for place, theirs in enumerate(true):
        cosines = [float((one[place] * theirs).sum() / one[place].norm() / theirs.norm()) for one in others]
        assert abs(sum(cosines) / len(cosines)) < 0.12
    for batch_term in (noise[1], true[1]):
        torch.testing.assert_close(batch_term, batch_term[:, :, :1].expand_as(batch_term))


def test_noise_keeps_the_values_of_the_terms_and_an_unused_one() -> None:
    student = normal(1).requires_grad_()
    terms = copula_terms(student, normal(2), normal(3), use_frame=True, use_batch=False, temperature=0.1)
    replaced = replace_gradient(terms, student, drawn(NOISE))
    assert torch.equal(replaced.frame.detach(), terms.frame.detach()) and replaced.batch is terms.batch


def test_matched_permutation_of_a_symmetric_batch_is_that_of_its_relations() -> None:
    """Shuffling teacher and critic alike is the true term of a student that was shuffled the other way."""
    student, teacher, critic = normal(1).requires_grad_(), normal(2), normal(3)
    draws = drawn(MATCHED)
    order = draws.batch_permutation
    assert order is not None
    options = {"use_frame": False, "use_batch": True, "temperature": 0.1}
    control = copula_terms(student, teacher, critic, batch_permutation_B=order, permute_critic=True, **options)
    true = copula_terms(student[order.argsort()], teacher, critic, **options)
    torch.testing.assert_close(control.batch, true.batch)


@pytest.mark.parametrize("control", CONTROLS)
def test_parts_of_a_batch_draw_what_the_whole_draws(control: str) -> None:
    whole = drawn(control)
    part = draw_control(control, torch.Generator().manual_seed(0), SHAPE, 2, torch.device("cpu"), range(4, 7))
    for name in ("frame_permutation", "noise"):
        values = getattr(whole, name)
        assert getattr(part, name) is None if values is None else torch.equal(getattr(part, name), values[4:7])
    assert (whole.batch_permutation is None) == (control not in (MATCHED, TEACHER_ONLY))
    if whole.batch_permutation is not None:
        assert torch.equal(part.batch_permutation, whole.batch_permutation)  # type: ignore[arg-type]
        assert whole.batch_permutation.sort().values.tolist() == list(range(16))
        assert whole.frame_permutation is not None
        assert whole.frame_permutation.sort(dim=1).values.tolist() == [list(range(8))] * 16

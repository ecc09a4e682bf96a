"""The discriminator's losses: closed forms, their optimum, and gradients by hand on a linear model."""

import math

import pytest
import torch

from distill.losses.gan import logistic_loss, with_gradient


def test_values_are_the_softplus_of_dmd2() -> None:
    logits = torch.tensor([0.0, 2.0, -30.0, 30.0], dtype=torch.float64)
    fake = [math.log(2), math.log1p(math.exp(2.0)), math.log1p(math.exp(-30.0)), 30.0]
    assert float(logistic_loss(logits, is_real=False)) == pytest.approx(sum(fake) / 4, rel=1e-9)
    assert float(logistic_loss(logits, is_real=True)) == pytest.approx(sum(fake) / 4 - logits.mean().item(), rel=1e-9)


@pytest.mark.parametrize("is_real", [True, False])
def test_gradient_by_hand_on_a_linear_discriminator(is_real: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    samples = torch.randn(5, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True)
    logistic_loss(samples @ weight, is_real=is_real).backward()
    sign = -1.0 if is_real else 1.0
    # d softplus(s * D) / dD = s * sigmoid(s * D), and dD / dx = w, dD / dw = x.
    slope = sign * torch.sigmoid(sign * (samples @ weight).detach()) / 5
    assert samples.grad is not None and weight.grad is not None
    torch.testing.assert_close(samples.grad, slope[:, None] * weight.detach())
    torch.testing.assert_close(weight.grad, slope @ samples.detach())


def test_the_best_discriminator_is_the_log_ratio_of_densities() -> None:
    """Of two laws on three values: the logits of least loss."""
    real, fake = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.2, 0.6])
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        halves = [
            p * logistic_loss(logits[i : i + 1], is_real=is_real)
            for law, is_real in ((real, True), (fake, False))
            for i, p in enumerate(law)
        ]
        loss = torch.stack(halves).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach(), (real / fake).log(), atol=1e-3, rtol=0)


def test_a_student_far_on_the_fake_side_still_gets_a_gradient() -> None:
    logits = torch.tensor([-20.0], requires_grad=True)
    logistic_loss(logits, is_real=True).backward()
    assert logits.grad is not None
    assert float(logits.grad) == pytest.approx(-1.0, rel=1e-6)


def test_with_gradient_has_the_value_and_the_gradient_that_it_is_given() -> None:
    x0 = torch.randn(2, 1, 1, 1, 3, requires_grad=True)
    gradient = torch.randn(2, 1, 1, 1, 3)
    loss = with_gradient(torch.tensor(4.5), x0, gradient)
    (got,) = torch.autograd.grad(loss, x0)
    assert float(loss.detach()) == pytest.approx(4.5, abs=1e-6)
    torch.testing.assert_close(got, gradient)

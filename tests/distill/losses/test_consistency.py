"""TrigFlow, the tangents of rCM and their loss: on Gaussians, whose consistency function is known, and a tiny Wan."""

import math

import pytest
import torch
from torch import Tensor

from codmd_serve.schedule import add_noise, flow_to_x0
from codmd_serve.wan.attention import use_compact_cross_attention
from distill.config import DistillConfig
from distill.losses.consistency import (
    consistency_loss,
    dcm_tangent,
    normalise_tangent,
    scm_tangent,
    teacher_step,
    trig_state,
    trig_to_rectified,
    trig_velocity,
    trig_x0,
    velocity_and_tangent,
    velocity_loss,
)
from distill.networks.base import open_base
from distill.networks.build import Networks, denoiser

SHAPE = (3, 2, 4, 5, 6)
THETA = torch.tensor([0.05, 0.8, 1.5], dtype=torch.float64)
MEAN, STD = 0.7, 0.4


def normal(seed: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sides(theta: Tensor) -> tuple[Tensor, Tensor]:
    angle = theta.reshape(-1, 1, 1, 1, 1)
    return angle.cos(), angle.sin()


def gaussian_velocity(x: Tensor, theta: Tensor) -> Tensor:
    """E[cos * noise - sin * x0 | x] when x0 ~ N(MEAN, STD^2) elementwise: the perfect teacher."""
    cosine, sine = sides(theta)
    residual = (x - cosine * MEAN) / (cosine**2 * STD**2 + sine**2)
    return cosine * sine * residual - sine * (MEAN + cosine * STD**2 * residual)


def gaussian_consistency(x: Tensor, theta: Tensor) -> Tensor:
    """Where the path of that teacher through x ends: the paths keep (x - cos * MEAN) / standard deviation."""
    cosine, sine = sides(theta)
    return MEAN + STD * (x - cosine * MEAN) / (cosine**2 * STD**2 + sine**2).sqrt()


def consistent_velocity(x: Tensor, theta: Tensor) -> Tensor:
    cosine, sine = sides(theta)
    return (cosine * x - gaussian_consistency(x, theta)) / sine


def some_velocity(x: Tensor, theta: Tensor) -> Tensor:
    """A smooth student that is not consistent."""
    _, sine = sides(theta)
    return 0.3 * (1.5 * x).sin() + sine * x**2 - 0.5


def test_the_state_is_rectified_flow_up_to_a_factor() -> None:
    x0, noise = normal(0), normal(1)
    latents, sigma = trig_to_rectified(trig_state(x0, noise, THETA), THETA)
    torch.testing.assert_close(sigma, THETA.tan() / (1 + THETA.tan()))
    torch.testing.assert_close(latents, add_noise(x0, noise, sigma))


def test_velocity_of_the_true_flow_is_the_derivative_of_the_state() -> None:
    x0, noise = normal(0), normal(1)
    cosine, sine = sides(THETA)
    velocity = trig_velocity(trig_state(x0, noise, THETA), noise - x0, THETA)
    torch.testing.assert_close(velocity, cosine * noise - sine * x0)


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.5 * math.pi])
def test_x0_is_that_of_rectified_flow_for_any_flow(theta: float) -> None:
    x, flow = normal(0), normal(1)
    angle = torch.full((3,), theta, dtype=torch.float64)
    latents, sigma = trig_to_rectified(x, angle)
    torch.testing.assert_close(trig_x0(x, trig_velocity(x, flow, angle), angle), flow_to_x0(latents, flow, sigma))


def test_tangent_vanishes_on_the_consistency_function_of_a_gaussian() -> None:
    x = trig_state(MEAN + STD * normal(0), normal(1), THETA)
    teacher = gaussian_velocity(x, THETA)
    own, derivative = velocity_and_tangent(consistent_velocity, x, THETA, teacher)
    torch.testing.assert_close(own, consistent_velocity(x, THETA))
    tangent = scm_tangent(x, own, teacher, derivative, THETA)
    assert float(tangent.abs().max()) < 1e-12
    # It is not zero because everything is: the terms that cancel are of order 1, and half-way through the warm-up
    # they do not.
    assert float(derivative.abs().max()) > 0.1
    assert float(scm_tangent(x, own, teacher, derivative, THETA, ratio=0.5).abs().max()) > 0.1


def test_tangent_vanishes_for_a_network_of_rectified_flow() -> None:
    """The same through the conversion that a Wan network needs: flow in, velocity out."""

    def through_flow(x: Tensor, theta: Tensor) -> Tensor:
        cosine, sine = sides(theta)
        latents, sigma = trig_to_rectified(x, theta)
        flow = (latents - gaussian_consistency(latents * (cosine + sine), theta)) / sigma.reshape(-1, 1, 1, 1, 1)
        return trig_velocity(x, flow, theta)

    x = trig_state(MEAN + STD * normal(0), normal(1), THETA)
    teacher = gaussian_velocity(x, THETA)
    own, derivative = velocity_and_tangent(through_flow, x, THETA, teacher)
    assert float(scm_tangent(x, own, teacher, derivative, THETA).abs().max()) < 1e-12


def test_tangent_is_cosine_times_the_change_of_the_prediction_along_the_teachers_path() -> None:
    x = normal(0)
    teacher = gaussian_velocity(x, THETA)
    own, derivative = velocity_and_tangent(some_velocity, x, THETA, teacher)

    def prediction(x: Tensor, theta: Tensor) -> Tensor:
        return trig_x0(x, some_velocity(x, theta), theta)

    _, change = torch.func.jvp(prediction, (x, THETA), (teacher, torch.ones_like(THETA)))
    torch.testing.assert_close(scm_tangent(x, own, teacher, derivative, THETA), sides(THETA)[0] * change)


def test_tangent_without_warm_up_ratio_is_the_pull_of_the_teacher_and_the_bare_derivative() -> None:
    x, own, teacher, derivative = (normal(seed) for seed in range(4))
    want = -sides(THETA)[0] * (own - teacher) - derivative
    torch.testing.assert_close(scm_tangent(x, own, teacher, derivative, THETA, ratio=0.0), want)


def test_discrete_tangent_tends_to_the_continuous_one() -> None:
    """The error falls with the step, and so it does for the gradient of the loss that the two feed."""
    x = normal(0)
    teacher = gaussian_velocity(x, THETA)
    own, derivative = velocity_and_tangent(some_velocity, x, THETA, teacher)
    want = scm_tangent(x, own, teacher, derivative, THETA)
    errors, gradient_errors = [], []
    for step in (1e-2, 1e-3, 1e-4):
        lower = THETA - step
        lower_x = teacher_step(x, teacher, THETA, lower)
        tangent = dcm_tangent(
            trig_x0(x, own, THETA), trig_x0(lower_x, some_velocity(lower_x, lower), lower), THETA, lower
        )
        errors.append(float((tangent - want).norm() / want.norm()))
        gradient_errors.append(float((loss_gradient(own, tangent) - loss_gradient(own, want)).norm()))
    assert errors[0] < 0.1
    for coarse, fine in ((0, 1), (1, 2)):
        assert errors[fine] == pytest.approx(errors[coarse] / 10, rel=0.2)
        assert gradient_errors[fine] < gradient_errors[coarse] / 5


def loss_gradient(velocity: Tensor, tangent: Tensor) -> Tensor:
    leaf = velocity.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(consistency_loss(leaf, normalise_tangent(tangent)[0]), leaf)
    return gradient


def test_discrete_tangent_is_zero_where_the_discrete_condition_holds() -> None:
    lower = THETA - 0.04
    prediction = normal(0)
    assert float(dcm_tangent(prediction, prediction.clone(), THETA, lower).abs().max()) == 0


def test_discrete_gradient_is_that_of_the_regression_up_to_a_factor_per_sample() -> None:
    """|f(x) - stopgrad(f(x'))|^2, which others minimise, against the loss on F with the same g, not normalised."""
    x, own, target = normal(0), normal(1).requires_grad_(), normal(2)
    lower = THETA - 0.03
    prediction = trig_x0(x, own, THETA)
    (regression,) = torch.autograd.grad((prediction - target).square().sum(), own)
    tangent = dcm_tangent(prediction.detach(), target, THETA, lower)
    (ours,) = torch.autograd.grad(3 * consistency_loss(own, tangent), own)
    torch.testing.assert_close(regression, 0.03 * THETA.tan().reshape(-1, 1, 1, 1, 1) * ours)


def test_teacher_step_is_an_euler_step_of_rectified_flow() -> None:
    x, flow = normal(0), normal(1)
    lower = THETA - 0.04
    latents, sigma = trig_to_rectified(x, THETA)
    stepped, lower_sigma = trig_to_rectified(teacher_step(x, trig_velocity(x, flow, THETA), THETA, lower), lower)
    torch.testing.assert_close(stepped, latents + (lower_sigma - sigma).reshape(-1, 1, 1, 1, 1) * flow)


def test_normalised_tangents_have_length_below_one_per_sample() -> None:
    tangent = normal(0) * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    scaled, norm = normalise_tangent(tangent)
    torch.testing.assert_close(norm, tangent.flatten(1).norm(dim=1))
    torch.testing.assert_close(scaled.flatten(1).norm(dim=1), norm / (norm + 0.1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_left_out(bad: float) -> None:
    tangent = normal(0)
    tangent[1, 0, 0, 0, 0] = bad
    scaled, norm = normalise_tangent(tangent)
    assert norm.isfinite().tolist() == [True, False, True]
    assert float(scaled[1].abs().max()) == 0
    assert torch.equal(scaled[0], normalise_tangent(normal(0))[0][0])
    assert bool(loss_gradient(normal(1), tangent).isfinite().all())


def test_loss_gradient_is_minus_twice_the_tangent_over_the_batch() -> None:
    velocity, tangent = normal(0).requires_grad_(), normal(1)
    loss = consistency_loss(velocity, tangent)
    (gradient,) = torch.autograd.grad(loss, velocity)
    torch.testing.assert_close(gradient, -2 * tangent / 3)
    torch.testing.assert_close(loss, tangent.square().sum() / 3)


def test_critic_loss_is_the_published_one_without_division_by_sine() -> None:
    x0, noise, flow = normal(0), normal(1), normal(2)
    latents, sigma = trig_to_rectified(trig_state(x0, noise, THETA), THETA)
    error = (x0 - flow_to_x0(latents, flow, sigma)).square() / sides(THETA)[1] ** 2
    torch.testing.assert_close(velocity_loss(flow, x0, noise, sigma), error.sum() / 3)
    assert float(velocity_loss(noise - x0, x0, noise, sigma)) == 0


def test_bfloat16_flows_are_handled_in_float32() -> None:
    x = normal(0, torch.float32)
    theta = THETA.float()
    flow = normal(1, torch.float32).bfloat16()
    got = trig_velocity(x, flow, theta)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), trig_velocity(x.double(), flow.double(), THETA), rtol=1e-5, atol=1e-5)


def test_derivative_through_wan_agrees_with_a_central_difference_in_float64(
    tiny_networks: Networks, tiny_config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 forward mode through the prepared network against float64 differences of the stock one."""
    shape = (3, 4, 3, 4, 4)
    x, teacher = normal(0, shape=shape), normal(1, shape=shape)
    embeds = normal(2, shape=(3, 8, 16))
    embeds[:, 6:] = 0

    def through(network: object, dtype: torch.dtype) -> object:
        denoise = denoiser(network, "fp32")

        def velocity(x: Tensor, theta: Tensor) -> Tensor:
            latents, sigma = trig_to_rectified(x, theta)
            return trig_velocity(x, denoise(latents, 1000 * sigma, embeds.to(dtype)), theta)

        return velocity

    student = through(tiny_networks.student, torch.float32)
    own, derivative = velocity_and_tangent(student, x.float(), THETA.float(), teacher.float())
    assert not own.requires_grad and not derivative.requires_grad
    assert all(parameter.grad is None for parameter in tiny_networks.student.parameters())
    stock = use_compact_cross_attention(open_base(tiny_config.base).load_transformer(torch.float64).eval())
    # Wan's norms and its time embedding ask for float32 by name; a difference over 1e-5 needs more digits than that.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    wide = through(stock, torch.float64)
    scale = THETA.cos() * THETA.sin()
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (
            wide(x + sign * h * scale.reshape(-1, 1, 1, 1, 1) * teacher, THETA + sign * h * scale) for sign in (1, -1)
        )
        difference = (ahead - behind) / (2 * h)
        plain = wide(x, THETA)
    assert float((own.to(torch.float64) - plain).norm() / plain.norm()) < 1e-4
    for index in range(3):
        error = (derivative[index].to(torch.float64) - difference[index]).norm() / difference[index].norm()
        assert float(error) < 2e-3

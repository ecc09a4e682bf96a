"""The DMD direction and the flow loss against closed forms."""

import pytest
import torch
from torch import Tensor

from codmd_serve.schedule import add_noise
from distill.losses.dmd import NORMALISER_FLOOR, dmd_direction, dmd_loss, guided_flow
from distill.losses.flow import flow_loss

SHAPE = (3, 2, 4, 5, 6)


def gaussian_flow(latents: Tensor, sigma: float, mean: float, std: float) -> Tensor:
    """Best flow prediction E[noise - x0 | latents] when x0 ~ N(mean, std^2) elementwise."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    residual = (latents - (1 - sigma) * mean) / variance
    x0 = mean + (1 - sigma) * std**2 * residual
    return (latents - x0) / sigma


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.98])
def test_direction_of_shifted_gaussians_is_the_closed_form(sigma: float) -> None:
    student_x0 = 1.5 + 0.5 * normal(0)
    latents = add_noise(student_x0, normal(1), sigma)
    teacher_flow = gaussian_flow(latents, sigma, mean=-1.0, std=0.5)
    critic_flow = gaussian_flow(latents, sigma, mean=1.5, std=0.5)
    direction = dmd_direction(student_x0, latents, teacher_flow, critic_flow, sigma)
    # Equal spreads: x0_critic - x0_teacher is the distance of the means times sigma^2 / variance, whatever the state.
    gap = (1.5 - -1.0) * sigma**2 / ((1 - sigma) ** 2 * 0.25 + sigma**2)
    teacher_x0 = latents - sigma * teacher_flow
    normaliser = (student_x0 - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(direction * normaliser, torch.full(SHAPE, gap, dtype=torch.float64))


def test_descending_the_loss_moves_the_student_to_the_teacher() -> None:
    """A student that only shifts noise reaches the teacher's mean when the critic is exact."""
    shift = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for seed in range(60):
        student_x0 = shift + 0.5 * normal(3 * seed)
        latents = add_noise(student_x0.detach(), normal(3 * seed + 1), 0.6)
        teacher_flow = gaussian_flow(latents, 0.6, mean=-1.0, std=0.5)
        critic_flow = gaussian_flow(latents, 0.6, mean=float(shift.detach()), std=0.5)
        direction = dmd_direction(student_x0, latents, teacher_flow, critic_flow, 0.6)
        (gradient,) = torch.autograd.grad(dmd_loss(student_x0, direction), shift)
        with torch.no_grad():
            shift -= 0.2 * gradient
    assert float(shift.detach()) == pytest.approx(-1.0, abs=0.1)


def test_loss_gradient_is_direction_over_element_count() -> None:
    student_x0 = normal(0).requires_grad_()
    direction = normal(1)
    dmd_loss(student_x0, direction).backward()
    torch.testing.assert_close(student_x0.grad, direction / direction.numel())


def test_direction_is_zero_when_critic_agrees_with_teacher() -> None:
    flow = normal(2)
    direction = dmd_direction(normal(0), normal(1), flow, flow, torch.tensor([0.1, 0.5, 0.9]))
    assert float(direction.abs().max()) == 0


def test_direction_uses_each_samples_own_sigma_and_normaliser() -> None:
    student_x0, latents, teacher_flow, critic_flow = (normal(seed) for seed in range(4))
    sigma_B = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = dmd_direction(student_x0, latents, teacher_flow, critic_flow, sigma_B)
    for i in range(3):
        alone = dmd_direction(
            student_x0[i : i + 1],
            latents[i : i + 1],
            teacher_flow[i : i + 1],
            critic_flow[i : i + 1],
            float(sigma_B[i]),
        )
        torch.testing.assert_close(together[i : i + 1], alone)


def test_normaliser_is_floored_when_the_student_is_the_teacher() -> None:
    latents = torch.zeros(SHAPE)
    teacher_flow = torch.zeros(SHAPE)
    critic_flow = torch.full(SHAPE, 1e-3)
    direction = dmd_direction(torch.zeros(SHAPE), latents, teacher_flow, critic_flow, 1.0)
    torch.testing.assert_close(direction, torch.full(SHAPE, -1e-3 / NORMALISER_FLOOR))


def test_direction_of_bf16_flows_is_computed_in_float32() -> None:
    """Two x0 rounded to bfloat16 at sigma .02 would differ by rounding as large as the signal."""
    sigma = 0.02
    latents, teacher_flow = normal(1, torch.float32), normal(2, torch.float32).bfloat16()
    critic_flow = (teacher_flow.float() + 0.1).bfloat16()
    direction = dmd_direction(normal(0, torch.float32), latents, teacher_flow, critic_flow, sigma)
    want = sigma * (teacher_flow.double() - critic_flow.double())
    teacher_x0 = latents.double() - sigma * teacher_flow.double()
    want = want / (normal(0, torch.float32).double() - teacher_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert direction.dtype == torch.float32
    torch.testing.assert_close(direction.double(), want, rtol=1e-4, atol=1e-7)


def test_direction_carries_no_gradient() -> None:
    student_x0 = normal(0).requires_grad_()
    critic_flow = normal(3).requires_grad_()
    assert not dmd_direction(student_x0, normal(1), normal(2), critic_flow, 0.5).requires_grad


def test_guidance_scale_one_is_no_guidance() -> None:
    cond, uncond = normal(0), normal(1)
    torch.testing.assert_close(guided_flow(cond, uncond, 1.0), cond)


def test_flow_loss_is_zero_at_the_target_and_a_mean_square_elsewhere() -> None:
    x0, noise = normal(0), normal(1)
    assert float(flow_loss(noise - x0, x0, noise)) == 0
    assert float(flow_loss(noise - x0 + 2.0, x0, noise)) == pytest.approx(4.0)


def test_flow_loss_sends_no_gradient_into_the_sample() -> None:
    x0, flow_pred = normal(0).requires_grad_(), normal(1).requires_grad_()
    flow_loss(flow_pred, x0, normal(2)).backward()
    assert x0.grad is None
    assert flow_pred.grad is not None

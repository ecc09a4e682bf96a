"""Continuous and discrete consistency terms of rCM, in TrigFlow, for a network that predicts rectified flow.

Knows no network and draws no random number.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.

TrigFlow runs along a quarter circle, theta from 0 (clean) to pi / 2 (noise), with c = cos(theta), s = sin(theta):

    x = c * x0 + s * noise,  velocity = dx / dtheta = c * noise - s * x0,  x0 = c * x - s * velocity.

Divided by c + s it is rectified flow: latents = x / (c + s), sigma = s / (c + s), and from flow = noise - x0

    velocity = (flow + (c - s) * x) / (c + s).

That this is the velocity is seen by putting x0 and noise in: noise * (1 + (c - s) * s) + x0 * ((c - s) * c - 1) equals
(c + s) * (c * noise - s * x0), since 1 - s^2 = c^2. Nothing is divided by s, so the clean end needs no care.
Every function computes in float32 or wider.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from codmd_serve.schedule import expand_sigma
from distill.losses.flow import at_least_float32

TANGENT_OFFSET = 0.1

# (x_BCFHW, theta_B) -> velocity_BCFHW
Velocity = Callable[[Tensor, Tensor], Tensor]


def trig_state(x0: Tensor, noise: Tensor, theta: Tensor) -> Tensor:
    """Return cos(theta) * x0 + sin(theta) * noise.

    Args:
        x0: (B, C, F, H, W) clean latents.
        noise: N(0, 1) of the same shape.
        theta: (B,) in [0, pi / 2].
    """
    angle = expand_sigma(theta, x0)
    return angle.cos() * at_least_float32(x0) + angle.sin() * at_least_float32(noise)


def trig_to_rectified(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a network of rectified flow is shown for a TrigFlow state.

    Args:
        x: (B, C, F, H, W) state at `theta`.
        theta: (B,) in [0, pi / 2].

    Returns:
        Latents of the shape of `x` and their noise level sigma (B,) in [0, 1].
    """
    angle = expand_sigma(theta, x)
    sine, total = angle.sin(), angle.cos() + angle.sin()
    return at_least_float32(x) / total, (sine / total).flatten()


def trig_velocity(x: Tensor, flow: Tensor, theta: Tensor) -> Tensor:
    """Return the TrigFlow velocity F = (flow + (cos - sin) * x) / (cos + sin).

    Args:
        x: (B, C, F, H, W) TrigFlow state, not the latents that the network saw.
        flow: the network's prediction of noise - x0 there.
        theta: (B,) in [0, pi / 2].

    Source: rCM (arXiv 2510.08431), its preconditioning of a rectified-flow network; this form of it has no 1 / sin.
    """
    angle = expand_sigma(theta, x)
    cosine, sine = angle.cos(), angle.sin()
    return (at_least_float32(flow) + (cosine - sine) * at_least_float32(x)) / (cosine + sine)


def trig_x0(x: Tensor, velocity: Tensor, theta: Tensor) -> Tensor:
    """Return cos(theta) * x - sin(theta) * velocity, which of a consistency model is its prediction of x0."""
    angle = expand_sigma(theta, x)
    return angle.cos() * at_least_float32(x) - angle.sin() * at_least_float32(velocity)


def velocity_and_tangent(
    velocity: Velocity, x: Tensor, theta: Tensor, teacher_velocity: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the student's velocity and cos * sin times its derivative along the teacher's path, in one forward pass.

    Args:
        velocity: the student as a function of state and angle, in float32: the tangent is a sum of terms much larger
            than itself, which bfloat16 rounds away.
        x: (B, C, F, H, W) state at `theta`.
        theta: (B,).
        teacher_velocity: dx / dtheta of the teacher at `x`.

    Returns:
        F and cos * sin * dF / dtheta, dF / dtheta = F_x * teacher_velocity + F_theta, both without gradient.

    Source: rCM, algorithm 1. The factor cos * sin goes into the tangents that are pushed forward, so that they vanish
    at both ends instead of being multiplied by nearly nothing afterwards. Attention runs as plain matrix products:
    the fused kernels have no forward-mode derivative.
    """
    angle = expand_sigma(theta, x)
    scale = angle.cos() * angle.sin()
    tangents = (scale * at_least_float32(teacher_velocity), scale.flatten())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # torch warns of torch.jit.script, which it calls itself to load its rules at the first use.
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        own, tangent = torch.func.jvp(velocity, (at_least_float32(x), theta.to(scale.dtype)), tangents)  # type: ignore[misc]
    return own.detach(), tangent.detach()


def scm_tangent(
    x: Tensor,
    velocity: Tensor,
    teacher_velocity: Tensor,
    velocity_tangent: Tensor,
    theta: Tensor,
    ratio: float = 1.0,
) -> Tensor:
    """Return g, the direction in which the student's velocity has to move for it to become consistent.

    Args:
        x: (B, C, F, H, W) state at `theta`.
        velocity: F of the student there, a constant.
        teacher_velocity: F_T of the teacher there.
        velocity_tangent: cos * sin * dF / dtheta along the teacher's path, from `velocity_and_tangent`.
        theta: (B,) in [0, pi / 2].
        ratio: r in 0..1; 1 is the method, smaller values are its warm-up.

    Returns:
        g = -cos * sqrt(1 - r^2 * sin^2) * (F - F_T) - (r * cos * sin * x + velocity_tangent), without gradient.

    A consistency function f = cos * x - sin * F keeps its value along the teacher's path, where dx / dtheta = F_T:

        df / dtheta = -sin * x + cos * F_T - cos * F - sin * dF / dtheta = 0,

    and at r = 1 the formula for g is cos * df / dtheta: g is 0 exactly where the student is consistent. At r = 0 the
    first part is -cos * (F - F_T), which draws F to the teacher's velocity, whatever the tangent.

    Source: rCM (arXiv 2510.08431) as in rcm@5b41aa9, where r multiplies the state and not the tangent of F; the
    tangent of sCM (arXiv 2410.11081) is cos * df / dtheta at r = 1 too.
    """
    with torch.no_grad():
        angle = expand_sigma(theta, x)
        cosine, sine = angle.cos(), angle.sin()
        pull = cosine * (1.0 - (ratio * sine).square()).clamp_min(0.0).sqrt()
        gap = at_least_float32(velocity) - at_least_float32(teacher_velocity)
        return -pull * gap - (ratio * cosine * sine * at_least_float32(x) + at_least_float32(velocity_tangent))


def teacher_step(x: Tensor, teacher_velocity: Tensor, theta: Tensor, lower_theta: Tensor) -> Tensor:
    """Return the state at `lower_theta` to which one Euler step of the teacher leads.

    An Euler step of rectified flow keeps the x0 and the noise that the teacher sees at `x`. In TrigFlow that is a turn
    by h = theta - lower_theta: cos(h) * x - sin(h) * teacher_velocity.

    Args:
        x: (B, C, F, H, W) state at `theta`.
        teacher_velocity: F_T there.
        theta: (B,) where from.
        lower_theta: (B,) where to.
    """
    turn = expand_sigma(theta - lower_theta, x)
    return turn.cos() * at_least_float32(x) - turn.sin() * at_least_float32(teacher_velocity)


def dcm_tangent(x0_pred: Tensor, lower_x0_pred: Tensor, theta: Tensor, lower_theta: Tensor) -> Tensor:
    """Return g as a difference over one step of the teacher: cos(theta) * (f(x) - f(x')) / (theta - theta').

    Args:
        x0_pred: (B, C, F, H, W) the student's x0 at the state at `theta`, a constant.
        lower_x0_pred: the student's x0 at the state that `teacher_step` leads to, a constant.
        theta: (B,) in [0, pi / 2].
        lower_theta: (B,) below `theta`.

    Returns:
        g of `scm_tangent` at ratio 1 up to an error of the order of the step, without gradient. It is 0 exactly where
        the discrete consistency condition f(x) = f(x') holds, at any step.

    Source: the discrete option of rcm@5b41aa9 (cm_type dcm), which regresses f(x) on f(x') by a mean squared error over
    48 steps. Its gradient with respect to F is that of `consistency_loss` with this g, times
    (theta - theta') * tan(theta). Deviations: theta is any angle, not an end of one of 48 fixed steps; loss, norm and
    weight are those of the continuous term, so that the balance with distribution matching holds for both and does not
    move with the number of steps; the lower angle is not below 0.
    """
    with torch.no_grad():
        step = expand_sigma(theta - lower_theta, x0_pred)
        cosine = expand_sigma(theta, x0_pred).cos()
        return cosine * (at_least_float32(x0_pred) - at_least_float32(lower_x0_pred)) / step


def normalise_tangent(tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return g / (|g| + .1) with the norm over each whole sample, and the norms.

    Args:
        tangent: (B, C, F, H, W) g.

    Returns:
        The normalised g, 0 for samples that are not finite, and |g| (B,), which is not finite there.

    Source: rCM, algorithm 1; rcm@5b41aa9 leaves out samples that are not finite.
    """
    norm = tangent.flatten(1).norm(dim=1)
    scaled = tangent / expand_sigma(norm + TANGENT_OFFSET, tangent)
    return torch.where(expand_sigma(norm, tangent).isfinite(), scaled, torch.zeros_like(scaled)), norm


def consistency_loss(velocity: Tensor, tangent: Tensor) -> Tensor:
    """Return the mean over samples of sum((F - stopgrad(F) - g)^2), whose gradient is -2 * g / B.

    Args:
        velocity: (B, C, F, H, W) F of the student, with gradient.
        tangent: normalised g, a constant.

    Returns:
        Scalar, float32 or wider; its value is mean |g|^2, at most 1, and tells nothing of how far training has come.

    Source: rCM, algorithm 1. Deviation: the constant is this F and not the one that came with the tangent, since two
    evaluations in different precision differ by more than a g of length 1 spread over millions of elements.
    """
    wide = at_least_float32(velocity)
    residual = wide - wide.detach() - tangent.detach()
    return residual.square().flatten(1).sum(dim=1).mean()


def velocity_loss(flow_pred: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the critic's TrigFlow loss, the mean over samples of sum((F_pred - F)^2).

    Args:
        flow_pred: (B, C, F, H, W) the critic's flow at (1 - sigma) * x0 + sigma * noise.
        x0: clean latents; a target, so no gradient reaches it.
        noise: N(0, 1) of the same shape.
        sigma: (B,) noise level.

    Returns:
        Scalar, float32 or wider. At equal states velocities differ by the difference of flows over cos + sin, and
        1 / (cos + sin)^2 = sigma^2 + (1 - sigma)^2.

    Source: rcm@5b41aa9, |x0 - x0_pred|^2 / sin^2 summed, which is the same; this form has no 1 / sin.
    """
    level = expand_sigma(sigma, flow_pred)
    weight = level.square() + (1.0 - level).square()
    target = (at_least_float32(noise) - at_least_float32(x0)).detach()
    return (weight * (at_least_float32(flow_pred) - target).square()).flatten(1).sum(dim=1).mean()

"""DMD2's GAN term: the student is to look real to a discriminator on the critic's features.

Owns its settings and its two losses. Every random number comes in.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codmd_serve.schedule import add_noise
from distill.data.prompts import Batch
from distill.losses.gan import logistic_loss, mean_of_verdicts
from distill.methods.draws import StepResult
from distill.networks.build import Networks, classifier
from distill.settings import HeadConfig, check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class GanConfig:
    """The discriminator and its term; 0 for both weights leaves it out.

    Attributes:
        weight: of the student's term, E[softplus(-D(student))].
        critic_weight: of the discriminator's loss beside the critic's flow loss; above 0, the critic has a head.
        shares_noise: the discriminator sees student and real videos in the noise of the scores, at their level;
            without it each in its own, as DMD2.
        depth: after which share of the critic's blocks the head reads.
        queries: learned queries of the head.
        width: units of the head's hidden layer.
    """

    weight: float = 0.0
    critic_weight: float = 0.0
    shares_noise: bool = False
    depth: float = 0.5
    queries: int = 8
    width: int = 512

    def __post_init__(self) -> None:
        for name in ("weight", "critic_weight"):
            check_range(f"terms.gan.{name}", getattr(self, name), 0.0, 1e4)
        check_range("terms.gan.depth", self.depth, 0.0, 1.0)
        check_range("terms.gan.queries", self.queries, 1, 1024)
        check_range("terms.gan.width", self.width, 1, 65_536)

    @property
    def head(self) -> HeadConfig | None:
        """The head that the critic gets; None where there is no discriminator."""
        return HeadConfig(depth=self.depth, queries=self.queries, width=self.width) if self.critic_weight > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedAt:
    """The noise in which a discriminator sees samples: noise (B, C, F, H, W), sigma (B,), timestep (B,)."""

    noise: Tensor
    sigma: Tensor
    timestep: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the discriminator says of a student sample; all without gradient.

    Attributes:
        loss: mean softplus(-logit).
        gradient: (B, C, F, H, W) of `loss` with respect to the sample.
        logits: (B,) float32.
    """

    loss: Tensor
    gradient: Tensor
    logits: Tensor


def judge(networks: Networks, batch: Batch, student_x0: Tensor, at: NoisedAt) -> Verdict:
    """Return the discriminator's verdict on a sample and the gradient that would change it.

    The gradient is taken here and not in the student's backward pass: so nothing is accumulated in the critic, and its
    graph is gone before the student's is walked.
    """
    with torch.enable_grad():
        leaf = student_x0.detach().requires_grad_()
        latents = add_noise(leaf, at.noise, at.sigma)
        logits = classifier(networks.critic, networks.precision)(latents, at.timestep, batch.prompt_embeds)
        loss = logistic_loss(logits, is_real=True)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return Verdict(loss=loss.detach(), gradient=gradient, logits=logits.detach())


def discriminator_results(
    networks: Networks,
    batch: Batch,
    student_x0: Tensor,
    noised: dict[str, NoisedAt],
    weight: float,
) -> Iterator[StepResult]:
    """Yield the two halves of the discriminator's loss: on samples of the student, and on real ones.

    The halves are added up. Each has its own graph, which the backward pass frees before the next one is built.

    Args:
        networks: the critic and its head get the gradient.
        batch: prompts, and x0, the real latents.
        student_x0: (B, C, F, H, W) a constant.
        noised: by "fake" and "real", the noise that they are seen in.
        weight: of the loss.
    """
    assert batch.x0 is not None
    denoise = classifier(networks.critic, networks.precision)
    for name, x0 in (("fake", student_x0), ("real", batch.x0)):
        at = noised[name]
        logits = denoise(add_noise(x0.detach(), at.noise, at.sigma), at.timestep, batch.prompt_embeds)
        loss = logistic_loss(logits, is_real=name == "real")
        metrics = {"loss_discriminator": loss.detach(), f"logit_{name}": mean_of_verdicts(logits)}
        yield StepResult(loss=weight * loss, metrics=metrics)

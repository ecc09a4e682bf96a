"""Turns of dmd2, f-distill, avd and vdot: dmd, and each term beside it."""

from collections.abc import Iterator

import pytest
import torch
from runs import with_method
from torch import Tensor

from codmd_serve.schedule import add_noise
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import Batch
from distill.losses.motion import flow_errors, motion_loss
from distill.methods.arms import draw_arm
from distill.methods.avd import ERROR_MEANS
from distill.methods.draws import StepResult, Turn
from distill.methods.f_distill import RATIO_MEANS
from distill.methods.registry import METHODS
from distill.methods.scores import student_sample
from distill.networks.base import open_base
from distill.networks.build import Networks, build_networks, classifier, denoiser
from distill.parallel.processes import SINGLE_PROCESS

CPU = torch.device("cpu")
SHAPE = (4, 4, 3, 4, 4)
ARMS = ("dmd2", "f-distill", "avd", "vdot")
BATCH_TERM = ["terms.transport.over=batch"]


def arm_config(tiny_config: DistillConfig, method: str, settings: list[str] | None = None) -> DistillConfig:
    own = ["batch_size=4", "student_every_iterations=1", *(settings or [])]
    return with_overrides(with_method(tiny_config, method), own)


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = torch.Generator().manual_seed(5)
    embeds = torch.randn(2, 4, 8, 16, generator=rng)
    return Batch(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], x0=torch.randn(SHAPE, generator=rng))


def networks_of(config: DistillConfig) -> Networks:
    """Networks that have parted: student and critic off the teacher, the head off its first weights."""
    networks = build_networks(config, open_base(config.base), CPU)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (networks.student, networks.critic):
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return networks


def turn_of(config: DistillConfig, networks: Networks, batch: Batch, role: str = "student") -> Turn:
    def load(positions: range) -> Batch:
        own = slice(positions.start, positions.stop)
        assert batch.x0 is not None
        return Batch(
            prompt_embeds=batch.prompt_embeds[own],
            negative_prompt_embeds=batch.negative_prompt_embeds[own],
            x0=batch.x0[own],
        )

    memory = {name: torch.tensor(values) for name, values in config.method_settings.memory(config).items()}
    return Turn(
        role=role,
        iteration=0,
        config=config,
        networks=networks,
        processes=SINGLE_PROCESS,
        shape=SHAPE,
        device=CPU,
        load=load,
        memory=memory,
    )


def results_of(turn: Turn) -> Iterator[StepResult]:
    return METHODS[turn.config.method].losses(turn)


def gradient_of(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of a turn's loss as one vector, as the trainer adds it up, and the last metrics."""
    network = turn.networks.student if turn.role == "student" else turn.networks.critic
    network.zero_grad()
    metrics: dict[str, Tensor] = {}
    for result in results_of(turn):
        (result.loss / turn.config.accumulate).backward()
        metrics |= result.metrics
    gradient = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in network.parameters()]
    )
    network.zero_grad()
    return gradient, metrics


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("method", ARMS)
def test_with_all_weights_at_0_an_arm_is_dmd(tiny_config: DistillConfig, batch: Batch, method: str) -> None:
    off = [
        "terms.gan.weight=0",
        "terms.gan.critic_weight=0",
        "terms.f_distill.divergence=none",
        "terms.avd.regression_weight=0",
        "terms.avd.motion_weight=0",
        "terms.transport.weight=0",
    ]
    config = arm_config(tiny_config, method, off)
    networks = networks_of(config)
    dmd = with_overrides(with_method(tiny_config, "dmd"), ["batch_size=4", "student_every_iterations=1"])
    for role in ("student", "critic"):
        got, _ = gradient_of(turn_of(config, networks, batch, role))
        want, _ = gradient_of(turn_of(dmd, networks, batch, role))
        assert torch.equal(got, want)


PARTS = {
    "dmd2": [],
    "dmd2 weighted by reverse KL": ["terms.gan.shares_noise=true", "terms.f_distill.divergence=reverse_kl"],
    "f-distill": [],
    "f-distill by forward KL": ["terms.f_distill.divergence=forward_kl"],
    "avd": [],
    "vdot": [],
    "vdot over the batch": BATCH_TERM,
}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_micro_batches_have_the_gradient_of_the_whole_batch(
    tiny_config: DistillConfig, batch: Batch, name: str
) -> None:
    # Terms that outweigh DMD, so that an error in their gradient cannot hide behind it.
    loud = ["terms.gan.weight=1", "terms.gan.critic_weight=1"] if name.split()[0] != "avd" else []
    config = arm_config(tiny_config, name.split()[0], [*loud, *PARTS[name]])
    networks = networks_of(config)
    for role in ("student", "critic"):
        turns = [turn_of(with_overrides(config, [f"accumulate={count}"]), networks, batch, role) for count in (1, 2, 4)]
        want, metrics = gradient_of(turns[0])
        assert float(want.norm()) > 0
        for turn in turns[1:]:
            got, _ = gradient_of(turn)
            assert relative(got, want) < 2e-5
            for key, tensor in turns[0].memory.items():
                torch.testing.assert_close(turn.memory[key], tensor)
        assert all(value.ndim == 0 and bool(value.isfinite()) for value in metrics.values())


def test_the_gan_term_has_the_gradient_of_the_whole_way_through_the_critic(
    tiny_config: DistillConfig, batch: Batch
) -> None:
    config = arm_config(tiny_config, "dmd2", ["terms.gan.weight=3"])
    networks = networks_of(config)
    got, metrics = gradient_of(turn_of(config, networks, batch))
    plain, _ = gradient_of(turn_of(with_overrides(config, ["terms.gan.weight=0"]), networks, batch))
    draws = draw_arm(config, "student", 0, SHAPE, CPU)
    x0 = student_sample(denoiser(networks.student, "fp32"), batch, draws, config.grid(), config.sampler, with_grad=True)
    at = draws.noised["fake"]
    logits = classifier(networks.critic, "fp32")(add_noise(x0, at.noise, at.sigma), at.timestep, batch.prompt_embeds)
    loss = torch.log1p(torch.exp(-logits)).mean()
    parameters = list(networks.student.parameters())
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    want = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().double() for p, g in zip(parameters, parts, strict=True)]
    )
    assert float(metrics["loss_gan"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert relative(got - plain, 3 * want) < 1e-4
    assert all(parameter.grad is None for parameter in networks.critic.parameters())


def test_regression_and_motion_are_added_with_their_weights(tiny_config: DistillConfig, batch: Batch) -> None:
    on = ["terms.avd.regression_weight=2", "terms.avd.motion_weight=0.5", "terms.avd.motion_threshold=-9"]
    config = arm_config(tiny_config, "avd", on)
    networks = networks_of(config)
    turn = turn_of(config, networks, batch)
    turn.memory[ERROR_MEANS].copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    means = turn.memory[ERROR_MEANS].clone()
    got, metrics = gradient_of(turn)
    off = with_overrides(config, ["terms.avd.regression_weight=0", "terms.avd.motion_weight=0"])
    plain, _ = gradient_of(turn_of(off, networks, batch))
    draws = draw_arm(config, "student", 0, SHAPE, CPU)
    assert draws.regression is not None and batch.x0 is not None
    grid, level, noise = config.grid(), draws.regression.level, draws.regression.noise
    student = denoiser(networks.student, "fp32")
    x0 = student_sample(student, batch, draws, grid, config.sampler, with_grad=True)
    sigma, timestep = torch.tensor(grid.sigmas[:-1])[level], torch.tensor(grid.timesteps)[level]
    flow = student(add_noise(batch.x0, noise, sigma), timestep, batch.prompt_embeds)
    error = flow_errors(flow, batch.x0, noise)
    weight = 1 - torch.sigmoid(3 * 0.95 * (error.detach() - means[level]))
    extra = 2 * (weight * error).mean() + 0.5 * motion_loss(x0, -9)
    parameters = list(networks.student.parameters())
    want = torch.cat([part.flatten().double() for part in torch.autograd.grad(extra, parameters)])
    assert relative(got - plain, want) < 1e-4
    assert float(metrics["regression_weight"]) == pytest.approx(float(weight.mean()), rel=1e-5)
    # The means have moved at the levels that were drawn, and nowhere else.
    drawn = torch.bincount(level, minlength=4) > 0
    assert torch.equal(turn.memory[ERROR_MEANS] != means, drawn)


def test_weights_are_those_of_the_ratio_and_means_are_kept(tiny_config: DistillConfig, batch: Batch) -> None:
    config = arm_config(tiny_config, "f-distill", ["terms.f_distill.divergence=forward_kl", "terms.gan.weight=0"])
    networks = networks_of(config)
    turn = turn_of(config, networks, batch)
    got, metrics = gradient_of(turn)
    plain, _ = gradient_of(turn_of(with_overrides(config, ["terms.f_distill.divergence=none"]), networks, batch))
    reverse, _ = gradient_of(
        turn_of(with_overrides(config, ["terms.f_distill.divergence=reverse_kl"]), networks, batch)
    )
    assert relative(reverse, plain) < 1e-5
    assert relative(got, plain) > 1e-3
    assert float(metrics["weight_max"]) > 1
    assert bool((turn.memory[RATIO_MEANS] != 1).any())


def test_a_discriminators_turn_trains_critic_and_head_and_nothing_else(
    tiny_config: DistillConfig, batch: Batch
) -> None:
    config = arm_config(tiny_config, "dmd2")
    networks = networks_of(config)
    for role in ("critic", "student"):
        for result in results_of(turn_of(config, networks, batch, role)):
            result.loss.backward()
        trained, other = (
            (networks.critic, networks.student) if role == "critic" else (networks.student, networks.critic)
        )
        assert all(parameter.grad is None for parameter in other.parameters())
        assert all(parameter.grad is None for parameter in networks.teacher.parameters())
        named = dict(trained.named_parameters())
        if role == "critic":
            assert named["gan_head.queries"].grad is not None and bool(named["gan_head.queries"].grad.any())
        trained.zero_grad()


def test_a_head_reads_the_first_blocks_and_leaves_the_flow_alone(tiny_config: DistillConfig, batch: Batch) -> None:
    plain = build_networks(tiny_config, open_base(tiny_config.base), CPU).critic
    config = arm_config(tiny_config, "dmd2", ["terms.gan.depth=0.5"])
    critic = build_networks(config, open_base(config.base), CPU).critic
    assert batch.x0 is not None
    inputs = (batch.x0, torch.full((4,), 500.0), batch.prompt_embeds)
    calls: list[int] = []
    for index, block in enumerate(critic.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    with torch.no_grad():
        logits = classifier(critic, "fp32")(*inputs)
        assert calls == [0]
        assert torch.equal(denoiser(critic, "fp32")(*inputs), denoiser(plain, "fp32")(*inputs))
    assert calls == [0, 0, 1]
    assert logits.shape == (4,) and logits.dtype == torch.float32
    again = build_networks(config, open_base(config.base), CPU).critic
    with torch.no_grad():
        assert torch.equal(classifier(again, "fp32")(*inputs), logits)

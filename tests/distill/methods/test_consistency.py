"""Steps of rcm and dcm: who is trained when, what is drawn, and losses that are those of their parts."""

import dataclasses
import math

import pytest
import torch
from runs import with_method
from torch import Tensor

from codmd_serve.schedule import add_noise
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import Batch
from distill.losses.consistency import trig_state, trig_to_rectified, velocity_loss
from distill.losses.dmd import dmd_direction
from distill.methods.consistency import (
    RcmConfig,
    RcmDraws,
    RolloutDraws,
    draw_rcm,
    rcm_critic_step,
    rcm_student_step,
    rcm_turns,
    rollout_length,
)
from distill.methods.scores import student_sample
from distill.networks.base import open_base
from distill.networks.build import Networks, denoiser

CPU = torch.device("cpu")
SHAPE = (3, 4, 3, 4, 4)
NUM_ELEMENTS = 4 * 3 * 4 * 4


@pytest.fixture
def config(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(with_method(tiny_config, "rcm"), ["rcm.warmup_iterations=0"])


@pytest.fixture
def batch() -> Batch:
    rng = torch.Generator().manual_seed(5)
    embeds = torch.randn(2, 3, 8, 16, generator=rng)
    embeds[:, :, 6:] = 0
    return Batch(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], x0=0.5 * torch.randn(SHAPE, generator=rng))


def part_ways(networks: Networks) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (networks.student, networks.critic):
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)


def student_draws(config: DistillConfig, step: int = 0) -> RcmDraws:
    draws = draw_rcm(config, "student", step, SHAPE, CPU)
    assert isinstance(draws, RcmDraws)
    return draws


def gradients(networks: Networks, batch: Batch, draws: RcmDraws, config: DistillConfig) -> list[Tensor]:
    parameters = list(networks.student.parameters())
    return list(torch.autograd.grad(rcm_student_step(networks, batch, draws, config).loss, parameters))


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_student_or_critic_is_trained_never_both(config: DistillConfig) -> None:
    config = with_overrides(config, ["rcm.warmup_iterations=3", "student_every_iterations=4"])
    turns = [rcm_turns(config, step) for step in range(12)]
    students = [step for step, roles in enumerate(turns) if roles == ("student",)]
    assert students == [0, 1, 2, 3, 7, 11]
    assert all(len(roles) == 1 for roles in turns)
    with_critic_first = with_overrides(config, ["critic_warmup_iterations=2"])
    assert [step for step in range(12) if rcm_turns(with_critic_first, step) == ("student",)] == [0, 1, 2, 5, 9]
    alone = with_overrides(config, ["rcm.dmd_weight=0"])
    assert {rcm_turns(alone, step) for step in range(12)} == {("student",)}


@pytest.mark.parametrize(("every", "warmup", "critic_first"), [(2, 0, 0), (5, 3, 0), (10, 0, 4)])
def test_each_role_goes_through_all_rollout_lengths(
    config: DistillConfig, every: int, warmup: int, critic_first: int
) -> None:
    config = with_overrides(
        config,
        [
            f"student_every_iterations={every}",
            f"rcm.warmup_iterations={warmup}",
            f"critic_warmup_iterations={critic_first}",
        ],
    )
    lengths: dict[str, list[int]] = {"student": [], "critic": []}
    for step in range(warmup, warmup + 200):
        (role,) = rcm_turns(config, step)
        lengths[role].append(rollout_length(config, role, step))
    for role, found in lengths.items():
        assert found == [1 + index % 4 for index in range(len(found))], role


def test_draws_are_a_function_of_seed_role_and_step(config: DistillConfig) -> None:
    first, again, other = student_draws(config), student_draws(config), student_draws(config, 2)
    assert torch.equal(first.theta, again.theta) and torch.equal(first.data_noise, again.data_noise)
    assert first.rollout is not None and again.rollout is not None
    assert first.rollout.grid == again.rollout.grid
    assert torch.equal(first.rollout.draws.rollout_noise, again.rollout.draws.rollout_noise)
    assert not torch.equal(first.theta, other.theta)
    critic = draw_rcm(config, "critic", 1, SHAPE, CPU)
    assert isinstance(critic, RolloutDraws)


def test_rollout_levels_descend_from_noise_and_follow_the_score_law(config: DistillConfig) -> None:
    config = with_overrides(config, ["score_shift=5"])
    exits = []
    for step in range(1, 4001):
        draws = draw_rcm(config, "critic", step, SHAPE, CPU)
        assert isinstance(draws, RolloutDraws)
        sigmas = draws.grid.sigmas
        assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
        assert draws.grid.timesteps == pytest.approx([1000 * sigma for sigma in sigmas[:-1]])
        assert draws.draws.exit_step == len(sigmas) - 2 == rollout_length(config, "critic", step) - 1
        exits.append((len(sigmas) - 1, sigmas[-2]))
    for length in (2, 3, 4):
        # The exit level is the least of length - 1 draws of shift_5(u), so its median is shift_5(1 - .5^(1 / that)).
        u = 1 - 0.5 ** (1 / (length - 1))
        levels = torch.tensor([sigma for found, sigma in exits if found == length])
        assert float(levels.median()) == pytest.approx(5 * u / (1 + 4 * u), abs=0.03)


def test_angles_of_the_consistency_term_are_log_normal(config: DistillConfig) -> None:
    config = with_overrides(config, ["rcm.theta_mean=0.7", "rcm.theta_std=1.6"])
    draws = draw_rcm(config, "student", 0, (20_000, 1, 1, 1, 1), CPU)
    assert isinstance(draws, RcmDraws)
    log_ratio = draws.theta.double().tan().log()
    assert float(log_ratio.mean()) == pytest.approx(0.7, abs=0.05)
    assert float(log_ratio.std()) == pytest.approx(1.6, abs=0.05)


def test_the_tangent_warms_up_over_iterations_without_matching(config: DistillConfig) -> None:
    config = with_overrides(config, ["rcm.warmup_iterations=4"])
    ratios = [student_draws(config, step).tangent_ratio for step in range(4)]
    assert ratios == [0.0, 0.25, 0.5, 0.75]
    assert student_draws(config, 3).rollout is None
    after = student_draws(config, 4)
    assert after.tangent_ratio == 1.0 and after.rollout is not None
    assert student_draws(with_overrides(config, ["rcm.dmd_weight=0"]), 9).rollout is None


@pytest.mark.parametrize("method", ["rcm", "dcm"])
def test_only_the_network_of_the_turn_gets_a_gradient(
    tiny_networks: Networks, config: DistillConfig, batch: Batch, method: str
) -> None:
    config = dataclasses.replace(config, method=method)
    rcm_student_step(tiny_networks, batch, student_draws(config, 4), config).loss.backward()
    assert all(parameter.grad is not None for parameter in tiny_networks.student.blocks.parameters())
    for network in (tiny_networks.critic, tiny_networks.teacher):
        assert all(parameter.grad is None for parameter in network.parameters())
    tiny_networks.student.zero_grad()
    draws = draw_rcm(config, "critic", 5, SHAPE, CPU)
    assert isinstance(draws, RolloutDraws)
    rcm_critic_step(tiny_networks, batch, draws, config).loss.backward()
    assert any(parameter.grad is not None for parameter in tiny_networks.critic.parameters())
    assert all(parameter.grad is None for parameter in tiny_networks.student.parameters())


def test_matching_gradient_is_the_summed_one_of_the_published_loss(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    """The difference that the rollout makes is 2 * direction / B, carried back from the exit step."""
    part_ways(tiny_networks)
    draws = next(found for step in range(0, 20, 2) if (found := student_draws(config, step)).rollout.draws.exit_step)
    rollout = draws.rollout
    assert rollout is not None
    both = gradients(tiny_networks, batch, draws, config)
    alone = gradients(tiny_networks, batch, dataclasses.replace(draws, rollout=None), config)
    student = denoiser(tiny_networks.student, "fp32")
    x0 = student_sample(student, batch, rollout.draws, rollout.grid, "sde", with_grad=True)
    sigma, timestep = rollout.draws.score_sigma, rollout.draws.score_timestep
    latents = add_noise(x0.detach(), rollout.draws.score_noise, sigma)
    with torch.no_grad():
        critic = denoiser(tiny_networks.critic, "fp32")(latents, timestep, batch.prompt_embeds)
        teacher = denoiser(tiny_networks.teacher, "fp32")
        cond, uncond = (
            teacher(latents, timestep, embeds) for embeds in (batch.prompt_embeds, batch.negative_prompt_embeds)
        )
        direction = dmd_direction(x0, latents, uncond + 3.0 * (cond - uncond), critic, sigma)
    want = torch.autograd.grad(x0, list(tiny_networks.student.parameters()), 2 * direction / 3)
    got = joined(both) - joined(alone)
    assert float((got - joined(list(want))).norm() / joined(list(want)).norm()) < 1e-3


def test_loss_is_weighted_by_the_root_of_the_latents_size(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    part_ways(tiny_networks)
    draws = student_draws(config)
    result = rcm_student_step(tiny_networks, batch, draws, config)
    weight = 100 * math.sqrt(NUM_ELEMENTS / 2.0e6)
    want = weight * float(result.metrics["loss_scm"]) + float(result.metrics["loss_dmd"])
    assert float(result.loss.detach()) == pytest.approx(want, rel=1e-5)
    names = {"loss_scm", "tangent_norm", "tangent_masked", "loss_dmd", "score_gap_abs_mean", "x0_std_ratio"}
    assert set(result.metrics) == names
    assert all(value.ndim == 0 and not value.requires_grad for value in result.metrics.values())
    norm = float(result.metrics["tangent_norm"])
    assert norm > 0 and float(result.metrics["tangent_masked"]) == 0
    assert 0 < float(result.metrics["loss_scm"]) < 1


def test_discrete_step_tends_to_the_continuous_one(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    part_ways(tiny_networks)
    # Angles of middle size: at the ends, float32 differences over a short step are rounding.
    draws = dataclasses.replace(student_draws(config), rollout=None, theta=torch.tensor([0.4, 0.9, 1.3]))
    want = joined(gradients(tiny_networks, batch, draws, config))
    errors = []
    # Wan's time embedding turns once in 6 units of 1000 * sigma, so an untrained network is smooth over less than that.
    for num_steps in (2000, 8000, 32_000):
        settings = RcmConfig(warmup_iterations=0, discrete_steps=num_steps)
        discrete = dataclasses.replace(config, method="dcm", method_settings=settings)
        got = joined(gradients(tiny_networks, batch, draws, discrete))
        errors.append(float((got - want).norm() / want.norm()))
    # Of first order in the step: a quarter of the step leaves a quarter of the error.
    assert errors[0] < 0.5
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.2)
    assert errors[2] == pytest.approx(errors[1] / 4, rel=0.2)


def test_states_nearer_to_clean_than_a_discrete_step_aim_at_the_data(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    config = with_overrides(with_method(config, "dcm"), ["rcm.discrete_steps=8"])
    draws = dataclasses.replace(student_draws(config), rollout=None, theta=torch.tensor([1e-3, 0.05, 0.19]))
    result = rcm_student_step(tiny_networks, batch, draws, config)
    assert bool(result.loss.isfinite())


def test_critic_learns_the_flow_of_rollouts_at_random_levels(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    draws = draw_rcm(config, "critic", 5, SHAPE, CPU)
    assert isinstance(draws, RolloutDraws)
    with torch.no_grad():
        student = denoiser(tiny_networks.student, "fp32")
        x0 = student_sample(student, batch, draws.draws, draws.grid, "sde", with_grad=False)
        latents = add_noise(x0, draws.draws.score_noise, draws.draws.score_sigma)
        flow = denoiser(tiny_networks.critic, "fp32")(latents, draws.draws.score_timestep, batch.prompt_embeds)
        want = velocity_loss(flow, x0, draws.draws.score_noise, draws.draws.score_sigma)
    torch.testing.assert_close(rcm_critic_step(tiny_networks, batch, draws, config).loss.detach(), want)


def test_the_state_shown_to_the_networks_is_the_noised_data(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    draws = dataclasses.replace(student_draws(config), rollout=None)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = tiny_networks.teacher.register_forward_pre_hook(lambda _module, args: seen.append((args[0], args[1])))
    rcm_student_step(tiny_networks, batch, draws, config)
    hook.remove()
    assert batch.x0 is not None
    latents, sigma = trig_to_rectified(trig_state(batch.x0, draws.data_noise, draws.theta), draws.theta)
    ((shown, timestep),) = seen
    torch.testing.assert_close(shown, torch.cat([latents, latents]))
    torch.testing.assert_close(timestep, 1000 * torch.cat([sigma, sigma]))
    torch.testing.assert_close(latents, add_noise(batch.x0, draws.data_noise, sigma))


@pytest.mark.parametrize("method", ["rcm", "dcm"])
def test_bf16_step_is_finite(tiny_config: DistillConfig, batch: Batch, method: str) -> None:
    from distill.networks.build import build_networks

    config = with_overrides(with_method(tiny_config, method), ["precision=bf16", "teacher_dtype=bf16"])
    networks = build_networks(config, open_base(config.base), CPU)
    result = rcm_student_step(networks, batch, student_draws(config, 400), config)
    result.loss.backward()
    assert bool(result.loss.isfinite())
    weight = networks.student.blocks[0].ffn.net[2].weight
    assert weight.grad is not None and float(weight.grad.abs().sum()) > 0

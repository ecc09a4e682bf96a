"""The student step of dp-dmd: the first step follows the teacher, matching starts at the second."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from runs import with_method
from torch.nn import functional

from codmd_serve.sampler import rollout
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import Batch
from distill.losses.trajectory import trajectory_loss
from distill.methods.draws import StepDraws, draw_step
from distill.methods.matching import CopulaConfig, draw_sample, student_step
from distill.methods.scores import critic_step
from distill.methods.trajectory import (
    dp_dmd_settings,
    dp_dmd_student_step,
    draw_dp_dmd,
    early_trajectory,
    full_rollout,
    teacher_levels,
)
from distill.networks.build import Networks, denoiser, guided_teacher_flow

CPU = torch.device("cpu")
SHAPE = (3, 4, 3, 4, 4)


@pytest.fixture
def full(tiny_config: DistillConfig) -> DistillConfig:
    """As the authors have it."""
    return with_overrides(
        with_method(tiny_config, "dp-dmd"), ["dp_dmd.teacher_steps=6", "dp_dmd.match_step=2", "dp_dmd.shift=3"]
    )


@pytest.fixture
def config(full: DistillConfig) -> DistillConfig:
    return with_overrides(full, ["dp_dmd.matching=exit", "sampler=sde"])


@pytest.fixture
def batch() -> Batch:
    embeds = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(5))
    embeds[:, :, 6:] = 0
    return Batch(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


def drawn(config: DistillConfig, exit_step: int) -> StepDraws:
    return draw_step(config, torch.Generator().manual_seed(0), SHAPE, exit_step, CPU)


def part_ways(networks: Networks) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (networks.student, networks.critic):
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)


def test_exit_steps_leave_the_first_one_out(config: DistillConfig) -> None:
    exits = [draw_dp_dmd(config, "critic", step, (1, 1, 1, 1, 1), CPU).exit_step for step in range(600)]
    counts = torch.bincount(torch.tensor(exits), minlength=4)
    assert counts.tolist() == [0, *(pytest.approx(200, abs=40) for _ in range(3))]


def test_teacher_levels_are_those_of_its_whole_way(config: DistillConfig) -> None:
    assert teacher_levels(config) == pytest.approx((1.0, 3 * (5 / 6) / (1 + 2 * 5 / 6), 3 * (2 / 3) / (1 + 2 * 2 / 3)))
    low = with_overrides(config, ["timesteps=[900,500]", "dp_dmd.match_step=6"])
    assert teacher_levels(low)[0] == 0.9
    assert teacher_levels(low)[-1] == 0.0
    assert list(teacher_levels(low)) == sorted(teacher_levels(low), reverse=True)


def test_early_trajectory_is_where_the_euler_sampler_passes(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    """The sampler tells x0 only; of a state and the next one, x0 gives the flow and so the state."""
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    levels = teacher_levels(config)

    def guided(latents: torch.Tensor, timestep_B: torch.Tensor, embeds_BLD: torch.Tensor) -> torch.Tensor:
        teacher = denoiser(tiny_networks.teacher, "fp32")
        return guided_teacher_flow(teacher, latents, timestep_B, embeds_BLD, batch.negative_prompt_embeds, 3.0)

    with torch.no_grad():
        whole = early_trajectory(tiny_networks, batch, start, (*levels, 0.0), 3.0)
        timesteps = [1000 * sigma for sigma in levels]
        want = rollout(guided, start[None], batch.prompt_embeds, (*levels, 0.0), timesteps, sampler="ode")
    torch.testing.assert_close(whole, want)


def test_loss_is_zero_when_the_student_is_the_teacher_and_so_is_its_trajectory(
    tiny_networks: Networks, config: DistillConfig, batch: Batch
) -> None:
    """An unguided teacher met after one step moves along the flow that the untrained student has; the critic agrees."""
    config = with_overrides(config, ["guidance_scale=1", "dp_dmd.match_step=1"])
    result = dp_dmd_student_step(tiny_networks, batch, drawn(config, 2), config)
    assert float(result.metrics["loss_trajectory"]) < 1e-10
    assert float(result.loss.detach()) < 1e-9
    result.loss.backward()
    largest = max(float(p.grad.abs().max()) for p in tiny_networks.student.parameters() if p.grad is not None)
    assert largest < 1e-5


@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize("exit_step", [1, 3])
def test_gradient_is_that_of_dmd_plus_the_first_step(
    tiny_networks: Networks, config: DistillConfig, batch: Batch, exit_step: int, sampler: str
) -> None:
    part_ways(tiny_networks)
    config = with_overrides(config, [f"sampler={sampler}", "dp_dmd.weight=2"])
    draws = drawn(config, exit_step)
    calls: list[int] = []
    hook = tiny_networks.student.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    result = dp_dmd_student_step(tiny_networks, batch, draws, config)
    hook.remove()
    assert calls == [3] * (exit_step + 1)  # the first step's forward serves both terms
    parameters = list(tiny_networks.student.parameters())
    got = torch.autograd.grad(result.loss, parameters)
    plain = dataclasses.replace(config, method="dmd", method_settings=CopulaConfig())
    same = draw_sample(plain, torch.Generator().manual_seed(0), SHAPE, exit_step, CPU)
    assert torch.equal(same.rollout_noise, draws.rollout_noise)
    dmd = student_step(tiny_networks, batch, same, plain)
    start = draws.rollout_noise[0]
    flow = denoiser(tiny_networks.student, "fp32")(start, torch.full((3,), 1000.0), batch.prompt_embeds)
    levels = teacher_levels(config)
    state = early_trajectory(tiny_networks, batch, start, levels, config.guidance_scale)
    first = trajectory_loss(flow, start, state, 1.0, levels[-1])
    want = torch.autograd.grad(dmd.loss + 2 * first, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert float(result.metrics["loss_dmd"]) == pytest.approx(float(dmd.metrics["loss_dmd"]))
    assert set(result.metrics) == {"loss_dmd", "loss_trajectory", "score_gap_abs_mean", "x0_std_ratio"}


def authors_loss(networks: Networks, batch: Batch, draws: StepDraws, config: DistillConfig) -> torch.Tensor:
    """The student branch of train_sd35_dpdmd.py in its own algebra, which is in predictions of x0 throughout."""
    grid, student = config.grid(), denoiser(networks.student, "fp32")
    x_stu = x1 = draws.rollout_noise[0]
    v_first = None
    for index, timestep in enumerate(grid.timesteps):
        v_step = student(x_stu, torch.full((3,), timestep), batch.prompt_embeds)
        x_stu = x_stu + (grid.sigmas[index + 1] - grid.sigmas[index]) * v_step
        if index == 0:
            v_first = v_step
            x_stu = x_stu.detach()
    levels = teacher_levels(config)
    z_tk = early_trajectory(networks, batch, x1, levels, config.guidance_scale)
    assert v_first is not None
    div_loss = functional.mse_loss(v_first, ((x1 - z_tk) / (1.0 - levels[-1])).detach())
    sigma = draws.score_sigma.reshape(-1, 1, 1, 1, 1)
    with torch.no_grad():
        xt = (1.0 - sigma) * x_stu + sigma * draws.score_noise
        inputs = (xt, draws.score_timestep)
        v_c = denoiser(networks.teacher, "fp32")(*inputs, batch.prompt_embeds)
        v_u = denoiser(networks.teacher, "fp32")(*inputs, batch.negative_prompt_embeds)
        v_fake = denoiser(networks.critic, "fp32")(*inputs, batch.prompt_embeds)
        p_real = xt - (xt - sigma * (v_u + config.guidance_scale * (v_c - v_u)))
        p_fake = xt - (xt - sigma * v_fake)
        grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3, 4], keepdim=True)
    dmd = 0.5 * functional.mse_loss(x_stu, (x_stu - grad).detach())
    return dmd + dp_dmd_settings(config).weight * div_loss


def test_full_matching_is_the_authors_student_branch(
    tiny_networks: Networks, full: DistillConfig, batch: Batch
) -> None:
    part_ways(tiny_networks)
    config = with_overrides(full, ["dp_dmd.weight=2"])
    draws = draw_dp_dmd(config, "student", 5, SHAPE, CPU)
    assert (draws.exit_step, draws.exit_steps) == (3, None)
    with counted_calls(tiny_networks.student) as calls:
        result = dp_dmd_student_step(tiny_networks, batch, draws, config)
    assert calls == [1000.0, *config.grid().timesteps[1:]]  # four forwards, the first of which serves both terms
    parameters = list(tiny_networks.student.parameters())
    got = torch.autograd.grad(result.loss, parameters)
    loss = authors_loss(tiny_networks, batch, draws, config)
    assert float(result.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for a, b in zip(got, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@contextlib.contextmanager
def counted_calls(network: torch.nn.Module) -> Iterator[list[float]]:
    """The timesteps that a network is called with."""
    calls: list[float] = []
    hook = network.register_forward_pre_hook(lambda _module, args: calls.append(float(args[1][0])))
    try:
        yield calls
    finally:
        hook.remove()


def test_full_matching_gives_the_first_step_no_gradient_but_the_diversity_terms(
    tiny_networks: Networks, full: DistillConfig, batch: Batch
) -> None:
    part_ways(tiny_networks)
    draws = draw_dp_dmd(full, "student", 5, SHAPE, CPU)
    first, end = full_rollout(denoiser(tiny_networks.student, "fp32"), batch, draws, full)
    assert torch.autograd.grad(end.sum(), first, retain_graph=True, allow_unused=True) == (None,)
    later = rollout(
        denoiser(tiny_networks.student, "fp32"),
        draws.rollout_noise,
        batch.prompt_embeds,
        full.grid().sigmas,
        full.grid().timesteps,
        sampler="ode",
    )
    torch.testing.assert_close(end, later)


def test_critic_of_full_matching_learns_the_end_of_the_rollout(
    tiny_networks: Networks, full: DistillConfig, batch: Batch
) -> None:
    draws = draw_dp_dmd(full, "critic", 0, SHAPE, CPU)
    with counted_calls(tiny_networks.student) as calls:
        critic_step(tiny_networks, batch, draws, full)
    assert calls == list(full.grid().timesteps)


def test_fresh_noise_is_what_the_ode_rollout_does_without(
    tiny_networks: Networks, full: DistillConfig, batch: Batch
) -> None:
    """D7: with sde the second step starts from new noise, so the first step's choice is undone."""
    draws = draw_dp_dmd(full, "student", 5, SHAPE, CPU)
    other = dataclasses.replace(
        draws, rollout_noise=torch.cat([draws.rollout_noise[:1], torch.randn_like(draws.rollout_noise[1:])])
    )
    ends = [full_rollout(denoiser(tiny_networks.student, "fp32"), batch, each, full)[1] for each in (draws, other)]
    assert torch.equal(*ends)


@pytest.mark.parametrize("matching", ["full", "exit"])
def test_only_the_student_gets_a_gradient(
    tiny_networks: Networks, full: DistillConfig, batch: Batch, matching: str
) -> None:
    config = with_overrides(full, [f"dp_dmd.matching={matching}"])
    draws = draw_dp_dmd(config, "student", 5, SHAPE, CPU)
    dp_dmd_student_step(tiny_networks, batch, draws, config).loss.backward()
    assert any(parameter.grad is not None for parameter in tiny_networks.student.parameters())
    for network in (tiny_networks.critic, tiny_networks.teacher):
        assert all(parameter.grad is None for parameter in network.parameters())

"""An exit step for each sample: the law of one for the batch, sample by sample, and as many forwards on every rank."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from runs import with_method

from distill.config import DistillConfig, with_overrides
from distill.data.prompts import Batch
from distill.methods.draws import draw_exits, score_window, steps_before_exit
from distill.methods.matching import (
    MatchingDraws,
    MatchingMethod,
    draw_sample,
    resumed_student_step,
    scored_sample,
    student_step,
)
from distill.methods.scores import student_sample
from distill.methods.trajectory import draw_dp_dmd
from distill.networks.build import Networks, denoiser
from distill.streams import named_rng

CPU = torch.device("cpu")
SHAPE = (3, 4, 3, 4, 4)


@pytest.fixture
def config(tiny_config: DistillConfig) -> DistillConfig:
    return with_overrides(tiny_config, ["exit_per_sample=true", "score_window=full", "copula.weight_batch=0"])


@pytest.fixture
def batch() -> Batch:
    embeds = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(5))
    return Batch(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


@pytest.fixture
def apart(tiny_networks: Networks) -> Networks:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (tiny_networks.student, tiny_networks.critic):
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return tiny_networks


def drawn(config: DistillConfig, exits: tuple[int, ...]) -> MatchingDraws:
    """Draws with noise for all steps, whatever the exit steps, so that they can be compared."""
    rng = torch.Generator().manual_seed(0)
    return dataclasses.replace(draw_sample(config, rng, SHAPE, 3, CPU, None, torch.tensor(exits)), exit_step=max(exits))


def gradient(loss: torch.Tensor, networks: Networks) -> torch.Tensor:
    parameters = list(networks.student.parameters())
    return torch.cat([item.flatten() for item in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_each_sample_is_that_of_a_batch_that_stops_where_it_does(
    apart: Networks, config: DistillConfig, batch: Batch, sampler: str
) -> None:
    student, grid = denoiser(apart.student, "fp32"), config.grid()
    exits = (2, 0, 3)
    draws = drawn(config, exits)
    got = student_sample(student, batch, draws, grid, sampler, with_grad=False)
    assert not got.requires_grad
    for place, step in enumerate(exits):
        whole = dataclasses.replace(draws, exit_steps=None, exit_step=step)
        want = student_sample(student, batch, whole, grid, sampler, with_grad=False)
        torch.testing.assert_close(got[place], want[place])


def test_loss_and_gradient_have_the_mean_of_one_exit_step_per_batch(
    apart: Networks, config: DistillConfig, batch: Batch
) -> None:
    """Over four assignments in which each sample stops once at each step, and over the four steps of a whole batch."""
    by_sample, by_batch = [], []
    for shift in range(4):
        exits = tuple((place + shift) % 4 for place in range(3))
        for kept, draws in (
            (by_sample, drawn(config, exits)),
            (by_batch, dataclasses.replace(drawn(config, (shift,)), exit_steps=None)),
        ):
            result = student_step(apart, batch, draws, config)
            kept.append((result.loss.detach(), gradient(result.loss, apart)))
    losses, gradients = (
        [torch.stack([one[part] for one in kept]).mean(dim=0) for kept in (by_sample, by_batch)] for part in (0, 1)
    )
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_exit_steps_are_uniform_and_independent(config: DistillConfig) -> None:
    pairs: Counter[tuple[int, ...]] = Counter()
    for iteration in range(1600):
        _, exits = draw_exits(config, named_rng(0, "exit", iteration), 3)
        assert exits is not None
        pairs[tuple(exits[:2].tolist())] += 1
    assert set(pairs) == set(itertools.product(range(4), repeat=2))
    # 100 expected of each; five standard deviations of a binomial count are 49.
    assert all(abs(count - 100) < 49 for count in pairs.values())


def test_student_and_critic_of_an_iteration_stop_at_the_same_steps_on_every_rank(config: DistillConfig) -> None:
    method = MatchingMethod("codmd")
    whole = method.draw(config, "student", 4, SHAPE, CPU)
    critic = method.draw(config, "critic", 4, SHAPE, CPU)
    assert whole.exit_steps is not None and critic.exit_steps is not None
    assert torch.equal(whole.exit_steps, critic.exit_steps)
    for place in range(3):
        own = method.draw(config, "student", 4, SHAPE, CPU, range(place, place + 1))
        assert own.exit_steps is not None
        # The rank of an early sample calls the student as often as the others.
        assert own.exit_step == whole.exit_step == int(whole.exit_steps.max())
        assert int(own.exit_steps) == int(whole.exit_steps[place])
        assert torch.equal(own.rollout_noise[:, 0], whole.rollout_noise[:, place])


@pytest.mark.parametrize("exits", [(2, 0, 3), (1, 1, 0)])
def test_a_resumed_step_is_the_step_bit_for_bit(
    apart: Networks, config: DistillConfig, batch: Batch, exits: tuple[int, ...]
) -> None:
    draws = drawn(config, exits)
    calls: list[float] = []
    hook = apart.student.register_forward_pre_hook(lambda _module, args: calls.append(float(args[1].max())))
    want = student_step(apart, batch, draws, config)
    assert len(calls) == max(exits) + 1
    sample, _ = scored_sample(apart, batch, draws, config)
    got = resumed_student_step(apart, batch, sample, config, lambda own: own)
    hook.remove()
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(*(gradient(one.loss, apart) for one in (got, want)))


@pytest.mark.parametrize("window", ["full", "above", "step"])
def test_each_sample_is_scored_in_the_window_of_its_own_step(config: DistillConfig, window: str) -> None:
    config = with_overrides(config, [f"score_window={window}"])
    exits = torch.arange(4).repeat(500)
    draws = draw_sample(config, torch.Generator().manual_seed(0), (2000, 1, 1, 1, 1), 3, CPU, None, exits)
    for step in range(4):
        low, high = score_window(config, step)
        sigmas = draws.score_sigma[exits == step]
        assert sigmas.dtype == torch.float32
        assert low - 1e-6 <= float(sigmas.min()) and float(sigmas.max()) <= high + 1e-6
        # They fill their window.
        assert float(sigmas.max() - sigmas.min()) > 0.9 * (high - low)


def test_plan_counts_the_latest_exit_of_the_batch(config: DistillConfig) -> None:
    config = dataclasses.replace(config, batch_size=3)
    latest = [draw_exits(config, named_rng(0, "exit", iteration), 3)[0] for iteration in range(4000)]
    assert steps_before_exit(config) == pytest.approx(sum(latest) / len(latest), abs=0.05)
    assert steps_before_exit(dataclasses.replace(config, exit_per_sample=False)) == 1.5
    one = dataclasses.replace(config, batch_size=1)
    assert steps_before_exit(one) == pytest.approx(1.5)
    assert steps_before_exit(one, first=1) == pytest.approx(2.0)
    assert MatchingMethod("dmd").passes(config)["critic"].student == steps_before_exit(config) + 1


def test_exit_steps_of_dp_dmd_leave_the_first_one_out(tiny_config: DistillConfig) -> None:
    config = with_overrides(with_method(tiny_config, "dp-dmd"), ["dp_dmd.matching=exit", "exit_per_sample=true"])
    seen = set()
    for iteration in range(60):
        exits = draw_dp_dmd(config, "student", iteration, SHAPE, CPU).exit_steps
        assert exits is not None
        seen |= set(exits.tolist())
    assert seen == {1, 2, 3}

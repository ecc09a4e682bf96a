"""One student step and one critic step: who gets a gradient, how often each network runs, what is drawn."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

from codmd_serve.schedule import add_noise, flow_to_x0
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import Batch
from distill.losses.copula import copula_terms
from distill.losses.dmd import dmd_direction
from distill.methods.controls import ControlDraws
from distill.methods.draws import Turn, draw_exit_step, draw_score_level, reference_sigma, score_window
from distill.methods.matching import (
    MatchingDraws,
    MatchingMethod,
    copula_settings,
    draw_sample,
    resumed_student_step,
    scored_sample,
    student_step,
)
from distill.methods.registry import recipe_config
from distill.methods.scores import critic_step
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.parallel.processes import SINGLE_PROCESS

CPU = torch.device("cpu")
SHAPE = (3, 4, 3, 4, 4)


@pytest.fixture
def batch() -> Batch:
    embeds = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(5))
    embeds[:, :, 6:] = 0
    return Batch(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


def drawn(config: DistillConfig, exit_step: int, seed: int = 0) -> MatchingDraws:
    return draw_sample(config, torch.Generator().manual_seed(seed), SHAPE, exit_step, CPU)


def part_ways(networks: Networks) -> None:
    """Move student and critic off the teacher, so that every difference in the losses is a real one."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (networks.student, networks.critic):
            for parameter in network.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)


@contextmanager
def counted(networks: Networks) -> Iterator[dict[str, list[int]]]:
    """Batch size of every forward call, by network."""
    calls: dict[str, list[int]] = {"student": [], "critic": [], "teacher": []}
    with ExitStack() as stack:
        for name, sizes in calls.items():
            hook = getattr(networks, name).register_forward_pre_hook(
                lambda _module, args, sizes=sizes: sizes.append(len(args[0]))
            )
            stack.callback(hook.remove)
        yield calls


def has_gradient(network: torch.nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("exit_step", [0, 2, 3])
def test_student_step_stops_at_the_exit_step_and_batches_guidance(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch, exit_step: int
) -> None:
    with counted(tiny_networks) as calls:
        result = student_step(tiny_networks, batch, drawn(tiny_config, exit_step), tiny_config)
    assert calls == {"student": [3] * (exit_step + 1), "critic": [3], "teacher": [6]}
    result.loss.backward()
    assert has_gradient(tiny_networks.student)
    assert not has_gradient(tiny_networks.critic)
    assert not has_gradient(tiny_networks.teacher)


def test_critic_step_trains_the_critic_alone(tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch) -> None:
    with counted(tiny_networks) as calls:
        critic_step(tiny_networks, batch, drawn(tiny_config, 1), tiny_config).loss.backward()
    assert calls == {"student": [3, 3], "critic": [3], "teacher": []}
    assert has_gradient(tiny_networks.critic)
    assert not has_gradient(tiny_networks.student)


def by_hand(networks: Networks, batch: Batch, draws: MatchingDraws, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """Student x0 at exit step 0 and the gradient of the whole loss with respect to it, from the parts."""
    latents = draws.rollout_noise[0]
    flow = denoiser(networks.student, "fp32")(latents, torch.full((3,), 1000.0), batch.prompt_embeds)
    x0 = flow_to_x0(latents, flow, 1.0)
    leaf = x0.detach().requires_grad_()
    noisy = add_noise(leaf.detach(), draws.score_noise, draws.score_sigma)
    with torch.no_grad():
        critic = denoiser(networks.critic, "fp32")(noisy, draws.score_timestep, batch.prompt_embeds)
        teacher = guided_teacher_flow(
            denoiser(networks.teacher, "fp32"),
            noisy,
            draws.score_timestep,
            batch.prompt_embeds,
            batch.negative_prompt_embeds,
            config.guidance_scale,
        )
    terms = copula_terms(
        leaf,
        flow_to_x0(noisy, teacher, draws.score_sigma),
        flow_to_x0(noisy, critic, draws.score_sigma),
        use_frame=True,
        use_batch=True,
        temperature=copula_settings(config).temperature,
    )
    (0.1 * (terms.frame + terms.batch)).backward()
    assert leaf.grad is not None
    direction = dmd_direction(leaf, noisy, teacher, critic, draws.score_sigma)
    return x0, leaf.grad + direction / direction.numel()


def test_student_gradient_is_that_of_the_parts(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch
) -> None:
    part_ways(tiny_networks)
    draws = drawn(tiny_config, 0)
    x0, gradient = by_hand(tiny_networks, batch, draws, tiny_config)
    parameters = list(tiny_networks.student.parameters())
    want = torch.autograd.grad(x0, parameters, gradient)
    got = torch.autograd.grad(student_step(tiny_networks, batch, draws, tiny_config).loss, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_dmd_is_codmd_without_the_relational_weights(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch
) -> None:
    part_ways(tiny_networks)
    draws = drawn(tiny_config, 1)
    dmd = student_step(tiny_networks, batch, draws, dataclasses.replace(tiny_config, method="dmd"))
    weightless = with_overrides(tiny_config, ["copula.weight_batch=0", "copula.weight_frame=0"])
    codmd = student_step(tiny_networks, batch, draws, tiny_config)
    assert float(dmd.loss.detach()) == float(student_step(tiny_networks, batch, draws, weightless).loss.detach())
    extra = 0.1 * (codmd.metrics["loss_frame"] + codmd.metrics["loss_batch"])
    torch.testing.assert_close(codmd.loss.detach(), dmd.loss.detach() + extra)
    assert float(extra) > 0
    assert "loss_frame" not in dmd.metrics


def turn_of(config: DistillConfig, networks: Networks, batch: Batch) -> Turn:
    def load(own: range) -> Batch:
        places = slice(own.start, own.stop)
        return Batch(
            prompt_embeds=batch.prompt_embeds[places], negative_prompt_embeds=batch.negative_prompt_embeds[places]
        )

    return Turn(
        role="student",
        iteration=1,
        config=config,
        networks=networks,
        processes=SINGLE_PROCESS,
        shape=SHAPE,
        device=CPU,
        load=load,
    )


def test_related_micro_batches_are_scored_once(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch
) -> None:
    """Of the two passes over three micro-batches, the second is one student forward each."""
    config = with_overrides(tiny_config, ["accumulate=3"])
    exit_step = MatchingMethod("codmd").draw(config, "student", 1, SHAPE, CPU).exit_step
    with counted(tiny_networks) as calls:
        results = list(MatchingMethod("codmd").losses(turn_of(config, tiny_networks, batch)))
    assert len(results) == 3
    assert calls == {"student": [1] * 3 * (exit_step + 2), "critic": [1] * 3, "teacher": [2] * 3}
    plain = with_overrides(config, ["copula.weight_batch=0"])
    with counted(tiny_networks) as calls:
        list(MatchingMethod("codmd").losses(turn_of(plain, tiny_networks, batch)))
    assert calls == {"student": [1] * 3 * (exit_step + 1), "critic": [1] * 3, "teacher": [2] * 3}


@pytest.mark.parametrize(("exit_step", "sampler"), [(0, "sde"), (2, "ode"), (2, "sde")])
@pytest.mark.parametrize("control", ["matched", "noise"])
def test_a_resumed_step_is_the_step_bit_for_bit(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch, exit_step: int, sampler: str, control: str
) -> None:
    part_ways(tiny_networks)
    config = with_overrides(tiny_config, [f"sampler={sampler}", f"copula.control={control}"])
    draws = drawn(config, exit_step)
    want = student_step(tiny_networks, batch, draws, config)
    sample, features = scored_sample(tiny_networks, batch, draws, config)
    assert features.shape == (3, 3, 4) and not features.requires_grad
    got = resumed_student_step(tiny_networks, batch, sample, config, lambda own: own)
    parameters = list(tiny_networks.student.parameters())
    assert torch.equal(got.loss, want.loss)
    for a, b in zip(*(torch.autograd.grad(one.loss, parameters) for one in (got, want)), strict=True):
        assert torch.equal(a, b)
    assert got.metrics.keys() == want.metrics.keys()
    assert all(torch.equal(value, want.metrics[name]) for name, value in got.metrics.items())


def test_nothing_moves_when_critic_agrees_with_an_unguided_teacher(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch
) -> None:
    config = dataclasses.replace(tiny_config, guidance_scale=1.0)
    result = student_step(tiny_networks, batch, drawn(config, 1), config)
    result.loss.backward()
    assert float(result.metrics["score_gap_abs_mean"]) < 1e-6
    largest = max(float(p.grad.abs().max()) for p in tiny_networks.student.parameters() if p.grad is not None)
    assert largest < 1e-6


def test_metrics_are_detached_scalars(tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch) -> None:
    metrics = student_step(tiny_networks, batch, drawn(tiny_config, 0), tiny_config).metrics
    assert set(metrics) == {"loss_dmd", "loss_frame", "loss_batch", "score_gap_abs_mean", "x0_std_ratio"}
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("control", ["matched", "teacher_only", "noise"])
def test_arms_share_their_noise(tiny_config: DistillConfig, control: str) -> None:
    """Paired comparisons: method and control arms change no draw but their own."""
    plain = drawn(tiny_config, 2)
    own = drawn(with_overrides(tiny_config, [f"copula.control={control}"]), 2)
    assert plain.control == ControlDraws() and own.control != ControlDraws()
    for name in ("rollout_noise", "score_noise", "score_sigma"):
        assert torch.equal(getattr(plain, name), getattr(own, name))


@pytest.mark.parametrize("control", ["matched", "teacher_only"])
def test_permuted_relations_change_the_loss(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch, control: str
) -> None:
    part_ways(tiny_networks)
    config = with_overrides(tiny_config, [f"copula.control={control}"])
    shuffles = ControlDraws(frame_permutation=torch.tensor([[2, 0, 1]] * 3), batch_permutation=torch.tensor([1, 2, 0]))
    draws = dataclasses.replace(drawn(config, 0), control=shuffles)
    permuted = student_step(tiny_networks, batch, draws, config).metrics
    plain = student_step(tiny_networks, batch, drawn(tiny_config, 0), tiny_config).metrics
    assert float(permuted["loss_dmd"]) == float(plain["loss_dmd"])
    assert float(permuted["loss_frame"]) != float(plain["loss_frame"])
    assert float(permuted["loss_batch"]) != float(plain["loss_batch"])


@pytest.mark.parametrize("control", ["matched", "noise"])
def test_size_matched_controls_vanish_when_critic_and_teacher_agree(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch, control: str
) -> None:
    config = with_overrides(tiny_config, [f"copula.control={control}", "guidance_scale=1.0"])
    result = student_step(tiny_networks, batch, drawn(config, 1), config)
    result.loss.backward()
    largest = max(float(p.grad.abs().max()) for p in tiny_networks.student.parameters() if p.grad is not None)
    assert largest < 1e-6
    # The old control does not.
    old = with_overrides(config, ["copula.control=teacher_only"])
    tiny_networks.student.zero_grad()
    student_step(tiny_networks, batch, drawn(old, 1), old).loss.backward()
    assert max(float(p.grad.abs().max()) for p in tiny_networks.student.parameters() if p.grad is not None) > 1e-5


def test_noise_keeps_the_values_and_replaces_the_gradient(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch
) -> None:
    part_ways(tiny_networks)
    config = with_overrides(tiny_config, ["copula.control=noise"])
    parameters = list(tiny_networks.student.parameters())
    plain = student_step(tiny_networks, batch, drawn(tiny_config, 0), tiny_config)
    noisy = student_step(tiny_networks, batch, drawn(config, 0), config)
    assert plain.metrics.keys() == noisy.metrics.keys()
    assert all(torch.equal(value, plain.metrics[name]) for name, value in noisy.metrics.items())
    torch.testing.assert_close(noisy.loss, plain.loss)
    gradients = [torch.autograd.grad(one.loss, parameters) for one in (plain, noisy)]
    assert any(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_score_level_follows_the_published_law() -> None:
    config = with_overrides(recipe_config("wan_1_3b"), ["score_shift=8"])
    sigma, timestep = draw_score_level(config, torch.Generator().manual_seed(0), 20_000, 0)
    # The clamp makes an atom at .98 of 14% of the draws at shift 8, and nearly none at .02.
    assert float((sigma == 0.98).double().mean()) == pytest.approx(0.14, abs=0.01)
    assert float(sigma.min()) == pytest.approx(0.02, rel=1e-6)
    assert float(sigma.median()) == pytest.approx(8 / 9, abs=0.01)
    torch.testing.assert_close(timestep, 1000 * sigma)


def test_reference_compat_snaps_the_score_sigma_but_not_the_timestep() -> None:
    config = recipe_config("wan_1_3b")
    sigma, timestep = draw_score_level(config, torch.Generator().manual_seed(0), 50, 0, reference_compat=True)
    assert float((sigma - timestep / 1000).abs().max()) > 1e-5
    assert sigma.tolist() == pytest.approx([reference_sigma(value) for value in timestep.tolist()])
    levels = timestep / 1000 / (8 - 7 * timestep / 1000) * 1000
    inside = (timestep > 20) & (timestep < 980)
    torch.testing.assert_close(levels[inside], levels[inside].round(), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("window", "bounds"),
    [
        ("full", [(0.02, 0.98)] * 4),
        ("above", [(0.9, 0.98), (0.75, 0.98), (0.5, 0.98), (0.02, 0.98)]),
        ("step", [(0.9, 0.98), (0.75, 0.9), (0.5, 0.75), (0.02, 0.5)]),
    ],
)
def test_score_window_of_each_exit_step(window: str, bounds: list[tuple[float, float]]) -> None:
    config = with_overrides(recipe_config(), [f"score_window={window}", "step_shift=3", "score_shift=3"])
    for exit_step, (low, high) in enumerate(bounds):
        assert score_window(config, exit_step) == pytest.approx((low, high))
        sigma, _ = draw_score_level(config, torch.Generator().manual_seed(0), 4000, exit_step)
        assert float(sigma.min()) == pytest.approx(low, abs=0.01)
        assert float(sigma.max()) == pytest.approx(high, abs=0.01)
        if window != "full":
            assert len(sigma.unique()) > 3900  # nothing piles up at the ends


def test_score_window_outside_the_clamp_is_one_level() -> None:
    """A first step so close to noise that its window lies above score_sigma_max is judged there."""
    config = with_overrides(recipe_config(), ["timesteps=[1000,990,500]", "score_window=step"])
    sigma, _ = draw_score_level(config, torch.Generator().manual_seed(0), 10, 0)
    assert sigma.tolist() == pytest.approx([0.98] * 10)


def test_shared_sigma_is_one_level_per_batch(tiny_config: DistillConfig) -> None:
    config = with_overrides(tiny_config, ["score_shared_sigma=true"])
    assert len(set(drawn(config, 0).score_sigma.tolist())) == 1
    assert len(set(drawn(tiny_config, 0).score_sigma.tolist())) == 3


def test_exit_step_is_uniform() -> None:
    rng = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw_exit_step(rng, 4) for _ in range(4000)]), minlength=4)
    assert counts.tolist() == pytest.approx([1000] * 4, abs=120)


@pytest.mark.parametrize("control", ["none", "matched", "teacher_only", "noise"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(
    tiny_networks: Networks, tiny_config: DistillConfig, batch: Batch, control: str
) -> None:
    """The noise of a control arm is as large in three micro-batches as in one."""
    part_ways(tiny_networks)
    parameters = list(tiny_networks.student.parameters())
    totals = []
    for accumulate in (1, 3):
        config = with_overrides(
            tiny_config, [f"copula.control={control}", "copula.scale=10", f"accumulate={accumulate}"]
        )
        parts = list(MatchingMethod("codmd").losses(turn_of(config, tiny_networks, batch)))
        assert len(parts) == accumulate
        gradients = [torch.autograd.grad(part.loss / accumulate, parameters) for part in parts]
        totals.append([sum(own) for own in zip(*gradients, strict=True)])
    for whole, summed in zip(*totals, strict=True):
        # float32 sums of another order, through a softmax at temperature .1; a lost factor would be 3.
        torch.testing.assert_close(summed, whole, rtol=1e-2, atol=1e-3 * float(whole.abs().max()) + 1e-7)

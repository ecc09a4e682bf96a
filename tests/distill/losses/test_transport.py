"""Sinkhorn's plan against exact transport and closed forms; the direction that it gives against DMD's."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distill.losses import transport
from distill.losses.transport import (
    frame_tokens,
    from_frame_tokens,
    squared_distances,
    transport_direction,
    transport_plan,
    transported,
    transported_frames,
    transported_samples,
)


def items(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_small_epsilon_is_the_exact_assignment() -> None:
    cost = squared_distances(items(1, 7, 3), items(1, 7, 3, seed=1))
    plan = transport_plan(cost, 2e-3, 4000)
    rows, columns = linear_sum_assignment(cost[0].numpy())
    assert float((plan * cost).sum()) == pytest.approx(cost[0].numpy()[rows, columns].sum() / 7, rel=2e-3)
    assert plan[0].argmax(dim=1).tolist() == columns.tolist()


def test_plan_has_uniform_marginals_and_the_form_of_a_scaled_kernel() -> None:
    cost = squared_distances(items(2, 5, 3), items(2, 4, 3, seed=1))
    plan = transport_plan(cost, 0.3, 500)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((2, 4), 1 / 4, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(dim=2), torch.full((2, 5), 1 / 5, dtype=torch.float64))
    # log P + C / epsilon is a sum of a function of the row and one of the column.
    potential = plan.log() + cost / (0.3 * cost.mean(dim=(1, 2), keepdim=True))
    mixed = potential - potential[:, :1] - potential[:, :, :1] + potential[:, :1, :1]
    assert float(mixed.abs().max()) < 1e-9


def test_two_by_two_has_a_closed_form() -> None:
    cost = torch.tensor([[[1.0, 3.0], [2.0, 0.5]]], dtype=torch.float64)
    epsilon = 0.4
    plan = transport_plan(cost, epsilon, 500)
    twist = (3.0 + 2.0 - 1.0 - 0.5) / (2 * epsilon * float(cost.mean()))
    assert float(plan[0, 0, 0]) == pytest.approx(0.5 * float(torch.sigmoid(torch.tensor(twist))), rel=1e-6)


def test_gradient_of_the_cost_is_the_distance_to_the_transported_mean() -> None:
    """By the envelope theorem: of min <P, C> - epsilon * H(P), the gradient is that at a constant plan."""
    x, y = items(1, 6, 2).requires_grad_(), items(1, 6, 2, seed=1)
    scale = 0.5 * float(squared_distances(x.detach(), y).mean())

    def value(points: torch.Tensor) -> torch.Tensor:
        cost = (points[:, :, None] - y[:, None]).square().sum(dim=-1)
        # The same absolute epsilon, whatever the mean of the cost.
        plan = transport_plan(cost, scale / float(cost.mean()), 2000)
        return (plan * cost).sum() + scale * (plan * plan.log()).sum()

    plan = transport_plan(squared_distances(x.detach(), y), 0.5, 2000)
    want = 2 / 6 * (x.detach() - transported(plan, y))
    step = 1e-5
    for index in ((0, 0, 0), (0, 3, 1)):
        moved = [x.detach().clone() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        slope = (value(moved[0]) - value(moved[1])) / (2 * step)
        assert float(slope) == pytest.approx(float(want[index]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("size", [(4, 6), (3, 4)])
def test_tokens_of_frames_go_back_to_where_they_were(size: tuple[int, int]) -> None:
    x0 = items(2, 3, 5, *size)
    tokens = frame_tokens(x0)
    assert tokens.shape == ((10, 6, 12) if size == (4, 6) else (10, 6, 6))
    assert torch.equal(from_frame_tokens(tokens, x0.shape), x0)
    # A token is a cell of one frame.
    assert set(tokens[0, 0].tolist()) <= set(x0[0, :, 0].flatten().tolist())


def test_where_critic_and_teacher_agree_nothing_is_moved() -> None:
    x0 = items(2, 4, 3, 4, 4)
    for partner in (
        transported_frames(x0, x0, 1e-3, 200),
        transported_samples(x0, x0, 1e-3, 200, slice(0, 2)),
    ):
        assert float(transport_direction(x0 + 1, x0, x0, partner).abs().max()) < 1e-6


def test_with_partners_of_their_own_it_is_the_direction_of_dmd() -> None:
    """Close predictions of far samples: the plan pairs each with its own."""
    teacher = items(3, 4, 2, 4, 4)
    critic, student = teacher + 0.01 * items(3, 4, 2, 4, 4, seed=1), teacher + items(3, 4, 2, 4, 4, seed=2)
    partner = transported_samples(critic, teacher, 1e-3, 500, slice(0, 3))
    distance = (student - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    want = (critic - teacher) / distance
    torch.testing.assert_close(transport_direction(student, critic, teacher, partner), want, rtol=1e-6, atol=1e-9)


def test_shuffled_tokens_are_found_again() -> None:
    """What no comparison by place can see: the critic's frame is the teacher's with its cells exchanged."""
    teacher = items(1, 4, 2, 4, 4)
    critic = torch.roll(teacher, (2, 2), dims=(3, 4))
    partner = transported_frames(critic, teacher, 1e-3, 500)
    torch.testing.assert_close(partner, critic, atol=1e-6, rtol=0)
    assert float((critic - teacher).abs().max()) > 1


def test_samples_at_once_are_those_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once only as many as their plans have room for: two samples of these have 2 * 3 * 16 entries."""
    critic, teacher = items(5, 2, 3, 4, 4), items(5, 2, 3, 4, 4, seed=1)
    made: list[int] = []

    def plan(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
        made.append(cost.numel())
        return transport_plan(cost, epsilon, iterations)

    monkeypatch.setattr(transport, "transport_plan", plan)
    found = []
    for entries, want in ((1, [48] * 5), (100, [96, 96, 48]), (2**20, [240])):
        monkeypatch.setattr(transport, "PLAN_ENTRIES", entries)
        found.append(transported_frames(critic, teacher, 0.1, 50))
        assert made == want
        made.clear()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_part_of_the_batch_gets_its_rows() -> None:
    critic, teacher = items(4, 2, 1, 2, 2), items(4, 2, 1, 2, 2, seed=1)
    whole = transported_samples(critic, teacher, 0.1, 50, slice(0, 4))
    assert torch.equal(transported_samples(critic, teacher, 0.1, 50, slice(1, 3)), whole[1:3])

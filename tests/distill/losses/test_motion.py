"""AVD's regression weights and its motion term, in closed form."""

import math

import pytest
import torch

from distill.losses.motion import adaptive_weights, flow_errors, motion_loss, moved_means


def test_error_of_each_sample_is_that_of_its_flow() -> None:
    x0, noise = torch.zeros(2, 1, 1, 1, 2), torch.ones(2, 1, 1, 1, 2)
    flow = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).reshape(2, 1, 1, 1, 2)
    assert flow_errors(flow, x0, noise).tolist() == [0.0, 2.0]


def test_weight_is_that_of_the_authors_who_count_the_error_in_the_mean_first() -> None:
    """Theirs: ema = .95 * ema + .05 * error, then 1 - sigmoid(3 * (error - ema)); one half where there was no ema."""
    errors, before = torch.tensor([0.4, 1.5, 0.7]), torch.tensor([0.5, 0.5, -1.0])
    after = 0.95 * before + 0.05 * errors
    want = 1 - torch.sigmoid(3 * (errors - after))
    want[2] = 0.5
    torch.testing.assert_close(adaptive_weights(errors, before, 3.0, 0.95), want)
    # An outlier hardly counts, a sample that is predicted well nearly does.
    assert float(adaptive_weights(torch.tensor([9.0]), torch.tensor([0.5]), 3.0, 0.95)) < 1e-6


def test_means_move_by_level_and_ignore_what_is_not_finite() -> None:
    means = torch.tensor([-1.0, 1.0, 2.0, -1.0])
    level, error = torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 3.0, 2.0, float("inf")])
    moved = moved_means(means, level, error, 0.95)
    torch.testing.assert_close(moved, torch.tensor([2.0, 1.05, 2.0, -1.0]))


def test_motion_is_the_log_of_the_variance_over_frames_where_it_is_small() -> None:
    # Frames a, -a have variance a^2; a still clip has the floor alone.
    amplitudes = torch.tensor([0.1, 0.9, 0.0])
    frames = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1)
    x0 = (amplitudes.view(3, 1, 1, 1, 1) * frames).double().requires_grad_()
    loss = motion_loss(x0, 0.8)
    want = (-math.log(0.01 + 1e-6) + 0.0 - math.log(1e-6)) / 3
    assert float(loss.detach()) == pytest.approx(want, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, x0)
    # d(-log(a^2 + floor)) / dx_f = -x_f / (a^2 + floor): both frames have half of the variance's 2 * x_f.
    assert float(gradient[0, 0, 0, 0, 0]) == pytest.approx(-0.1 / (0.01 + 1e-6) / 3, rel=1e-5)
    assert not gradient[1].any()
    # The means of sides do not count: a constant has no variance and no direction to gain one.
    assert not gradient[2].any()

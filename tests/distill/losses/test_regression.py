"""The regression loss: a mean of squares whose target gets no gradient."""

import torch

from distill.losses.regression import regression_loss


def test_it_is_the_mean_square_and_its_gradient_reaches_the_prediction_alone() -> None:
    x0_pred = torch.tensor([[1.0, 3.0], [0.0, 0.0]], requires_grad=True)
    x0 = torch.tensor([[0.0, 1.0], [0.0, 2.0]], requires_grad=True)
    loss = regression_loss(x0_pred, x0)
    assert loss.item() == (1 + 4 + 0 + 4) / 4
    loss.backward()
    assert x0_pred.grad is not None and torch.equal(x0_pred.grad, (x0_pred - x0).detach() * 2 / 4)
    assert x0.grad is None


def test_bfloat16_is_compared_in_float32() -> None:
    loss = regression_loss(torch.full((2,), 1.0, dtype=torch.bfloat16), torch.full((2,), 1.0 + 2**-9))
    assert loss.dtype == torch.float32 and loss.item() == 2**-18

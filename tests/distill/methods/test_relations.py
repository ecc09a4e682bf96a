"""Parts of a batch that take each other's features as constants have the gradient of the whole between them."""

import pytest
import torch
from torch import Tensor

from distill.methods.relations import BatchRelations
from distill.parallel.processes import SINGLE_PROCESS, Processes


def loss_of(features_BVD: Tensor) -> Tensor:
    """Some function of all samples at once that no sum over parts is equal to."""
    student, teacher = features_BVD[:, 0], features_BVD[:, 1].detach()
    return ((student @ student.T).softmax(dim=1) * (teacher @ teacher.T)).mean()


def test_gradients_of_parts_add_up_to_that_of_the_whole() -> None:
    features = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = features.clone().requires_grad_()
    want = loss_of(whole)
    want.backward()
    relations = BatchRelations(3, SINGLE_PROCESS)
    parts = [part.clone().requires_grad_() for part in features.split(2)]
    for part in parts:
        relations.collect(part)
    for index, part in enumerate(parts):
        loss = loss_of(relations.of_micro_batch(index)(part))
        torch.testing.assert_close(loss, want)
        # The trainer averages over parts.
        (loss / 3).backward()
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad)


@pytest.mark.parametrize(("is_divided", "scale"), [(False, 8), (True, 2)])
def test_the_authors_divide_the_gradient_by_the_number_of_processes(is_divided: bool, scale: int) -> None:
    groups_of_two = Processes(rank=1, world_size=8, context_parallel=2)
    for processes in (Processes(rank=1, world_size=4), groups_of_two):
        assert BatchRelations(2, processes, is_divided=is_divided).gradient_scale == scale

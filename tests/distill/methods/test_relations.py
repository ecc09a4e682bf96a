"""Parts of a batch that take each other's features as constants have the gradient of the whole between them."""

import pytest
import torch
from torch import Tensor

from distill.config import DistillConfig, with_overrides
from distill.methods.relations import BatchRelations
from distill.parallel.processes import SINGLE_PROCESS, Processes


def loss_of(features_BVD: Tensor) -> Tensor:
    """Some function of all samples at once that no sum over parts is equal to."""
    student, teacher = features_BVD[:, 0], features_BVD[:, 1].detach()
    return ((student @ student.T).softmax(dim=1) * (teacher @ teacher.T)).mean()


def test_gradients_of_parts_add_up_to_that_of_the_whole(tiny_config: DistillConfig) -> None:
    config = with_overrides(tiny_config, ["batch_size=6", "accumulate=3"])
    features = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = features.clone().requires_grad_()
    want = loss_of(whole)
    want.backward()
    relations = BatchRelations(config, SINGLE_PROCESS)
    parts = [part.clone().requires_grad_() for part in features.split(2)]
    for part in parts:
        assert relations.collect(part).shape == features.shape
    for index, part in enumerate(parts):
        loss = loss_of(relations.of_part(index)(part))
        torch.testing.assert_close(loss, want)
        # The trainer averages over parts.
        (loss / 3).backward()
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad)


@pytest.mark.parametrize(("compat", "scale"), [("false", 8), ("true", 2)])
def test_the_authors_divide_the_gradient_by_the_number_of_processes(
    tiny_config: DistillConfig, compat: str, scale: int
) -> None:
    config = with_overrides(tiny_config, ["batch_size=8", "accumulate=2", f"reference_compat={compat}"])
    assert BatchRelations(config, Processes(rank=1, world_size=4)).gradient_scale == scale
    groups_of_two = Processes(rank=1, world_size=8, context_parallel=2)
    assert BatchRelations(config, groups_of_two).gradient_scale == scale

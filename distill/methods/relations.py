"""Features of the whole batch for the relational term, where ranks and micro-batches compute some of its samples each.

Knows no network and no loss.

Legend: b samples of one micro-batch on one rank, B samples of the whole batch, V videos, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distill.parallel.processes import Processes


class BatchRelations:
    """Completes the features of one micro-batch to those of the whole batch.

    The loss is one function of the features of all samples, and each micro-batch has gradient for its own alone. So
    each takes all others as constants; the sum of the gradients over micro-batches is the gradient of the loss.

    Args:
        num_micro_batches: of each rank.
        processes: this rank among the others.
        is_divided: divide the gradient by the number of data-parallel ranks, as the authors' trainer does.
    """

    def __init__(self, num_micro_batches: int, processes: Processes, *, is_divided: bool = False) -> None:
        self.processes = processes
        # Gradients are averaged over micro-batches and ranks, where a sum is wanted.
        self.gradient_scale = num_micro_batches * (1 if is_divided else processes.data_parallel)
        self.gathered: list[Tensor] = []

    def collect(self, own_bVD: Tensor) -> None:
        """Gather the features of the next micro-batch from all ranks; only needed where there are several."""
        self.gathered.append(self.processes.gather_samples(own_bVD))

    def of_micro_batch(self, index: int) -> Callable[[Tensor], Tensor]:
        """Return `relate` of `copula_terms` for one micro-batch: (b, V, D) with gradient -> (B, V, D).

        Where there are several, `collect` must have seen all of them.
        """

        def relate(own_bVD: Tensor) -> Tensor:
            blocks = self.gathered or [self.processes.gather_samples(own_bVD)]
            num_own = len(own_bVD)
            first = self.processes.rank // self.processes.context_parallel * num_own
            constant = own_bVD.detach()
            # The value of the features, gradient_scale times their gradient.
            scaled = constant + self.gradient_scale * (own_bVD - constant)
            block = torch.cat([blocks[index][:first], scaled, blocks[index][first + num_own :]])
            return torch.cat([*blocks[:index], block, *blocks[index + 1 :]])

        return relate

"""Features of the whole batch for the relational term, where processes and parts compute some of its samples each.

Knows no network and no loss. Layout: b samples of one part in one process, B of the whole batch, V videos, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distill.config import DistillConfig
from distill.parallel.processes import Processes


class BatchRelations:
    """What `relate` of `distill.methods.matching.student_step` needs of one batch.

    The loss of a batch is one function of the features of all its samples, and none of its parts sees more than its
    own with gradient. So each takes the others' as constants, and the sum of all those gradients is the gradient.
    """

    def __init__(self, config: DistillConfig, processes: Processes) -> None:
        self.processes = processes
        self.num_parts = config.accumulate
        # Gradients are averaged over parts and processes, and the wanted one is a sum. The authors' trainer averages
        # it over processes too, which divides the term by their number.
        self.gradient_scale = config.accumulate * (1 if config.reference_compat else processes.data_parallel)
        self.gathered: list[Tensor] = []

    def collect(self, own_bVD: Tensor) -> Tensor:
        """Take in the features of the next part, when a batch has several; what is computed of the result is not used.

        Returns:
            (B, V, D), the part repeated.
        """
        block = self.processes.gather_samples(own_bVD)
        self.gathered.append(block)
        return block.repeat(self.num_parts, 1, 1)

    def of_part(self, part: int) -> Callable[[Tensor], Tensor]:
        """Return `relate` for one part, after `collect` has seen all parts, if there are several."""

        def relate(own_bVD: Tensor) -> Tensor:
            blocks = self.gathered or [self.processes.gather_samples(own_bVD)]
            num_own = len(own_bVD)
            first = self.processes.rank // self.processes.context_parallel * num_own
            constant = own_bVD.detach()
            # The value of the features, the gradient of a multiple of them.
            scaled = constant + self.gradient_scale * (own_bVD - constant)
            block = torch.cat([blocks[part][:first], scaled, blocks[part][first + num_own :]])
            return torch.cat([*blocks[:part], block, *blocks[part + 1 :]])

        return relate

"""The processes of one run: who they are, which samples each trains on, and what they tell each other.

Knows no network and no loss. One process is the same code with nobody to talk to. Every method but the plain
properties is collective: all processes call it, in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from codmd_serve.errors import CheckpointError, CodmdError, ConfigError
from distill.config import DistillConfig

LAUNCHER = "torchrun --nproc-per-node N --no-python codmd-distill train ..."

# How long processes wait for each other: the first one encodes the prompts and writes checkpoints alone.
PATIENCE = timedelta(hours=2)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among those of the run.

    Groups of `context_parallel` neighbouring processes share their samples and split their tokens; `mesh` is one-
    dimensional over all processes, None for one process alone.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a constant
    mesh: DeviceMesh | None = None
    context_parallel: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def num_data(self) -> int:
        """Number of groups that train on samples of their own."""
        return self.world_size // self.context_parallel

    def positions(self, batch_size: int, accumulate: int, part: int) -> range:
        """Return which places of the whole batch this process computes in one of its `accumulate` parts.

        Part after part, and within each one group of processes after the other, so that gathering a part over the
        processes gives consecutive samples.
        """
        share = batch_size // (self.num_data * accumulate)
        first = (part * self.num_data + self.rank // self.context_parallel) * share
        return range(first, first + share)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.mesh is None:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed / self.world_size

    def greatest(self, *values: int) -> list[int]:
        """Return the largest of each number over all processes."""
        if self.mesh is None:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return [int(value) for value in largest.tolist()]

    def gather_samples(self, own: Tensor) -> Tensor:
        """Concatenate (b, ...) tensors of all groups along the first dimension, without gradient."""
        if self.mesh is None:
            return own.detach()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own.detach().contiguous())
        return torch.cat(parts[:: self.context_parallel])

    def full(self, state: T) -> T:
        """Copy nested dicts and lists of tensors, sharded ones made whole; on the CPU, and only in the first process.

        Elsewhere whole tensors are dropped as soon as they have been sent, and empty ones stand in their place.
        """

        def whole(leaf: Any) -> Any:
            if not isinstance(leaf, DTensor):
                return leaf
            gathered = leaf.full_tensor().detach()
            return gathered.cpu() if self.is_first else gathered.new_empty(0)

        copied: T = tree_map(whole, state)
        return copied

    def first_does(self, action: Callable[[], T]) -> T | None:
        """Let the first process do something while the others wait.

        Returns:
            What it returned; None in the other processes.

        Raises:
            CodmdError: in all processes, of the kind that it failed with in the first. What else it fails with is
                raised as it is there and as CodmdError elsewhere, so that nobody waits for a process that is gone.
        """
        if self.mesh is None:
            return action()
        result: T | None = None
        failure: Exception | None = None
        if self.is_first:
            try:
                result = action()
            except Exception as error:  # raised again below, when the others know
                failure = error
        told: list[tuple[str, str] | None] = [None if failure is None else _described(failure)]
        dist.broadcast_object_list(told, src=0)
        if failure is not None:
            raise failure
        if told[0] is not None:
            kind, message = told[0]
            raise {kind.__name__: kind for kind in _KINDS}[kind](message)
        return result

    def first_tells(self, action: Callable[[], T]) -> T:
        """Let the first process find something out, and return it in all of them.

        Args:
            action: gives something small that can be pickled.

        Raises:
            CodmdError: as `first_does`.
        """
        found = [self.first_does(action)]
        if self.mesh is not None:
            dist.broadcast_object_list(found, src=0)
        return cast(T, found[0])

    def all_do(self, action: Callable[[], T]) -> T:
        """Do something in every process that any of them may fail at, as reading a file.

        Args:
            action: no collective.

        Raises:
            CodmdError: in all processes when it failed in one: there what it failed with.
        """
        result: T | None = None
        failure: CodmdError | None = None
        try:
            result = action()
        except CodmdError as error:
            failure = error
        (has_failed,) = self.greatest(int(failure is not None))
        if failure is not None:
            raise failure
        if has_failed:
            raise CheckpointError("another process cannot read what this one can: all must see the same folders")
        return cast(T, result)


# From the most special to the most general.
_KINDS = (ConfigError, CheckpointError, CodmdError)


def _described(failure: Exception) -> tuple[str, str]:
    """The kind and the text with which other processes report a failure of the first one."""
    kind = next((kind for kind in _KINDS if isinstance(failure, kind)), None)
    if kind is None:
        return CodmdError.__name__, f"the first process failed: {type(failure).__name__}: {failure}"
    return kind.__name__, str(failure)


ALONE = Processes()


@contextmanager
def process_group(device: torch.device, config: DistillConfig) -> Iterator[Processes]:
    """Join the other processes when torchrun started this one, else be alone.

    Args:
        device: cpu (gloo) or cuda (nccl; each process takes the GPU of its number on its machine).
        config: its batch has to come out even.

    Raises:
        ConfigError: too few processes for context_parallel, or a batch_size that cannot be shared out.
    """
    if not dist.is_torchelastic_launched():
        check_shares(config, 1)
        yield Processes(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield join_processes(device, config)
    finally:
        dist.destroy_process_group()


def join_processes(device: torch.device, config: DistillConfig) -> Processes:
    """Describe this process of torch.distributed's default group, which must be there.

    Raises:
        ConfigError: as `process_group`.
    """
    world_size = dist.get_world_size()
    check_shares(config, world_size)
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("all",))
    return Processes(
        rank=dist.get_rank(),
        world_size=world_size,
        device=device,
        mesh=mesh,
        context_parallel=config.context_parallel,
    )


def check_shares(config: DistillConfig, world_size: int) -> None:
    """Check that a run can be spread over processes.

    Raises:
        ConfigError: it cannot; the message names the key and says what would do.
    """
    degree = config.context_parallel
    if world_size < degree or world_size % degree:
        raise ConfigError(
            f"context_parallel {degree} needs a multiple of {degree} processes, got {world_size}: "
            f"start the run with {LAUNCHER}"
        )
    parts = world_size // degree * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size must be a multiple of {parts} ({world_size // degree} processes with samples of their own, "
            f"accumulate={config.accumulate}), got {config.batch_size}"
        )

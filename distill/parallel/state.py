"""Sharded training state: each rank stages, saves and loads its own shards through torch.distributed.checkpoint.

Knows neither networks nor folders of runs. No rank gathers a tensor: saving takes host memory for the rank's own shards
(`stage`), loading takes none but `shard_files.BUFFER_BYTES`. Where several replicas hold the same shards (HSDP), each
stages and writes its share of them, and every shard is written once.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from codmd_serve.errors import CheckpointError, CodmdError
from codmd_serve.files import atomic_folder, first_line
from distill.parallel.processes import Processes
from distill.parallel.shard_files import ShardIndex, ShardReader, ShardWriter


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedShard:
    """A copy on the CPU of what this rank holds of a tensor.

    Attributes:
        local: the copy.
        offsets: of `local` in the whole tensor.
        size: of the whole tensor.
    """

    local: Tensor
    offsets: tuple[int, ...]
    size: tuple[int, ...]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """Tell torch's planner what there is to write: nothing, where a rank holds no row or a replica writes it."""
        if self.local.numel() == 0 < math.prod(self.size):
            return []
        offsets = torch.Size(self.offsets)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=self.local.size()),
            properties=TensorProperties.create_from_tensor(self.local),
            size=torch.Size(self.size),
        )
        return [WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data)]


class _StagedPlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        staged: StagedShard = self.state_dict[index.fqn]
        return staged.local


def stage(tensors: Mapping[str, Tensor]) -> dict[str, StagedShard]:
    """Copy this rank's shards to host memory, after which the tensors may change.

    Of a shard that other replicas hold too, only one of them stages more than an empty tensor.
    """
    taken: dict[int, int] = {}

    def staged(tensor: Tensor) -> StagedShard:
        local, offsets = local_part(tensor)
        replica, num_replicas = _replica_of(tensor)
        if num_replicas > 1:
            # Equal on all replicas of a shard, as sizes and order are.
            loads = [taken.get(index, 0) for index in range(num_replicas)]
            owner = loads.index(min(loads))
            taken[owner] = loads[owner] + local.nbytes
            local = local if replica == owner else local.new_empty(0)
        return StagedShard(local=local.to("cpu", copy=True), offsets=offsets, size=tuple(tensor.shape))

    return {name: staged(tensor) for name, tensor in tensors.items()}


def _replica_of(tensor: Tensor) -> tuple[int, int]:
    """Return which replica of a sharded tensor this rank belongs to, and how many there are."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    replica, num_replicas = 0, 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dimension)
            replica = replica * size + tensor.device_mesh.get_local_rank(dimension)
            num_replicas *= size
    return replica, num_replicas


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return what this rank holds of a tensor, sharded or not, and its offsets in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.ndim
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), tuple(offsets)


def save_shards(folder: Path, staged: dict[str, StagedShard], values: dict[str, Any], processes: Processes) -> None:
    """Write a sharded state as one folder, whole or not at all; every rank calls it, also in a background thread.

    Its collectives run in `processes.save_group` alone.

    Args:
        folder: seen by all ranks; one that exists is replaced.
        staged: this rank's shards.
        values: plain JSON values, equal on all ranks.
        processes: of the run.

    Raises:
        CheckpointError: on all ranks, when any of them cannot write.
    """
    with ExitStack() as stack:
        fresh = processes.broadcast_in_save_group(lambda: stack.enter_context(atomic_folder(folder)))
        # Closing the stack flushes the folder and gives it its name.
        writer = ShardWriter(fresh, processes.rank, values, commit=stack.close)
        _ignore_single_process_warning()
        _attempt(
            f"checkpoint {folder} cannot be written",
            lambda: save(
                staged,
                storage_writer=writer,
                planner=_StagedPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=processes.save_group,
                no_dist=processes.save_group is None,
            ),
        )


def load_shards(index: ShardIndex, targets: Mapping[str, Tensor], processes: Processes) -> None:
    """Read a sharded state into tensors, in place; each rank reads the parts that its own shards overlap.

    Args:
        index: of the checkpoint, whatever number of processes wrote it.
        targets: some or all tensors of the checkpoint by name, sharded in any way.
        processes: of the run.

    Raises:
        CheckpointError: on all ranks: a name, size or dtype that differs, or a shard that cannot be read.
    """
    for name, target in targets.items():
        stored = index.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"it belongs to another network: it has no {name}")
        if (stored.size, stored.dtype) != (tuple(target.shape), target.dtype):
            raise CheckpointError(
                f"it belongs to another network: {name} is {stored.dtype} {stored.size}, "
                f"expected {target.dtype} {tuple(target.shape)}"
            )
    _ignore_single_process_warning()
    _attempt(
        f"checkpoint {index.folder} cannot be loaded",
        lambda: load(
            dict(targets),
            storage_reader=ShardReader(index),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=processes.save_group,
            no_dist=processes.save_group is None,
        ),
    )


@torch.no_grad()
def copy_whole(whole: Tensor, target: Tensor) -> None:
    """Copy this rank's part of a whole tensor, which every rank can see, into its shard."""
    local, offsets = local_part(target)
    box = tuple(slice(first, first + size) for first, size in zip(offsets, local.shape, strict=True))
    local.copy_(whole[box])


def _attempt(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except CheckpointException as error:
        cause = next(failure for failure, _ in error.failures.values())
        if isinstance(cause, CodmdError):
            raise CheckpointError(str(cause)) from error
        raise CheckpointError(f"{what}: {first_line(cause)}") from error


def _ignore_single_process_warning() -> None:
    # torch warns whenever it is told that there is one process.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit", UserWarning)

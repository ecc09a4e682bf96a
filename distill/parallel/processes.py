"""The processes of one run: rank and world size, which samples each rank trains on, and collectives that report errors.

Knows no network and no loss. A run of one process uses the same code without torch.distributed. Every method but
`positions` and the properties is a collective: all ranks call it, in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from codmd_serve.errors import CheckpointError, CodmdError, ConfigError
from codmd_serve.files import first_line
from distill.config import DistillConfig
from distill.parallel.launch import Launch

LAUNCHER = "torchrun --nproc-per-node N --no-python codmd-distill train ..."

# Of an iteration: a rank that is later than this is gone or hangs.
TRAINING_TIMEOUT = timedelta(minutes=20)
# Of waiting for files: rank 0 reads weights or writes a bundle, or a save is in flight, while the others wait.
FILES_TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The place of this process in the run.

    Attributes:
        rank: 0..world_size - 1.
        world_size: number of processes.
        device: of this rank.
        mesh: what networks are sharded over: (all ranks,), or (replicas, shards) with `shard_group`; None without
            torch.distributed.
        context_parallel: neighbouring ranks that train on the same samples and split their tokens.
        files_group: gloo group of all ranks that wait for rank 0's files; None without torch.distributed.
        save_group: gloo group of all ranks, for checkpoints alone: saves run in a background thread, whose collectives
            must not meet those of the training loop.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a constant
    mesh: DeviceMesh | None = None
    context_parallel: int = 1
    files_group: dist.ProcessGroup | None = None
    save_group: dist.ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    @property
    def data_parallel(self) -> int:
        """Number of groups of ranks that train on different samples."""
        return self.world_size // self.context_parallel

    def positions(self, batch_size: int, accumulate: int, part: int) -> range:
        """Return the places of the whole batch that this rank computes in one of its `accumulate` micro-batches.

        Micro-batches follow each other in the batch, and within one the groups of ranks do. So gathering a micro-batch
        over the ranks gives consecutive samples.
        """
        share = batch_size // (self.data_parallel * accumulate)
        first = (part * self.data_parallel + self.rank // self.context_parallel) * share
        return range(first, first + share)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks."""
        if self.mesh is None:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed / self.world_size

    def all_reduce_max(self, *values: int) -> list[int]:
        """Return the maximum of each number over all ranks."""
        if self.mesh is None:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return [int(value) for value in largest.tolist()]

    def gather_samples(self, own: Tensor) -> Tensor:
        """Concatenate the (b, ...) tensors of all groups along the first dimension, without gradient."""
        if self.mesh is None:
            return own.detach()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own.detach().contiguous())
        return torch.cat(parts[:: self.context_parallel])

    def gather_texts(self, own: str) -> list[str]:
        """Return the text of every rank, in order."""
        if self.mesh is None:
            return [own]
        found: list[str] = [""] * self.world_size
        dist.all_gather_object(found, own, group=self.files_group)
        return found

    def on_rank0(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 while the other ranks wait.

        Returns:
            Its result on rank 0, None on the other ranks.

        Raises:
            CodmdError: of the same class on all ranks. Any other exception is re-raised on rank 0 and becomes
                CodmdError on the other ranks, so that none of them hangs.
        """
        return self._on_rank0(action, self.files_group)

    def _on_rank0(self, action: Callable[[], T], group: dist.ProcessGroup | None) -> T | None:
        if self.mesh is None:
            return action()
        result: T | None = None
        failure: Exception | None = None
        if self.is_rank0:
            try:
                result = action()
            except Exception as error:  # re-raised below, after the broadcast
                failure = error
        told: list[tuple[str, str] | None] = [None if failure is None else _described(failure)]
        dist.broadcast_object_list(told, src=0, group=group)
        if failure is not None:
            raise failure
        if told[0] is not None:
            kind, message = told[0]
            raise {kind.__name__: kind for kind in _ERROR_CLASSES}[kind](message)
        return result

    def broadcast_from_rank0(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on all ranks.

        Args:
            action: returns a small object that can be pickled.

        Raises:
            CodmdError: as `on_rank0`.
        """
        return self._broadcast_from_rank0(action, self.files_group)

    def broadcast_in_save_group(self, action: Callable[[], T]) -> T:
        """As `broadcast_from_rank0`, for the thread that saves a checkpoint."""
        return self._broadcast_from_rank0(action, self.save_group)

    def _broadcast_from_rank0(self, action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
        found = [self._on_rank0(action, group)]
        if self.mesh is not None:
            dist.broadcast_object_list(found, src=0, group=group)
        return cast(T, found[0])

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, where any of them may fail, as when it reads a file.

        Args:
            action: calls no collective.

        Raises:
            Exception: on the ranks where `action` raised it.
            CheckpointError: on all other ranks, so that none of them hangs.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # re-raised below, after the other ranks know
            failure = error
        has_failed = torch.tensor(int(failure is not None))
        if self.mesh is not None:
            dist.all_reduce(has_failed, dist.ReduceOp.MAX, group=self.files_group)
        if failure is not None:
            raise failure
        if has_failed:
            raise CheckpointError(
                "another process cannot read what this one can: all processes must see the same folders"
            )
        return cast(T, result)


# From the most specific class to the most general.
_ERROR_CLASSES = (ConfigError, CheckpointError, CodmdError)


def _described(failure: Exception) -> tuple[str, str]:
    """Return the class and the message with which the other ranks report a failure of rank 0."""
    kind = next((kind for kind in _ERROR_CLASSES if isinstance(failure, kind)), None)
    if kind is None:
        return CodmdError.__name__, f"rank 0 failed: {first_line(failure)}"
    return kind.__name__, str(failure)


SINGLE_PROCESS = Processes()


@contextmanager
def process_group(device: torch.device, config: DistillConfig, launch: Launch | None = None) -> Iterator[Processes]:
    """Join the process group when a launcher started this process; otherwise yield a single process.

    Args:
        device: cpu (gloo) or cuda (nccl; each process takes the GPU of its local rank).
        config: its batch_size must divide over the ranks.
        launch: of a launcher other than torchrun, which torch sees itself.

    Raises:
        ConfigError: too few processes for context_parallel, or a batch_size that does not divide over them.
    """
    if launch is None and not dist.is_torchelastic_launched():
        check_world_size(config, 1)
        yield Processes(device=device)
        return
    if device.type == "cuda":
        device = own_gpu(dist.get_node_local_rank() if launch is None else launch.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=None if launch is None else launch.url,
        # -1 is torch's word for what it finds itself.
        rank=-1 if launch is None else launch.rank,
        world_size=-1 if launch is None else launch.world_size,
        timeout=TRAINING_TIMEOUT,
    )
    try:
        yield join_processes(device, config)
    finally:
        dist.destroy_process_group()


def own_gpu(local_rank: int) -> torch.device:
    """Return the GPU of a process: that of its local rank, or the only one that its launcher lets it see.

    Raises:
        ConfigError: this machine has fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    # srun --gpus-per-task=1 shows each process its own GPU alone; NCCL refuses two processes on one.
    if count == 1:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU, it sees {count}: start as many processes as GPUs"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def out_of_memory_in_one_line(processes: Processes) -> Iterator[None]:
    """Say in one sentence which rank is out of memory and what to change, in place of a traceback of each rank.

    Raises:
        CodmdError: the block ran out of memory. The launcher ends the other ranks, which wait for this one.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CodmdError(_out_of_memory(processes)) from error
    except RuntimeError as error:
        # What torch raises on a CPU is no class of its own.
        if "can't allocate memory" not in str(error):
            raise
        raise CodmdError(_out_of_memory(processes)) from error


def _out_of_memory(processes: Processes) -> str:
    where = f"rank {processes.rank} of {processes.world_size} ran out of memory on {processes.device}"
    if processes.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(processes.device)
        where += f" ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB taken)"
    return (
        f"{where}: use more processes, or --set accumulate=N, activation_checkpointing=true, lora_critic_rank=64 or "
        "context_parallel=N; codmd-distill plan says what fits. The last checkpoint is kept"
    )


def join_processes(device: torch.device, config: DistillConfig) -> Processes:
    """Describe this process of torch.distributed's default group, which must be initialised.

    Raises:
        ConfigError: as `process_group`.
    """
    world_size = dist.get_world_size()
    check_world_size(config, world_size)
    return Processes(
        rank=dist.get_rank(),
        world_size=world_size,
        device=device,
        mesh=_shard_mesh(device, config.shard_group, world_size),
        context_parallel=config.context_parallel,
        files_group=dist.new_group(backend="gloo", timeout=FILES_TIMEOUT),
        save_group=dist.new_group(backend="gloo", timeout=FILES_TIMEOUT),
    )


def _shard_mesh(device: torch.device, shard_group: int, world_size: int) -> DeviceMesh:
    """Return the mesh of the networks: one dimension for FSDP; replicas, then neighbours that shard one, for HSDP."""
    if shard_group in (0, world_size):
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("all",))
    sizes = (world_size // shard_group, shard_group)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))


def check_world_size(config: DistillConfig, world_size: int) -> None:
    """Check that a run can be distributed over `world_size` processes.

    Raises:
        ConfigError: it cannot; the message names the key and the values that work.
    """
    degree = config.context_parallel
    if world_size < degree or world_size % degree:
        raise ConfigError(
            f"context_parallel {degree} needs a multiple of {degree} processes, got {world_size}: "
            f"start the run with {LAUNCHER}"
        )
    if config.shard_group and (world_size < config.shard_group or world_size % config.shard_group):
        raise ConfigError(
            f"shard_group {config.shard_group} needs a multiple of {config.shard_group} processes, got {world_size}: "
            "use 0 to shard over all of them"
        )
    parts = world_size // degree * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size must be a multiple of {parts} ({world_size // degree} processes with samples of their own, "
            f"accumulate={config.accumulate}), got {config.batch_size}"
        )

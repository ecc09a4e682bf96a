"""srun, mpirun and plain variables are understood, or refused before N processes train the same run N times."""

import pytest
import torch

from codmd_serve.errors import CodmdError, ConfigError
from distill.parallel.launch import Launch, find_launch
from distill.parallel.processes import Processes, out_of_memory_in_one_line, own_gpu

SRUN = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "fe80::1", "MASTER_PORT": "1234"}


def test_one_process_and_torchrun_need_no_help() -> None:
    assert find_launch({}) is None
    assert find_launch(PLAIN | {"TORCHELASTIC_RUN_ID": "x"}) is None
    assert find_launch({"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None
    # The shell of a batch job, which srun did not start.
    assert find_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) is None


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, local_rank, index in ((8, 3, 3), (1, 3, 0), (1, 0, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert own_gpu(local_rank) == torch.device("cuda", index)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match="process 4 of this machine has no GPU, it sees 4"):
        own_gpu(4)


def test_every_launcher_gives_rank_size_and_rendezvous() -> None:
    assert find_launch(SRUN | {"MASTER_ADDR": "node7"}) == Launch(
        launcher="srun", rank=9, world_size=16, local_rank=1, address="node7", port=29500
    )
    assert find_launch(MPIRUN) == Launch(
        launcher="mpirun", rank=3, world_size=4, local_rank=3, address="127.0.0.1", port=29500
    )
    plain = find_launch(PLAIN)
    assert plain is not None and (plain.rank, plain.world_size, plain.url) == (1, 2, "tcp://[fe80::1]:1234")
    hydra = find_launch({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "a"})
    assert hydra is not None and hydra.url == "tcp://a:29500"
    alone = find_launch(SRUN | {"SLURM_STEP_NUM_NODES": "1"})
    assert alone is not None and alone.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (SRUN, r"srun started 16 processes, but MASTER_ADDR is not set: export MASTER_ADDR=\$\(scontrol"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun started 4 processes, but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2"}, "there are 2 processes, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        (PLAIN | {"RANK": "2"}, r"RANK must be in 0\.\.1, got 2"),
        (PLAIN | {"RANK": "-1"}, "RANK must be a whole number"),
        (PLAIN | {"MASTER_PORT": "0"}, "MASTER_PORT"),
        (PLAIN | {"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
    ],
)
def test_what_cannot_be_joined_is_refused_by_variable(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        find_launch(environment)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_one_sentence_with_rank_and_remedy(error: Exception) -> None:
    with (
        pytest.raises(
            CodmdError, match=r"^rank 3 of 8 ran out of memory on cpu: use more processes, or --set"
        ) as caught,
        out_of_memory_in_one_line(Processes(rank=3, world_size=8)),
    ):
        raise error
    assert "\n" not in str(caught.value) and "codmd-distill plan" in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), out_of_memory_in_one_line(Processes()):
        raise RuntimeError("shapes differ")

"""What the launcher of a run tells each process: srun, mpirun, or the variables that torch itself reads.

Knows no torch. torchrun is not looked for here; torch joins its processes without help.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from codmd_serve.errors import ConfigError

DEFAULT_PORT = 29500
# Name, and the variables of rank, number of processes, rank within the machine, and processes or machines by which one
# machine is told from many. A job's own shell has SLURM_PROCID too, but SLURM_STEP_NUM_TASKS only what srun started.
_LAUNCHERS = (
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The place of a process in the run, and where rank 0 listens.

    Attributes:
        launcher: what started it, in words.
        local_rank: rank within the machine, which is the number of its GPU.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @property
    def url(self) -> str:
        """The rendezvous for torch.distributed."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"tcp://{host}:{self.port}"


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Return how this process was started; None when it is alone or torchrun started it.

    Raises:
        ConfigError: a launcher started several processes and does not say enough to join them; without this error each
            would train the whole run in the same folder.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return None
    for launcher, rank, size, local_rank in _LAUNCHERS:
        world_size = _number(environment, size)
        if world_size is None or world_size < 2:
            continue
        found = {name: _number(environment, name) for name in (rank, local_rank)}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise ConfigError(
                f"{launcher} says that there are {world_size} processes, but {missing[0]} is not set: "
                "start the run with torchrun, or set it"
            )
        own_rank, own_local_rank = (int(value or 0) for value in found.values())
        if not 0 <= own_rank < world_size:
            raise ConfigError(f"{rank} must be in 0..{world_size - 1}, got {own_rank}")
        return Launch(
            launcher=launcher,
            rank=own_rank,
            world_size=world_size,
            local_rank=own_local_rank,
            address=_address(environment, launcher, world_size),
            port=_port(environment),
        )
    return None


def _address(environment: Mapping[str, str], launcher: str, world_size: int) -> str:
    given = environment.get("MASTER_ADDR", "").strip()
    if given:
        return given
    is_one_machine = (
        environment.get("SLURM_STEP_NUM_NODES") == "1"
        if launcher == "srun"
        else environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world_size)
    )
    if is_one_machine:
        return "127.0.0.1"
    how = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' if launcher == "srun" else "HOST"
    raise ConfigError(
        f"{launcher} started {world_size} processes, but MASTER_ADDR is not set: export MASTER_ADDR={how}, the machine "
        "of rank 0, or start the run with torchrun"
    )


def _port(environment: Mapping[str, str]) -> int:
    port = _number(environment, "MASTER_PORT")
    if port is None:
        return DEFAULT_PORT
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT must be in 1..65535, got {port}")
    return port


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{name} must be a whole number, got {text[:40]!r}")
    return int(text)

"""Machine and parallel layout of a plan; standard library only.

Knows no network. Every field of `PlanOptions` is an option of `codmd-distill plan`.
"""

from dataclasses import dataclass

from codmd_serve.errors import ConfigError

GIB = 1024**3
MIN_GPU_GIB = 0.1
GRADIENT_SYNCS = ("each", "last")
# Options that are settings of a run too, under the same name.
LAYOUT = (
    "activation_checkpointing",
    "shard_group",
    "gradient_sync",
    "context_parallel",
    "accumulate",
    "lora_critic_rank",
    "lora_student_rank",
)
DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Machine and layout of a run.

    Attributes:
        gpus: from 2 on every network is sharded with FSDP, one group per block.
        reserve_gib: kept free for CUDA context, NCCL, library workspaces and fragmentation.
        activation_checkpointing: of every block.
        lora_critic_rank: rank of a LoRA critic on the teacher's frozen weights; 0 is a full critic.
        lora_student_rank: rank of a LoRA student on frozen weights of its own; 0 is a full student.
        shard_group: GPUs that shard one copy of the networks; 0 shards over all of them.
        gradient_sync: reduce gradients in "each" micro-batch, or whole ones in the "last".
        master_dtype: of weights, gradients and moments of student and critic.
        prompt_tokens: 512 is Wan's padded length; training trims to the longest prompt of a batch.
        tflops: rate of one GPU; 400 is half of what large bf16 matrix products reach on an H200.

    Raises:
        ConfigError: a value outside its range; the message names the option.
    """

    gpus: int = 1
    gpu_gib: float = 80.0
    reserve_gib: float = 4.0
    activation_checkpointing: bool = True
    lora_critic_rank: int = 0
    lora_student_rank: int = 0
    master_dtype: str = "fp32"
    context_parallel: int = 1
    shard_group: int = 0
    accumulate: int = 1
    gradient_sync: str = "each"
    prompt_tokens: int = 512
    tflops: float = 400.0

    def __post_init__(self) -> None:
        for name in ("gpus", "context_parallel", "accumulate"):
            _check_range(name, getattr(self, name), 1, 10**6)
        _check_range("shard_group", self.shard_group, 0, 10**6)
        _check_range("prompt_tokens", self.prompt_tokens, 1, 512)
        for name in ("lora_critic_rank", "lora_student_rank"):
            _check_range(name, getattr(self, name), 0, 4096)
        _check_range("gpu_gib", self.gpu_gib, MIN_GPU_GIB, 1e5)
        _check_range("reserve_gib", self.reserve_gib, 0.0, self.gpu_gib)
        _check_range("tflops", self.tflops, 1e-3, 1e6)
        if self.master_dtype not in DTYPE_BYTES:
            raise ConfigError(
                f"{flag('master_dtype')} must be one of {', '.join(DTYPE_BYTES)}, got {self.master_dtype!r}"
            )
        if self.gradient_sync not in GRADIENT_SYNCS:
            raise ConfigError(
                f"{flag('gradient_sync')} must be one of {', '.join(GRADIENT_SYNCS)}, got {self.gradient_sync!r}"
            )
        for name, size in (("context_parallel", self.context_parallel), ("shard_group", self.shards)):
            if self.gpus % size:
                raise ConfigError(
                    f"{flag(name)} must divide the {self.gpus} GPUs, got {size}: "
                    f"use one of {', '.join(str(degree) for degree in divisors(self.gpus))}"
                )

    def lora_rank(self, role: str) -> int:
        """Return the rank of a role's adapters; 0 for none."""
        return {"student": self.lora_student_rank, "critic": self.lora_critic_rank}.get(role, 0)

    @property
    def data_parallel(self) -> int:
        """Return the data-parallel degree."""
        return self.gpus // self.context_parallel

    @property
    def shards(self) -> int:
        """Return the number of GPUs that one copy of the networks is sharded over."""
        return self.shard_group or self.gpus


def flag(name: str) -> str:
    """Return the command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def divisors(number: int) -> list[int]:
    """Return all divisors of a number of at least 1, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{flag(name)} must be in {low:.10g}..{high:.10g}, got {value!r}")

"""Every setting of a distillation run, as frozen dataclasses, and the recipes that fill them; computes nothing.

Settings that change what is computed live here. Where a run writes, how long it may take and on what it runs are
options of the command (trainer.py), and nothing here depends on the machine but `precision="auto"`, which `resolved`
replaces before anything is saved.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from codmd_serve.errors import ConfigError
from codmd_serve.grid import SAMPLERS, StepGrid
from codmd_serve.schedule import NUM_TRAIN_TIMESTEPS, shift_sigma
from distill.settings import CopulaConfig as CopulaConfig
from distill.settings import DpDmdConfig as DpDmdConfig
from distill.settings import EmaConfig as EmaConfig
from distill.settings import NativeConfig as NativeConfig
from distill.settings import OptimizerConfig as OptimizerConfig
from distill.settings import RcmConfig as RcmConfig
from distill.settings import check_choice, check_range

METHODS = ("codmd", "dmd", "rcm", "dcm", "dp-dmd")
CONSISTENCY_METHODS = ("rcm", "dcm")
PRECISIONS = ("auto", "fp32", "bf16")
DTYPES = ("fp32", "bf16")
SCORE_WINDOWS = ("full", "above", "step")
BUNDLE_DTYPES = ("fp32", "bf16", "fp16")
# Settings that a resumed run may change: none of them alters what an iteration computes, but for rounding.
RESUMABLE = (
    "max_steps",
    "save_every_steps",
    "log_every_steps",
    "keep_last",
    "max_nonfinite_in_row",
    "bundle_dtype",
    "accumulate",
    "activation_checkpointing",
    "context_parallel",
)
# The authors look sigma up in this table for both model sizes, whatever shift the scores are drawn with.
REFERENCE_TABLE_SHIFT = 8.0

# Wan2.1, wan/configs/shared_config.py: what the teacher is guided away from.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One distillation run.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    recipe: str
    base: str  # folder or hub id of the teacher's diffusers pipeline
    native: NativeConfig
    optimizer: OptimizerConfig
    ema: EmaConfig
    method: str = "codmd"
    seed: int = 0
    batch_size: int  # of one update, over all processes and parts
    accumulate: int = 1  # parts that each process computes its share of a batch in, one after the other
    activation_checkpointing: bool = False  # keep only the inputs of blocks, compute them again for the gradient
    context_parallel: int = 1  # processes that share their samples and split their tokens
    lora_critic_rank: int = 0  # of a critic on the teacher's frozen weights; 0 is a critic of its own
    lora_critic_alpha: float = 64.0  # what such a critic adds weighs alpha / rank
    max_steps: int  # iterations; each trains the critic, every student_every_steps-th the student too
    student_every_steps: int = 5
    critic_warmup_steps: int = 0  # iterations before the first student update
    guidance_scale: float  # uncond + guidance_scale * (cond - uncond)
    negative_prompt: str = ""
    sampler: str = "sde"
    # The student's steps are timesteps, or where that is empty, 1000 * shift of step_levels; of rcm and dcm, the
    # angles in `rcm`.
    timesteps: tuple[float, ...] = ()
    step_levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    step_shift: float = 1.0
    score_shift: float
    score_sigma_min: float = 0.02
    score_sigma_max: float = 0.98
    score_window: str = "full"  # which noise levels judge which exit step: step.score_window
    reference_compat: bool = False  # the authors' behaviour where ours departs from it
    copula: CopulaConfig = field(default_factory=CopulaConfig)
    rcm: RcmConfig = field(default_factory=RcmConfig)
    dp_dmd: DpDmdConfig = field(default_factory=DpDmdConfig)
    # A txt or jsonl file; empty means captions drawn from the shapeworld grammar, of one and two objects in turn.
    prompts: str = ""
    num_captions: int = 4096  # how many of those
    precision: str = "auto"
    teacher_dtype: str = "fp32"
    text_dtype: str = "fp32"
    bundle_dtype: str = "fp32"  # of the exported student
    max_nonfinite_in_row: int = 10
    log_every_steps: int = 20
    save_every_steps: int = 200
    keep_last: int = 2
    vocabulary_note: str = ""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("score_window", self.score_window, SCORE_WINDOWS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("teacher_dtype", self.teacher_dtype, DTYPES)
        check_choice("text_dtype", self.text_dtype, DTYPES)
        check_choice("bundle_dtype", self.bundle_dtype, BUNDLE_DTYPES)
        check_range("seed", self.seed, 0, 2**63 - 1)
        for name in ("batch_size", "max_steps", "student_every_steps", "num_captions", "max_nonfinite_in_row"):
            check_range(name, getattr(self, name), 1, 10**9)
        for name in ("log_every_steps", "save_every_steps", "keep_last", "accumulate", "context_parallel"):
            check_range(name, getattr(self, name), 1, 10**9)
        check_range("lora_critic_rank", self.lora_critic_rank, 0, 4096)
        check_range("lora_critic_alpha", self.lora_critic_alpha, 1e-3, 1e6)
        check_range("critic_warmup_steps", self.critic_warmup_steps, 0, 10**9)
        check_range("guidance_scale", self.guidance_scale, 0.0, 100.0)
        check_range("step_shift", self.step_shift, 1e-3, 1e3)
        check_range("score_shift", self.score_shift, 1e-3, 1e3)
        if not 0.0 < self.score_sigma_min < self.score_sigma_max <= 1.0:
            raise ConfigError(
                "expected 0 < score_sigma_min < score_sigma_max <= 1, "
                f"got {self.score_sigma_min} and {self.score_sigma_max}"
            )
        if self.teacher_dtype == "bf16" and self.precision == "fp32":
            raise ConfigError("teacher_dtype bf16 needs precision bf16: a bf16 teacher runs under autocast")
        self._check_method()
        self._check_batch_term()
        self.grid()

    def _check_method(self) -> None:
        if self.method == "rcm" and self.context_parallel > 1:
            raise ConfigError(
                f"context_parallel must be 1 for method rcm, got {self.context_parallel}: attention over split tokens "
                "has no forward-mode derivative"
            )
        if self.method in CONSISTENCY_METHODS:
            if self.score_window != "full":
                raise ConfigError(
                    f"score_window must be full for method {self.method}, got {self.score_window!r}: "
                    "its rollouts stop at random levels, not at the steps that the windows lie between"
                )
            if self.rcm.dmd_weight > 0 and self.student_every_steps < 2:
                raise ConfigError(
                    f"student_every_steps must be 2 or more for method {self.method}, got {self.student_every_steps}: "
                    "an iteration trains either student or critic, so the critic would never be trained"
                )
        if self.method not in ("codmd", "dmd") and self.reference_compat:
            raise ConfigError(f"reference_compat is of methods codmd and dmd, got method {self.method!r}")
        if self.method == "dp-dmd" and len(self.grid().timesteps) < 2:
            raise ConfigError("timesteps or step_levels must be 2 or more for method dp-dmd: the first is not matched")

    def _check_batch_term(self) -> None:
        smallest = 2 if self.reference_compat else 3
        if self.method == "codmd" and self.copula.weight_batch > 0 and self.batch_size < smallest:
            raise ConfigError(
                f"copula.weight_batch needs batch_size of {smallest} or more, got {self.batch_size}: "
                "fewer samples have no relations to compare"
            )

    def grid(self) -> StepGrid:
        """The student's steps: sigma = timestep / 1000, or the authors' table entry with `reference_compat`.

        Raises:
            ConfigError: steps that do not descend from at most 1 to above 0.
        """
        if self.method in CONSISTENCY_METHODS:
            levels = self.rcm.levels()
        else:
            levels = tuple(shift_sigma(level, self.step_shift) for level in self.step_levels)
        timesteps = self.timesteps or tuple(NUM_TRAIN_TIMESTEPS * level for level in levels)
        if self.reference_compat:
            sigmas = tuple(reference_sigma(timestep) for timestep in timesteps)
        else:
            sigmas = tuple(timestep / NUM_TRAIN_TIMESTEPS for timestep in timesteps)
        return StepGrid(sigmas=(*sigmas, 0.0), timesteps=tuple(timesteps))

    def sha256(self) -> str:
        """Digest of the whole config, the same for equal configs whatever the order of their keys."""
        text = json.dumps(config_to_dict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def gather_precision(method: str, role: str, precision: str) -> str:
    """Return fp32 or bf16: what a sharded network's blocks are gathered in, when networks are called in `precision`.

    Args:
        method: of the run.
        role: student, critic or teacher.
        precision: fp32 or bf16.
    """
    # rcm also calls its student in float32, for the derivative.
    return "fp32" if (method, role) == ("rcm", "student") else precision


def reference_sigma(timestep: float) -> float:
    """The entry of the authors' 1000-entry shift-8 table nearest to timestep / 1000.

    Source: CoDMD@6a8259b looks every sigma up this way while the network is fed the timestep itself; off by up to
    .0035. Kept for `reference_compat` only.
    """
    # Entry i is shift_8(1 - i / 1000); its inverse gives the neighbourhood, so no table is needed.
    level = timestep / NUM_TRAIN_TIMESTEPS
    position = NUM_TRAIN_TIMESTEPS * shift_sigma(level, 1.0 / REFERENCE_TABLE_SHIFT)
    entries = [
        shift_sigma(step / NUM_TRAIN_TIMESTEPS, REFERENCE_TABLE_SHIFT)
        for step in {max(math.floor(position), 1), max(math.ceil(position), 1)}
    ]
    return min(entries, key=lambda entry: abs(entry - level))


def shapeworld() -> DistillConfig:
    """The embedded world: 64x64, 17 frames at 16 fps, captions of its own grammar."""
    return DistillConfig(
        recipe="shapeworld",
        base="weights/shapeworld",
        native=NativeConfig(height=64, width=64, num_frames=17, fps=16),
        optimizer=OptimizerConfig(student_lr=1e-4, critic_lr=2e-4, betas=(0.0, 0.999)),
        ema=EmaConfig(decay=0.97),
        batch_size=16,
        max_steps=4000,
        student_every_steps=4,
        guidance_scale=3.0,
        step_shift=3.0,
        score_shift=3.0,
        score_window="step",
        bundle_dtype="fp16",
    )


def wan_1_3b() -> DistillConfig:
    """Wan2.1-T2V-1.3B with the published constants of CoDMD.

    Source: CoDMD@6a8259b configs; its 3.5 in cond + 3.5 * (cond - uncond) is guidance_scale 4.5. The batch of 64 is
    the repository's (the paper says 128); the moving average is Self-Forcing's, CoDMD has none.
    """
    return DistillConfig(
        recipe="wan_1_3b",
        base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        native=NativeConfig(height=480, width=832, num_frames=81, fps=16),
        optimizer=OptimizerConfig(student_lr=2e-6, critic_lr=4e-7),
        ema=EmaConfig(decay=0.99, start_update=200),
        batch_size=64,
        max_steps=3000,
        guidance_scale=4.5,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        timesteps=(1000.0, 900.0, 757.0, 522.0),
        score_shift=8.0,
        copula=CopulaConfig(weight_frame=1.0, weight_batch=0.0),
        teacher_dtype="bf16",
        precision="bf16",
        text_dtype="bf16",
        activation_checkpointing=True,
    )


def wan_14b() -> DistillConfig:
    """Wan2.1-T2V-14B with the published constants of CoDMD: shift-5 steps and scores, both relational terms."""
    return dataclasses.replace(
        wan_1_3b(),
        recipe="wan_14b",
        base="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        optimizer=OptimizerConfig(student_lr=4e-6, critic_lr=8e-7),
        batch_size=32,
        timesteps=(),
        step_shift=5.0,
        score_shift=5.0,
        copula=CopulaConfig(weight_frame=1.0, weight_batch=1.0),
    )


RECIPES: dict[str, Callable[[], DistillConfig]] = {
    "shapeworld": shapeworld,
    "wan_1_3b": wan_1_3b,
    "wan_14b": wan_14b,
}


def config_to_dict(config: DistillConfig) -> dict[str, Any]:
    """The config as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def config_from_dict(data: Mapping[str, Any]) -> DistillConfig:
    """The config that `config_to_dict` gave.

    Raises:
        ConfigError: unknown or missing keys, values of the wrong kind or out of range; the message names the key.
    """
    built = _build(DistillConfig, data, prefix="")
    assert isinstance(built, DistillConfig)
    return built


def with_overrides(config: DistillConfig, assignments: list[str]) -> DistillConfig:
    """Apply `key=value` settings; nested keys have a dot, values are JSON, and what is not JSON is text.

    Raises:
        ConfigError: no `=`, an unknown key or a value that does not fit; the message names the key.
    """
    data = config_to_dict(config)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"expected key=value, got {assignment!r}")
        *groups, leaf = key.split(".")
        target = data
        for group in groups:
            target = target.get(group) if isinstance(target, dict) else None  # type: ignore[assignment]
        if not isinstance(target, dict) or leaf not in target:
            raise ConfigError(f"unknown setting {key!r}, expected one of: {', '.join(sorted(_dotted_keys(data)))}")
        try:
            target[leaf] = json.loads(text)
        except ValueError:
            target[leaf] = text
    return config_from_dict(data)


def _dotted_keys(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in data.items():
        keys += _dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def _build(kind: type, data: object, prefix: str) -> object:
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected settings under {prefix.rstrip('.') or 'the config'}, got {data!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(data.keys() - hints.keys())
    if unknown:
        raise ConfigError(f"unknown setting {prefix}{unknown[0]}, expected one of: {', '.join(hints)}")
    required = {
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - data.keys())
    if missing:
        raise ConfigError(f"missing setting {prefix}{missing[0]}")
    return kind(**{key: _convert(hints[key], value, prefix + key) for key, value in data.items()})


def _convert(hint: Any, value: object, key: str) -> object:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    if isinstance(hint, types.UnionType):  # "float | None" is the only kind there is
        return None if value is None else _convert(typing.get_args(hint)[0], value, key)
    if isinstance(hint, types.GenericAlias):
        args = typing.get_args(hint)
        is_open = len(args) == 2 and args[1] is Ellipsis
        if not isinstance(value, list | tuple) or not (is_open or len(value) == len(args)):
            raise ConfigError(
                f"{key} must be a list of {'numbers' if is_open else f'{len(args)} numbers'}, got {value!r}"
            )
        return tuple(_convert(args[0], item, key) for item in value)
    if hint is float and type(value) in (int, float):
        return float(typing.cast(float, value))
    if type(value) is not hint:
        raise ConfigError(f"{key} must be of type {hint.__name__}, got {value!r}")
    return value

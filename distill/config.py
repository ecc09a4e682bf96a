"""Every setting of a distillation run as frozen dataclasses, and the recipes they start from; computes nothing.

Settings that change what is computed live here. Where a run writes, how long it may take and on what device it runs are
options of the command (run/command.py). Nothing here depends on the machine but `precision="auto"`, which the command
resolves before anything is saved. Nothing here knows a single method: the settings of a method are a `MethodSettings`
of its file in distill/methods, and distill/methods/registry.py builds a config for a method by name.
"""

import dataclasses
import hashlib
import json
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from codmd_serve.errors import ConfigError
from codmd_serve.grid import SAMPLERS, StepGrid
from distill.formats import RENAMED, RENAMED_IN_4, current_names, current_values, name_of_today, value_of_today
from distill.settings import EmaConfig as EmaConfig
from distill.settings import HeadConfig, check_choice, check_range
from distill.settings import NativeConfig as NativeConfig
from distill.settings import OptimizerConfig as OptimizerConfig
from distill.settings import StartConfig as StartConfig
from distill.settings import ValidateConfig as ValidateConfig

# Of config.json. A file without a format is of format 1; distill/formats.py knows the older ones.
FORMAT = 4
PRECISIONS, BUNDLE_DTYPES = ("auto", "fp32", "bf16"), ("fp32", "bf16", "fp16")
DTYPES, GRADIENT_SYNCS = ("fp32", "bf16"), ("each", "last")
SCORE_WINDOWS = ("full", "above", "step")
# A resumed run may change these settings: apart from rounding, none of them alters what an iteration computes.
RESUMABLE = (
    "max_iterations",
    "save_every_iterations",
    "log_every_iterations",
    "keep_last",
    "max_nonfinite_in_row",
    "bundle_dtype",
    "accumulate",
    "activation_checkpointing",
    "context_parallel",
    "shard_group",
    "gradient_sync",
    "validate",
)

# Wan2.1, wan/configs/shared_config.py: what the teacher is guided away from.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSettings(ABC):
    """Base of the settings of one family of methods, and what a config asks of them.

    Attributes:
        group: their key in config.json and before the dot in `--set`.
        has_exit_steps: rollouts stop at a drawn denoising step of the student.
    """

    group: ClassVar[str]
    has_exit_steps: ClassVar[bool] = False

    @abstractmethod
    def check(self, config: "DistillConfig") -> None:
        """Refuse a config that the method cannot train.

        Raises:
            ConfigError: names the key.
        """

    @abstractmethod
    def step_grid(self, config: "DistillConfig") -> StepGrid:
        """Return the denoising steps of the student."""

    @classmethod
    def upgraded(cls, saved: Mapping[str, Any], saved_format: int) -> dict[str, Any]:
        """Return these settings as an older format saved them, with the meaning that they had then."""
        del saved_format
        return dict(saved)

    def float32_roles(self, config: "DistillConfig") -> frozenset[str]:
        """Return the networks that the method also calls in float32 when `precision` is bf16."""
        del config
        return frozenset()

    def critic_head(self) -> HeadConfig | None:
        """Return the head that the critic has beside its flow, None for none."""
        return None

    def data_roles(self) -> frozenset[str]:
        """Return the roles whose turns are given real latents, where the method trains on any."""
        return frozenset({"student"})

    def memory(self, _config: "DistillConfig") -> dict[str, tuple[float, ...]]:
        """Return what the method keeps from turn to turn, as it is before the first; it is a part of checkpoints."""
        return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One distillation run.

    Attributes:
        recipe: name of the recipe that it started from.
        base: folder or hub id of a diffusers pipeline: the student's architecture and first weights, VAE, text encoder.
        teacher: another network to distil from, of the base's VAE and text encoder: a pipeline's folder or hub id, a
            bundle, or a file that `codmd-serve convert` reads; empty is the base.
        student_from, critic_from: weights that student and critic start from, in place of the base's: a bundle, or a
            file or folder that `codmd-serve convert` reads.
        start: regression of the student on the teacher's paths, from these weights, before the method's own iterations.
        validate: scores of the student on held-out prompts during the run, which choose its best checkpoint.
        native: the video that the student is trained on.
        optimizer: of student and critic.
        ema: of the student.
        method: name of the distillation method; set with --method only.
        method_settings: settings of the method's family; in JSON they stand under the family's own key.
        seed: of every random number of the run, 0..2^63-1.
        batch_size: samples of one update, over all processes and micro-batches.
        accumulate: micro-batches per update, computed one after the other in each process.
        activation_checkpointing: keep only the inputs of blocks and recompute the rest in the backward pass.
        context_parallel: processes that share their samples and split their tokens.
        shard_group: neighbouring processes that shard one copy of the networks (HSDP); 0 shards over all of them.
        gradient_sync: reduce gradients in "each" micro-batch, or in the "last" alone and keep whole ones until then.
        lora_critic_rank: rank of a LoRA critic on the teacher's frozen weights; 0 trains a full critic.
        lora_student_rank: rank of a LoRA student on frozen weights of its own; 0 trains a full student.
        lora_critic_alpha, lora_student_alpha: the LoRA update is scaled by alpha / rank.
        max_iterations: passes of the training loop.
        student_every_iterations: the student's turn comes once in so many iterations.
        critic_warmup_iterations: iterations before the first student update.
        guidance_scale: of the teacher, uncond + guidance_scale * (cond - uncond).
        negative_prompt: what the teacher is guided away from.
        sampler: `sde` noises the prediction again after each step, `ode` follows the flow.
        timesteps: the student's denoising steps; where empty, the method derives them from the fields below or its own.
        step_levels, step_shift: noise levels of those steps before the shift, and the shift.
        score_shift, score_sigma_min, score_sigma_max: law of the noise levels at which teacher and critic are compared.
        score_window: which of these levels judge which exit step, see `methods.draws.score_window`.
        score_shared_sigma: one such level per batch instead of one per sample.
        exit_per_sample: each sample's rollout stops at an exit step of its own, as CoDMD's authors have it, instead of
            one for the whole batch. A large batch then takes nearly all steps in every turn.
        prompts: a txt, jsonl or tar file, a folder of tars, or one of packed samples; empty draws captions of one and
            two objects in turn from the ShapeWorld grammar, num_captions of them.
        num_captions: captions drawn where there are no prompts.
        samples_seed: of the noise that the teacher's samples begin with; runs of one number share their samples.
        precision: auto, fp32 or bf16 (autocast); auto is bf16 where the device computes it fast.
        teacher_dtype: of the frozen weights of the teacher and under a LoRA student, fp32 or bf16.
        text_dtype: of the weights of the text encoder, fp32 or bf16.
        residual_dtype: of the residual stream between blocks under bf16 autocast, fp32 or bf16.
        bundle_dtype: of the exported student, fp32, bf16 or fp16.
        max_nonfinite_in_row: the run ends after so many updates in a row whose gradient was not finite.
        log_every_iterations: iterations per line of the log.
        save_every_iterations: iterations between two checkpoints.
        keep_last: checkpoints that are kept.
        vocabulary_note: a sentence for users whose prompt has words that the model never saw; goes into student.json.

    Raises:
        ConfigError: a value outside its range; the message names the key.
    """

    recipe: str
    base: str
    native: NativeConfig
    optimizer: OptimizerConfig
    ema: EmaConfig
    method: str
    method_settings: MethodSettings
    seed: int = 0
    batch_size: int
    accumulate: int = 1
    activation_checkpointing: bool = False
    context_parallel: int = 1
    shard_group: int = 0
    gradient_sync: str = "each"
    lora_critic_rank: int = 0
    lora_critic_alpha: float = 64.0
    lora_student_rank: int = 0
    lora_student_alpha: float = 64.0
    max_iterations: int
    student_every_iterations: int = 5
    critic_warmup_iterations: int = 0
    teacher: str = ""
    student_from: str = ""
    critic_from: str = ""
    start: StartConfig = field(default_factory=StartConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    guidance_scale: float
    negative_prompt: str = ""
    sampler: str = "sde"
    timesteps: tuple[float, ...] = ()
    step_levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    step_shift: float = 1.0
    score_shift: float
    score_sigma_min: float = 0.02
    score_sigma_max: float = 0.98
    score_window: str = "full"
    score_shared_sigma: bool = False
    exit_per_sample: bool = False
    prompts: str = ""
    num_captions: int = 4096
    samples_seed: int = 0
    precision: str = "auto"
    teacher_dtype: str = "fp32"
    text_dtype: str = "fp32"
    residual_dtype: str = "fp32"
    bundle_dtype: str = "fp32"
    max_nonfinite_in_row: int = 10
    log_every_iterations: int = 20
    save_every_iterations: int = 200
    keep_last: int = 2
    vocabulary_note: str = ""

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("score_window", self.score_window, SCORE_WINDOWS)
        check_choice("precision", self.precision, PRECISIONS)
        for name in ("teacher_dtype", "text_dtype", "residual_dtype"):
            check_choice(name, getattr(self, name), DTYPES)
        check_choice("gradient_sync", self.gradient_sync, GRADIENT_SYNCS)
        check_choice("bundle_dtype", self.bundle_dtype, BUNDLE_DTYPES)
        for name in ("seed", "samples_seed"):
            check_range(name, getattr(self, name), 0, 2**63 - 1)
        for name in ("batch_size", "accumulate", "context_parallel", "max_iterations", "student_every_iterations"):
            check_range(name, getattr(self, name), 1, 10**9)
        for name in ("log_every_iterations", "save_every_iterations", "max_nonfinite_in_row", "keep_last"):
            check_range(name, getattr(self, name), 1, 10**9)
        check_range("num_captions", self.num_captions, 1, 10**9)
        check_range("shard_group", self.shard_group, 0, 10**9)
        for role in ("critic", "student"):
            check_range(f"lora_{role}_rank", getattr(self, f"lora_{role}_rank"), 0, 4096)
            check_range(f"lora_{role}_alpha", getattr(self, f"lora_{role}_alpha"), 1e-3, 1e6)
        check_range("critic_warmup_iterations", self.critic_warmup_iterations, 0, 10**9)
        check_range("guidance_scale", self.guidance_scale, 0.0, 100.0)
        check_range("step_shift", self.step_shift, 1e-3, 1e3)
        check_range("score_shift", self.score_shift, 1e-3, 1e3)
        if not 0.0 < self.score_sigma_min < self.score_sigma_max <= 1.0:
            raise ConfigError(
                "expected 0 < score_sigma_min < score_sigma_max <= 1, "
                f"got {self.score_sigma_min} and {self.score_sigma_max}"
            )
        if self.critic_from and self.lora_critic_rank:
            raise ConfigError("critic_from needs lora_critic_rank 0: a LoRA critic is the teacher with adapters")
        if self.teacher_dtype == "bf16" and self.precision == "fp32":
            raise ConfigError("teacher_dtype bf16 needs precision bf16: a bf16 teacher runs under autocast")
        if self.residual_dtype == "bf16" and self.precision == "fp32":
            raise ConfigError("residual_dtype bf16 needs precision bf16: without autocast everything is float32")
        if self.exit_per_sample and not self.method_settings.has_exit_steps:
            raise ConfigError(f"exit_per_sample must be false for method {self.method}: its rollouts draw no exit step")
        if self.exit_per_sample and self.score_shared_sigma and self.score_window != "full":
            raise ConfigError(
                f"exit_per_sample needs score_shared_sigma false or score_window full, got {self.score_window!r}: "
                "samples that stop at different steps have no noise level in common"
            )
        self.method_settings.check(self)
        self.grid()

    def grid(self) -> StepGrid:
        """Return the student's denoising steps.

        Raises:
            ConfigError: steps that do not descend from at most 1 to above 0.
        """
        return self.method_settings.step_grid(self)

    def gather_precision(self, role: str, precision: str) -> str:
        """Return the precision, fp32 or bf16, in which a sharded network's blocks are gathered.

        Args:
            role: student, critic or teacher.
            precision: in which the networks are called: fp32 or bf16.
        """
        return "fp32" if role in self.method_settings.float32_roles(self) else precision

    def frozen_dtype(self, role: str) -> str:
        """Return the dtype, fp32 or bf16, of the frozen weights of the teacher, or of those under a LoRA student."""
        return "fp32" if role in self.method_settings.float32_roles(self) else self.teacher_dtype

    def sha256(self) -> str:
        """Return `settings_digest` of this config as config.json holds it."""
        return settings_digest(config_to_dict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a run distils, whatever the method: the teacher, the size of its video, dtypes.

    A method adds the settings published for it on that teacher; see `methods.registry.recipe_config`.
    """

    name: str
    base: str
    native: NativeConfig
    negative_prompt: str = ""
    activation_checkpointing: bool = False
    precision: str = "auto"
    teacher_dtype: str = "fp32"
    text_dtype: str = "fp32"
    bundle_dtype: str = "fp32"
    validate: ValidateConfig = field(default_factory=ValidateConfig)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `DistillConfig` that the recipe fixes."""
        own = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {"recipe": own.pop("name"), **own}


# By recipe, the world of distill/worlds/analytic.
ANALYTIC_RECIPES = {"analytic_ties": "ties", "analytic_orbit": "orbit", "analytic_switch": "switch"}
_WAN_RECIPE = Recipe(
    name="wan",
    base="",
    native=NativeConfig(height=480, width=832, num_frames=81, fps=16),
    negative_prompt=WAN_NEGATIVE_PROMPT,
    activation_checkpointing=True,
    precision="bf16",
    teacher_dtype="bf16",
    text_dtype="bf16",
    bundle_dtype="bf16",
    validate=ValidateConfig(metric="command.total"),
)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # The embedded world: captions of its own grammar.
        Recipe(
            name="shapeworld",
            base="weights/shapeworld",
            native=NativeConfig(height=96, width=96, num_frames=25, fps=16),
            bundle_dtype="fp16",
            validate=ValidateConfig(metric="shapebench.all"),
        ),
        # Worlds whose teacher is exact: latents of (4, 8, 2, 2), no VAE.
        *(
            Recipe(
                name=name,
                base=f"analytic:{world}",
                native=NativeConfig(height=2, width=2, num_frames=8, fps=8),
                precision="fp32",
            )
            for name, world in ANALYTIC_RECIPES.items()
        ),
        dataclasses.replace(_WAN_RECIPE, name="wan_1_3b", base="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        dataclasses.replace(_WAN_RECIPE, name="wan_14b", base="Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    )
}


def config_to_dict(config: DistillConfig) -> dict[str, Any]:
    """Return the config as plain JSON values, as config.json holds them."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    # The group keeps its place among the settings.
    group = config.method_settings.group
    named = {group if key == "method_settings" else key: value for key, value in plain.items()}
    return {"format": FORMAT, **named}


def settings_digest(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the JSON object in a config.json of any format, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def parse_config(data: Mapping[str, Any], kinds: Mapping[str, type[MethodSettings]]) -> DistillConfig:
    """Build the config that `config_to_dict` gave, in this format or an older one.

    Args:
        data: plain JSON values.
        kinds: by method name, the class of its settings.

    Raises:
        ConfigError: written by a newer version, an unknown method, unknown or missing keys, values of the wrong kind or
            out of range; the message names the key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected settings as one JSON object, got {data!r}")
    saved_format = data.get("format", 1)
    if type(saved_format) is not int or saved_format > FORMAT:
        raise ConfigError(
            f"expected settings of format {FORMAT} or lower, got format {saved_format!r}: "
            "a newer version wrote them, so update this one"
        )
    method = data.get("method")
    if not isinstance(method, str):
        raise ConfigError("missing setting method" if method is None else f"method must be text, got {method!r}")
    check_choice("method", method, tuple(kinds))
    kind = kinds[method]
    own = {key: value for key, value in data.items() if key != "format"}
    if saved_format == 1:
        # It held the settings of all methods, used or not.
        unused = {other.group for other in kinds.values()} - {kind.group}
        own = {key: value for key, value in current_names(own, RENAMED).items() if key not in unused}
    if saved_format <= 2:
        own = current_values(own)
    if saved_format <= 3:
        own = current_names(own, RENAMED_IN_4)
    if isinstance(own.get(kind.group, {}), dict):
        own[kind.group] = kind.upgraded(own.get(kind.group, {}), saved_format)
    recipe = RECIPES.get(str(own.get("recipe")))
    if recipe is not None:  # a run of before there was validation
        own.setdefault("validate", dataclasses.asdict(recipe.validate))
    return _assemble(own, kind)


def with_overrides(config: DistillConfig, assignments: list[str]) -> DistillConfig:
    """Apply `key=value` settings; nested keys have a dot, values are JSON, and what is not JSON is text.

    Raises:
        ConfigError: no `=`, the method, an unknown key or a value that does not fit; the message names the key.
    """
    data = config_to_dict(config)
    del data["format"]
    for assignment in assignments:
        given, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"expected key=value, got {assignment!r}")
        if given == "method":
            raise ConfigError(
                f"method cannot be set with --set, which would leave out the settings published for it: "
                f"use --method {text}"
            )
        *groups, leaf = name_of_today(given).split(".")
        target = data
        for group in groups:
            target = target.get(group) if isinstance(target, dict) else None  # type: ignore[assignment]
        if not isinstance(target, dict) or leaf not in target:
            keys = ", ".join(sorted(_dotted_keys(data)))
            raise ConfigError(f"unknown setting {given!r} of method {config.method}, expected one of: {keys}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        target[leaf] = value_of_today(given, value)
    return _assemble(data, type(config.method_settings))


def _assemble(data: Mapping[str, Any], kind: type[MethodSettings]) -> DistillConfig:
    names = {kind.group if name == "method_settings" else name for name in DistillConfig.__dataclass_fields__}
    unknown = sorted(data.keys() - names)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]}, expected one of: {', '.join(sorted(names))}")
    own = dict(data)
    settings = _build(kind, own.pop(kind.group, {}), prefix=f"{kind.group}.")
    built = _build(DistillConfig, {**own, "method_settings": settings}, prefix="")
    assert isinstance(built, DistillConfig)
    return built


def _dotted_keys(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in data.items():
        if isinstance(value, dict):
            keys += _dotted_keys(value, f"{prefix}{key}.")
        elif key != "method":
            keys.append(prefix + key)
    return keys


def _build(kind: type, data: object, prefix: str) -> object:
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected settings under {prefix.rstrip('.') or 'the config'}, got {data!r}")
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    known = [entry.name for entry in fields]
    unknown = sorted(data.keys() - set(known))
    if unknown:
        raise ConfigError(f"unknown setting {prefix}{unknown[0]}, expected one of: {', '.join(known)}")
    required = {
        entry.name
        for entry in fields
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - data.keys())
    if missing:
        raise ConfigError(f"missing setting {prefix}{missing[0]}")
    return kind(**{key: _convert(hints[key], value, prefix + key) for key, value in data.items()})


def _convert(hint: Any, value: object, key: str) -> object:
    if hint is MethodSettings:
        return value
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

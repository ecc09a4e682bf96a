"""Groups of settings that every method has: optimizer, moving average, native video; computes nothing.

The settings of one family of methods are in its file in distill/methods.
"""

from dataclasses import dataclass

from codmd_serve.errors import ConfigError

EMA_KINDS = ("constant", "power")
HIGH, LOW = "high", "low"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW of student and critic.

    Attributes:
        student_lr, critic_lr: learning rates.
        betas: published are (0.9, 0.999) and (0, 0.999); torch keeps the first moment for either.
        eps: of AdamW.
        weight_decay: of AdamW.
        clip_norm: largest gradient norm; None (null in JSON) switches clipping off.
        warmup_updates: linear warm-up of the learning rate, counted in each network's own updates.
    """

    student_lr: float
    critic_lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 10.0
    warmup_updates: int = 0

    def __post_init__(self) -> None:
        for name in ("student_lr", "critic_lr", "eps"):
            check_range(f"optimizer.{name}", getattr(self, name), 1e-12, 1.0)
        for beta in self.betas:
            check_range("optimizer.betas", beta, 0.0, 0.99999)
        check_range("optimizer.weight_decay", self.weight_decay, 0.0, 1.0)
        if self.clip_norm is not None:
            check_range("optimizer.clip_norm", self.clip_norm, 1e-6, 1e6)
        check_range("optimizer.warmup_updates", self.warmup_updates, 0, 10**6)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """Float32 moving average (EMA) of the student; it advances with each student update.

    Attributes:
        decay: share of the average that stays at each update, for kind "constant".
        start_after_updates: student updates after which the average starts; until then it is a plain copy. An iteration
            count of another trainer is to be divided by its iterations per student update.
        kind: "constant" forgets at one rate; "power" always averages over the same share of all updates so far.
        length: for "power", the standard deviation of the averaged updates over their number.
    """

    decay: float
    start_after_updates: int = 0
    kind: str = "constant"
    length: float = 0.1

    def __post_init__(self) -> None:
        check_choice("ema.kind", self.kind, EMA_KINDS)
        # Above .288 the exponent is negative: older updates would weigh more than newer ones.
        check_range("ema.length", self.length, 1e-3, 0.28)
        check_range("ema.decay", self.decay, 0.0, 0.999999)
        check_range("ema.start_after_updates", self.start_after_updates, 0, 10**7)


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeConfig:
    """The video a student is trained on.

    Attributes:
        height, width: pixels.
        num_frames: frames, 4k + 1.
        fps: frames per second.
    """

    height: int
    width: int
    num_frames: int
    fps: int

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "fps"):
            check_range(f"native.{name}", getattr(self, name), 1, 10_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """The regressed start: before a run, its student is trained on the ends of the teacher's own paths.

    Attributes:
        updates: of the student, before the first iteration of the method; 0 leaves the start out.
        paths: of the teacher, sampled once and stored in the cache.
        teacher_steps: Euler steps of a path.
        shift: of the teacher's steps.
        student_lr: learning rate of the start.
    """

    updates: int = 0
    paths: int = 4096
    teacher_steps: int = 50
    shift: float = 3.0
    student_lr: float = 1e-4

    def __post_init__(self) -> None:
        check_range("start.updates", self.updates, 0, 10**9)
        check_range("start.paths", self.paths, 1, 10**9)
        check_range("start.teacher_steps", self.teacher_steps, 1, 10_000)
        check_range("start.shift", self.shift, 1e-3, 1e3)
        check_range("start.student_lr", self.student_lr, 1e-12, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """A discriminator's head on the critic.

    Attributes:
        depth: after which share of the critic's blocks it reads their tokens.
        queries: learned queries that pool the tokens.
        width: units of its hidden layer.
    """

    depth: float
    queries: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig:
    """Validation: the EMA student is sampled on held-out prompts and scored; the best checkpoint is kept.

    It draws from random streams of its own, so a run with it trains the same weights as one without.

    Attributes:
        every_iterations: iterations between two validations; 0 makes none.
        metric: SUITE.VALUE that chooses the best checkpoint, such as shapebench.all or command.total.
        better: high or low; where empty, what the suite says of the metric. The metrics of a command need it.
        patience: the run ends after so many validations in a row without a new best; 0 lets it go on.
        prompts: a txt or jsonl file of held-out prompts, for suite `command`; where empty, captions of ShapeWorld that
            neither this run nor a report uses.
        num_prompts: prompts that are sampled once.
        deep_prompts, deep_seeds: so many prompts are sampled with so many noises, for what a prompt leaves open; 0
            prompts leave these scores out.
        command: of suite `command`: gets a folder of mp4s and a JSON file of prompts, prints a JSON object of numbers.
        timeout_s: seconds after which the command is killed.
    """

    every_iterations: int = 0
    metric: str = ""
    better: str = ""
    patience: int = 0
    prompts: str = ""
    num_prompts: int = 32
    deep_prompts: int = 2
    deep_seeds: int = 16
    command: str = ""
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        check_choice("validate.better", self.better, ("", HIGH, LOW))
        for name in ("every_iterations", "patience"):
            check_range(f"validate.{name}", getattr(self, name), 0, 10**9)
        check_range("validate.num_prompts", self.num_prompts, 1, 10_000)
        check_range("validate.deep_prompts", self.deep_prompts, 0, 1000)
        check_range("validate.deep_seeds", self.deep_seeds, 2, 10_000)
        # The other processes wait for the command, for two hours at most.
        check_range("validate.timeout_s", self.timeout_s, 0.1, 6000.0)
        if self.every_iterations and not self.metric:
            raise ConfigError(
                "validate.every_iterations needs validate.metric, such as shapebench.all or command.total"
            )


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError, naming the key, unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError, naming the key, unless `value` is in low..high; NaN is not."""
    if not low <= value <= high:
        raise ConfigError(f"{key} must be in {low:g}..{high:g}, got {value!r}")

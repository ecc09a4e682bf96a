"""Every default of serving, as frozen dataclasses and presets; reads no environment and imports nothing heavy."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError

MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARS = 4000
DEFAULT_CRF = 18
FORMATS = ("mp4", "gif", "webp")
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
# Fields of ServeConfig that the engine is loaded with; a worker is told them by these names.
ENGINE_SETTINGS = (
    "device",
    "dtype",
    "attention",
    "quantization",
    "lossy",
    "execution",
    "text_encoder",
    "text_cache",
    "vae_dtype",
    "cache",
    "threads",
    "teacher",
    "overlap",
)
# Of them, those that do not decide the bytes of the student's videos.
NEUTRAL_SETTINGS = ("text_cache", "cache", "teacher", "overlap")
QUANTIZATIONS = ("none", "fp8", "fp8-emulated")
# What a lossy engine beside the exact one may be: a quantization, an attention kernel, or both.
LOSSY_ENGINES = ("none", "fp8", "sage", "fp8+sage", "fp8-emulated")
TEXT_ENCODERS = ("auto", "gpu", "cpu", "offload")
EXECUTIONS = ("auto", "eager", "graph", "compiled", "compiled+graph")
OVERLAPS = ("auto", "on", "off")
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


def default_bundle_path() -> Path:
    """Return the folder of the embedded student, in an installed wheel or in a checkout.

    Returns:
        The path, whether or not it exists: the loader reports what is missing.
    """
    package = Path(__file__).resolve().parent
    installed = package / "_weights"
    return (installed if installed.is_dir() else package.parent / "weights") / "shapeworld-dmd"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Settings of a server. The command line and CODMD_* variables are generated from these fields.

    Raises:
        ConfigError: a value out of its range.
    """

    bundle: str = field(default_factory=lambda: str(default_bundle_path()))
    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int = 0
    device: str = "auto"
    dtype: str = "auto"
    vae_dtype: str = "auto"
    attention: str = "auto"
    quantization: str = "none"
    lossy: str = "none"
    execution: str = "auto"
    text_encoder: str = "auto"
    text_cache: str = ""
    cache: str = ""
    threads: int = 0
    teacher: bool = False
    workers: str = "auto"
    spare_worker: bool = True
    overlap: str = "auto"
    queue_size: int = 16
    max_pixels: int = 0
    max_body_bytes: int = 65536
    jobs_kept: int = 10_000
    max_attempts: int = 2
    cancel_timeout_s: int = 10
    stall_timeout_s: int = 60
    drain_timeout_s: int = 30
    page: bool = True
    allow_remote_without_auth: bool = False
    data: str = ""
    store: str = ""
    results: str = ""
    result_hours: int = 168
    result_max_mib: int = 20_480
    lease_s: int = 30
    unserved_hours: int = 168
    api_keys: str = ""
    key_share_percent: int = 50
    key_jobs_per_minute: int = 60
    allowed_hosts: str = ""
    max_connections: int = 4096
    header_timeout_s: int = 10
    body_timeout_s: int = 30
    webhook_hosts: str = ""
    webhook_secret_file: str = ""

    def __post_init__(self) -> None:
        ranges = {
            "port": (1, 65535),
            "metrics_port": (0, 65535),
            "queue_size": (1, 10_000),
            "max_pixels": (0, 2**40),
            "max_body_bytes": (1024, 2**30),
            "jobs_kept": (1, 1_000_000),
            "max_attempts": (1, 1000),
            "threads": (0, 4096),
            "cancel_timeout_s": (1, 86_400),
            "stall_timeout_s": (1, 86_400),
            "drain_timeout_s": (0, 86_400),
            "result_hours": (1, 876_000),
            "result_max_mib": (0, 2**40),
            "lease_s": (3, 86_400),
            "unserved_hours": (0, 876_000),
            "key_share_percent": (1, 100),
            "key_jobs_per_minute": (0, 1_000_000),
            "max_connections": (16, 1_000_000),
            "header_timeout_s": (1, 3600),
            "body_timeout_s": (1, 3600),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be in {low}..{high}, got {getattr(self, name)}")
        choices = {
            "dtype": DTYPE_CHOICES,
            "vae_dtype": DTYPE_CHOICES,
            "quantization": QUANTIZATIONS,
            "lossy": LOSSY_ENGINES,
            "overlap": OVERLAPS,
            "execution": EXECUTIONS,
            "text_encoder": TEXT_ENCODERS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.workers != "auto" and not (self.workers.isascii() and self.workers.isdecimal()):
            raise ConfigError(f"workers must be auto or a whole number, got {self.workers!r}")
        if self.host not in LOOPBACK_HOSTS and not self.allow_remote_without_auth and not self.api_keys:
            raise ConfigError(
                f"refusing to listen on {self.host}: there is no authentication, so anybody who reaches this address "
                "could use the machine; name a file of keys with --api-keys, or say --allow-remote-without-auth if "
                "that is what you want"
            )
        if self.webhook_hosts and not self.webhook_secret_file:
            raise ConfigError("webhooks are signed: name a file that holds the secret with --webhook-secret-file")

    @property
    def num_workers(self) -> int | None:
        """Return the requested number of worker processes; None is one per GPU, and one on a CPU."""
        return None if self.workers == "auto" else int(self.workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateParams:
    """One video to make: everything that determines its bytes, besides the bundle. Validated where a request enters.

    Attributes:
        prompt: 1..4000 characters, not blank.
        seed: 0..2^63-1.
        height, width: pixels.
        num_frames: frames, 4k + 1.
        fps: frames per second of playback.
        crf: H.264 constant rate factor, 1 (best) to 51.
        format: one of FORMATS.
        may_be_lossy: whether the lossy engine makes it, where one is served beside the exact one.
        teacher: fingerprint of the teacher that makes it instead of the student; empty is the student.
    """

    prompt: str
    seed: int
    height: int
    width: int
    num_frames: int
    fps: int
    crf: int
    format: str = "mp4"
    may_be_lossy: bool = False
    teacher: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, later ones only where they differ from their default: older content keys and files hold."""
        later = {"format": "mp4", "may_be_lossy": False, "teacher": ""}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherFacts:
    """Facts of the teacher that an engine runs beside its student.

    Attributes:
        name: of the base model.
        fingerprint: see GenerateParams.teacher.
        num_steps, guidance_scale: how it is sampled.
        service_s: seconds that the native video takes, estimated from two steps.
    """

    name: str
    fingerprint: str
    num_steps: int
    guidance_scale: float
    service_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Facts of a loaded engine, enough to validate a request without it.

    Attributes:
        name: of the bundle.
        device, dtype, attention, execution: what runs it; attention is a kernel, or two as `self+prompt`.
        num_steps: of the sampler.
        height, width, num_frames, fps: what the bundle was trained to make.
        size_multiple: height and width must be multiples of it.
        max_side_px, max_num_frames: the largest positions that the network can encode.
        frame_multiple: num_frames is a multiple of it, plus one.
        service_s: seconds that the native video took, warm.
        load_s: seconds from start to warm.
        fallback: why something does not run as it was asked for, or as it would be fastest; empty when all does.
        vae_dtype: of the VAE's weights and activations; its sums and norms are float32.
        vae_execution: eager, or graph where the chunks of the native video are replayed.
        is_decoding_overlapped: whether a video is decoded while the next one is denoised.
        max_video_px: height * width * num_frames that the memory of the device has room for; 0 is unknown.
        num_devices: GPUs that the worker sees; 1 on a CPU.
        lossy: what makes another picture than the weights ask for, as `fp8+sage`; empty when nothing does.
        lossy_beside: the same of a second engine, which makes what `quality` high, medium or low asks for; empty when
            there is none.
        threads: of torch on a CPU, which decide the order of its sums; 0 on a GPU.
        about: one sentence on what the model can draw; empty when the bundle does not say.
        examples: prompts that the bundle suggests.
        teacher: what runs beside the student; None when nothing does.
    """

    name: str
    device: str
    dtype: str
    attention: str
    execution: str
    num_steps: int
    height: int
    width: int
    num_frames: int
    fps: int
    size_multiple: int
    max_side_px: int
    frame_multiple: int
    max_num_frames: int
    service_s: float
    load_s: float
    fallback: str = ""
    vae_dtype: str = "float32"
    vae_execution: str = "eager"
    is_decoding_overlapped: bool = False
    max_video_px: int = 0
    num_devices: int = 1
    lossy: str = ""
    lossy_beside: str = ""
    threads: int = 0
    about: str = ""
    examples: tuple[str, ...] = ()
    teacher: TeacherFacts | None = None

    def __post_init__(self) -> None:
        # From JSON come lists and objects.
        object.__setattr__(self, "examples", tuple(self.examples))
        if isinstance(self.teacher, dict):
            object.__setattr__(self, "teacher", TeacherFacts(**self.teacher))

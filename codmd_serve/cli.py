"""codmd-serve on the command line: serve, work, generate, bench, convert, models, doctor.

The one place that reads the environment, configures logging, and puts the page beside the API.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from codmd_serve import __version__
from codmd_serve.bench.command import add_bench_arguments, run_bench
from codmd_serve.caches import prepare_caches
from codmd_serve.commands import OneLineParser, app_module, listening_socket, run_command
from codmd_serve.config import DEFAULT_CRF, ENGINE_SETTINGS, GenerateParams, ModelFacts, ServeConfig
from codmd_serve.convert_cli import add_convert_arguments, run_convert
from codmd_serve.cpu import prepare_threads
from codmd_serve.doctor import run_doctor
from codmd_serve.errors import ConfigError, InvalidRequestError
from codmd_serve.files import check_name
from codmd_serve.lean_imports import import_lean
from codmd_serve.models_cli import add_models_arguments, resolve_bundle, run_models
from codmd_serve.textfiles import shown
from codmd_serve.video import check_encoder, find_ffmpeg, format_of
from codmd_serve.worker_process import worker_ahead

PROGRAM = "codmd-serve"
COMMANDS = ("serve", "work", "generate", "bench", "convert", "models", "doctor")
ENVIRONMENT_PREFIX = "CODMD_"
ANY_HOST = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Flag:
    """A command-line flag that is also an environment variable."""

    name: str
    help: str
    kind: type = str
    default: Any = None
    short: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()


def _default(field_name: str) -> Any:
    field = next(field for field in fields(ServeConfig) if field.name == field_name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _serve_flag(name: str, help_text: str) -> Flag:
    default = _default(name)
    return Flag(name, help_text, type(default), default)


MODEL_FLAGS = (
    _serve_flag("bundle", "student bundle: a folder, org/name, org/name:file (@revision), or a name of `models`"),
    Flag("base", "what a hub id in --bundle was distilled from; guessed from its width when absent", str, ""),
    _serve_flag("device", "auto, cpu, cuda or cuda:N"),
    _serve_flag("dtype", "auto (bfloat16 on cuda, on a cpu what is faster), float32, bfloat16 or float16"),
    _serve_flag(
        "cache",
        "folder that keeps converted students, compiled kernels and what was measured at load, so that the next load "
        "makes the same choices; empty is the user's cache folder",
    ),
    _serve_flag("vae_dtype", "auto (float16 on cuda where the activations fit, on a cpu what is faster), or a dtype"),
    _serve_flag("quantization", "none; fp8: 8-bit products, lossy, CUDA of capability 8.9; fp8-emulated, on a CPU"),
    _serve_flag("execution", "auto (what is fastest on the device), eager, graph, compiled or compiled+graph"),
    _serve_flag("text_encoder", "auto, gpu, cpu, or offload: on the cpu, lent to the device while it encodes"),
    _serve_flag("teacher", "load the base of the bundle too: the many-step teacher, beside the student"),
    _serve_flag("threads", "CPU threads; 0 is the cores that affinity and CPU quota leave to this process"),
    _serve_flag("text_cache", "folder that keeps prompt embeddings over restarts; empty is memory only"),
    _serve_flag(
        "attention", "auto (the fastest that is installed and right) or a kernel of `doctor`'s table; sage is lossy"
    ),
)
SERVE_FLAGS = (
    *MODEL_FLAGS,
    _serve_flag("host", "address to listen on"),
    _serve_flag("port", "port to listen on"),
    _serve_flag(
        "lossy", "none, fp8, sage or fp8+sage: a lossy engine beside the exact one, for requests with a quality"
    ),
    _serve_flag(
        "metrics_port", "port of `work` for Prometheus, on --host; 0 is none. `serve` has /metrics on its own port"
    ),
    _serve_flag("workers", "worker processes: auto (one per GPU, one on a CPU), a number, or 0 for the API alone"),
    _serve_flag("spare_worker", "keep a process ready, imports done, to replace a worker that dies in seconds"),
    _serve_flag(
        "overlap", "auto (on with a GPU), on or off: denoise a job while the one before it is decoded and encoded"
    ),
    _serve_flag("queue_size", "jobs that may wait before requests are refused"),
    _serve_flag("max_pixels", "largest height * width * frames; 0 is four times what the bundle was trained at"),
    _serve_flag("max_body_bytes", "largest request body"),
    _serve_flag("jobs_kept", "finished jobs that are remembered"),
    _serve_flag("data", "folder for jobs, videos and what is in the making; empty is the user's data folder"),
    _serve_flag("store", "of the jobs: an SQLite file, or postgresql://...; empty is jobs.sqlite3 in the data folder"),
    _serve_flag("results", "where videos are kept: a folder or a URL such as s3://...; empty is in the data folder"),
    _serve_flag("result_hours", "hours that a video is kept after it was made or asked for again"),
    _serve_flag("result_max_mib", "size of all videos, beyond which the least used go; 0 is without a bound"),
    _serve_flag("lease_s", "seconds after which a machine that is not heard of loses its jobs to another"),
    _serve_flag("unserved_hours", "hours that a job waits while no worker serves its bundle; 0 is for ever"),
    _serve_flag("api_keys", "file of API keys, one NAME and SHA-256 of the key a line; empty lets everybody in"),
    _serve_flag("key_share_percent", "percent of the queue that one API key may fill"),
    _serve_flag("key_jobs_per_minute", "jobs that one API key may send; 0 is without a bound"),
    _serve_flag("allowed_hosts", "names that the server goes by, with commas, beside its own; * allows all"),
    _serve_flag("max_connections", "open connections"),
    _serve_flag("header_timeout_s", "seconds that a client gets for its headers"),
    _serve_flag("body_timeout_s", "seconds that a client gets for its body"),
    _serve_flag("webhook_hosts", "hosts that webhooks may call, with commas, * is all public ones; empty is none"),
    _serve_flag("webhook_secret_file", "file of the secret that webhooks are signed with"),
    _serve_flag("max_attempts", "tries of a job whose worker dies"),
    _serve_flag("cancel_timeout_s", "seconds that a job has to obey a cancellation before its worker is killed"),
    _serve_flag("stall_timeout_s", "seconds without progress, over what is expected, before a worker is killed"),
    _serve_flag("drain_timeout_s", "seconds that running requests get at shutdown"),
    _serve_flag("page", "the web page at /"),
    _serve_flag("allow_remote_without_auth", "listen on other than loopback although anybody could use it then"),
)
GENERATE_FLAGS = (
    Flag("output", "file to write; its suffix is the format: .mp4, .gif or .webp", str, "out.mp4", ("-o",)),
    *MODEL_FLAGS,
    Flag("seed", "0..2^63-1; drawn and printed when absent", int),
    Flag("height", "pixels; what the bundle was trained at when absent", int),
    Flag("width", "pixels; what the bundle was trained at when absent", int),
    Flag("num_frames", "4k + 1; what the bundle was trained at when absent", int),
    Flag("fps", "frames per second; what the bundle was trained at when absent", int),
    Flag("crf", "H.264 rate factor, 1 best to 51 smallest", int, DEFAULT_CRF),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code, see `codmd_serve.commands`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "serve")
    return run_command(PROGRAM, lambda: _run(words))


def _run(words: list[str]) -> int:
    options = _parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for noisy in ("httpx", "httpx2", "httpcore", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    prepare_threads(os.environ, getattr(options, "threads", 0))  # before torch is imported
    if hasattr(options, "cache"):
        options.cache = options.cache or str(user_cache_folder())
        prepare_caches(os.environ, options.cache)
    if hasattr(options, "bundle"):
        with _ended_by_sigterm():
            cache = getattr(options, "cache", "") or str(user_cache_folder())
            options.bundle = resolve_bundle(options.bundle, getattr(options, "base", ""), Path(cache))
    if options.command == "bench":
        with _ended_by_sigterm():
            return run_bench(options, words)
    run = {
        "serve": serve,
        "work": work,
        "generate": generate,
        "convert": convert,
        "models": models,
        "doctor": run_doctor,
    }
    status: int = run[options.command](options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="Text to video with few-step distilled Wan students. Without a command: serve.",
    )
    parser.add_argument("--version", action="version", version=f"codmd-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    serving = commands.add_parser("serve", help="serve POST /generate and the web page")
    working = commands.add_parser("work", help="run the jobs of a store, without HTTP")
    generating = commands.add_parser("generate", help="make one video without a server")
    generating.add_argument("prompt", help="what to show")
    add_bench_arguments(commands.add_parser("bench", help="measure this machine, also against diffusers"))
    add_convert_arguments(commands.add_parser("convert", help="make a student bundle of a published checkpoint"))
    listing = commands.add_parser("models", help="list published students, or fetch and convert one")
    add_models_arguments(listing)
    examining = commands.add_parser("doctor", help="say what is installed and what would be used")
    for command, flags in (
        (serving, SERVE_FLAGS),
        (working, SERVE_FLAGS),
        (generating, GENERATE_FLAGS),
        (listing, tuple(flag for flag in MODEL_FLAGS if flag.name in ("base", "cache"))),
        (examining, MODEL_FLAGS),
    ):
        for flag in flags:
            _add_flag(command, flag)
    return parser


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    options: dict[str, Any] = {"default": _from_environment(flag)}
    shown = "" if flag.default in (None, "") else f"default: {flag.default}; "
    options["help"] = f"{flag.help} ({shown}also ${flag.variable})".replace("%", "%%")
    if flag.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = flag.kind
        options["metavar"] = "N" if flag.kind is int else "TEXT"
    parser.add_argument(*flag.short, "--" + flag.name.replace("_", "-"), **options)


def _from_environment(flag: Flag) -> Any:
    text = os.environ.get(flag.variable)
    if text is None or text == "":
        return flag.default
    try:
        if flag.kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.strip().lower()]
        return flag.kind(text)
    except (KeyError, ValueError):
        wanted = "1 or 0" if flag.kind is bool else "a whole number"
        raise ConfigError(f"${flag.variable} must be {wanted}, got {shown(text)}") from None


def _config(options: argparse.Namespace) -> ServeConfig:
    settings = {field.name: getattr(options, field.name) for field in fields(ServeConfig)}
    return ServeConfig(**{**settings, "data": settings["data"] or str(user_data_folder())})


def user_data_folder() -> Path:
    """Where this platform keeps what a program knows about its user."""
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / PROGRAM
    return Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / PROGRAM


def user_cache_folder() -> Path:
    """Where this platform keeps what a program can make again."""
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / PROGRAM
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / PROGRAM


def models(options: argparse.Namespace) -> int:
    """Print the table of published students, or prepare one of them."""
    with _ended_by_sigterm():
        return run_models(options.name, options.base, Path(options.cache))


def serve(options: argparse.Namespace) -> int:
    """Serve until told to stop; prints one line when ready."""
    start_s = time.perf_counter()
    config = _config(options)
    has_workers = config.workers != "0"
    if has_workers:
        check_encoder(find_ffmpeg())
    address = f"http://{_in_url(config.host)}:{config.port}"
    fatal: list[str] = []

    def on_ready(facts: ModelFacts) -> None:
        _print_ready(f"{address} ", facts, start_s)

    def on_fatal(message: str) -> None:
        fatal.append(message)
        server.should_exit = True

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening_socket(config.host, config.port))
        runner = stack.enter_context(asyncio.Runner())
        spare = stack.enter_context(worker_ahead(runner)) if has_workers else None
        # Only now: these imports take about a second, in which the worker gets on with its own.
        from codmd_serve.api.app import create_app
        from codmd_serve.api.security import read_keys
        from codmd_serve.serving import make_backend, make_server

        keys = read_keys(config.api_keys)
        backend, metrics = make_backend(config, on_ready, on_fatal, spare=spare)
        app: Any = create_app(backend, metrics, keys, _page_loader(config) if config.page else None)
        server = make_server(app, backend)
        if not has_workers:
            print(f"ready: {address} workers=0 seconds_to_ready={time.perf_counter() - start_s:.1f}", flush=True)
        runner.run(server.serve(sockets=[listener]))
    if fatal:
        raise ConfigError(fatal[0])
    return 0


def work(options: argparse.Namespace) -> int:
    """Run jobs of a store until told to stop, without HTTP; prints one line when ready."""
    start_s = time.perf_counter()
    config = _config(options)
    if config.workers == "0":
        raise ConfigError("workers must be auto or above 0: `work` is what runs jobs")
    check_encoder(find_ffmpeg())
    with asyncio.Runner() as runner, worker_ahead(runner) as spare:
        from codmd_serve.serving import run_worker

        runner.run(run_worker(config, lambda facts: _print_ready("", facts, start_s), spare=spare))
    return 0


def _print_ready(address: str, facts: ModelFacts, start_s: float) -> None:
    seconds = time.perf_counter() - start_s
    print(
        f"ready: {address}model={facts.name} device={facts.device} dtype={facts.dtype} "
        f"attention={facts.attention} execution={facts.execution} seconds_to_ready={seconds:.1f}"
        f"{f' lossy={facts.lossy}' if facts.lossy else ''}"
        f"{f' teacher={facts.teacher.name}' if facts.teacher else ''}",
        flush=True,
    )


def _page_loader(config: ServeConfig) -> Callable[[], Any]:
    """What builds the page, for `create_app` to call beside the running server: its imports take seconds."""

    def load() -> Any:
        # Its own: another user may own the one in the system's temporary folder.
        folder = Path(config.data) / "page"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        import gradio
        from fastapi import FastAPI

        from codmd_serve.api.page import Page

        demo = app_module("demo")

        # The page is a client like any other, so it needs an address that this machine reaches itself by.
        host = "127.0.0.1" if config.host in ANY_HOST else config.host
        page = demo.build_page(f"http://{_in_url(host)}:{config.port}")
        parent = FastAPI()
        gradio.mount_gradio_app(parent, page, path="/", **demo.page_options())
        mounted: Any = parent.routes[-1]
        num_inputs = {number: len(each.inputs) for number, each in page.fns.items()}

        async def start() -> None:
            page.run_startup_events()
            await page.run_extra_startup_events()

        return Page(mounted.app, num_inputs, start, mounted.app.stop_event.set)

    return load


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def generate(options: argparse.Namespace) -> int:
    """Make one video in this process, with a progress bar, and print where the time went."""
    from pydantic import ValidationError

    from codmd_serve.api.schemas import GenerateBody, to_params

    output = _checked_output(options.output)
    names = ("seed", "height", "width", "num_frames", "fps", "crf")
    asked = {"format": format_of(output), **{name: getattr(options, name) for name in names}}
    if asked["format"] == "gif" and asked["crf"] == DEFAULT_CRF:  # not said; a gif has none
        asked["crf"] = None
    try:
        body = GenerateBody(prompt=options.prompt, **asked)
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        raise InvalidRequestError(f"{field}: {problem['msg'].removeprefix('Value error, ')}", field) from None
    check_encoder(find_ffmpeg())
    import_lean("codmd_serve.loading")
    from codmd_serve.loading import load_engine
    from codmd_serve.wan.checkpoint import silence_libraries

    silence_libraries()
    settings = {name: getattr(options, name) for name in ENGINE_SETTINGS if name in vars(options)}
    engine = load_engine(Path(options.bundle), **settings)
    params = to_params(body, engine.facts, sys.maxsize, engine.facts.teacher)
    with _ended_by_sigterm():
        result = _generate_with_bar(engine, params, output)
    for warning in result.warnings:
        print(f"note: {warning}", file=sys.stderr)
    total_ms = sum(result.timings_ms.values())
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in result.timings_ms.items())
    print(f"{output}: seed {params.seed}, {total_ms:.0f} ms ({stages})")
    return 0


def _generate_with_bar(engine: Any, params: GenerateParams, output: Path) -> Any:
    from tqdm import tqdm

    num_steps = engine.facts.teacher.num_steps if params.teacher else engine.facts.num_steps
    with tqdm(total=num_steps + params.num_frames, unit="step", leave=False) as bar:

        def on_progress(stage: str, done: int, total: int) -> None:
            bar.set_description(stage)
            is_decoded = {"text": 0, "denoise": done, "decode": num_steps + done}
            bar.update(is_decoded.get(stage, bar.n) - bar.n)

        return engine.generate(params, output, on_progress)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the half of a video does not stay on disk."""

    def unwind(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def convert(options: argparse.Namespace) -> int:
    """Make a student bundle of a published checkpoint, and print what had to be guessed."""
    with _ended_by_sigterm():
        return run_convert(options)


def _checked_output(name: str) -> Path:
    """Refuse an output that cannot be written before minutes are spent on making it."""
    output = Path(name)
    check_name(output)
    format_of(output)
    if output.is_dir():
        raise ConfigError(f"{output} is a folder: name a file, for example {output / 'out.mp4'}")
    if output.exists() and not output.is_file():
        raise ConfigError(f"{output} is not a file that could be replaced")
    if not output.parent.is_dir():
        raise ConfigError(f"there is no folder {output.parent} to write {output.name} to")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"the folder {output.parent} cannot be written to")
    return output


if __name__ == "__main__":
    sys.exit(main())

"""One row of the results: load, measure, count, write.

JSON of a row: row, name, command, date, machine, versions, request, load_average, cold_start (or null), load_s,
ceilings, work (per stage: flop, num_bytes, floor_ms), contestants (per name: stages_ms, total_ms and cpu_ms as spreads,
device_ms and memory_bytes as spreads or null, held_bytes or null, num_forwards), lossy (per variant: latents and
psnr_db, one number per seed, execution, attention), ratios (per opponent and stage, of
pairs), pairs (raw), operators (per name: calls, top), left_out (sentences), picture, seconds.
"""

import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from codmd_serve import __version__
from codmd_serve.bench.against import BenchRun, Measurements, against
from codmd_serve.bench.cold import measure_cold_start
from codmd_serve.bench.contestants import (
    Ours,
)
from codmd_serve.bench.floor import Ceilings, Work, measure_ceilings, text_work, transformer_work, vae_work
from codmd_serve.bench.options import BenchConfig
from codmd_serve.bench.report import Row, document, serving_lines, short_table
from codmd_serve.bench.roofline import Point, draw_roofline
from codmd_serve.bench.serving import measure_serving
from codmd_serve.bench.trials import (
    Pair,
    Spread,
    spread_of,
)
from codmd_serve.bench.weights import PROMPTS, random_bundle
from codmd_serve.config import DEFAULT_CRF, GenerateParams
from codmd_serve.cpu import processor_name
from codmd_serve.device import DTYPES_BY_NAME, choose_device, choose_dtype
from codmd_serve.engine import Engine
from codmd_serve.errors import CodmdError, ConfigError
from codmd_serve.files import first_line, write_json, write_text
from codmd_serve.loading import load_engine
from codmd_serve.stages import STAGES
from codmd_serve.textfiles import read_json_object
from codmd_serve.wan.checkpoint import read_spec, resolve_base
from codmd_serve.wan.vae import latent_shape

# A machine whose run queue is this much longer than its cores is doing something else.
BUSY_LOAD = 0.5


def measure_row(config: BenchConfig, folder: Path, command: str) -> str:
    """Measure, write `performance-ROW.json`, `performance-ROW.png` and `performance.md`; return the short table.

    Args:
        config: what to measure.
        folder: exists and can be written to.
        command: as it is to be published.

    Raises:
        CodmdError: what cannot be measured here; no row is written then. What had been found until then stands in
            `numbers-ROW.jsonl`, line by line, as it does when the process is killed.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    name = config.random_weights or Path(config.bundle).resolve().name
    shape = "x".join(str(size) for size in (config.width, config.height, config.num_frames) if size)
    kind = "lossy" if config.against == "lossy" else ""
    row_name = "-".join(word for word in (name, device.type, shape, kind) if word)
    file = folder / f"performance-{row_name}.json"
    if config.serving:
        file = folder / f"serving-{row_name}.json"
    shown = serving_lines if config.serving else short_table
    if config.resume and _is_current(file, device):
        return _text(shown(read_json_object(file, ConfigError)))
    with tempfile.TemporaryDirectory(prefix="codmd-bench-") as temporary:
        numbers = folder / f"numbers-{row_name}.jsonl"
        numbers.unlink(missing_ok=True)
        run = BenchRun(config, device, dtype, Path(temporary), numbers)
        with _bundle(run) as bundle:
            row = _served(run, bundle, folder / config.timeline) if config.serving else _measured(run, bundle)
    row |= {"row": row_name, "name": name, "command": command}
    if not config.serving:
        row["picture"] = file.with_suffix(".png").name
        _draw(folder / row["picture"], row)
    write_json(file, row, indent=None if config.serving else 1)
    numbers.unlink(missing_ok=True)  # the row has them all
    rows, serving = (
        [read_json_object(other, ConfigError) for other in sorted(folder.glob(f"{kind}-*.json"))]
        for kind in ("performance", "serving")
    )
    write_text(folder / "performance.md", document(rows, serving))
    return _text(shown(row))


def _text(shown: str | list[str]) -> str:
    return shown if isinstance(shown, str) else "\n".join(shown)


def _served(run: BenchRun, bundle: Path, timeline: Path) -> Row:
    """Measure a row of `serving-ROW.json`."""
    date = datetime.now(UTC)
    engine = load_engine(bundle, str(run.device), run.config.dtype)
    run.dtype = DTYPES_BY_NAME[engine.facts.dtype]
    params = _params(run.config, engine)
    measured = measure_serving(engine, bundle if run.config.cold_start else None, params, run.config.pairs, timeline)
    run.look_at_load()
    return {
        "date": date.strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(run, run.loads[0]),
        "versions": _versions(),
        "load_average": {"before": run.loads[0], "highest": max(run.loads)},
        "request": {"text": f"{params.width}x{params.height}, {params.num_frames} frames"},
        **measured,
        "seconds": run.seconds(),
    }


def _is_current(file: Path, device: torch.device) -> bool:
    if not file.is_file():
        return False
    row = read_json_object(file, ConfigError)
    return bool(row["versions"] == _versions() and row["machine"]["device"] == _device_name(device))


@contextmanager
def _bundle(run: BenchRun) -> Iterator[Path]:
    if not run.config.random_weights:
        yield Path(run.config.bundle)
        return
    work = Path(run.config.work) if run.config.work else run.folder
    work.mkdir(parents=True, exist_ok=True)
    with random_bundle(run.config.random_weights, work, run.device, run.dtype) as bundle:
        yield bundle


def _measured(run: BenchRun, bundle: Path) -> Row:
    spec, versions = read_spec(bundle), _versions()
    date = datetime.now(UTC)
    cold = None
    if run.config.cold_start:
        base = resolve_base(bundle, spec.base)
        parts = [base / "text_encoder", base / "vae"]
        timeout_s = max(60.0, float(run.config.limit_s))
        try:
            folders = [bundle / "transformer", *parts]
            cold = measure_cold_start(bundle, folders, run.device, run.config.dtype, timeout_s)
            run.tell("cold_start", **asdict(cold))
        except (CodmdError, OSError) as error:  # of a machine without the server's packages, too
            run.left_out.append(f"the cold start: {first_line(error)}")
    held = _held_bytes(run.device)
    engine = load_engine(bundle, str(run.device), run.config.dtype)
    run.dtype = DTYPES_BY_NAME[engine.facts.dtype]
    held = None if held is None else (_held_bytes(run.device) or 0) - held
    params, facts = _params(run.config, engine), engine.facts
    run.tell("load", load_s=facts.load_s, execution=facts.execution, attention=facts.attention, vae=facts.vae_dtype)
    ours = Ours(engine)
    ceilings = measure_ceilings(run.device, run.dtype)
    run.tell("ceilings", **asdict(ceilings))
    work = _work(engine, params, run.dtype)
    del engine  # or it could not make room for an opponent
    measured = against(run, bundle, ours, params)
    ceilings = ceilings.best(measure_ceilings(run.device, run.dtype))
    run.look_at_load()
    load = {"before": run.loads[0], "highest": max(run.loads)}
    size = f"{params.width}x{params.height}, {params.num_frames} frames"
    return {
        "date": date.strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(run, load["before"]),
        "versions": versions,
        "request": {
            **{name: getattr(params, name) for name in ("height", "width", "num_frames", "fps", "crf")},
            "dtype": str(run.dtype).removeprefix("torch."),
            "num_steps": ours.num_forwards,
            "execution": facts.execution,
            "attention": facts.attention,
            "vae_dtype": facts.vae_dtype,
            "diffusers_dtype": measured.stock_dtype,
            "fallback": facts.fallback,
            "text": f"{size}, {ours.num_forwards} steps, {str(run.dtype).removeprefix('torch.')}, text to mp4",
        },
        "load_average": load,
        "cold_start": None if cold is None else asdict(cold),
        "load_s": facts.load_s,
        "ceilings": asdict(ceilings),
        "work": {stage: {**asdict(entry), "floor_ms": 1000 * ceilings.floor_s(entry)} for stage, entry in work.items()},
        **_summed_up(measured, held),
        "left_out": run.left_out,
        "seconds": run.seconds(),
    }


def _summed_up(found: Measurements, held_bytes: int | None) -> Row:
    contestants = {}
    for name, trials in found.trials.items():
        device_ms = [trial.device_ms for trial in trials if trial.device_ms is not None]
        memory = [float(trial.memory_bytes) for trial in trials if trial.memory_bytes is not None]
        contestants[name] = {
            "num_forwards": found.contestants[name].num_forwards,
            "stages_ms": {stage: _spread([trial.stages_ms[stage] for trial in trials]) for stage in STAGES},
            "total_ms": _spread([trial.total_ms for trial in trials]),
            "cpu_ms": _spread([trial.cpu_ms for trial in trials]),
            "device_ms": _spread(device_ms) if device_ms else None,
            "memory_bytes": _spread(memory) if memory else None,
            "held_bytes": held_bytes if name == "ours" else None,
        }
    return {
        "contestants": contestants,
        "ratios": {name: _ratios(pairs) for name, pairs in found.pairs.items()},
        "pairs": {name: [asdict(pair) for pair in pairs] for name, pairs in found.pairs.items()},
        "operators": {name: asdict(count) for name, count in found.operators.items()},
        "lossy": found.lossy,
    }


def _ratios(pairs: Sequence[Pair]) -> Row:
    ratios: Row = {"total": _spread([pair.ratio for pair in pairs])}
    ratios["cpu"] = _spread([pair.other.cpu_ms / pair.ours.cpu_ms for pair in pairs])
    for stage in STAGES:
        both = [(pair.other.stages_ms[stage], pair.ours.stages_ms[stage]) for pair in pairs]
        ratios[stage] = _spread([other / ours for other, ours in both]) if all(ours for _, ours in both) else None
    return ratios


def _spread(values: Sequence[float]) -> Row:
    spread: Spread = spread_of(values)
    return {**asdict(spread), "relative": spread.relative}


def _params(config: BenchConfig, engine: Engine) -> GenerateParams:
    facts = engine.facts
    height, width = config.height or facts.height, config.width or facts.width
    num_frames = config.num_frames or facts.num_frames
    if height % facts.size_multiple or width % facts.size_multiple or (num_frames - 1) % facts.frame_multiple:
        raise ConfigError(
            f"{facts.name} needs height and width that are multiples of {facts.size_multiple} and "
            f"{facts.frame_multiple}k + 1 frames, got {height}, {width} and {num_frames}"
        )
    return GenerateParams(
        prompt=PROMPTS[0], seed=0, height=height, width=width, num_frames=num_frames, fps=facts.fps, crf=DEFAULT_CRF
    )


def _work(engine: Engine, params: GenerateParams, dtype: torch.dtype) -> dict[str, Work]:
    vae, text_encoder = engine.bundle.vae, engine.bundle.text_encoder
    latents = latent_shape(vae, params.height, params.width, params.num_frames)
    one = transformer_work(engine.transformer.config, latents, dtype)
    return {
        "text": text_work(text_encoder.config, dtype),
        "denoise": one.times(len(engine.bundle.spec.timesteps)),
        "decode": vae_work(vae.config, latents, engine.decoder.dtype),
    }


def _held_bytes(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _machine(run: BenchRun, load: float) -> Row:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor = processor_name()
    device, threads = _device_name(run.device), torch.get_num_threads()
    on = "" if device == "cpu" else f"{device}, "
    return {
        "device": device,
        "processor": processor,
        "cores": cores,
        "threads": threads,
        "is_busy": load > BUSY_LOAD * cores,
        "text": f"{on}{processor}, {cores} cores, torch threads: {threads}, {platform.system()}",
    }


def _versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers")
    return {
        "codmd-serve": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "CUDA": torch.version.cuda or "",
    }


def _commit() -> str:
    """Return the commit of this checkout; empty outside one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _draw(path: Path, row: Row) -> None:
    points = []
    for name, entry in row["contestants"].items():
        if name == "teacher" or name in row["lossy"]:  # other work than what was counted, or at another rate
            continue
        for stage, work in row["work"].items():
            seconds = entry["stages_ms"][stage]["median"] / 1000
            points.append(Point(name, stage, work["flop"] / work["num_bytes"], work["flop"] / seconds))
    ceilings = Ceilings(**row["ceilings"])
    title = f"{row['row']}, {row['machine']['device']}, {row['request']['dtype']}"
    draw_roofline(path, title, ceilings.flop_per_s, ceilings.bytes_per_s, points)

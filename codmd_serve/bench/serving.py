"""Measures the overhead of HTTP over the bare engine, and the gain from overlapping jobs.

JSON of `serving-ROW.json`: row, name, command, date, machine, versions, load_average, request; server (or null):
latency and saturation, ratios of the server's time to the engine's, and own_ms, what a request took beyond its stages
by the server's own account, all as spreads; overlap: ratio of the time in a row to the time overlapped, num_jobs;
timeline: picture, encode_beside_ms, spans per request; seconds.
"""

import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from codmd_serve.bench.cold import running_server
from codmd_serve.bench.mlperf import in_mlperf_form
from codmd_serve.bench.report import Row
from codmd_serve.bench.timeline import draw_timeline, overlap_s
from codmd_serve.bench.trials import requests, spread_of
from codmd_serve.bench.weights import PROMPTS
from codmd_serve.config import GenerateParams
from codmd_serve.device import DTYPES_BY_NAME
from codmd_serve.engine import Engine, GenerateResult

NUM_JOBS = 8  # at once: fewer than a server's queue takes
NUM_DRAWN = 3
BLOCKS_PER_PAIR = 5  # eight requests cost as much as eight


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request: the mp4, total milliseconds, and milliseconds per server stage."""

    video: bytes
    total_ms: float
    stages_ms: dict[str, float]


def measure_serving(engine: Engine, bundle: Path | None, params: GenerateParams, pairs: int, timeline: Path) -> Row:
    """Measure server, overlap and timeline of one bundle.

    Args:
        engine: warm; the bare one.
        bundle: to serve beside it; None leaves the server out.
        params: of which prompt and seed change.
        pairs: of single requests, in turns; of blocks of eight there are a fifth as many, at least two.
        timeline: PNG to write.

    Raises:
        GenerationError: the server did not start; code cold_start.
    """
    asked = requests(params, PROMPTS)
    device, dtype = engine.transformer.device, DTYPES_BY_NAME[engine.facts.dtype]
    num_blocks = max(2, pairs // BLOCKS_PER_PAIR)
    with tempfile.TemporaryDirectory(prefix="codmd-bench-") as temporary:
        folder = Path(temporary)
        engine.generate(next(asked), folder / "warm.mp4")
        server, mlperf = None, {}
        if bundle is not None:
            with running_server(bundle, device, dtype, timeout_s=600.0) as address:
                server, mlperf["server"] = measure_server(engine, address, asked, folder, pairs, num_blocks)
        jobs = [next(asked) for _ in range(pairs)]
        single_ms = [_timed_ms(lambda job=job: engine.generate(job, folder / "a.mp4")) for job in jobs]  # type: ignore[misc]
        overlap, blocks_ms = measure_overlap(engine, asked, folder, num_blocks)
        mlperf["engine"] = in_mlperf_form(single_ms, blocks_ms, NUM_JOBS)
        results = run_overlapped(engine, [next(asked) for _ in range(NUM_DRAWN)], folder)
    spans = [[(span.stage, span.start_s, span.end_s) for span in result.spans] for result in results]
    draw_timeline(timeline, f"{engine.facts.name}, {engine.facts.device}: three requests in the queue", spans)
    beside_ms = 1000 * overlap_s(spans)
    return {
        "server": server,
        "overlap": overlap,
        "mlperf": mlperf,
        "timeline": {"picture": timeline.name, "encode_beside_ms": beside_ms, "spans": spans},
    }


def measure_server(
    engine: Engine, address: str, asked: Iterator[GenerateParams], folder: Path, pairs: int, blocks: int
) -> tuple[Row, Row]:
    """Time requests over HTTP and on the bare engine in alternation: one by one, and eight at once.

    Args:
        engine: the bare one.
        address: of a server of the same bundle.
        asked: requests.
        folder: for videos.
        pairs: single requests of each.
        blocks: of eight requests of each.

    Returns:
        `latency` and `saturation` (ratios of times, server / engine) and `own_ms`, as spreads; and the server's own
        times in MLPerf's form.
    """
    ask(address, next(asked))
    latency, own_ms, single_ms = [], [], []
    for _ in range(pairs):
        params = next(asked)
        answer = ask(address, params)
        engine_ms = _timed_ms(lambda params=params: engine.generate(params, folder / "a.mp4"))  # type: ignore[misc]
        latency.append(answer.total_ms / engine_ms)
        single_ms.append(answer.total_ms)
        own_ms.append(answer.total_ms - sum(ms for stage, ms in answer.stages_ms.items() if stage != "queue"))
    saturation, blocks_ms = [], []
    with ThreadPoolExecutor(NUM_JOBS) as clients:
        for _ in range(blocks):
            jobs = [next(asked) for _ in range(NUM_JOBS)]
            server_ms = _timed_ms(lambda jobs=jobs: list(clients.map(lambda job: ask(address, job), jobs)))  # type: ignore[misc]
            engine_ms = _timed_ms(lambda jobs=jobs: run_in_a_row(engine, jobs, folder))  # type: ignore[misc]
            saturation.append(server_ms / engine_ms)
            blocks_ms.append(server_ms)
    named = {"latency": latency, "saturation": saturation, "own_ms": own_ms}
    spreads = {name: asdict(spread_of(values)) for name, values in named.items()}
    return spreads, in_mlperf_form(single_ms, blocks_ms, NUM_JOBS)


def measure_overlap(
    engine: Engine, asked: Iterator[GenerateParams], folder: Path, blocks: int
) -> tuple[Row, list[float]]:
    """Time eight queued requests in sequence and overlapped; a ratio above 1 means that overlap is quicker.

    Returns:
        The ratio as a spread, and the milliseconds of each overlapped block.
    """
    ratios, blocks_ms = [], []
    for _ in range(blocks):
        jobs = [next(asked) for _ in range(NUM_JOBS)]
        in_a_row_ms = _timed_ms(lambda jobs=jobs: run_in_a_row(engine, jobs, folder))  # type: ignore[misc]
        overlapped_ms = _timed_ms(lambda jobs=jobs: run_overlapped(engine, jobs, folder))  # type: ignore[misc]
        ratios.append(in_a_row_ms / overlapped_ms)
        blocks_ms.append(overlapped_ms)
    return {"ratio": asdict(spread_of(ratios)), "num_jobs": NUM_JOBS}, blocks_ms


def run_in_a_row(engine: Engine, jobs: Sequence[GenerateParams], folder: Path) -> list[GenerateResult]:
    """Make videos one after the other, as FOLDER/0.mp4 and so on."""
    return [engine.generate(params, folder / f"{number}.mp4") for number, params in enumerate(jobs)]


def run_overlapped(engine: Engine, jobs: Sequence[GenerateParams], folder: Path) -> list[GenerateResult]:
    """Make the same videos as a worker with several jobs in flight does."""
    with ThreadPoolExecutor(max_workers=1) as ahead:

        def begin(number: int, params: GenerateParams) -> "Future[GenerateResult]":
            def on_progress(stage: str, _done: int, _total: int) -> None:
                if stage == "text" and number + 1 < len(jobs):
                    ahead.submit(engine.prepare, jobs[number + 1].prompt)

            return engine.begin(params, folder / f"{number}.mp4", on_progress)

        videos = [begin(number, params) for number, params in enumerate(jobs)]
        return [video.result() for video in videos]


def ask(address: str, params: GenerateParams) -> Answer:
    """Send one request to a server and wait for its video.

    Raises:
        urllib.error.URLError: no answer, or one that is no video.
    """
    body = json.dumps(params.to_dict()).encode()
    # no-cache: an equal request would be answered from the store.
    headers = {"content-type": "application/json", "cache-control": "no-cache"}
    request = urllib.request.Request(f"{address}/generate", body, headers)
    # A proxy of the environment must not answer for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    start_s = time.perf_counter()
    with opener.open(request) as answer:
        video = answer.read()
        total_ms = 1000 * (time.perf_counter() - start_s)
        timing = answer.headers["Server-Timing"]
    pairs = (entry.split(";dur=") for entry in timing.split(", "))
    return Answer(video, total_ms, {stage: float(value) for stage, value in pairs})


def _timed_ms(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start_s)

"""Prometheus metrics of a server or of a worker machine. Labels hold no prompt, no id and no key."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from codmd_serve import __version__
from codmd_serve.errors import ConfigError
from codmd_serve.jobs.leases import Finished
from codmd_serve.jobs.states import Job

if TYPE_CHECKING:
    from codmd_serve.dispatcher import Dispatcher

# From the embedded student on a CPU (a stage of 20 ms) to 14B on one GPU behind a long queue.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)
JOB_STAGES = ("queue", "text", "denoise", "decode", "encode")
CONTENT_TYPE = CONTENT_TYPE_LATEST
# Every reason for which a worker is replaced; known ones are exported as 0 before they happen, so that a rate sees the
# first one.
RESTART_REASONS = ("died", "silent", "stalled", "deadline", "cancel_timeout", "device_error", "load")
BYTES_PER_MB = 2**20

Queue = tuple[int, int, float]


class Metrics:
    """All metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        Info("codmd_build", "Version of the package", registry=of).info({"version": __version__})
        ProcessCollector(registry=of)  # memory, CPU time, descriptors; not of the workers
        text = "Jobs that ended here, by outcome and error code"
        self.jobs = Counter("codmd_jobs", text, ["status", "code"], registry=of)
        text = "Jobs taken, by where the video comes from: engine, store (a cache hit), replay (an Idempotency-Key)"
        self.submissions = Counter("codmd_submissions", text, ["source"], registry=of)
        self.errors = Counter("codmd_errors", "Answers that were an error, by code", ["code"], registry=of)
        text = "Time of a stage; queue is the wait"
        self.stages = Histogram("codmd_stage_seconds", text, ["stage"], buckets=SECONDS, registry=of)
        text = "From acceptance to the finished video"
        self.total = Histogram("codmd_job_seconds", text, buckets=SECONDS, registry=of)
        self.peak_memory_mb = 0.0
        self.jobs.labels("completed", "")
        for source in ("engine", "store", "replay"):
            self.submissions.labels(source)
        for stage in JOB_STAGES:
            self.stages.labels(stage)

    def submitted(self, job: Job, is_new: bool) -> None:
        """Count a job that was taken."""
        self.submissions.labels("replay" if not is_new else "store" if job.is_reused else "engine").inc()

    def refused(self, code: str) -> None:
        """Count an answer that was an error."""
        self.errors.labels(code).inc()

    def finished(self, job: Job, finished: Finished) -> None:
        """Count a job that ended in this process."""
        self.jobs.labels(finished.status, finished.error_code).inc()
        for stage in JOB_STAGES:
            if stage in finished.timings_ms:
                self.stages.labels(stage).observe(finished.timings_ms[stage] / 1000)
        if finished.timings_ms:
            self.total.observe(sum(finished.timings_ms.values()) / 1000)
        self.peak_memory_mb = finished.peak_memory_mb or self.peak_memory_mb

    def watch(
        self,
        queue: Callable[[], Queue | None],
        is_ready: Callable[[], bool],
        dispatcher: "Dispatcher | None",
        queue_size: int,
        num_unserved: Callable[[], int] | None = None,
    ) -> None:
        """Add what is read when somebody asks.

        Args:
            queue: jobs that wait, jobs that run, seconds that the oldest waits; None while the store does not answer.
            is_ready: whether a job would begin as soon as a worker is free.
            dispatcher: of this process; None for an API alone.
            queue_size: jobs that may wait.
            num_unserved: jobs that wait for a bundle that no live worker serves; None where that is not known.
        """
        self.registry.register(_Live(self, queue, is_ready, dispatcher, queue_size, num_unserved))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def serve_metrics(metrics: Metrics, host: str, port: int) -> Callable[[], None]:
    """Answer GET on any path with the metrics, from a thread; return what stops that.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} for metrics: {error.strerror}; choose another with --metrics-port"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


class _Live(Collector):
    def __init__(
        self,
        metrics: Metrics,
        queue: Callable[[], Queue | None],
        is_ready: Callable[[], bool],
        dispatcher: "Dispatcher | None",
        queue_size: int,
        num_unserved: Callable[[], int] | None,
    ) -> None:
        self.metrics, self.queue, self.is_ready, self.dispatcher = metrics, queue, is_ready, dispatcher
        self.queue_size, self.num_unserved = queue_size, num_unserved

    def collect(self) -> Iterable[Metric]:
        yield _gauge("codmd_ready", "Whether a job would begin as soon as a worker is free", self.is_ready())
        queue = self.queue()
        yield _gauge("codmd_store_up", "Whether the job store answers", queue is not None)
        if queue is not None:
            num_waiting, num_running, age_s = queue
            yield _gauge("codmd_queue_depth", "Jobs that wait, of all machines", num_waiting)
            yield _gauge("codmd_queue_age_seconds", "How long the oldest of them waits", age_s)
            yield _gauge("codmd_running", "Jobs that run, of all machines", num_running)
        if self.num_unserved is not None:
            text = "Jobs that wait for a bundle that no live worker serves"
            yield _gauge("codmd_unserved", text, self.num_unserved())
        yield _gauge("codmd_queue_limit", "Jobs that may wait before more are refused", self.queue_size)
        if self.dispatcher is not None:
            yield from self._of_workers(self.dispatcher)

    def _of_workers(self, dispatcher: "Dispatcher") -> Iterable[Metric]:
        runner: Any = dispatcher.runner
        yield _gauge("codmd_workers", "Workers that are warm", runner.num_workers)
        yield _gauge("codmd_workers_hanging", "Warm workers without progress, about to be replaced", runner.num_hanging)
        yield _gauge("codmd_jobs_in_flight", "Jobs in flight on the workers of this process", dispatcher.num_running)
        text = "Whether no job is started because videos cannot be kept"
        yield _gauge("codmd_storage_blocked", text, bool(dispatcher.blocked))
        text = "Peak memory of the last job: allocated on the device, or resident in the worker on a CPU"
        yield _gauge("codmd_job_peak_memory_bytes", text, self.metrics.peak_memory_mb * BYTES_PER_MB)
        restarts = CounterMetricFamily("codmd_worker_restarts", "Workers replaced, by reason", labels=["reason"])
        numbers = dict.fromkeys(RESTART_REASONS, 0) | dict(getattr(runner, "restarts", {}))
        for reason, number in numbers.items():
            restarts.add_metric([reason], number)
        yield restarts
        facts = runner.facts
        labels = ["model", "device", "execution", "attention", "dtype", "lossy", "fallback"]
        info = GaugeMetricFamily("codmd_execution_info", "How the model runs", labels=labels)
        if facts is not None:
            kinds = [facts.name, facts.device, facts.execution, facts.attention, facts.dtype, facts.lossy]
            info.add_metric([*kinds, str(bool(facts.fallback)).lower()], 1)
            yield _gauge("codmd_model_load_seconds", "From the start of a worker to warm", facts.load_s)
            text = "What a video takes that is as large as the model was trained at"
            yield _gauge("codmd_native_video_seconds", text, facts.service_s)
        yield info


def _gauge(name: str, text: str, value: float) -> Metric:
    gauge = GaugeMetricFamily(name, text)
    gauge.add_metric([], float(value))
    return gauge

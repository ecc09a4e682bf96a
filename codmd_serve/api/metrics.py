"""Prometheus metrics. Labels hold no prompt, no id and no key."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from codmd_serve.jobs.leases import Finished
from codmd_serve.jobs.states import Job

if TYPE_CHECKING:
    from codmd_serve.api.backend import Backend

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
JOB_STAGES = ("queue", "text", "denoise", "decode", "encode")
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """All metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        text = "Jobs that ended here, by outcome and error code"
        self.jobs = Counter("codmd_jobs", text, ["status", "code"], registry=of)
        text = "Jobs taken, by where the video comes from"
        self.submissions = Counter("codmd_submissions", text, ["source"], registry=of)
        text = "Time of a stage; queue is the wait"
        self.stages = Histogram("codmd_stage_seconds", text, ["stage"], buckets=SECONDS, registry=of)
        text = "From acceptance to the finished video"
        self.total = Histogram("codmd_job_seconds", text, buckets=SECONDS, registry=of)
        self.peak_memory_mb = 0.0

    def submitted(self, job: Job, is_new: bool) -> None:
        """Count a job that was taken."""
        self.submissions.labels("replay" if not is_new else "store" if job.is_reused else "engine").inc()

    def finished(self, job: Job, finished: Finished) -> None:
        """Count a job that ended in this process."""
        self.jobs.labels(finished.status, finished.error_code).inc()
        for stage in JOB_STAGES:
            if stage in finished.timings_ms:
                self.stages.labels(stage).observe(finished.timings_ms[stage] / 1000)
        if finished.timings_ms:
            self.total.observe(sum(finished.timings_ms.values()) / 1000)
        self.peak_memory_mb = finished.peak_memory_mb or self.peak_memory_mb

    def watch(self, backend: "Backend") -> None:
        """Add what is read when somebody asks."""
        self.registry.register(_Live(self, backend))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Live(Collector):
    def __init__(self, metrics: Metrics, backend: "Backend") -> None:
        self.metrics = metrics
        self.backend = backend

    def collect(self) -> Iterable[Metric]:
        backend = self.backend
        num_waiting, num_running, age_s = backend.queue
        gauges = {
            "codmd_queue_depth": ("Jobs that wait", num_waiting),
            "codmd_queue_age_seconds": ("How long the oldest of them waits", age_s),
            "codmd_running": ("Jobs that run", num_running),
            "codmd_ready": ("Whether a job would begin as soon as a worker is free", float(backend.is_ready)),
            "codmd_peak_memory_megabytes": ("Peak memory of the last job", self.metrics.peak_memory_mb),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text)
            gauge.add_metric([], value)
            yield gauge
        if backend.dispatcher is None:
            return
        runner = backend.dispatcher.runner
        workers = GaugeMetricFamily("codmd_workers", "Workers that are warm")
        workers.add_metric([], runner.num_workers)
        yield workers
        restarts = CounterMetricFamily("codmd_worker_restarts", "Workers replaced, by reason", labels=["reason"])
        for reason, number in getattr(runner, "restarts", {}).items():
            restarts.add_metric([reason], number)
        yield restarts
        if runner.facts is not None:
            facts = runner.facts
            labels = ["execution", "attention", "dtype", "lossy", "fallback"]
            info = GaugeMetricFamily("codmd_execution_info", "How the model runs", labels=labels)
            info.add_metric([facts.execution, facts.attention, facts.dtype, facts.lossy, str(bool(facts.fallback))], 1)
            yield info

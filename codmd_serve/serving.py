"""Assembles a server: store, results, dispatcher, API. Knows no command line and no web page.

DATA/jobs.sqlite3       the jobs, unless --store says otherwise
DATA/results/           the videos, unless --results says otherwise
DATA/spool/             videos in the making; what a killed process left is swept at the next start
DATA/dispatchers/       a lock file of each running process
DATA/page/              temporary files of the page
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codmd_serve.api.backend import Backend, Own, describe_bundle
from codmd_serve.api.metrics import Metrics, Queue, serve_metrics
from codmd_serve.api.webhooks import Webhooks, read_secret
from codmd_serve.config import ModelFacts, ServeConfig
from codmd_serve.dispatcher import Dispatcher, Runner
from codmd_serve.errors import CodmdError, ConfigError
from codmd_serve.jobs.database import Database, open_database
from codmd_serve.jobs.events import EventHub
from codmd_serve.jobs.leases import Leases
from codmd_serve.jobs.listener import Listener
from codmd_serve.jobs.ownership import Ownership
from codmd_serve.jobs.results import ResultStore
from codmd_serve.jobs.store import JobStore
from codmd_serve.pool import WorkerPool
from codmd_serve.worker_process import WORKER_COMMAND, WorkerProcess

# Answers to waiting clients are on their way when the workers have been stopped.
LAST_ANSWERS_S = 10

OnReady = Callable[[ModelFacts], None]
OnFatal = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """An open store with its results, events and database."""

    database: Database
    results: ResultStore
    hub: EventHub
    metrics: Metrics

    @classmethod
    def open(cls, config: ServeConfig) -> "Parts":
        """Open what `config` names.

        Raises:
            StoreError, ConfigError: in one sentence; nothing was changed.
        """
        data = Path(config.data)
        results = ResultStore(config.results or str(data / "results"))
        database = open_database(config.store or str(data / "jobs.sqlite3"))
        return cls(database, results, EventHub(), Metrics())


def make_dispatcher(
    config: ServeConfig,
    parts: Parts,
    own: Own,
    runner: Runner,
) -> Dispatcher:
    """Make a dispatcher of the bundle `own` on an open store."""
    ownership = Ownership(Path(config.data))
    webhooks = Webhooks(config, read_secret(config))
    leases = Leases(
        parts.database,
        ownership.owner,
        own.bundle,
        own.name,
        own.engine_key,
        float(config.lease_s),
        config.max_attempts,
        config.teacher,
    )
    store = JobStore(parts.database, 3600.0 * config.result_hours)
    deliver = webhooks.deliver if config.webhook_hosts else None
    return Dispatcher(
        config, store, leases, parts.results, ownership, runner, parts.hub, deliver, parts.metrics.finished
    )


def make_backend(
    config: ServeConfig,
    on_ready: OnReady | None = None,
    on_fatal: OnFatal | None = None,
    command: Sequence[str] = WORKER_COMMAND,
    spare: WorkerProcess | None = None,
) -> tuple[Backend, Metrics]:
    """Make the store, the API and, unless `workers` is 0, the dispatcher of one process.

    Args:
        config: everything.
        on_ready: called with the facts when the first worker is warm.
        on_fatal: called with one sentence when the first worker cannot load.
        command: starts a worker; tests have one of their own.
        spare: the first worker, where it was started already.

    Raises:
        StoreError, ConfigError: in one sentence.
    """
    parts = Parts.open(config)
    own = dispatcher = None
    try:
        if config.workers != "0":
            own = describe_bundle(config)
            pool = WorkerPool(config, command, on_ready, on_fatal, spare=spare)
            dispatcher = make_dispatcher(config, parts, own, pool)
    except BaseException:
        parts.database.close()
        raise
    return Backend(config, parts.database, parts.results, parts.hub, own, dispatcher), parts.metrics


def make_server(app: Any, backend: Backend) -> Any:
    """Make a uvicorn server of `app` that drains `backend` before it closes its sockets."""
    import uvicorn

    from codmd_serve.api.connections import connection_limit, guarded_protocol

    config = backend.config

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # The sockets stay open meanwhile: /ready says 503, new jobs are told why, running ones are answered.
            draining = asyncio.create_task(backend.drain(float(config.drain_timeout_s)))
            while not draining.done() and not self.force_exit:
                await asyncio.wait((draining,), timeout=0.1)
            if app.state.page is not None:
                app.state.page.close()
            await super().shutdown(sockets)
            if draining.done():
                draining.result()
            # uvicorn would raise SIGTERM again at the end; a server that did what it was told ends with 0.
            self._captured_signals = [number for number in self._captured_signals if number != signal.SIGTERM]

    limit = connection_limit(config.max_connections)
    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http=guarded_protocol(limit, float(config.header_timeout_s)),
            ws="none",
            timeout_graceful_shutdown=LAST_ANSWERS_S,
            lifespan="on",
        )
    )


async def run_worker(
    config: ServeConfig,
    on_ready: OnReady,
    command: Sequence[str] = WORKER_COMMAND,
    spare: WorkerProcess | None = None,
) -> None:
    """Run a dispatcher without HTTP, until SIGTERM or SIGINT; arguments as of `make_backend`.

    Raises:
        ConfigError: the first worker cannot load.
        StoreError: in one sentence.
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    fatal: list[str] = []

    def on_fatal(message: str) -> None:
        fatal.append(message)
        stopping.set()

    parts = Parts.open(config)
    stop_metrics: Callable[[], None] | None = None
    try:
        pool = WorkerPool(config, command, on_ready, on_fatal, spare=spare)
        dispatcher = make_dispatcher(config, parts, describe_bundle(config), pool)
        if config.metrics_port:
            parts.metrics.watch(_queue_of(dispatcher.store), lambda: dispatcher.is_ready, dispatcher, config.queue_size)
            stop_metrics = serve_metrics(parts.metrics, config.host, config.metrics_port)
        listener = Listener(parts.database, parts.hub, _on_notification(dispatcher))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        listener.start()
        await dispatcher.start()
        await stopping.wait()
        await dispatcher.stop(float(config.drain_timeout_s))
        await asyncio.to_thread(listener.stop)
    finally:
        if stop_metrics is not None:
            await asyncio.to_thread(stop_metrics)
        with contextlib.suppress(Exception):
            parts.database.close()
    if fatal:
        raise ConfigError(fatal[0])


def _queue_of(store: JobStore) -> Callable[[], Queue | None]:
    def queue() -> Queue | None:
        try:
            return store.queue()
        except CodmdError:
            return None

    return queue


def _on_notification(dispatcher: Dispatcher) -> Callable[[str, str], None]:
    def on_change(job_id: str, status: str) -> None:
        if status == "cancel":
            dispatcher.cancel(job_id)
        elif status == "queued":
            dispatcher.wake()

    return on_change

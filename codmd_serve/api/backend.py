"""What the routes have in common: models, submitting, waiting, cancelling. Knows the store, and HTTP only by errors.

Lives on one event loop. Calls of the store run in threads.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from codmd_serve import __version__
from codmd_serve.bundle import bundle_hash, declared_facts
from codmd_serve.config import ENGINE_SETTINGS, NEUTRAL_SETTINGS, ModelFacts, ServeConfig
from codmd_serve.dispatcher import Dispatcher
from codmd_serve.errors import CodmdError, GenerationError, InvalidRequestError, StorageFullError
from codmd_serve.jobs.database import Database
from codmd_serve.jobs.events import KEPT_WHEN_FINAL_S, EventHub
from codmd_serve.jobs.leases import Leases
from codmd_serve.jobs.listener import Listener
from codmd_serve.jobs.results import ResultStore
from codmd_serve.jobs.rows import content_key
from codmd_serve.jobs.states import CANCELLED, FAILED, Job, NewJob
from codmd_serve.jobs.store import JobStore, QueueLimits, ServedModel

REFRESH_S = 1.0
SWEEP_S = 30.0
POLL_S = 1.0
CANCEL_GRACE_S = 5.0
# A client that said it is gone, and reloads its page, follows its job again within this time.
LEAVE_GRACE_S = 5.0

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Own:
    """The bundle that this process serves itself.

    Attributes:
        bundle: hash of it.
        name: of the model, until the engine tells it.
        engine_key: see store.ServedModel.
        facts: declared by the bundle; None when it does not say.
    """

    bundle: str
    name: str
    engine_key: str
    facts: ModelFacts | None


def engine_key(config: ServeConfig) -> str:
    """Hash of what decides the bytes of a video besides bundle and request: version and settings of the engine."""
    settings = {name: getattr(config, name) for name in ENGINE_SETTINGS if name not in NEUTRAL_SETTINGS}
    return hashlib.sha256(json.dumps([__version__, settings], sort_keys=True).encode()).hexdigest()


def describe_bundle(config: ServeConfig) -> Own:
    """Hash and facts of the bundle that `config` names; a broken one is left to the worker to explain."""
    bundle = Path(config.bundle)
    try:
        name_of_content = bundle_hash(bundle)
    except OSError as error:
        logger.warning("bundle cannot be read: %s", error)
        name_of_content = hashlib.sha256(config.bundle.encode()).hexdigest()
    return Own(name_of_content, bundle.resolve().name, engine_key(config), declared_facts(bundle))


class Backend:
    """The API's view of jobs.

    Args:
        config: limits.
        database: open; closed by `stop`.
        results: where videos are.
        hub: progress.
        own: the bundle of `dispatcher`; None for an API alone.
        dispatcher: not started yet, in this process; None for an API alone.
    """

    def __init__(
        self,
        config: ServeConfig,
        database: Database,
        results: ResultStore,
        hub: EventHub,
        own: Own | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        self.config = config
        self.store = JobStore(database, 3600.0 * config.result_hours)
        self.results = results
        self.hub = hub
        self.own = own
        self.dispatcher = dispatcher
        self.is_draining = False
        self.is_stopped = False
        self._models: list[ServedModel] = []
        self._queue = (0, 0, 0.0)
        self._num_unserved = 0
        self._next_sweep_s = 0.0
        self._store_error = ""
        self._listener = Listener(database, hub, self._on_change)
        self._task: asyncio.Task[None] | None = None
        self._leaving: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Look at the store once, start dispatcher and refreshing."""
        self._listener.start()
        if self.dispatcher is not None:
            await self.dispatcher.start()
        await self._refresh()
        self._task = asyncio.create_task(self._keep_fresh())

    async def drain(self, drain_s: float) -> None:
        """Refuse new jobs, let running ones end, queue the others again; answers of waiting clients follow."""
        self.is_draining = True
        if self.dispatcher is not None:
            await self.dispatcher.stop(drain_s)
        self.is_stopped = True
        self.hub.wake_all()

    async def stop(self) -> None:
        """End everything. `drain` first, for those who wait."""
        if not self.is_stopped:
            await self.drain(0.0)
        tasks = [*self._leaving.values(), *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._listener.stop)
        self.store.database.close()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            self._models = await asyncio.to_thread(self.store.models)
            self._queue = await asyncio.to_thread(self.store.queue)
            self._num_unserved = await asyncio.to_thread(self.store.num_unserved)
            if time.monotonic() >= self._next_sweep_s:
                self._next_sweep_s = time.monotonic() + SWEEP_S
                await asyncio.to_thread(self._sweep)
            self._store_error = ""
        except CodmdError as error:
            if not self._store_error:
                logger.error("%s", error)
            self._store_error = "the job store cannot be used"

    def _sweep(self) -> None:
        """End what has waited for a worker for too long; an API alone also takes jobs back from lost machines."""
        if self.dispatcher is None:
            config = self.config
            Leases(
                self.store.database, "", "", lease_s=config.lease_s, max_attempts=config.max_attempts
            ).expire_leases()
        if self.config.unserved_hours:
            for job_id in self.store.fail_unserved(3600.0 * self.config.unserved_hours):
                logger.warning("job=%s code=not_served", job_id)

    def _on_change(self, job_id: str, status: str) -> None:
        if self.dispatcher is None:
            return
        if status == "cancel":
            self.dispatcher.cancel(job_id)
        elif status == "queued":
            self.dispatcher.wake()

    # What can be served

    def models(self) -> list[ServedModel]:
        """Bundles that jobs may name, the default one first; never touches the store."""
        found = {model.bundle: model for model in self._models}
        if self.own is None:
            return list(found.values())
        known = found.pop(self.own.bundle, None)
        facts = known.facts if known is not None and known.facts is not None else self.own.facts
        if self.dispatcher is not None:
            facts = self.dispatcher.runner.facts or facts
        name = facts.name if facts is not None else self.own.name
        own = known or ServedModel(self.own.bundle, name, self.own.engine_key, facts, 0, False, "", 0.0)
        own = replace(own, name=name, engine_key=self.own.engine_key, facts=facts)
        if self.dispatcher is not None:
            own = replace(own, is_ready=self.dispatcher.is_ready, reason=self.dispatcher.reason)
        live = [model for model in found.values() if model.capacity]
        return [own, *live]

    def offered(self) -> list[ServedModel]:
        """Models that requests may name: the bundles, each with the teacher that runs beside its student."""
        found = []
        for model in self.models():
            found.append(model)
            teacher = model.facts.teacher if model.facts is not None else None
            if teacher is not None:
                name, num_steps, service_s = teacher.name, teacher.num_steps, teacher.service_s
                facts = replace(facts_of(model), name=name, num_steps=num_steps, service_s=service_s, teacher=None)
                facts = replace(facts, lossy_beside="")
                found.append(replace(model, name=name, facts=facts, service_s=service_s, teacher=teacher))
        return found

    def model(self, name: str | None = None) -> ServedModel:
        """The model that a request means.

        Raises:
            InvalidRequestError: no model has that name.
            GenerationError: code not_ready: nothing is known about any model yet.
        """
        models = self.offered()
        if name:
            known = [model for model in models if name in (model.name, model.bundle)]
            is_loading = self.dispatcher is not None and self.dispatcher.runner.facts is None
            if not known and models and not (self.config.teacher and is_loading):
                names = ", ".join(model.name for model in models)
                raise InvalidRequestError(f"model must be one of {names}, got {name[:60]!r}", "model")
            models = known
        if not models or models[0].facts is None:
            raise GenerationError("the model is not loaded yet", "not_ready")
        return models[0]

    @property
    def is_ready(self) -> bool:
        """Whether a job that came now would be begun as soon as a worker is free."""
        return not self.reason

    @property
    def reason(self) -> str:
        if self.is_draining:
            return "the server is shutting down"
        if self._store_error:
            return self._store_error
        models = self.models()
        if not models:
            return "no worker is alive"
        return "" if models[0].is_ready else models[0].reason or "the model is loading"

    def waiting_for(self, job: Job) -> str | None:
        """What a job waits for beside its turn: a worker of its bundle, which no live one serves. None when nothing."""
        is_own = self.dispatcher is not None and self.own is not None and job.bundle == self.own.bundle
        if job.status != "queued" or is_own or any(m.is_served for m in self._models if m.bundle == job.bundle):
            return None
        return f"no worker serves the bundle {job.model or job.bundle[:12]}"

    @property
    def num_unserved(self) -> int:
        """Jobs that wait for a bundle that no live worker serves; a second old at most."""
        return self._num_unserved

    def known_queue(self) -> tuple[int, int, float] | None:
        """Return `queue`; None when the store did not answer when it was last asked."""
        return None if self._store_error else self._queue

    @property
    def queue(self) -> tuple[int, int, float]:
        """Jobs that wait, jobs that run, seconds that the oldest waits; a second old at most."""
        return self._queue

    def retry_after_s(self, model: ServedModel) -> int:
        """Seconds until a place frees: until the first running job ends, or a worker is back."""
        seconds = model.service_s / max(1, model.capacity)
        if self.dispatcher is not None and self.dispatcher.runner.facts is not None:
            seconds = self.dispatcher.runner.seconds_to_place()
        elif not model.is_ready and model.facts is not None:
            seconds += model.facts.load_s
        return max(1, math.ceil(seconds))

    # Jobs

    async def submit(self, new: NewJob, model: ServedModel, may_reuse: bool = True) -> tuple[Job, bool]:
        """Write a job; see JobStore.submit.

        Raises:
            GenerationError: code shutting_down.
            StorageFullError: no video could be kept.
        """
        if self.is_draining:
            raise GenerationError("the server is shutting down", "shutting_down")
        if self.dispatcher is not None and self.dispatcher.blocked_code == "storage_full":
            raise StorageFullError(self.dispatcher.blocked)
        share = 0
        if new.owner:
            share = max(1, self.config.queue_size * self.config.key_share_percent // 100)
        limits = QueueLimits(self.config.queue_size, share, self.retry_after_s(model))
        job, is_new = await self.call(self.store.submit, new, limits, may_reuse)
        if is_new and job.status == "queued" and self.dispatcher is not None:
            self.dispatcher.wake()
        return job, is_new

    def content_key(self, model: ServedModel, params: Any) -> str:
        facts = model.facts if model.facts is not None and model.facts.dtype else None  # declared ones have none
        return content_key(model.bundle, model.engine_key, params, facts)

    async def get(self, job_id: str, owner: str | None) -> Job | None:
        return await self.call(self.store.get, job_id, owner)

    async def wait(self, job: Job, timeout_s: float | None = None) -> Job:
        """The job when it is final, or when the time is over.

        Raises:
            GenerationError: code shutting_down: this server will not see its end; it stays in the store.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self.hub.listening(job.id) as channel:
            version = -1  # the caller read the job before anybody listened
            while not job.is_final:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    break
                if self.is_stopped or (self.is_draining and job.status == "queued"):
                    raise GenerationError(
                        "the server is shutting down; the job goes on when it is back", "shutting_down"
                    )
                await channel.changed(version, min(left_s, POLL_S))
                version = channel.version
                job = await self.get(job.id, None) or replace(job, status=CANCELLED)
        if job.is_final:
            asyncio.get_running_loop().call_later(KEPT_WHEN_FINAL_S, self.hub.forget, job.id)
        return job

    async def cancel(self, job: Job) -> Job:
        """Give a job up and wait until it is final, or until it should have been for long."""
        found = await self.call(self.store.cancel, job.id)
        if found is None:
            return replace(job, status=CANCELLED)
        if found.status == CANCELLED and not job.is_final:
            self.hub.publish(job.id, CANCELLED, {"status": CANCELLED})
        if not found.is_final and self.dispatcher is not None:
            self.dispatcher.cancel(job.id)
        with contextlib.suppress(GenerationError):
            return await self.wait(found, self.config.cancel_timeout_s + CANCEL_GRACE_S)
        return found

    async def abandon(self, job: Job) -> None:
        """Cancel a job whose client left, unless somebody else may want it."""
        if self.is_draining:
            return
        channel = self.hub.known(job.id)
        found = await self.get(job.id, None)
        if found is None or found.is_final or found.is_detached or (channel is not None and channel.num_listeners):
            return
        await self.call(self.store.cancel, job.id)
        if self.dispatcher is not None:
            self.dispatcher.cancel(job.id)

    def leave(self, job: Job) -> None:
        """Cancel a job soon unless somebody listens then: its client said that it is gone. Returns at once."""
        if not job.is_final and job.id not in self._leaving:
            self._leaving[job.id] = asyncio.create_task(self._cancel_unheard(job))

    async def _cancel_unheard(self, job: Job) -> None:
        try:
            # The stream of the client that left may end a little after its word arrives.
            await asyncio.sleep(LEAVE_GRACE_S)
            channel = self.hub.known(job.id)
            if self.is_draining or (channel is not None and channel.num_listeners):
                return
            await self.call(self.store.cancel, job.id)
            if self.dispatcher is not None:
                self.dispatcher.cancel(job.id)
        except CodmdError as error:
            logger.warning("job=%s cannot be cancelled: %s", job.id, error)
        finally:
            self._leaving.pop(job.id, None)

    async def position(self, job: Job) -> tuple[int, float | None]:
        """Jobs that wait before this one, and seconds until it is done; None when that cannot be known."""
        model = next((model for model in self.models() if model.bundle == job.bundle), None)
        service_s = 0.0
        if model is not None:
            service_s = model.service_s or (model.facts.service_s if model.facts else 0.0)
            if job.params.teacher and model.facts is not None and model.facts.teacher is not None:
                service_s = model.facts.teacher.service_s
            if self.dispatcher is not None and self.own is not None and self.own.bundle == job.bundle:
                service_s = self.dispatcher.runner.service_s(job.params) or service_s
        ahead = 0
        if job.status == "queued":
            ahead = await self.call(self.store.position, job)
        if not service_s or job.is_final or self.waiting_for(job):
            return ahead, None
        if job.status == "running":
            channel = self.hub.known(job.id)
            return 0, round(service_s * (1.0 - (channel.progress if channel else 0.0)), 1)
        assert model is not None
        num_running = min(self.queue[1], max(1, model.capacity))
        return ahead, round(service_s * (1 + (ahead + num_running) / max(1, model.capacity)), 1)

    async def call(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Run a call of the store in a thread."""
        return await asyncio.to_thread(function, *arguments)


def failure(job: Job) -> GenerationError:
    """The error of a failed job, as it is raised to a client that waits for it."""
    assert job.status == FAILED
    return GenerationError(job.error_message, job.error_code)


def facts_of(model: ServedModel) -> ModelFacts:
    """Facts of a model that has some."""
    assert model.facts is not None
    return model.facts


def public_facts(model: ServedModel | None) -> dict[str, Any] | None:
    return asdict(model.facts) if model is not None and model.facts is not None else None

"""The side of the job store that an API uses: submit, look up, list, cancel, delete. Knows neither HTTP nor devices."""

import json
import secrets
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select, true

from codmd_serve.config import ModelFacts, TeacherFacts
from codmd_serve.errors import ConflictError, QueueFullError
from codmd_serve.jobs.database import Database
from codmd_serve.jobs.rows import CHANGED_CHANNEL, change, encode_params, read_job, select_jobs, to_job
from codmd_serve.jobs.schema import dispatchers_table as dispatchers
from codmd_serve.jobs.schema import jobs_table as jobs
from codmd_serve.jobs.schema import results_table as results
from codmd_serve.jobs.schema import webhooks_table as webhooks
from codmd_serve.jobs.states import CANCELLED, COMPLETED, EXPIRED, FAILED, FINAL, QUEUED, RUNNING, STATUSES, Job, NewJob

UNFINISHED = (QUEUED, RUNNING)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait: jobs of one bundle in all, and of one owner.

    Attributes:
        queue_size: jobs of one bundle that may be queued.
        owner_share: jobs of one owner that may be queued; 0 is as many as the queue takes.
        retry_after_s: time until a place is likely to be free, told to who is refused.
    """

    queue_size: int
    owner_share: int = 0
    retry_after_s: int = 1


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A bundle that some dispatcher serves, as the store knows it.

    Attributes:
        bundle: its hash.
        name: as clients call it.
        engine_key: hash of what else decides the bytes of a video: version and settings of the engine.
        facts: what the engine told when it was loaded.
        capacity: jobs that run at once, all live dispatchers together; 0 when none is alive, or none has loaded it yet.
        is_ready: whether a live dispatcher is warm.
        reason: why not.
        service_s: seconds that a video takes.
        is_served: whether a dispatcher of it is alive, warm or not.
        teacher: that this stands for, beside the student of the bundle; None is the student.
    """

    bundle: str
    name: str
    engine_key: str
    facts: ModelFacts | None
    capacity: int
    is_ready: bool
    reason: str
    service_s: float
    is_served: bool = False
    teacher: TeacherFacts | None = None


class JobStore:
    """Jobs as clients see them. Every method is one transaction, and blocks: call it in a thread.

    Args:
        database: open.
        result_ttl_s: seconds that a result is kept after it was made or used.
    """

    def __init__(self, database: Database, result_ttl_s: float = 7 * 86_400) -> None:
        self.database = database
        self.result_ttl_s = result_ttl_s

    def submit(self, new: NewJob, limits: QueueLimits, may_reuse: bool = True) -> tuple[Job, bool]:
        """Write a job, or find the one that answers the same request.

        Args:
            new: the request.
            limits: of the queue.
            may_reuse: whether a finished result of an equal request may be given.

        Returns:
            The job, and whether it was written now (False: the idempotency key was seen before).

        Raises:
            ConflictError: the idempotency key was used with another body.
            QueueFullError: no place.
        """
        with self.database.write() as connection:
            self.database.lock_submissions(connection)
            if new.idempotency_key and (known := self._replayed(connection, new)) is not None:
                return known, False
            now = self.database.now(connection)
            result_id = self._reusable(connection, new.content_key, now) if may_reuse else None
            if result_id is None:
                self._check_limits(connection, new, limits)
            job_id = secrets.token_hex(12)
            connection.execute(jobs.insert(), _columns(new, job_id, now, result_id))
            if new.webhook_url:
                connection.execute(webhooks.insert().values(job_id=job_id, attempts=0, due_at=now))
            payload = {"id": job_id, "status": COMPLETED if result_id else QUEUED}
            self.database.notify(connection, CHANGED_CHANNEL, json.dumps(payload))
            job = read_job(connection, job_id)
            assert job is not None
            return job, True

    def _replayed(self, connection: Connection, new: NewJob) -> Job | None:
        query = select_jobs().where(jobs.c.owner == new.owner, jobs.c.idempotency_key == new.idempotency_key)
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.body_hash != new.body_hash:
            raise ConflictError(
                "this Idempotency-Key was used with another body; send the same body, or another key",
                "idempotency_conflict",
            )
        return to_job(row)

    def _reusable(self, connection: Connection, content_key: str, now: float) -> str | None:
        query = select(results.c.id).where(results.c.content_key == content_key, results.c.expires_at > now)
        result_id: str | None = connection.execute(query.order_by(results.c.created_at.desc()).limit(1)).scalar()
        if result_id is not None:
            update = results.update().where(results.c.id == result_id)
            connection.execute(update.values(used_at=now, expires_at=now + self.result_ttl_s))
        return result_id

    def _check_limits(self, connection: Connection, new: NewJob, limits: QueueLimits) -> None:
        waiting = select(func.count()).where(jobs.c.status == QUEUED, jobs.c.bundle == new.bundle)
        num_waiting = connection.execute(waiting).scalar_one()
        if num_waiting >= limits.queue_size:
            message = f"{num_waiting} jobs are waiting already, no more are taken"
            raise QueueFullError(message, limits.retry_after_s)
        if limits.owner_share:
            num_own = connection.execute(waiting.where(jobs.c.owner == new.owner)).scalar_one()
            if num_own >= limits.owner_share:
                message = f"{num_own} jobs of this API key are waiting already, no more are taken"
                raise QueueFullError(message, limits.retry_after_s, "quota_exceeded")

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job by id; None when there is none, or when it is of another owner than the one given."""
        with self.database.read() as connection:
            job = read_job(connection, job_id)
        return job if job is not None and owner in (None, job.owner) else None

    def list_jobs(
        self,
        owner: str | None = None,
        *,
        limit: int = 20,
        after: int | None = None,
        status: str | None = None,
        is_ascending: bool = False,
    ) -> list[Job]:
        """Jobs of an owner, newest first.

        Args:
            owner: None for everybody's.
            limit: at most as many.
            after: number of the last job of the page before.
            status: only jobs of that status.
            is_ascending: oldest first.
        """
        assert status is None or status in STATUSES
        query = select_jobs().order_by(jobs.c.number.asc() if is_ascending else jobs.c.number.desc()).limit(limit)
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if after is not None:
            query = query.where(jobs.c.number > after if is_ascending else jobs.c.number < after)
        with self.database.read() as connection:
            return [to_job(row) for row in connection.execute(query)]

    def position(self, job: Job) -> int:
        """How many jobs of the same bundle wait before this one."""
        ahead = select(func.count()).where(
            jobs.c.status == QUEUED, jobs.c.bundle == job.bundle, jobs.c.number < job.number
        )
        with self.database.read() as connection:
            return int(connection.execute(ahead).scalar_one())

    def keep(self, job_id: str) -> None:
        """Let a job go on when the client that sent it leaves: somebody else knows its id."""
        with self.database.write() as connection:
            connection.execute(jobs.update().where(jobs.c.id == job_id).values(is_detached=True))

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job that waits, or ask the dispatcher to give up one that runs; a final one stays as it is."""
        with self.database.write() as connection:
            if not change(self.database, connection, job_id, QUEUED, CANCELLED):
                update = jobs.update().where(jobs.c.id == job_id, jobs.c.status == RUNNING)
                if connection.execute(update.values(is_cancel_requested=True)).rowcount:
                    self.database.notify(connection, CHANGED_CHANNEL, json.dumps({"id": job_id, "status": "cancel"}))
            return read_job(connection, job_id)

    def delete(self, job_id: str) -> None:
        """Forget a job: nobody finds it any more, and the sweep deletes its result.

        One that waits is cancelled, and the outcome of one that runs is dropped.
        """
        with self.database.write() as connection:
            change(self.database, connection, job_id, QUEUED, CANCELLED)
            values = {"is_deleted": True, "idempotency_key": None}
            connection.execute(jobs.update().where(jobs.c.id == job_id).values(values))

    def mark_expired(self, job_id: str) -> None:
        """Say that the result of a completed job is gone."""
        with self.database.write() as connection:
            job = read_job(connection, job_id)
            if job is not None and job.result is not None:
                _expire(self.database, connection, job.result.id)

    def expire(self, max_bytes: int, max_jobs: int) -> list[str]:
        """Let old results and old records go.

        Args:
            max_bytes: results kept in all; the least recently used go first. 0 is without a bound.
            max_jobs: final jobs that are remembered.

        Returns:
            Names of the files to delete, in the results place.
        """
        names: list[str] = []
        with self.database.write() as connection:
            now = self.database.now(connection)
            self._forget(connection, max_jobs)
            in_use = select(jobs.c.result_id).where(jobs.c.result_id.is_not(None), jobs.c.is_deleted.is_(False))
            total = 0
            rows = connection.execute(select(results, results.c.id.in_(in_use).label("is_used")))
            for row in sorted(rows, key=lambda row: row.used_at, reverse=True):
                total += row.num_bytes
                if row.expires_at <= now or not row.is_used or (max_bytes and total > max_bytes):
                    _expire(self.database, connection, row.id)
                    total -= row.num_bytes
                    names.append(row.name)
        return names

    def _forget(self, connection: Connection, max_jobs: int) -> None:
        final = jobs.c.status.in_(sorted(FINAL))
        connection.execute(jobs.delete().where(final, jobs.c.is_deleted.is_(True)))
        newest = select(jobs.c.number).where(final).order_by(jobs.c.number.desc()).offset(max_jobs).limit(1)
        last = connection.execute(newest).scalar()
        if last is not None:
            connection.execute(jobs.delete().where(final, jobs.c.number <= last))

    def has_result_named(self, names: list[str]) -> set[str]:
        """Which of these files belong to a result; the others are left over from a killed process."""
        with self.database.read() as connection:
            return set(connection.execute(select(results.c.name).where(results.c.name.in_(names))).scalars())

    def has_results(self, result_ids: list[str]) -> set[str]:
        """Which of these results are written down."""
        with self.database.read() as connection:
            return set(connection.execute(select(results.c.id).where(results.c.id.in_(result_ids))).scalars())

    def models(self) -> list[ServedModel]:
        """Bundles that dispatchers serve or have served, those with a live one first."""
        with self.database.read() as connection:
            now = self.database.now(connection)
            rows = connection.execute(select(dispatchers).order_by(dispatchers.c.alive_until.desc())).all()
        found: dict[str, ServedModel] = {}
        for row in rows:
            known = found.get(row.bundle)
            if known is None:
                facts = ModelFacts(**json.loads(row.facts)) if row.facts else None
                reason = f"no worker serves the bundle {row.model}"
                known = ServedModel(row.bundle, row.model, row.engine_key, facts, 0, False, reason, row.service_s)
            if row.alive_until > now:
                if known.facts is not None and known.facts.teacher is None and row.facts:
                    # Only some dispatchers of a bundle may have its teacher.
                    teacher = ModelFacts(**json.loads(row.facts)).teacher
                    known = replace(known, facts=replace(known.facts, teacher=teacher))
                is_ready = known.is_ready or bool(row.is_ready)
                reason = "" if is_ready else row.reason
                capacity = known.capacity + row.capacity
                known = replace(known, capacity=capacity, is_ready=is_ready, reason=reason, is_served=True)
            found[row.bundle] = known
        return sorted(found.values(), key=lambda model: (model.capacity == 0, not model.is_served))

    def num_unserved(self) -> int:
        """Jobs that wait for a bundle that no live dispatcher serves."""
        with self.database.read() as connection:
            query = select(func.count()).where(self._is_unserved(self.database.now(connection)))
            return int(connection.execute(query).scalar_one())

    def fail_unserved(self, after_s: float) -> list[str]:
        """End the jobs that have waited for `after_s` seconds for a bundle that nobody has served meanwhile."""
        with self.database.write() as connection:
            now = self.database.now(connection)
            since = select(func.max(dispatchers.c.alive_until)).where(dispatchers.c.bundle == jobs.c.bundle)
            query = select(jobs.c.id).where(
                self._is_unserved(now),
                jobs.c.created_at < now - after_s,
                func.coalesce(since.scalar_subquery(), 0.0) < now - after_s,
            )
            error = {
                "error_code": "not_served",
                "error_message": f"no worker served its bundle for {after_s / 3600:g} h",
            }
            job_ids = connection.execute(query).scalars().all()
            return [each for each in job_ids if change(self.database, connection, each, QUEUED, FAILED, **error)]

    def _is_unserved(self, now: float) -> ColumnElement[bool]:
        served = select(dispatchers.c.bundle).where(dispatchers.c.alive_until > now)
        return and_(jobs.c.status == QUEUED, jobs.c.is_deleted.is_(False), jobs.c.bundle.not_in(served))

    def counts(self) -> dict[str, int]:
        """How many jobs have each status."""
        query = select(jobs.c.status, func.count()).where(jobs.c.is_deleted.is_(False)).group_by(jobs.c.status)
        with self.database.read() as connection:
            found = {status: int(number) for status, number in connection.execute(query)}
        return {status: found.get(status, 0) for status in STATUSES}

    def queue(self, bundle: str | None = None) -> tuple[int, int, float]:
        """Jobs that wait, jobs that run, and seconds that the oldest waits; of one bundle or of all."""
        of_bundle = true() if bundle is None else jobs.c.bundle == bundle
        query = (
            select(jobs.c.status, func.count(), func.min(jobs.c.created_at))
            .where(or_(jobs.c.status == QUEUED, jobs.c.status == RUNNING), of_bundle)
            .group_by(jobs.c.status)
        )
        with self.database.read() as connection:
            now = self.database.now(connection)
            found = {status: (int(number), float(oldest)) for status, number, oldest in connection.execute(query)}
        num_waiting, oldest = found.get(QUEUED, (0, now))
        return num_waiting, found.get(RUNNING, (0, now))[0], max(0.0, now - oldest)


def _columns(new: NewJob, job_id: str, now: float, result_id: str | None) -> dict[str, Any]:
    is_done = result_id is not None
    return {
        "id": job_id,
        "owner": new.owner,
        "status": COMPLETED if is_done else QUEUED,
        "bundle": new.bundle,
        "model": new.model,
        "content_key": new.content_key,
        "params": encode_params(new.params),
        "is_preview": new.is_preview,
        "is_detached": new.is_detached,
        "idempotency_key": new.idempotency_key or None,
        "body_hash": new.body_hash,
        "created_at": now,
        "started_at": now if is_done else None,
        "finished_at": now if is_done else None,
        "attempts": 0,
        "is_alone": False,
        "is_cancel_requested": False,
        "is_reused": is_done,
        "is_deleted": False,
        "lease_owner": "",
        "lease_until": 0.0,
        "timings_ms": "{}",
        "warnings": "[]",
        "error_code": "",
        "error_message": "",
        "result_id": result_id,
        "webhook_url": new.webhook_url,
    }


def _expire(database: Database, connection: Connection, result_id: str) -> None:
    """Take a result away from all jobs that have it."""
    query = select(jobs.c.id).where(jobs.c.result_id == result_id)
    for job_id in connection.execute(query).scalars().all():
        change(database, connection, job_id, COMPLETED, EXPIRED, result_id=None)
    connection.execute(results.delete().where(results.c.id == result_id))

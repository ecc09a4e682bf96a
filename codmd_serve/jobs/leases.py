"""The side of the job store that a dispatcher uses: claims under a lease, heartbeats, outcomes. Knows no worker.

A lease names the dispatcher that runs a job and until when its word counts. Every outcome is a compare-and-set on the
lease, so a dispatcher that was slow for too long cannot overwrite what its successor wrote.
"""

import json
from dataclasses import asdict, dataclass, field

from sqlalchemy import Connection, select, true

from codmd_serve.config import ModelFacts
from codmd_serve.jobs.database import Database
from codmd_serve.jobs.rows import change, content_key, read_job
from codmd_serve.jobs.schema import dispatchers_table as dispatchers
from codmd_serve.jobs.schema import jobs_table as jobs
from codmd_serve.jobs.schema import results_table as results
from codmd_serve.jobs.schema import webhooks_table as webhooks
from codmd_serve.jobs.states import CANCELLED, FAILED, FINAL, QUEUED, RUNNING, Job, Result


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """How a job ended: `status` completed (with a result), failed (with an error) or cancelled."""

    status: str
    timings_ms: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    peak_memory_mb: float | None = None
    error_code: str = ""
    error_message: str = ""
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a heartbeat found: jobs that this dispatcher still holds, and those of them that shall be given up."""

    held: frozenset[str]
    cancelled: frozenset[str]


class Leases:
    """Jobs as one dispatcher sees them. Every method is one transaction, and blocks: call it in a thread.

    Args:
        database: open.
        owner: unguessable id of the dispatcher.
        bundle: hash of the bundle that it serves; it claims jobs of that bundle only.
        model: name of the bundle.
        engine_key: see store.Model.
        lease_s: seconds that a claim holds without a heartbeat.
        max_attempts: tries of a job whose worker dies or whose lease runs out.
        has_teacher: whether it claims jobs of the teacher too.
    """

    def __init__(
        self,
        database: Database,
        owner: str,
        bundle: str,
        model: str = "",
        engine_key: str = "",
        lease_s: float = 30.0,
        max_attempts: int = 2,
        has_teacher: bool = False,
    ) -> None:
        self.database = database
        self.owner = owner
        self.bundle = bundle
        self.model = model
        self.engine_key = engine_key
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self.has_teacher = has_teacher

    def claim(self) -> Job | None:
        """Take the job that has waited longest; None when none waits. No two dispatchers get the same."""
        with self.database.write() as connection:
            # A quote of a prompt is escaped in JSON, so this is found where the field is and nowhere else.
            is_of_student = ~jobs.c.params.contains('"teacher": "', autoescape=True)
            query = (
                select(jobs.c.id)
                .where(jobs.c.status == QUEUED, jobs.c.bundle == self.bundle)
                .where(true() if self.has_teacher else is_of_student)
                .order_by(jobs.c.number)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            job_id = connection.execute(query).scalar()
            if job_id is None:
                return None
            now = self.database.now(connection)
            change(
                self.database,
                connection,
                job_id,
                QUEUED,
                RUNNING,
                started_at=now,
                attempts=jobs.c.attempts + 1,
                lease_owner=self.owner,
                lease_until=now + self.lease_s,
            )
            return read_job(connection, job_id)

    def heartbeat(self) -> Heartbeat:
        """Extend the leases of all own jobs."""
        own = (jobs.c.lease_owner == self.owner, jobs.c.status == RUNNING)
        with self.database.write() as connection:
            now = self.database.now(connection)
            connection.execute(jobs.update().where(*own).values(lease_until=now + self.lease_s))
            rows = connection.execute(select(jobs.c.id, jobs.c.is_cancel_requested).where(*own)).all()
        return Heartbeat(frozenset(row.id for row in rows), frozenset(row.id for row in rows if row[1]))

    def cancelled(self) -> frozenset[str]:
        """Own jobs that shall be given up; a read, for asking often."""
        query = select(jobs.c.id).where(
            jobs.c.lease_owner == self.owner, jobs.c.status == RUNNING, jobs.c.is_cancel_requested.is_(True)
        )
        with self.database.read() as connection:
            return frozenset(connection.execute(query).scalars())

    def announce(
        self, facts: ModelFacts | None, capacity: int, is_ready: bool, reason: str, service_s: float, alive_s: float
    ) -> None:
        """Tell APIs what this dispatcher serves, for `alive_s` seconds."""
        with self.database.write() as connection:
            values = {
                "bundle": self.bundle,
                "model": self.model,
                "engine_key": self.engine_key,
                "facts": json.dumps(asdict(facts)) if facts else "",
                "capacity": capacity,
                "is_ready": is_ready,
                "reason": reason,
                "service_s": service_s,
                "alive_until": self.database.now(connection) + alive_s,
            }
            update = dispatchers.update().where(dispatchers.c.id == self.owner).values(values)
            if not connection.execute(update).rowcount:
                connection.execute(dispatchers.insert().values(id=self.owner, **values))

    def finish(self, job_id: str, finished: Finished, facts: ModelFacts | None = None) -> bool:
        """Write how a job ended.

        Args:
            job_id: of a job that this dispatcher holds.
            finished: its end.
            facts: of the engine that made it.

        Returns:
            False when the lease was lost meanwhile: whoever holds the job now will say how it ended.
        """
        with self.database.write() as connection:
            job = read_job(connection, job_id)
            if job is None:  # deleted while it ran
                connection.execute(jobs.delete().where(jobs.c.id == job_id, jobs.c.lease_owner == self.owner))
                return False
            result = finished.result
            is_changed = change(
                self.database,
                connection,
                job_id,
                RUNNING,
                finished.status,
                owner=self.owner,
                timings_ms=json.dumps(finished.timings_ms),
                warnings=json.dumps(finished.warnings),
                peak_memory_mb=finished.peak_memory_mb,
                error_code=finished.error_code,
                error_message=finished.error_message,
                result_id=result.id if result else None,
            )
            if is_changed and result is not None:
                now = self.database.now(connection)
                row = {name: getattr(result, name) for name in Result.__slots__}
                # By this dispatcher's engine: the API that took the job may have had another one in mind.
                row["content_key"] = content_key(self.bundle, self.engine_key, job.params, facts)
                connection.execute(results.insert().values(created_at=now, used_at=now, **row))
            return is_changed

    def retry(self, job_id: str, message: str, code: str = "worker_died", is_charged: bool = True) -> str | None:
        """Queue a job again whose worker is gone, or fail it when its attempts are used up.

        Args:
            job_id: of a job that this dispatcher holds.
            message, code: the error, if there is no further attempt.
            is_charged: whether the attempt counts. It does not where the job was not the cause.

        Returns:
            The new status; None when the lease was lost.
        """
        with self.database.write() as connection:
            return self._give_back(connection, job_id, self.owner, message, code, is_charged)

    def release(self, owner: str | None = None) -> int:
        """Queue all jobs of a dispatcher that ended or was killed; no attempt counts. Default: this one."""
        return self._give_back_all(owner or self.owner, "the server was stopped", "server_stopped", is_charged=False)

    def forget_dispatcher(self, owner: str) -> None:
        """Take a dispatcher out of the list, unless it is all that knows this bundle's facts.

        The time of its end stays: it says since when nobody serves the bundle.
        """
        with self.database.write() as connection:
            ended = dispatchers.update().where(dispatchers.c.id == owner, dispatchers.c.alive_until > 0.0)
            connection.execute(ended.values(alive_until=self.database.now(connection) - 0.001))
            newest = (
                select(dispatchers.c.id)
                .where(dispatchers.c.bundle == self.bundle, dispatchers.c.facts != "")
                .order_by(dispatchers.c.alive_until.desc())
                .limit(1)
            )
            keep = connection.execute(newest).scalar()
            now = self.database.now(connection)
            old = dispatchers.delete().where(dispatchers.c.alive_until < now, dispatchers.c.bundle == self.bundle)
            connection.execute(old.where(dispatchers.c.id != (keep or "")))

    def expire_leases(self) -> int:
        """Queue jobs again whose dispatcher has not been heard of; the attempt counts. Returns how many."""
        with self.database.write() as connection:
            now = self.database.now(connection)
            late = select(jobs.c.id, jobs.c.lease_owner).where(jobs.c.status == RUNNING, jobs.c.lease_until < now)
            rows = connection.execute(late).all()
            for row in rows:
                message = "the machine that ran it has not been heard of"
                self._give_back(connection, row.id, row.lease_owner, message, "worker_lost", is_charged=True)
            return len(rows)

    def _give_back_all(self, owner: str, message: str, code: str, is_charged: bool) -> int:
        with self.database.write() as connection:
            held = select(jobs.c.id).where(jobs.c.lease_owner == owner, jobs.c.status == RUNNING)
            job_ids = connection.execute(held).scalars().all()
            for job_id in job_ids:
                self._give_back(connection, job_id, owner, message, code, is_charged)
            return len(job_ids)

    def _give_back(
        self, connection: Connection, job_id: str, owner: str, message: str, code: str, is_charged: bool
    ) -> str | None:
        job = read_job(connection, job_id)
        if job is None:  # deleted while it ran
            connection.execute(jobs.delete().where(jobs.c.id == job_id, jobs.c.lease_owner == owner))
            return None
        if job.is_cancel_requested:
            is_changed = change(self.database, connection, job_id, RUNNING, CANCELLED, owner=owner)
            return CANCELLED if is_changed else None
        if is_charged and job.attempts >= self.max_attempts:
            error = {"error_code": code, "error_message": f"{message} ({job.attempts} attempts)"}
            return FAILED if change(self.database, connection, job_id, RUNNING, FAILED, owner=owner, **error) else None
        values = {
            "attempts": job.attempts if is_charged else max(0, job.attempts - 1),
            "is_alone": job.is_alone or is_charged,
        }
        return QUEUED if change(self.database, connection, job_id, RUNNING, QUEUED, owner=owner, **values) else None

    def due_webhooks(self, limit: int = 8) -> list[tuple[Job, int]]:
        """Finished jobs whose webhook is due, with the calls made so far; each is taken for `lease_s` seconds."""
        with self.database.write() as connection:
            now = self.database.now(connection)
            query = (
                select(webhooks.c.job_id, webhooks.c.attempts)
                .join(jobs, jobs.c.id == webhooks.c.job_id)
                .where(webhooks.c.due_at <= now, jobs.c.status.in_(sorted(FINAL)))
                .limit(limit)
                .with_for_update(skip_locked=True, of=webhooks)
            )
            taken = []
            for job_id, attempts in connection.execute(query).all():
                update = webhooks.update().where(webhooks.c.job_id == job_id)
                connection.execute(update.values(attempts=attempts + 1, due_at=now + self.lease_s))
                if (job := read_job(connection, job_id)) is not None:
                    taken.append((job, attempts))
            return taken

    def webhook_done(self, job_id: str, retry_in_s: float | None) -> None:
        """Forget a webhook that was delivered or given up (None), or call it again later."""
        with self.database.write() as connection:
            mine = webhooks.c.job_id == job_id
            if retry_in_s is None:
                connection.execute(webhooks.delete().where(mine))
            else:
                due_at = self.database.now(connection) + retry_in_s
                connection.execute(webhooks.update().where(mine).values(due_at=due_at))

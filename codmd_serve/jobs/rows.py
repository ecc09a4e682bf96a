"""What the classes of the job store share: reading rows as jobs, and the one compare-and-set of a job's status."""

import functools
import hashlib
import json
from typing import Any

from sqlalchemy import Connection, Row, Select, select

from codmd_serve.config import GenerateParams, ModelFacts
from codmd_serve.jobs.database import Database
from codmd_serve.jobs.schema import jobs_table as jobs
from codmd_serve.jobs.schema import results_table as results
from codmd_serve.jobs.states import FINAL, TRANSITIONS, Job, Result

# Channels of NOTIFY. The payload is JSON.
CHANGED_CHANNEL = "codmd_changed"  # {"id", "status"}: a job has a new status, or its cancellation was asked for
PROGRESS_CHANNEL = "codmd_progress"  # an event of a running job


@functools.cache
def select_jobs() -> Select[Any]:
    """Jobs that their owner has not deleted, with their results."""
    joined = jobs.outerjoin(results, jobs.c.result_id == results.c.id)
    names = ("id", "name", "num_bytes", "sha256", "media_type", "expires_at")
    labelled = [results.c[name].label(f"result_{name}_") for name in names]
    return select(jobs, *labelled).select_from(joined).where(jobs.c.is_deleted.is_(False))


def read_job(connection: Connection, job_id: str) -> Job | None:
    row = connection.execute(select_jobs().where(jobs.c.id == job_id)).one_or_none()
    return None if row is None else to_job(row)


def to_job(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    result = None
    if values["result_id_"] is not None:
        result = Result(
            id=values["result_id_"],
            name=values["result_name_"],
            num_bytes=values["result_num_bytes_"],
            sha256=values["result_sha256_"],
            media_type=values["result_media_type_"],
            expires_at=values["result_expires_at_"],
        )
    plain = {name: values[name] for name in Job.__slots__ if name in values}
    decoded: dict[str, Any] = {name: json.loads(values[name]) for name in ("timings_ms", "warnings")}
    params = GenerateParams(**json.loads(values["params"]))
    return Job(**{**plain, **decoded, "params": params, "result": result})


# What the engine chose at load, by measuring or for want of a choice, and what decides bytes.
CHOSEN_FACTS = ("device", "dtype", "vae_dtype", "attention", "execution", "threads")


def content_key(bundle: str, engine_key: str, params: GenerateParams, facts: ModelFacts | None = None) -> str:
    """Hash of everything that decides the bytes of a video.

    Args:
        bundle, engine_key, params: hashes of bundle and settings; the request.
        facts: of the loaded engine, or of the last one with these settings; None while none was ever loaded. Such a
            key finds no video: none is kept without them.
    """
    parts = [bundle, engine_key, encode_params(params)]
    if facts is not None:
        parts.append(json.dumps([getattr(facts, name) for name in CHOSEN_FACTS]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def encode_params(params: GenerateParams) -> str:
    return json.dumps(params.to_dict(), sort_keys=True)


def change(
    database: Database, connection: Connection, job_id: str, before: str, after: str, owner: str = "", **values: Any
) -> bool:
    """Give a job another status if it still has the one expected: the one place where a status changes.

    Args:
        database: that the connection is of.
        connection: in a write transaction.
        job_id: of the job.
        before, after: a transition of the state machine.
        owner: the dispatcher that must still hold the lease; empty for whoever.
        values: other columns to set.

    Returns:
        False when the job has another status, another owner, or is gone; nothing changed then.
    """
    assert (before, after) in TRANSITIONS, f"a job never goes from {before} to {after}"
    update = jobs.update().where(jobs.c.id == job_id, jobs.c.status == before)
    if owner:
        update = update.where(jobs.c.lease_owner == owner)
    if before == "running":
        values |= {"lease_owner": "", "lease_until": 0.0}
    if after in FINAL and before != "completed":
        values |= {"finished_at": database.now(connection)}
    is_changed = connection.execute(update.values(status=after, **values)).rowcount == 1
    if is_changed:
        database.notify(connection, CHANGED_CHANNEL, json.dumps({"id": job_id, "status": after}))
    return is_changed

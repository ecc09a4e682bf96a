"""Claims, heartbeats, attempts and outcomes on SQLite and PostgreSQL, raced by threads and by processes."""

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from codmd_serve.config import ModelFacts, TeacherFacts
from codmd_serve.jobs.leases import Finished, Leases
from codmd_serve.jobs.rows import change
from codmd_serve.jobs.schema import jobs_table
from codmd_serve.jobs.states import STATUSES, TRANSITIONS, Job
from codmd_serve.jobs.store import JobStore

Submit = Callable[..., Job]
LeasesOf = Callable[..., Leases]
FACTS = ModelFacts(
    name="fake",
    device="cpu",
    dtype="float32",
    attention="none",
    execution="eager",
    num_steps=4,
    height=64,
    width=64,
    num_frames=17,
    fps=16,
    size_multiple=16,
    max_side_px=1024,
    frame_multiple=4,
    max_num_frames=101,
    service_s=2.5,
    load_s=0.1,
)
CLAIM_ALL = """
import sys
from codmd_serve.jobs.database import open_database
from codmd_serve.jobs.leases import Leases
leases = Leases(open_database(sys.argv[1]), sys.argv[2], "b")
sys.stdin.readline()
while (job := leases.claim()) is not None:
    print(job.id)
"""


def status_of(store: JobStore, job: Job) -> str:
    found = store.get(job.id)
    assert found is not None
    return found.status


def test_jobs_are_claimed_in_order_with_a_lease(submit: Submit, leases: LeasesOf) -> None:
    jobs = [submit(str(number)) for number in range(3)]
    dispatcher = leases("d", lease_s=30.0)
    claimed = [dispatcher.claim() for _ in jobs]
    assert [job and job.id for job in claimed] == [job.id for job in jobs]
    first = claimed[0]
    assert first is not None and (first.status, first.attempts, first.lease_owner) == ("running", 1, "d")
    assert first.started_at is not None and first.lease_until - first.started_at == pytest.approx(30.0)
    assert dispatcher.claim() is None


def test_a_dispatcher_claims_jobs_of_its_bundle_only(submit: Submit, leases: LeasesOf) -> None:
    submit("a")
    other = leases("d")
    other.bundle = "another"
    assert other.claim() is None


def test_processes_never_claim_the_same_job(store_address: str, submit: Submit, tmp_path: Path) -> None:
    jobs = {submit(str(number)).id for number in range(40)}
    command = [sys.executable, "-c", CLAIM_ALL, store_address]
    processes = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    said = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        said += process.communicate(timeout=120)[0].split()
    assert len(said) == len(jobs) and set(said) == jobs


def test_threads_never_claim_the_same_job(submit: Submit, leases: LeasesOf) -> None:
    jobs = {submit(str(number)).id for number in range(20)}
    with ThreadPoolExecutor(8) as pool:
        claimed = [job.id for job in pool.map(lambda number: leases(str(number)).claim(), range(24)) if job]
    assert len(claimed) == len(jobs) and set(claimed) == jobs


def test_a_heartbeat_extends_the_lease(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    job, dispatcher = submit("a"), leases("d", lease_s=100.0)
    claimed = dispatcher.claim()
    dispatcher.lease_s = 200.0
    assert dispatcher.heartbeat().held == {job.id}
    found = store.get(job.id)
    assert found is not None and claimed is not None and found.lease_until > claimed.lease_until + 90


def test_a_lease_that_ran_out_is_claimable_again_and_counts_an_attempt(
    store: JobStore, submit: Submit, leases: LeasesOf
) -> None:
    job, slow, other = submit("a"), leases("slow", lease_s=-1.0), leases("other")
    assert slow.claim() is not None
    assert other.expire_leases() == 1 and other.expire_leases() == 0
    again = other.claim()
    assert again is not None and (again.id, again.attempts, again.is_alone) == (job.id, 2, True)
    assert not slow.finish(job.id, Finished(status="failed")), "its word does not count any more"
    assert slow.retry(job.id, "x") is None and slow.heartbeat().held == frozenset()
    assert status_of(store, job) == "running"
    assert other.finish(job.id, Finished(status="cancelled"))


def test_a_lease_that_runs_out_too_often_fails_the_job(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    job, dispatcher = submit("a"), leases("d", lease_s=-1.0, max_attempts=2)
    for status in ("queued", "failed"):
        dispatcher.claim()
        dispatcher.expire_leases()
        assert status_of(store, job) == status
    found = store.get(job.id)
    assert found is not None and found.error_code == "worker_lost" and "2 attempts" in found.error_message


def test_a_killed_server_costs_no_attempt(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    jobs = [submit("a"), submit("b")]
    for _ in range(5):
        killed = leases("killed")
        assert killed.claim() is not None and killed.claim() is not None
        assert leases("next").release("killed") == 2
        found = [store.get(job.id) for job in jobs]
        assert [(job.status, job.attempts, job.is_alone) for job in found if job] == [("queued", 0, False)] * 2


def test_a_dead_worker_costs_an_attempt_and_then_the_job(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    job, dispatcher = submit("a"), leases("d", max_attempts=2)
    dispatcher.claim()
    assert dispatcher.retry(job.id, "the worker died", is_charged=False) == "queued"
    dispatcher.claim()
    assert dispatcher.retry(job.id, "the worker died") == "queued"
    dispatcher.claim()
    assert dispatcher.retry(job.id, "the worker died") == "failed"
    found = store.get(job.id)
    assert found is not None and (found.error_code, found.error_message) == (
        "worker_died",
        "the worker died (2 attempts)",
    )


def test_a_job_that_should_be_cancelled_is_not_run_again(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    jobs, dispatcher = [submit("a"), submit("b"), submit("c")], leases("d", lease_s=-1.0)
    for job in jobs:
        dispatcher.claim()
        store.cancel(job.id)
    assert dispatcher.retry(jobs[0].id, "the worker died") == "cancelled"
    dispatcher.expire_leases()
    assert [status_of(store, job) for job in jobs] == ["cancelled"] * 3


def test_a_dispatcher_tells_what_it_serves(store: JobStore, leases: LeasesOf) -> None:
    first, second = leases("d"), leases("e")
    first.announce(FACTS, 2, True, "", 2.5, alive_s=60.0)
    second.announce(FACTS, 1, False, "the model is loading", 2.5, alive_s=60.0)
    (model,) = store.models()
    assert (model.bundle, model.name, model.facts, model.capacity) == ("b", "model-b", FACTS, 3)
    assert model.is_ready and model.reason == ""
    first.forget_dispatcher("d")
    (model,) = store.models()
    assert (model.capacity, model.is_ready, model.reason) == (1, False, "the model is loading")
    second.forget_dispatcher("e")
    (model,) = store.models()
    assert (model.capacity, model.is_ready, model.facts) == (0, False, FACTS), "facts outlive the dispatcher"


def test_jobs_of_a_bundle_that_nobody_serves_are_counted_and_end(
    store: JobStore, submit: Submit, leases: LeasesOf
) -> None:
    job, dispatcher = submit("a"), leases("d")
    assert store.num_unserved() == 1 and store.models() == []
    assert store.fail_unserved(after_s=3600.0) == [], "it has not waited for long"
    dispatcher.announce(None, 0, False, "the model is loading", 0.0, alive_s=60.0)
    (model,) = store.models()
    assert store.num_unserved() == 0 and model.is_served and model.capacity == 0
    assert store.fail_unserved(after_s=-1.0) == [], "a worker that loads is one"
    dispatcher.announce(FACTS, 1, True, "", 2.5, alive_s=60.0)
    dispatcher.forget_dispatcher("d")
    (model,) = store.models()
    assert store.num_unserved() == 1 and not model.is_served
    assert model.reason == "no worker serves the bundle model-b"
    with store.database.write() as connection:  # sent long ago, and served until now
        connection.execute(jobs_table.update().values(created_at=0.0))
    assert store.fail_unserved(after_s=3600.0) == []
    assert store.fail_unserved(after_s=-1.0) == [job.id]
    found = store.get(job.id)
    assert found is not None and (found.status, found.error_code) == ("failed", "not_served")


def test_every_change_of_status_is_a_compare_and_set(store: JobStore, submit: Submit) -> None:
    """From each status, each transition works once and only from where it starts."""
    for before in STATUSES:
        for start, after in sorted(TRANSITIONS):
            job = submit(f"{before} {start} {after}")
            with store.database.write() as connection:
                put(connection, job.id, before)
                assert change(store.database, connection, job.id, start, after) is (before == start)
            assert status_of(store, job) == (after if before == start else before)


def put(connection: object, job_id: str, status: str) -> None:
    from sqlalchemy import Connection

    assert isinstance(connection, Connection)
    connection.execute(jobs_table.update().where(jobs_table.c.id == job_id).values(status=status))


def test_a_transition_that_is_none_is_a_bug(store: JobStore, submit: Submit) -> None:
    job = submit("a")
    for before, after in {(a, b) for a in STATUSES for b in STATUSES} - TRANSITIONS:
        with pytest.raises(AssertionError, match="a job never goes from"), store.database.write() as connection:
            change(store.database, connection, job.id, before, after)


def test_webhooks_are_due_when_the_job_is_final_and_taken_once(submit: Submit, leases: LeasesOf) -> None:
    job, dispatcher = submit("a", webhook_url="https://h.example/"), leases("d", lease_s=60.0)
    assert dispatcher.due_webhooks() == []
    dispatcher.claim()
    dispatcher.finish(job.id, Finished(status="failed", error_code="x"))
    ((found, attempts),) = dispatcher.due_webhooks()
    assert (found.id, found.webhook_url, attempts) == (job.id, "https://h.example/", 0)
    assert leases("e").due_webhooks() == []
    dispatcher.webhook_done(job.id, -1.0)
    assert [attempts for _, attempts in leases("e").due_webhooks()] == [1]
    dispatcher.webhook_done(job.id, None)
    assert dispatcher.due_webhooks() == []


def test_the_clock_of_the_store_is_unix_time(store: JobStore) -> None:
    with store.database.read() as connection:
        assert store.database.now(connection) == pytest.approx(time.time(), abs=5.0)


def test_jobs_of_the_teacher_wait_for_a_dispatcher_that_has_it(submit: Submit, leases: LeasesOf) -> None:
    mine = '"teacher": "no such"'
    of_teacher, of_student = submit("a", teacher="t" * 32), submit(mine)
    plain = leases("plain").claim()
    assert plain is not None and plain.id == of_student.id, "a prompt is never taken for the field"
    assert leases("plain").claim() is None
    found = leases("both", has_teacher=True).claim()
    assert found is not None and found.id == of_teacher.id and found.params.teacher == "t" * 32


def test_a_teacher_is_known_when_any_live_dispatcher_has_it(store: JobStore, leases: LeasesOf) -> None:
    teacher = TeacherFacts(name="base", fingerprint="f", num_steps=50, guidance_scale=3.0, service_s=20.0)
    leases("with").announce(replace(FACTS, teacher=teacher, examples=("a", "b")), 1, True, "", 2.5, 60.0)
    leases("without").announce(FACTS, 1, True, "", 2.5, 90.0)
    (model,) = store.models()
    assert model.facts is not None and model.facts.teacher == teacher and model.capacity == 2
    leases("with").announce(replace(FACTS, teacher=teacher), 1, True, "", 2.5, -1.0)
    (model,) = store.models()
    assert model.facts is not None and model.facts.teacher is None

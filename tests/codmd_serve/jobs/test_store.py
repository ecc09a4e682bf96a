"""The job store on SQLite and PostgreSQL: submitting, finding, cancelling, reuse, idempotency, bounds and expiry."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from codmd_serve.errors import ConflictError, QueueFullError
from codmd_serve.jobs.leases import Finished, Leases
from codmd_serve.jobs.states import Job, NewJob, Result
from codmd_serve.jobs.store import JobStore, QueueLimits

Submit = Callable[..., Job]
LeasesOf = Callable[..., Leases]


def result(name: str, num_bytes: int = 10, ttl_s: float = 1e9) -> Result:
    return Result(
        id=name,
        name=f"{name}.mp4",
        num_bytes=num_bytes,
        sha256="0" * 64,
        media_type="video/mp4",
        expires_at=1e9 + ttl_s if ttl_s > 0 else 1.0,
    )


def complete(leases: Leases, video: Result) -> Job:
    job = leases.claim()
    assert job is not None
    assert leases.finish(job.id, Finished(status="completed", timings_ms={"text": 1.5}, warnings=["w"], result=video))
    return job


def test_a_job_is_found_as_it_was_submitted(store: JobStore, submit: Submit) -> None:
    job = submit("a \u00e9 \U0001f409", owner="k", is_preview=True, webhook_url="https://h.example/x", model="m")
    assert store.get(job.id) == job
    assert (job.status, job.attempts, job.owner, job.is_preview, job.model) == ("queued", 0, "k", True, "m")
    assert job.params.prompt == "a \u00e9 \U0001f409" and job.params.seed == 1 and not job.is_final
    assert store.get("nowhere") is None


def test_only_the_owner_sees_a_job(store: JobStore, submit: Submit) -> None:
    mine, other = submit("a", owner="me"), submit("b", owner="you")
    assert store.get(other.id, "me") is None and store.get(mine.id, "me") == mine
    assert [job.id for job in store.list_jobs("me")] == [mine.id]
    assert [job.id for job in store.list_jobs()] == [other.id, mine.id]


def test_list_goes_page_by_page_in_both_directions_and_by_status(store: JobStore, submit: Submit) -> None:
    jobs = [submit(str(number)) for number in range(5)]
    store.cancel(jobs[3].id)
    first = store.list_jobs(limit=2)
    assert [job.id for job in first] == [jobs[4].id, jobs[3].id]
    assert [job.id for job in store.list_jobs(limit=9, after=first[-1].number)] == [job.id for job in jobs[2::-1]]
    upwards = store.list_jobs(limit=2, after=jobs[1].number, is_ascending=True)
    assert [job.id for job in upwards] == [jobs[2].id, jobs[3].id]
    assert [job.id for job in store.list_jobs(status="cancelled")] == [jobs[3].id]
    assert store.counts() == {"queued": 4, "running": 0, "completed": 0, "failed": 0, "cancelled": 1, "expired": 0}
    assert store.queue("b")[:2] == (4, 0) and store.queue("other")[:2] == (0, 0)


def test_position_counts_what_waits_before(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    jobs = [submit(str(number)) for number in range(3)]
    assert [store.position(job) for job in jobs] == [0, 1, 2]
    leases("d").claim()
    assert store.position(jobs[2]) == 1


def test_a_full_queue_takes_no_more_and_says_when(submit: Submit, leases: LeasesOf) -> None:
    limits = QueueLimits(queue_size=2, retry_after_s=7)
    submit("1", limits)
    submit("2", limits)
    with pytest.raises(QueueFullError, match="2 jobs are waiting") as caught:
        submit("3", limits)
    assert (caught.value.retry_after_s, caught.value.code) == (7, "queue_full")
    leases("d").claim()
    submit("3", limits)


def test_an_owner_takes_no_more_than_its_share(submit: Submit) -> None:
    limits = QueueLimits(queue_size=10, owner_share=1)
    submit("1", limits, owner="me")
    with pytest.raises(QueueFullError, match="of this API key") as caught:
        submit("2", limits, owner="me")
    assert caught.value.code == "quota_exceeded"
    submit("2", limits, owner="you")


def test_the_bound_holds_against_threads(store: JobStore, submit: Submit) -> None:
    def attempt(number: int) -> bool:
        try:
            submit(str(number), QueueLimits(queue_size=5))
        except QueueFullError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(24))) == 5
    assert store.counts()["queued"] == 5


# idempotency


def test_the_same_key_and_body_is_the_same_job(store: JobStore, submit: Submit) -> None:
    first = submit("a", idempotency_key="k", body_hash="1")
    key = first.content_key
    new = NewJob(params=first.params, bundle="b", content_key=key, idempotency_key="k", body_hash="1")
    again, is_new = store.submit(new, QueueLimits(queue_size=1))
    assert again == first and not is_new


def test_the_same_key_with_another_body_is_refused_but_not_for_another_owner(submit: Submit) -> None:
    first = submit("a", idempotency_key="k", body_hash="1")
    with pytest.raises(ConflictError, match="another body") as caught:
        submit("b", idempotency_key="k", body_hash="2")
    assert caught.value.code == "idempotency_conflict"
    assert submit("b", idempotency_key="k", body_hash="2", owner="other").id != first.id


def test_a_key_raced_by_threads_gives_one_job(store: JobStore, submit: Submit) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: submit("a", idempotency_key="k", body_hash="1").id, range(16)))
    assert len(set(jobs)) == 1 and store.counts()["queued"] == 1


# cancelling


def test_a_waiting_job_is_cancelled_at_once_and_stays_so(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    job = submit("a")
    cancelled = store.cancel(job.id)
    assert cancelled is not None and cancelled.status == "cancelled" and cancelled.finished_at is not None
    assert leases("d").claim() is None
    assert store.cancel(job.id) == cancelled and store.cancel("nowhere") is None


def test_a_running_job_is_asked_to_end_and_may_end_either_way(
    store: JobStore, submit: Submit, leases: LeasesOf
) -> None:
    first, second, dispatcher = submit("a"), submit("b"), leases("d")
    for job, status in ((first, "cancelled"), (second, "completed")):
        assert dispatcher.claim() is not None
        asked = store.cancel(job.id)
        assert asked is not None and asked.status == "running" and asked.is_cancel_requested
        assert dispatcher.heartbeat().cancelled == {job.id}
        finished = Finished(status=status, result=result("r") if status == "completed" else None)
        assert dispatcher.finish(job.id, finished)
        late = store.cancel(job.id)
        assert late is not None and late.status == status, "a final status is sticky"


def test_a_deleted_job_is_found_nowhere_and_its_key_is_free(store: JobStore, submit: Submit) -> None:
    job = submit("a", idempotency_key="k", body_hash="1")
    store.delete(job.id)
    assert store.get(job.id) is None and store.list_jobs() == [] and store.counts()["queued"] == 0
    assert submit("b", idempotency_key="k", body_hash="2").id != job.id


def test_a_job_deleted_while_it_runs_leaves_nothing(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    job, dispatcher = submit("a"), leases("d")
    dispatcher.claim()
    store.delete(job.id)
    assert not dispatcher.finish(job.id, Finished(status="completed", result=result("r")))
    assert store.has_result_named(["r.mp4"]) == set()


# reuse and expiry


def test_an_equal_request_is_answered_from_the_store(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    submit("a")
    first = complete(leases("d"), result("r"))
    again = submit("a", QueueLimits(queue_size=1))
    assert again.status == "completed" and again.is_reused and again.id != first.id
    assert again.result is not None and again.result.name == "r.mp4"
    assert submit("b").status == "queued", "another content"
    assert submit("a", may_reuse=False).status == "queued", "no-cache"


def test_a_result_is_filed_under_the_engine_that_made_it(submit: Submit, leases: LeasesOf) -> None:
    submit("a")
    other = leases("d")
    other.engine_key = "another"
    complete(other, result("r"))
    assert submit("a").status == "queued"


def test_what_a_job_took_is_remembered(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    submit("a")
    job = store.get(complete(leases("d"), result("r")).id)
    assert job is not None and job.is_final and job.timings_ms == {"text": 1.5} and job.warnings == ["w"]
    assert job.started_at is not None and job.finished_at is not None
    assert job.created_at <= job.started_at <= job.finished_at
    assert job.expires_at is not None and job.lease_owner == ""


def test_results_expire_by_age(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    submit("old")
    submit("new")
    old, new = complete(leases("d"), result("1", ttl_s=0)), complete(leases("d"), result("2"))
    assert submit("old").status == "queued", "a result past its time is not given again"
    assert store.expire(0, 100) == ["1.mp4"]
    statuses = {job.id: job.status for job in store.list_jobs()}
    assert statuses[old.id] == "expired" and statuses[new.id] == "completed"
    assert store.expire(0, 100) == []


def test_results_expire_by_size_the_least_recently_used_first(
    store: JobStore, submit: Submit, leases: LeasesOf
) -> None:
    for name in ("1", "2", "3"):
        submit(name)
        complete(leases("d"), result(name, num_bytes=40))
    submit("1")  # used again
    assert store.expire(80, 100) == ["2.mp4"]
    assert store.has_result_named(["1.mp4", "2.mp4", "3.mp4"]) == {"1.mp4", "3.mp4"}


def test_a_result_goes_with_the_last_job_that_has_it(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    submit("a")
    first = complete(leases("d"), result("r"))
    second = submit("a")
    store.delete(first.id)
    assert store.expire(0, 100) == []
    store.delete(second.id)
    assert store.expire(0, 100) == ["r.mp4"]


def test_old_records_are_forgotten(store: JobStore, submit: Submit) -> None:
    jobs = [submit(str(number)) for number in range(5)]
    for job in jobs[:4]:
        store.cancel(job.id)
    store.expire(0, 2)
    assert [job.id for job in store.list_jobs()] == [jobs[4].id, jobs[3].id, jobs[2].id]


def test_a_result_whose_file_is_gone_is_marked(store: JobStore, submit: Submit, leases: LeasesOf) -> None:
    submit("a")
    job = complete(leases("d"), result("r"))
    store.mark_expired(job.id)
    found = store.get(job.id)
    assert found is not None and found.status == "expired" and found.result is None


def test_keep_detaches_a_job_from_its_client(store: JobStore, submit: Submit) -> None:
    job = submit("a")
    store.keep(job.id)
    assert store.get(job.id) == replace(job, is_detached=True)

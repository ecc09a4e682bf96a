"""A hand-over between two threads: in order, bounded, ended by a failure of either side; and a shared memory."""

import threading
from collections.abc import Callable, Iterator

import pytest

from codmd_serve.threads import BoundedQueue, LruCache

DEADLINE_S = 60.0


def ends(handover: BoundedQueue[int, list[int]]) -> bool:
    """Whether the consumer's thread is gone, waiting for it as long as a machine with little to spare may need."""
    joiner = threading.Thread(target=handover.join, daemon=True)
    joiner.start()
    joiner.join(DEADLINE_S)
    return not joiner.is_alive()


def test_items_arrive_in_order_and_the_result_holds_what_the_consumer_returned() -> None:
    handover: BoundedQueue[int, list[int]] = BoundedQueue(list)
    for number in range(20):
        handover.put(number)
    handover.complete()
    assert handover.result.result(DEADLINE_S) == list(range(20))
    assert ends(handover)


def test_no_more_items_wait_than_allowed() -> None:
    may_go_on, taken = threading.Event(), list[int]()

    def consume(items: BoundedQueue[int, list[int]]) -> list[int]:
        may_go_on.wait(DEADLINE_S)
        taken.extend(items)
        return taken

    handover = BoundedQueue(consume, size=2)
    put: list[int] = []

    def produce() -> None:
        for number in range(5):
            handover.put(number)
            put.append(number)
        handover.complete()

    producer = threading.Thread(target=produce)
    producer.start()
    while len(put) < 2:
        pass
    producer.join(0.05)  # the time it would take to put one too many
    assert put == [0, 1] and producer.is_alive()
    may_go_on.set()
    producer.join(DEADLINE_S)
    assert handover.result.result(DEADLINE_S) == [0, 1, 2, 3, 4]


def test_a_consumer_that_fails_ends_the_producer() -> None:
    def consume(items: BoundedQueue[int, list[int]]) -> list[int]:
        next(iter(items))
        raise ValueError("cannot take more")

    handover = BoundedQueue(consume, size=1)

    def produce() -> None:
        for number in range(1000):
            handover.put(number)

    with pytest.raises(ValueError, match="cannot take more"):
        produce()
    assert ends(handover)


def test_what_a_consumer_does_not_want_any_more_is_dropped() -> None:
    handover: BoundedQueue[int, list[int]] = BoundedQueue(lambda items: [next(iter(items))], size=1)
    for number in range(100):
        handover.put(number)
    handover.complete()
    assert handover.result.result(DEADLINE_S) == [0]


def test_abandoning_raises_the_reason_in_a_consumer_that_waits_for_items() -> None:
    seen: list[BaseException] = []

    def consume(items: BoundedQueue[int, list[int]]) -> list[int]:
        try:
            return list(items)
        except KeyError as error:
            seen.append(error)
            raise

    handover = BoundedQueue(consume)
    handover.put(1)
    reason = KeyError("enough")
    handover.abandon(reason)
    assert seen == [reason] and handover.result.exception(DEADLINE_S) is reason
    assert ends(handover)


def test_abandoning_interrupts_a_consumer_that_waits_for_something_else() -> None:
    is_interrupted, is_waiting = threading.Event(), threading.Event()

    def consume(items: BoundedQueue[int, list[int]]) -> list[int]:
        items.on_abandon(is_interrupted.set)
        taken = list(items)
        is_waiting.set()
        assert is_interrupted.wait(DEADLINE_S)
        return taken

    handover = BoundedQueue(consume)
    handover.complete()
    assert is_waiting.wait(DEADLINE_S)
    handover.abandon(KeyError("enough"))
    assert handover.result.result() == []


def test_callbacks_of_the_result_have_run_when_join_returns() -> None:
    told: list[list[int]] = []
    go_on = threading.Event()
    handover: BoundedQueue[int, list[int]] = BoundedQueue(lambda items: list(items) if go_on.wait(DEADLINE_S) else [])
    handover.result.add_done_callback(lambda future: told.append(future.result()))
    handover.put(3)
    handover.complete()
    go_on.set()
    handover.join()
    assert told == [[3]]


def test_memory_computes_once_and_lets_go_of_the_oldest() -> None:
    computed: list[str] = []

    def compute(key: str) -> str | None:
        computed.append(key)
        return None if key == "n" else key.upper()

    memory: LruCache[str, str | None] = LruCache(compute, size=2)
    assert [memory(key) for key in "anan"] == ["A", None, "A", None]
    assert computed == ["a", "n"]
    memory("a")
    memory("c")
    assert computed == ["a", "n", "c"]
    memory("a")
    memory("n")
    assert computed == ["a", "n", "c", "n"]


def test_memory_does_not_remember_a_failure() -> None:
    answers: Iterator[Exception | int] = iter([ValueError("not yet"), 7])

    def compute(_: str) -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    memory = LruCache(compute, size=2)
    with pytest.raises(ValueError, match="not yet"):
        memory("a")
    assert memory("a") == 7


def in_thread(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_memory_finds_what_it_knows_while_another_thread_computes_and_computes_a_key_once() -> None:
    is_slow, may_end, computed = threading.Event(), threading.Event(), list[str]()

    def compute(key: str) -> str:
        computed.append(key)
        if key == "slow":
            is_slow.set()
            assert may_end.wait(DEADLINE_S)
        return key.upper()

    memory = LruCache(compute, size=4)
    memory("known")
    threads = [in_thread(lambda: memory("slow")) for _ in range(2)]
    assert is_slow.wait(DEADLINE_S)
    assert memory("known") == "KNOWN", "and does not wait for the slow one"
    may_end.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert computed == ["known", "slow"]

"""What the threads of one engine share: a bounded hand-over to a consumer, and a memory of slow results.

Knows nothing of tensors, videos or processes.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key")
Value = TypeVar("Value")

# One that is being consumed, one ready behind it: more would only cost memory.
NUM_HANDED_OVER = 2


class HandOver(Generic[Item, Result]):
    """A consumer in a thread of its own, fed with items; a failure of either side ends the other.

    Args:
        consume: iterates the hand-over that it is given, to its end, and returns what `result` is to hold. Its thread
            starts at once.
        size: items that may wait for it; the producer waits while there are as many.

    Attributes:
        result: what `consume` returned or raised; its callbacks run in the consumer's thread.
    """

    def __init__(self, consume: Callable[["HandOver[Item, Result]"], Result], *, size: int = NUM_HANDED_OVER) -> None:
        self.result: Future[Result] = Future()
        self._consume, self._size = consume, size
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._is_complete = self._is_ended = False
        self._reason: BaseException | None = None
        self._interrupt: Callable[[], object] | None = None
        # A daemon: a process that ends does not wait for an encoder that hangs.
        self._thread = threading.Thread(target=self._run, name="codmd-tail", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand an item over, as soon as there is room. One that the consumer does not want any more is dropped.

        Raises:
            BaseException: what the consumer raised, if it did.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or len(self._items) < self._size)
            if not self._is_ended:
                self._items.append(item)
                self._changed.notify_all()
                return
        self.join()
        self.result.result()

    def complete(self) -> None:
        """Say that nothing more will come; returns at once."""
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    def abandon(self, reason: BaseException) -> None:
        """End the consumer, which gets `reason` in place of its next item, and wait until it has ended."""
        with self._changed:
            self._reason = reason
            self._changed.notify_all()
            interrupt = self._interrupt
        if interrupt is not None:
            interrupt()
        self.join()

    @property
    def is_complete(self) -> bool:
        """Whether nothing more will come."""
        return self._is_complete

    def on_abandon(self, interrupt: Callable[[], object]) -> None:
        """For the consumer: what ends it while it waits for something else than items. Called in another thread."""
        with self._changed:
            self._interrupt = interrupt

    def join(self) -> None:
        """Wait until the consumer has ended, and the callbacks of `result` with it."""
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reason or self._items or self._is_complete)
                if self._reason is not None:
                    raise self._reason
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item

    def _run(self) -> None:
        try:
            result = self._consume(self)
        except BaseException as error:  # it is the producer's to raise
            self._end()
            self.result.set_exception(error)
        else:
            self._end()
            self.result.set_result(result)

    def _end(self) -> None:
        with self._changed:
            self._is_ended = True
            self._items.clear()
            self._changed.notify_all()


class Memory(Generic[Key, Value]):
    """The last results of a slow function, for any thread. One is computed at a time; a known one waits for nothing.

    Args:
        compute: the function. What it raises goes to who asked, and is not remembered.
        size: results that are kept; the one asked for longest ago goes.
    """

    def __init__(self, compute: Callable[[Key], Value], *, size: int) -> None:
        self._compute, self._size = compute, size
        self._known: OrderedDict[Key, Value] = OrderedDict()
        self._looking, self._computing = threading.Lock(), threading.Lock()

    def __call__(self, key: Key) -> Value:
        """The result for `key`."""
        known = self._look_up(key)
        if known is None:
            with self._computing:
                # Again: another thread may have computed it in the meantime.
                known = self._look_up(key) or self._remember(key, self._compute(key))
        return known[0]

    def _look_up(self, key: Key) -> tuple[Value] | None:
        with self._looking:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return (self._known[key],)

    def _remember(self, key: Key, value: Value) -> tuple[Value]:
        with self._looking:
            self._known[key] = value
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return (value,)

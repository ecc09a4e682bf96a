"""What the threads of one engine share: a bounded queue to a consumer thread, and an LRU cache.

Knows nothing of tensors, videos or processes.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

# Double buffering: one item is being consumed, one is ready behind it. More would only cost memory.
BUFFER_SIZE = 2


class BoundedQueue(Generic[ItemT, ResultT]):
    """A bounded queue to a consumer thread; a failure of either side ends the other.

    Args:
        consume: iterates this queue to its end and returns the value of `result`. Its thread starts at once.
        size: capacity of the queue; `put` blocks while it is full.

    Attributes:
        result: what `consume` returned or raised; its callbacks run in the consumer thread.
    """

    def __init__(
        self, consume: Callable[["BoundedQueue[ItemT, ResultT]"], ResultT], *, size: int = BUFFER_SIZE
    ) -> None:
        self.result: Future[ResultT] = Future()
        self._consume, self._size = consume, size
        self._items: deque[ItemT] = deque()
        self._changed = threading.Condition()
        self._is_complete = self._is_ended = False
        self._reason: BaseException | None = None
        self._interrupt: Callable[[], object] | None = None
        # A daemon: a process that ends does not wait for an encoder that hangs.
        self._thread = threading.Thread(target=self._run, name="codmd-tail", daemon=True)
        self._thread.start()

    def put(self, item: ItemT) -> None:
        """Append an item, as soon as there is room. Items after the end of the consumer are dropped.

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
        """Close the queue to further items; return at once."""
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    def abandon(self, reason: BaseException) -> None:
        """Raise `reason` in the consumer in place of its next item, and wait until it has ended."""
        with self._changed:
            self._reason = reason
            self._changed.notify_all()
            interrupt = self._interrupt
        if interrupt is not None:
            interrupt()
        self.join()

    @property
    def is_complete(self) -> bool:
        """Return whether the queue is closed to further items."""
        return self._is_complete

    def on_abandon(self, interrupt: Callable[[], object]) -> None:
        """Register what unblocks the consumer when it waits for something else than items; any thread may call it."""
        with self._changed:
            self._interrupt = interrupt

    def join(self) -> None:
        """Wait until the consumer and the callbacks of `result` have ended."""
        self._thread.join()

    def __iter__(self) -> Iterator[ItemT]:
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


class LruCache(Generic[KeyT, ValueT]):
    """A thread-safe LRU cache of a slow function. Misses run one at a time; a hit never waits for a miss.

    Args:
        compute: the function. Its exceptions go to the caller and are not cached.
        size: number of results that are kept.
    """

    def __init__(self, compute: Callable[[KeyT], ValueT], *, size: int) -> None:
        self._compute, self._size = compute, size
        self._known: OrderedDict[KeyT, ValueT] = OrderedDict()
        self._looking, self._computing = threading.Lock(), threading.Lock()

    def __call__(self, key: KeyT) -> ValueT:
        """Return the result for `key`."""
        known = self._look_up(key)
        if known is None:
            with self._computing:
                # Again: another thread may have computed it in the meantime.
                known = self._look_up(key) or self._remember(key, self._compute(key))
        return known[0]

    def _look_up(self, key: KeyT) -> tuple[ValueT] | None:
        with self._looking:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return (self._known[key],)

    def _remember(self, key: KeyT, value: ValueT) -> tuple[ValueT]:
        with self._looking:
            self._known[key] = value
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return (value,)

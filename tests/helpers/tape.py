"""A CUDA graph on a CPU: repeats the operators of a run on the very tensors that they had, and nothing of its Python.

What Python does in between, such as binding a new tensor to a name, is not repeated, which is what makes graphs wrong
where buffers move. Reading a value on the host fails, as it does while a stream is captured. All tapes of one recorder
share a pool: a replay destroys the outputs of the other tapes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUM_WARM_RUNS = 2
NOT_CAPTURABLE = ("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.nonzero")

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if str(func).startswith(NOT_CAPTURABLE):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class TapeRecorder:
    """Records functions of tensors as `CudaRecorder` does, on a CPU.

    Attributes:
        num_recorded, num_replayed: runs.
    """

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0
        self._outputs: list[Tensor] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        for _ in range(NUM_WARM_RUNS):
            run()
        with _Recording() as recording:
            output = run()
        self.num_recorded += 1
        others = list(self._outputs)
        self._outputs.append(output)

        def replay() -> None:
            self.num_replayed += 1
            for other in (*others, *self._outputs[len(others) + 1 :]):
                other.fill_(99)
            for func, args, kwargs, result in recording.calls:
                _overwrite(result, func(*args, **kwargs), (args, kwargs))

        return replay, output


def _overwrite(result: Any, again: Any, given: Any) -> None:
    """Put new results where the recorded ones lie; views and tensors written in place are there already."""
    places = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
        if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in places:
            old.copy_(new)

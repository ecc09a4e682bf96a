"""Builds modules whose weights are about to be loaded, without drawing random ones first."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

INITIALISERS = ("kaiming_uniform_", "normal_", "uniform_")


@contextlib.contextmanager
def blank_weights() -> Iterator[None]:
    """Leave new weights as they are within the block; for one thread.

    Layers draw theirs when they are made, also on the meta device, where torch imports its whole compiler for that.
    """
    kept = {name: getattr(nn.init, name) for name in INITIALISERS}
    for name in INITIALISERS:
        setattr(nn.init, name, _leave)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


def _leave(tensor: Tensor, *_: Any, **_options: Any) -> Tensor:
    return tensor

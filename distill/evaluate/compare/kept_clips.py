"""Clips that take minutes to sample, kept in the cache folder, made by whoever needs them first.

CACHE/NAME/00000.safetensors      clips 0 to 15, complete or absent
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from codmd_serve.errors import CheckpointError
from codmd_serve.files import atomic_file, first_line
from distill.evaluate.sample import Request

SHARD_SIZE = 16


def kept_clips(
    folder: Path, requests: Sequence[Request], make: Callable[[Sequence[Request]], np.ndarray]
) -> np.ndarray:
    """Return the clips of some requests, making those that the folder does not have.

    Several processes share the work: each makes a shard that no other is at. An interrupted call has lost the shard
    that it was at.

    Args:
        folder: its name must follow from all that the clips depend on.
        requests: of all clips.
        make: clips of some of them, uint8 (K, T, H, W, 3).

    Raises:
        CheckpointError: a shard cannot be written or read.
    """
    parts = [requests[first : first + SHARD_SIZE] for first in range(0, len(requests), SHARD_SIZE)]
    paths = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First what nobody else is at, then wait for the rest.
        for must_wait in (False, True):
            for path, part in zip(paths, parts, strict=True):
                if path.is_file():
                    continue
                with _locked(path.with_suffix(".lock"), must_wait) as is_locked:
                    if is_locked and not path.is_file():
                        _save(path, make(part))
        return np.concatenate([load_file(path)["clips"].numpy() for path in paths])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"clips of the teacher in {folder}: {first_line(error)}") from error


def _save(path: Path, clips: np.ndarray) -> None:
    with atomic_file(path) as temporary:
        save_file({"clips": torch.from_numpy(np.ascontiguousarray(clips))}, temporary)


@contextmanager
def _locked(path: Path, must_wait: bool) -> Iterator[bool]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if must_wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True

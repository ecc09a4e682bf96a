"""Distances of laws: each planted fault is seen by its own metric; clips that are kept are made once."""

import fcntl
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from codmd_serve.errors import CheckpointError
from distill.evaluate.compare.kept_clips import SHARD_SIZE, kept_clips
from distill.evaluate.compare.shape_law import Law, copying, distances, law_of, matrices
from distill.evaluate.joint import FACTORS
from distill.evaluate.sample import Request


def law(seed: int, scale: float = 1.0, rho: float = 0.8) -> Law:
    """Two captions of 256 clips: radius and speed tied, all other factors free; frames share their brightness."""
    rng = np.random.default_rng(seed)
    factors, clips = [], []
    for count in (1, 2):
        values = rng.normal(0.5, 0.1 * scale, (256, len(FACTORS)))
        radius, speed = (FACTORS.index(name) for name in ("radius", "speed"))
        free = values[:, speed] - 0.5
        values[:, speed] = 0.5 + rho * (values[:, radius] - 0.5) + np.sqrt(1 - rho**2) * free
        missing = ("offset1", "offset2") if count == 1 else ("place_x", "place_y")
        values[:, [FACTORS.index(name) for name in missing]] = np.nan
        shared, own = rng.normal(0, 30, (256, 1, 2, 2, 3)), rng.normal(0, 15, (256, 5, 2, 2, 3))
        factors.append(values)
        clips.append(np.clip(128 + shared + own, 0, 255).astype(np.uint8).repeat(4, axis=2).repeat(4, axis=3))
    return law_of(factors, clips)


def test_every_fault_is_seen_by_its_own_distance() -> None:
    reference = law(0)
    same, loose, wide = (distances(own, reference) for own in (law(1), law(1, rho=0.0), law(1, scale=2.0)))
    # Three of the four pairs are free in both laws, so only one moves the mean.
    assert same["tau_err"] < 0.06 and same["w1"] < 0.2 and abs(same["sd_ratio"] - 1.0) < 0.1
    assert abs(same["tau_kept"] - 1.0) < 0.15 and same["frame_rho"] < 0.1 and same["kept_err"] < 0.1
    assert loose["tau_err"] > same["tau_err"] + 0.1 and loose["tau_kept"] < 0.3 and loose["w1"] < 0.2
    assert wide["w1"] > 0.5 and wide["sd_ratio"] > 1.8 and wide["tau_err"] < 0.06
    assert len(same["taus"]) == 4


def test_matrices_are_of_the_factors_that_every_caption_has() -> None:
    found = matrices(law(2))
    tau = np.array(found["tau"])
    shared = [name for name in FACTORS if name not in ("offset1", "offset2", "place_x", "place_y")]
    assert tau.shape == (len(shared),) * 2 and np.array(found["rho"]).shape == (2, 2)
    assert 0.45 < tau[shared.index("radius"), shared.index("speed")] < 0.75
    np.testing.assert_allclose(tau, tau.T)


def test_copying_is_of_the_same_noise_only() -> None:
    clips = [np.random.default_rng(seed).integers(0, 256, (6, 5, 8, 8, 3)).astype(np.uint8) for seed in (0, 1)]
    assert copying(clips, clips) == pytest.approx(1.0)
    assert copying(clips, [own[::-1] for own in clips]) < 0.0
    assert copying([own * 0 for own in clips], clips) == 0.0


REQUESTS = [Request("a red circle", number, 0) for number in range(SHARD_SIZE + 3)]


def made(requests: Sequence[Request]) -> np.ndarray:
    return np.full((len(requests), 2, 4, 4, 3), requests[0].caption_index, dtype=np.uint8)


def test_kept_clips_are_made_once_and_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    calls: list[int] = []

    def make(requests: Sequence[Request]) -> np.ndarray:
        calls.append(requests[0].caption_index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(requests)

    with pytest.raises(KeyboardInterrupt):
        kept_clips(tmp_path, REQUESTS, make)
    clips = kept_clips(tmp_path, REQUESTS, make)
    assert calls == [0, SHARD_SIZE, SHARD_SIZE] and clips[:, 0, 0, 0, 0].tolist() == [0] * SHARD_SIZE + [SHARD_SIZE] * 3
    assert np.array_equal(kept_clips(tmp_path, REQUESTS, make), clips) and len(calls) == 3
    (tmp_path / "00000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="clips of the teacher in"):
        kept_clips(tmp_path, REQUESTS, make)


def test_a_shard_that_another_process_is_at_is_left_for_last(tmp_path: Path) -> None:
    calls: list[int] = []
    other = (tmp_path / "00000.lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)

    def make(requests: Sequence[Request]) -> np.ndarray:
        calls.append(requests[0].caption_index)
        if requests[0].caption_index:  # the other process ends without its shard while this one makes the next
            threading.Thread(target=other.close).start()
        return made(requests)

    assert len(kept_clips(tmp_path, REQUESTS, make)) == len(REQUESTS)
    assert calls == [SHARD_SIZE, 0]

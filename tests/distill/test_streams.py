"""Streams of random numbers: functions of their names alone, and no two of a whole run alike."""

from typing import Any

import pytest
import torch

from distill import streams
from distill.streams import named_rng, sample_noise

ITERATIONS, BATCH = 600, 32


def state_of(rng: torch.Generator) -> bytes:
    return rng.get_state().numpy().tobytes()


def test_a_stream_is_a_function_of_its_name() -> None:
    draws = [torch.randn(5, generator=named_rng(7, "critic", 3, 2)) for _ in range(2)]
    assert torch.equal(*draws)
    assert abs(float(torch.randn(10_000, generator=named_rng(0, "a", 0)).mean())) < 0.05
    assert abs(float(torch.randn(10_000, generator=named_rng(0, "a", 0)).std()) - 1.0) < 0.05


def test_seeds_that_differ_in_their_upper_half_alone_differ() -> None:
    """torch.Generator.manual_seed keeps the lower 32 bits of a seed."""
    first, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.rand(3, generator=first), torch.rand(3, generator=other))
    assert state_of(named_rng(5, "a", 0)) != state_of(named_rng(5 + 2**32, "a", 0))


def test_no_two_streams_of_a_whole_run_coincide() -> None:
    """Every stream that a run of any method asks for, by the head of its state."""
    seen = []
    for index in range(ITERATIONS):
        for name in ("exit", "levels", "teacher-latents", "preview"):
            seen.append(head(named_rng(0, name, index)))
        for role in ("student", "critic"):
            rng = named_rng(0, role, index)
            seen.append(head(rng))
            with_noise = []
            original = streams.named_rng

            def noted(*key: Any, original: Any = original, found: list[bytes] = with_noise) -> torch.Generator:
                found.append(head(rng := original(*key)))
                return rng

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(streams, "named_rng", noted)
                sample_noise(rng, (1,), range(BATCH))
            assert len(with_noise) == BATCH
            seen += with_noise
    assert len(seen) == ITERATIONS * (4 + 2 * (1 + BATCH))
    assert len(set(seen)) == len(seen)


def head(rng: torch.Generator) -> bytes:
    """The first 32 bytes of the Mersenne Twister's state, from which a stream's first numbers follow."""
    return rng.get_state()[24:88].numpy().tobytes()


def test_each_place_of_a_batch_has_noise_of_its_own_on_every_rank() -> None:
    whole = sample_noise(named_rng(0, "critic", 1), (2, 3), range(4))
    part = sample_noise(named_rng(0, "critic", 1), (2, 3), range(2, 4))
    assert torch.equal(whole[2:], part)
    assert len({row.numpy().tobytes() for row in whole}) == 4

"""Streams of random numbers: functions of their names alone, and no two of a whole run alike."""

from collections.abc import Iterator

import pytest
import torch

from distill import streams
from distill.config import DistillConfig, with_overrides
from distill.methods.registry import METHODS, recipe_config
from distill.streams import named_rng, sample_noise

Key = tuple[int, str, int, int]
CPU = torch.device("cpu")


def state_of(rng: torch.Generator) -> bytes:
    return rng.get_state().numpy().tobytes()


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> dict[Key, bytes]:
    """By its name, the first 32 bytes of each stream that is asked for, from which its first numbers follow."""
    seen: dict[Key, bytes] = {}
    original = streams._rngs

    def noted(seed: int, name: str, index: int, positions: range) -> Iterator[torch.Generator]:
        for position, rng in zip(positions, original(seed, name, index, positions), strict=True):
            seen[seed, name, index, position] = state_of(rng)[24 : 24 + 64]
            yield rng

    monkeypatch.setattr(streams, "_rngs", noted)
    return seen


def draw_whole_run(config: DistillConfig) -> int:
    """Draw the turns of a run as the trainer does, for latents of one number; return the number of turns."""
    method, num_turns = METHODS[config.method], 0
    for iteration in range(config.max_iterations):
        for role in method.turns(config, iteration):
            method.draw(config, role, iteration, (config.batch_size, 1, 1, 1, 1), CPU)
            num_turns += 1
    return num_turns


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


@pytest.mark.parametrize(("num_iterations", "batch_size"), [(3000, 2), (60, 64)])
def test_no_two_streams_of_a_run_of_wan_coincide(num_iterations: int, batch_size: int, heads: dict[Key, bytes]) -> None:
    """All iterations of the run, and all places of its batch.

    Places are one number of Philox's counter, so two of a batch cannot coincide, whatever the iteration. Of the run's
    192,000 samples torch's own seeds gave 6 pairs one stream.
    """
    settings = [f"max_iterations={num_iterations}", f"batch_size={batch_size}"]
    config = with_overrides(recipe_config("wan_1_3b", "dmd"), settings)
    num_turns = draw_whole_run(config)
    # A turn has one stream of its own and one for each place of the batch; the exit step's is the iteration's.
    assert len(heads) == num_turns * (1 + batch_size) + num_iterations
    assert len(set(heads.values())) == len(heads)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_two_streams_of_any_method_coincide(method: str, heads: dict[Key, bytes]) -> None:
    config = with_overrides(recipe_config("shapeworld", method), ["max_iterations=300", "batch_size=8"])
    draw_whole_run(config)
    for name in ("preview", "teacher-latents"):
        for index in range(config.max_iterations):
            named_rng(config.seed, name, index)
    assert len(heads) >= 3 * config.max_iterations
    assert len(set(heads.values())) == len(heads)


def test_each_place_of_a_batch_has_noise_of_its_own_on_every_rank() -> None:
    whole = sample_noise(named_rng(0, "critic", 1), (2, 3), range(4))
    part = sample_noise(named_rng(0, "critic", 1), (2, 3), range(2, 4))
    assert torch.equal(whole[2:], part)
    assert len({row.numpy().tobytes() for row in whole}) == 4


def test_streams_of_random_numbers_differ_by_role_step_and_rank() -> None:
    draws = {
        float(torch.rand((), generator=named_rng(*key)))
        for key in [
            (0, "student", 0, 0),
            (0, "critic", 0, 0),
            (0, "student", 1, 0),
            (0, "student", 0, 1),
            (1, "student", 0, 0),
        ]
    }
    assert len(draws) == 5
    repeated = [float(torch.rand((), generator=named_rng(0, "exit", 3))) for _ in range(2)]
    assert repeated[0] == repeated[1]

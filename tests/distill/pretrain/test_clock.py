"""The time budget: shares of the first stages, the rest for the last, counted over sittings."""

import json
import time
from pathlib import Path

import pytest

from distill.pretrain.clock import BUDGET_SHARES, LAST_STAGE, LEAST_S, RESERVED_SHARE, Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_no_minutes_are_no_limit(tmp_path: Path, now: list[float]) -> None:
    assert Clock(tmp_path, None, start=now[0]).budget_s("vae") is None


def test_first_stages_get_their_share_and_the_last_what_is_left(tmp_path: Path, now: list[float]) -> None:
    clock = Clock(tmp_path, 10, start=990.0)  # libraries took 10 s
    assert clock.budget_s("vae") == pytest.approx(600 * BUDGET_SHARES["vae"])
    with clock.stage("vae"):
        now[0] += 50
    now[0] += 5
    assert clock.budget_s(LAST_STAGE) == pytest.approx(600 * (1 - RESERVED_SHARE) - 65)
    assert clock.spent == {"other": 15, "vae": 50}


def test_a_later_sitting_counts_the_earlier_ones(tmp_path: Path, now: list[float]) -> None:
    first = Clock(tmp_path, 10, start=now[0])
    with first.stage("vae"):
        now[0] += 100
    with first.stage(LAST_STAGE):
        now[0] += 30
    now[0] += 10_000  # between two sittings nothing is counted
    second = Clock(tmp_path, 10, start=now[0])
    # A stage's own time so far is within its budget, the others' is not.
    assert second.budget_s(LAST_STAGE) == pytest.approx(600 * (1 - RESERVED_SHARE) - 100)
    assert second.budget_s("latents") == pytest.approx(600 * BUDGET_SHARES["latents"])


def test_a_spent_budget_leaves_next_to_nothing_and_a_failed_stage_counts(tmp_path: Path, now: list[float]) -> None:
    clock = Clock(tmp_path, 1, start=now[0])

    def fail() -> None:
        now[0] += 90
        raise KeyError

    with pytest.raises(KeyError), clock.stage("vae"):
        fail()
    assert clock.budget_s(LAST_STAGE) == LEAST_S
    assert json.loads((tmp_path / "elapsed.json").read_text())["vae"] == 90

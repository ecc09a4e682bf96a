"""Cells run through the trainer: counted calls, finished ones kept, interrupted ones gone on with."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparison import TINY

from codmd_serve.errors import ConfigError
from distill.cli import main
from distill.evaluate.compare.bench import Bench
from distill.evaluate.compare.cells import (
    InterruptedCellError,
    all_cells,
    cell_config,
    expected_calls,
    is_finished,
    run_cell,
)
from distill.evaluate.compare.pool import run_chain, run_chains
from distill.evaluate.compare.table import Arm, parse_table
from distill.run.trainer import Trainer


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells of the tiny table, run by the command in worker processes."""
    folder = tmp_path_factory.mktemp("runs")
    table = folder / "tiny.json"
    table.write_text(json.dumps(TINY), encoding="utf-8")
    command = ["eval", "compare", "run", str(table), "--out", str(folder), "--cache", str(cache)]
    assert main([*command, "--jobs", "2", "--json", str(folder / "result.json")]) == 0
    return folder


def test_counted_calls_are_those_that_the_methods_say(runs: Path) -> None:
    data = json.loads((runs / "result.json").read_text(encoding="utf-8"))
    table = parse_table(TINY)
    cells = {cell.name: cell for chain in all_cells(table, table.seeds) for cell in chain}
    assert len(data["cells"]) == len(cells) == 24
    for found in data["cells"]:
        name = f"{found['arm']} g={found['guidance']:g} seed={found['seed']} budget={found['budget']}"
        if cells[name].arm.kind == "run":
            expected = expected_calls(cell_config(cells[name]))
            assert (found["calls"]["teacher"], found["calls"]["critic"]) == (expected["teacher"], expected["critic"])
            assert found["student_updates"] == found["budget"]
        steps = 1 if found["arm"] == "truth" else 4
        assert len(found["steps"]) == steps and set(TINY["metrics"]) <= found["steps"][0].keys()


def test_the_teacher_copies_itself_and_the_law_copies_nobody(runs: Path) -> None:
    data = json.loads((runs / "result.json").read_text(encoding="utf-8"))
    copied = {cell["arm"]: cell["steps"][-1]["copying"] for cell in data["cells"]}
    assert copied["teacher_4"] > 0.7 and abs(copied["truth"]) < 0.2


def test_a_finished_cell_is_never_run_again(runs: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.name != ".lock"}
    command = ["eval", "compare", "run", str(runs / "tiny.json"), "--out", str(runs), "--cache", str(cache)]
    assert main([*command, "--json", str(runs.parent / "again.json")]) == 0
    assert "24 of 24 cells are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.name != ".lock"} == before
    assert (runs.parent / "again.json").read_bytes() == (runs / "result.json").read_bytes()


def test_an_arm_that_no_budget_changes_is_scored_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clips, of ShapeWorld, cost 90 seconds a budget."""
    alone = {
        "method": "regression",
        "updates": 2,
        "settings": {"regression.paths": 4, "regression.teacher_steps": 3},
        "unequal": "the start alone",
    }
    table = parse_table({**TINY, "arms": {**TINY["arms"], "alone": alone}})
    scored: list[str] = []
    score = Bench.score_arm

    def counting(self: Bench, arm: Arm, *args: Any, **options: Any) -> dict[str, Any]:
        scored.append(arm.name)
        return score(self, arm, *args, **options)

    monkeypatch.setattr(Bench, "score_arm", counting)
    for chain in all_cells(table, (1,)):
        if chain[0].arm.name in ("truth", "alone", "dmd"):
            run_chain(chain, tmp_path, cache)
    assert scored == ["truth", "dmd", "dmd", "alone"]
    for name in ("truth", "alone"):
        first, second = (
            json.loads((tmp_path / f"tiny/{name}/g1/seed1/scores-{budget}.json").read_bytes()) for budget in (2, 3)
        )
        assert (first.pop("budget"), second.pop("budget")) == (2, 3)
        assert first.pop("config") != second.pop("config") or name == "alone"
        assert first == second
    assert all(is_finished(cell, tmp_path) for cell in all_cells(table, (1,))[0])


def test_a_lost_cell_is_made_again_and_a_lost_seed_is_refused_with_the_list(
    runs: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = runs / "tiny" / "codmd" / "g1" / "seed2" / "scores-3.json"
    kept = lost.read_bytes()
    lost.unlink()
    command = [str(runs / "tiny.json"), "--out", str(runs), "--json", str(tmp_path / "x.json")]
    try:
        assert main(["eval", "compare", "collect", *command]) == 2
        assert "no scores of codmd g=1 budget=3 seed=2" in capsys.readouterr().err
        table = parse_table(TINY)
        (chain,) = [
            cells for cells in all_cells(table, table.seeds) if cells[0].arm.name == "codmd" and cells[0].seed == 2
        ]
        assert run_chain(chain, runs, cache) == ([cell.name for cell in chain], {})
        again, before = json.loads(lost.read_bytes()), json.loads(kept)
        assert again["steps"] == before["steps"] and again["calls"] == before["calls"]
    finally:
        lost.write_bytes(kept)


def test_interrupted_in_the_second_budget_it_goes_on_to_the_same_scores(
    runs: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = parse_table(TINY)
    (chain,) = [cells for cells in all_cells(table, (1,)) if cells[0].arm.name == "dmd+start"]
    original: Callable[[Trainer], dict[str, torch.Tensor]] = Trainer.iterate

    def stopped(self: Trainer) -> dict[str, torch.Tensor]:
        if self.iteration == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Trainer, "iterate", stopped)
    run_cell(chain[0], tmp_path, cache)
    with pytest.raises(InterruptedCellError):
        run_cell(chain[1], tmp_path, cache)
    monkeypatch.undo()
    run_cell(chain[1], tmp_path, cache)
    for cell in chain:
        own, whole = (json.loads(cell.scores(folder).read_bytes()) for folder in (tmp_path, runs))
        assert own["steps"] == whole["steps"] and own["calls"] == whole["calls"]


def test_a_signal_ends_all_workers_and_none_begins_another_cell(cache: Path, tmp_path: Path) -> None:
    table = parse_table(TINY)
    chains = [chain for chain in all_cells(table, (1, 2)) if chain[0].arm.kind in ("truth", "dmd", "run")]
    told: list[str] = []

    def tell(name: str) -> None:
        told.append(name)
        if len(told) == 1:  # a second signal would end this process
            os.kill(os.getpid(), signal.SIGTERM)

    report = run_chains(chains, tmp_path, cache, 2, tell)
    assert report.signal_number == signal.SIGTERM and report.failed == {}
    finished = [cell for chain in chains for cell in chain if cell.scores(tmp_path).is_file()]
    assert 1 <= len(finished) < sum(map(len, chains))
    assert not [worker for worker in multiprocessing.active_children() if "Process" in worker.name]


def test_cells_of_other_settings_are_not_mixed_in(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "tiny.json"
    table.write_text(json.dumps({**TINY, "settings": {**TINY["settings"], "batch_size": 5}}), encoding="utf-8")
    assert main(["eval", "compare", "collect", str(table), "--out", str(runs), "--json", str(tmp_path / "x")]) == 2
    assert "was made with another batch_size than the table has now" in capsys.readouterr().err


def test_two_arms_on_disk_that_differ_only_in_case_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny" / "DMD").mkdir(parents=True)
    command = ["eval", "compare", "run", str(runs / "tiny.json"), "--out", str(tmp_path)]
    assert main(command) == 2
    assert "differ in more than case: DMD, dmd" in capsys.readouterr().err


def test_a_tuning_seed_has_a_folder_and_a_table_of_its_own(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {**TINY, "tuning_seeds": [7, 8]}
    (runs.parent / "tuned.json").write_text(json.dumps(table), encoding="utf-8")
    assert main(["eval", "compare", "plan", str(runs.parent / "tuned.json"), "--tuning"]) == 0
    assert "seeds 7, 8" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"without repetitions|2 or more"):
        parse_table({**TINY, "seeds": []})

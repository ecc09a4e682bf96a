"""docs/results/reliability.md is what its records say, and names tests that there are."""

import json
from pathlib import Path
from typing import Any

import reliability

ROOT = Path(__file__).resolve().parents[2]
RECORD: dict[str, Any] = {
    "test": "tests/faults/test_kills.py::test_kills_of_the_worker[fake]",
    "started": "2026-11-27 03:00 UTC",
    "percent": 10.0,
    "cores": 2,
    "load_average_before": 1.0,
    "load_average_after": 2.25,
    "outcome": "passed",
    "seconds": 12.5,
    "kills": 5,
    "statuses": {"200": 3},
}


def test_the_page_is_written_from_its_records() -> None:
    known = json.loads(reliability.DATA.read_text())
    assert reliability.PAGE.read_text() == reliability.page(known)
    sources = {path.name: path.read_text() for path in (ROOT / "tests" / "faults").glob("test_*.py")}
    for test in known:
        file, _, name = test.rpartition("/")[2].partition("::")
        assert f"def {name.partition('[')[0]}(" in sources[file], test


def test_a_figure_appears_with_its_command_and_the_share_of_the_counts() -> None:
    other = RECORD | {"test": RECORD["test"].replace("worker", "server"), "percent": 100.0, "deaths": 1}
    text = reliability.page({record["test"]: record for record in (RECORD, other)})
    (row,) = [line for line in text.splitlines() if "worker[fake]" in line]
    assert row.startswith("| `test_kills.py::test_kills_of_the_worker[fake]` | 5 | 200: 3 | passed |")
    assert "load 1.0 to 2.2 on 2 cores, 10% of the counts" in row
    assert text.count("| test | kills |") == 2, "records with other figures are a table of their own"

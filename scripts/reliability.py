"""Writes docs/results/reliability.md from what `make faults` recorded; no figure of that page is typed by hand.

python scripts/reliability.py build/faults     takes in what the last run recorded, and writes the page
python scripts/reliability.py                  writes the page again
"""

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "results" / "reliability.md"
HEAD = """# Reliability
Real server processes on loopback, killed, starved and overloaded. Written by `scripts/reliability.py` from
`reliability.json`, which `make faults` fills. Each row's command:

    .venv/bin/python -m pytest -m faults 'tests/faults/TEST' && .venv/bin/python scripts/reliability.py build/faults

TEST is in the first column. What may never happen is asserted by the test: a row says `passed` only if it did not.
Figures of time are recorded as they were; `load` is the machine's load average before and after, on the cores named.
"""
SECTIONS = {
    "test_kills.py": (
        "Kills under load",
        "SIGKILL at random moments while jobs are sent, each with an Idempotency-Key until it is answered. `fake` is "
        "an engine whose video is its parameters, `real` the embedded student, whose bytes are compared with those "
        "of a server that nobody disturbed. `lost`: accepted and not there; `doubled`: made twice; `leftover files`: "
        "in the results place and of no job; `attempts`: of all jobs together, above their number where a kill of a "
        "worker hit one.",
    ),
    "test_single.py": (
        "One fault after the other",
        "The job says its code or goes on, and the next good request gets its video.",
    ),
    "test_input.py": ("Bad input", "A server with the page mounted; no answer of 5xx, no hang, no file."),
    "test_load.py": ("Load", "Many clients on the cores that the server has too."),
}
# What every record has; shown in the last columns.
COMMON = ("test", "started", "percent", "cores", "load_average_before", "load_average_after", "outcome", "seconds")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of what a run recorded")
    options = parser.parse_args()
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    if options.folder is not None:
        found = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]
        known |= {record["test"]: record for record in found if "outcome" in record}
    known = dict(sorted(known.items()))
    DATA.write_text(json.dumps(known, indent=1) + "\n")
    PAGE.write_text(page(known))


def page(known: dict[str, dict[str, Any]]) -> str:
    """Return the page of records by test."""
    parts = [HEAD]
    for file, (title, text) in SECTIONS.items():
        records = [known[test] for test in sorted(known) if f"/{file}::" in test]
        if records:
            parts += [f"\n## {title}\n{text}\n", *(_group(each) for each in _alike(records))]
    return "".join(parts)


def _alike(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the records that have the same figures; each group is a table."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(_figures(record)), []).append(record)
    return list(groups.values())


def _group(records: list[dict[str, Any]]) -> str:
    names = _figures(records[0])
    head = ["test", *(name.replace("_", " ") for name in names), "outcome", "run"]
    rows = [head, ["---"] * len(head)]
    for record in records:
        share = "" if record["percent"] == 100 else f", {record['percent']:g}% of the counts"
        load = f"{record['load_average_before']:.1f} to {record['load_average_after']:.1f} on {record['cores']} cores"
        run = f"{record['started']}, {record['seconds']:g} s, load {load}{share}"
        test = record["test"].rpartition("/")[2]
        rows.append([f"`{test}`", *(_shown(record[name]) for name in names), record["outcome"], run])
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _figures(record: dict[str, Any]) -> list[str]:
    return [name for name in record if name not in COMMON]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(each) for each in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


if __name__ == "__main__":
    main()

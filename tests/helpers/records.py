"""What a fault run found: one JSON file per test, which scripts/reliability.py renders."""

import json
import os
import time
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("FAULT_RESULTS") or Path(__file__).parents[2] / "build" / "faults")
PERCENT = float(os.environ.get("FAULT_PERCENT") or 100)


def rounds(full: int) -> int:
    """That many, or the share of it that FAULT_PERCENT asks for."""
    return max(1, round(full * PERCENT / 100))


def record(node: str, figures: dict[str, Any]) -> None:
    """Add figures to the record of a test."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = _path(node)
    known = json.loads(path.read_text()) if path.exists() else {"test": node}
    known |= figures
    path.write_text(json.dumps(known, indent=1) + "\n")


def begin(node: str) -> None:
    """Forget what an earlier run found."""
    _path(node).unlink(missing_ok=True)
    cores = len(os.sched_getaffinity(0))
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    record(node, {"started": started, "percent": PERCENT, "cores": cores, "load_average_before": os.getloadavg()[0]})


def end(node: str, outcome: str, seconds: float) -> None:
    load = round(os.getloadavg()[0], 2)
    record(node, {"outcome": outcome, "seconds": round(seconds, 1), "load_average_after": load})


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _path(node: str) -> Path:
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in node.rpartition("/")[2])
    return FOLDER / f"{name}.json"

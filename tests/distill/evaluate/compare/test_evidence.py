"""The tracked evidence is what its JSON gives: the page, README's block, and every file that the page names."""

import re
import shlex
from pathlib import Path

import pytest

from distill.evaluate.compare.page import block_for, commands_of, page_text
from distill.evaluate.compare.results import Comparison, read_results

ROOT = Path(__file__).resolve().parents[4]
PAGE, README = Path("docs/results/evidence.md"), Path("README.md")
AGAIN = "run the report command that stands under Made by of docs/results/evidence.md"
MAX_BYTES = 1_000_000


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of the page have paths relative to the root."""
    monkeypatch.chdir(ROOT)


def files() -> list[Path]:
    """Return the JSON files that the page's own command names."""
    (command,) = re.findall(r"^codmd-distill eval compare report (.*) --out", PAGE.read_text(encoding="utf-8"), re.M)
    return [Path(name) for name in shlex.split(command)]


def comparisons() -> list[Comparison]:
    return [read_results(path) for path in files()]


def test_the_page_is_made_of_the_tracked_json() -> None:
    found = comparisons()
    assert PAGE.read_text(encoding="utf-8") == page_text(found, commands_of(found, files(), PAGE, README), PAGE), AGAIN


def test_readme_says_what_the_tracked_json_gives() -> None:
    assert block_for(README, comparisons(), PAGE) in README.read_text(encoding="utf-8"), AGAIN


def test_every_kept_file_is_used_and_all_are_small() -> None:
    folder = PAGE.with_suffix("")
    figures = set(re.findall(r"\]\(evidence/([^)]+)\)", PAGE.read_text(encoding="utf-8")))
    cells = [cell for own in comparisons() for cell in own.data["cells"]]
    strips = {Path(clip["strip"]).as_posix() for cell in cells for clip in cell.get("clips", [])}
    kept = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert kept.keys() == figures | strips | {path.name for path in files()}
    assert sum(kept.values()) < MAX_BYTES

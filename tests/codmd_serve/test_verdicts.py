"""Verdicts of an earlier load: found by what they depend on, never trusted further than they can be read."""

import json
from pathlib import Path

import pytest

from codmd_serve import verdicts as verdicts_module
from codmd_serve.verdicts import FILE, Verdicts

KNOWN = ("eager", "graph")


def test_a_verdict_is_found_under_its_own_key_only(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for it"
    Verdicts(folder, "H200", "2.11").put("execution", "graph")
    Verdicts(folder, "H200", "2.11").put("attention", "eager")
    assert Verdicts(folder, "H200", "2.11").get("execution", KNOWN) == "graph"
    assert Verdicts(folder, "H200", "2.11").get("attention", KNOWN) == "eager"
    assert Verdicts(folder, "H200", "2.12").get("execution", KNOWN) is None
    assert Verdicts(None, "H200", "2.11").get("execution", KNOWN) is None


def test_a_verdict_that_is_not_known_any_more_is_none(tmp_path: Path) -> None:
    Verdicts(tmp_path).put("execution", "by hand")
    assert Verdicts(tmp_path).get("execution", KNOWN) is None


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\x00", "{"])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert Verdicts(tmp_path).get("execution", KNOWN) is None
    Verdicts(tmp_path).put("execution", "graph")
    assert Verdicts(tmp_path).get("execution", KNOWN) == "graph"


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    Verdicts(tmp_path / "file").put("execution", "graph")
    Verdicts(None).put("execution", "graph")
    assert "verdicts=unwritable" in caplog.text


def test_the_oldest_keys_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts_module, "MAX_KEYS", 2)
    for part in ("a", "b", "c"):
        Verdicts(tmp_path, part).put("execution", "graph")
    found = [Verdicts(tmp_path, part).get("execution", KNOWN) for part in ("a", "b", "c")]
    assert found == [None, "graph", "graph"]
    assert len(json.loads((tmp_path / FILE).read_text())) == 2

"""The log: what was acknowledged is read back, whatever a crash left of the rest."""

import json
import os
import threading
from pathlib import Path

import pytest

from codmd_serve.errors import ConfigError
from distill.evaluate.study.log import LOG_FILE, AnswerLog, read_records


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    assert read_records(path) == ([], 0)
    log = AnswerLog(path)
    records = [{"n": n, "note": '\u00fcber\u2028 "quoted"\n'} for n in range(3)]
    for record in records:
        log.append(record)
    log.close()
    assert read_records(path) == (records, 0)
    assert path.read_bytes().count(b"\n") == 3


def test_log_is_flushed_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AnswerLog(tmp_path / LOG_FILE)
    flushed: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append((tmp_path / LOG_FILE).read_bytes()))
    log.append({"a": 1})
    assert flushed == [b'{"a": 1}\n']
    log.close()


@pytest.mark.parametrize("num_bytes", range(1, 9))
def test_torn_last_line_is_skipped_and_the_next_record_is_whole(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / LOG_FILE
    path.write_bytes(b'{"a": 1}\n' + b'{"b": 2}\n'[:num_bytes])
    before = path.read_bytes()
    log = AnswerLog(path)
    log.append({"c": 3})
    log.close()
    records, num_damaged = read_records(path)
    whole = num_bytes == 8  # only the line end is missing
    assert records == [{"a": 1}, *([{"b": 2}] if whole else []), {"c": 3}]
    assert num_damaged == (0 if whole else 1)
    assert path.read_bytes().startswith(before), "the log is only appended to"


def test_damage_in_the_middle_costs_its_line_only(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    path.write_bytes(b'{"a": 1}\n\xff\xfe\n[1]\n' + b"[" * 100_000 + b'\n\n{"b": 2}\n')
    assert read_records(path) == ([{"a": 1}, {"b": 2}], 3)


def test_failed_write_does_not_spoil_the_next_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AnswerLog(tmp_path / LOG_FILE)
    log.append({"a": 1})
    write = os.write
    with monkeypatch.context() as patch:

        def half(file: int, data: bytes) -> int:
            write(file, data[:4])
            raise OSError(28, "No space left on device")

        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            log.append({"b": 2})
    log.append({"c": 3})
    log.close()
    assert read_records(tmp_path / LOG_FILE) == ([{"a": 1}, {"c": 3}], 1)


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / LOG_FILE)
    threads = [
        threading.Thread(target=lambda k=k: [log.append({"k": k, "n": n, "x": "y" * 300}) for n in range(20)])
        for k in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    records, num_damaged = read_records(tmp_path / LOG_FILE)
    assert num_damaged == 0 and len(records) == 160
    assert all([r["n"] for r in records if r["k"] == k] == list(range(20)) for k in range(8))


def test_second_server_of_a_study_is_refused(tmp_path: Path) -> None:
    """The lock belongs to the open file, so a second one in this process is refused as one in another would be."""
    log = AnswerLog(tmp_path / LOG_FILE)
    with pytest.raises(ConfigError, match="served already"):
        AnswerLog(tmp_path / LOG_FILE)
    log.close()
    AnswerLog(tmp_path / LOG_FILE).close()


def test_log_where_none_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        AnswerLog(tmp_path / "no folder" / LOG_FILE)
    (tmp_path / LOG_FILE).mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_records(tmp_path / LOG_FILE)


def test_lone_surrogate_in_a_note_is_stored(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / LOG_FILE)
    log.append({"note": "\ud83d"})
    log.close()
    (line,) = (tmp_path / LOG_FILE).read_bytes().splitlines()
    assert json.loads(line) == {"note": "\ud83d"}

"""Text of other systems is read, anything else ends in one sentence; no line ends where its maker saw none."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.textfiles import (
    decode_text,
    escape_console,
    parse_json,
    read_json_object,
    read_text,
    shown,
    split_lines,
)

OTHER_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_and_without_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_bytes("a red ring\r\nÄ".encode(encoding))
    assert read_text(tmp_path / "a", ConfigError) == "a red ring\r\nÄ"


def test_lines_end_at_newlines_and_nowhere_else() -> None:
    text = f"one{OTHER_LINE_ENDS}still one\r\ntwo\n\nfour"
    assert split_lines(text) == [f"one{OTHER_LINE_ENDS}still one", "two", "", "four"]
    assert split_lines("") == [] and split_lines("a\n") == ["a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"fine\nb\xff", "FILE is not UTF-8 text: line 2 holds the byte 0xff; save it as UTF-8"),
        (b"\xff\xfea", "FILE is not UTF-16-LE text: line 1 holds the byte 0x61"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode_text(data, "FILE", ConfigError)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_text(path, CheckpointError)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 10_000, "Exceeds the limit"),
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice, with different values"),
        ('{"x": {"a": [], "a": [1]}}', "stands there twice"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"FILE cannot be read as JSON: .*{reason}"):
        parse_json(text, "FILE", CheckpointError)


def test_json_of_other_systems_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y", "b": 1, "b": 1}\r\n')
    assert read_json_object(tmp_path / "a", ConfigError) == {"a": "x\u2028y", "b": 1}
    (tmp_path / "a").write_text("[]")
    with pytest.raises(ConfigError, match="must hold one JSON object, got list"):
        read_json_object(tmp_path / "a", ConfigError)


def value_or_message(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ConfigError as error:
        return error


@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_one_sentence(data: bytes) -> None:
    text = value_or_message(lambda: decode_text(data, "FILE", ConfigError))
    if isinstance(text, ConfigError):
        assert "\n" not in str(text)
        return
    lines = split_lines(text)
    # Nothing is lost but the line ends.
    assert "".join(lines) == text.replace("\r\n", "").replace("\n", "")


@given(st.text(max_size=200))
def test_any_text_is_json_or_one_sentence(text: str) -> None:
    value = value_or_message(lambda: parse_json(text, "FILE", ConfigError))
    if isinstance(value, ConfigError):
        assert str(value).startswith("FILE cannot be read as JSON: ")
        return
    assert json.loads(text) == value or value != value  # NaN


@given(st.recursive(st.none() | st.text(max_size=300) | st.integers(), st.lists))
def test_shown_is_short(value: object) -> None:
    assert len(shown(value)) < 120


def test_shown_takes_what_has_no_repr() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert (
        shown(10**5000) == "one int"
        and shown(loop) == "[[...]]"
        and shown("x" * 100_000).endswith("(100002 characters)")
    )


def test_a_console_without_a_character_shows_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    escape_console()
    print("色 ü \udcff", flush=True)
    assert buffer.getvalue() == b"\\u8272 \\xfc \\udcff\n"

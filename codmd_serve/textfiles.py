"""Reads untrusted text and JSON files: byte order marks, line ends, damage; knows nothing of their meaning.

Every function raises the error class it is given, with one sentence that names the file.
"""

import codecs
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from codmd_serve.errors import CodmdError
from codmd_serve.files import first_line

# UTF-32 before UTF-16: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SHOWN_CHARS = 80


def read_text(path: Path, error: type[CodmdError]) -> str:
    """Read a text file: UTF-8, or what its byte order mark says. The mark is dropped, line ends are kept.

    Raises:
        error: there is no such file, it cannot be read, or it is not text; the message names the first bad line.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{path} cannot be read: {reason}") from problem
    return decode_text(data, str(path), error)


def decode_text(data: bytes, where: str, error: type[CodmdError]) -> str:
    """Decode bytes as `read_text` does; `where` is what messages call them."""
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    body = data[len(mark) :]
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as problem:
        line = 1 + body.count("\n".encode(encoding), 0, problem.start)
        raise error(
            f"{where} is not {encoding.upper()} text: line {line} holds the byte 0x{body[problem.start]:02x}; "
            "save it as UTF-8"
        ) from problem


def split_lines(text: str) -> list[str]:
    r"""Split text at \n and \r\n, and nowhere else.

    str.splitlines also splits at U+2028, U+0085, \v, \f and six others, which JSON strings and prompts may hold.
    """
    lines = re.split(r"\r?\n", text)
    return lines[:-1] if lines[-1] == "" else lines


def parse_json(text: str, where: str, error: type[CodmdError]) -> Any:
    """Parse one JSON value.

    Raises:
        error: it is not JSON, is nested too deeply, or an object says two things under one key.
    """
    try:
        return json.loads(text, object_pairs_hook=_one_value_per_key)
    except RecursionError:
        raise error(f"{where} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{where} cannot be read as JSON: {first_line(problem).partition(': ')[2]}") from problem


def read_json_object(path: Path, error: type[CodmdError]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        error: as `read_text` and `parse_json`, or another value than an object.
    """
    data = parse_json(read_text(path, error), str(path), error)
    if not isinstance(data, dict):
        raise error(f"{path} must hold one JSON object, got {type(data).__name__}")
    return data


def shown(value: object) -> str:
    """Format an untrusted value for a message: its repr, at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints; a list within itself
        return f"one {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"


def escape_console() -> None:
    """Escape characters that the console cannot encode, so that printing never fails a finished command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _one_value_per_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result and result[key] != value:
            raise ValueError(f"the key {shown(key)} stands there twice, with different values")
        result[key] = value
    return result

"""Reads VBench's prompt list, from its JSON file or its wheel; knows neither seeds nor videos.

The list is VBench's own and is not copied here: `pip download --no-deps vbench==0.1.5` or `make vbench-env` brings it.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from codmd_serve.textfiles import decode_text, parse_json, read_text, shown, split_lines
from distill.evaluate.vbench.facts import DIMENSIONS, SUITE_SHA256, VBENCH_VERSION

LIST_NAME = "vbench/VBench_full_info.json"
ENVIRONMENT = Path("build/vbench-env")
HOW_TO_GET = f"`make vbench-env` or `pip download --no-deps vbench=={VBENCH_VERSION}` brings it"
MAX_PROMPT_CHARS = 2000


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One prompt of the suite, with all dimensions that are scored on it.

    Attributes:
        index: place of its first entry among the distinct prompts of the file.
        text: the short prompt: what the evaluators are told.
        dimensions: in the file's order.
        auxiliary: what evaluators need besides the prompt, by dimension.
        lines: places of its entries in the file, from 0; augmented prompts are matched by them.
    """

    index: int
    text: str
    dimensions: list[str] = field(default_factory=list)
    auxiliary: dict[str, Any] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A prompt list.

    Attributes:
        prompts: distinct ones, in the file's order.
        num_entries: of the file; prompts that stand there twice count twice.
        sha256: of the file.
    """

    prompts: list[Prompt]
    num_entries: int
    sha256: str

    @property
    def is_official(self) -> bool:
        """Whether this is the list of VBench 0.1.5, byte for byte."""
        return self.sha256 == SUITE_SHA256


def find_suite(path: Path | None) -> Path:
    """Return the file to read: the given one, or the list of the environment that `make vbench-env` makes.

    Raises:
        ConfigError: there is none.
    """
    if path is not None:
        return path
    found = sorted(ENVIRONMENT.glob(f"lib/python*/site-packages/{LIST_NAME}"))
    if not found:
        raise ConfigError(f"no prompt list in {ENVIRONMENT}: name VBench's list or wheel with --suite; {HOW_TO_GET}")
    return found[-1]


def read_suite(path: Path) -> Suite:
    """Read a prompt list.

    Args:
        path: the JSON file, or a wheel of vbench that holds it.

    Raises:
        ConfigError: no such file, not a list of prompts, or a dimension that VBench does not have.
    """
    data, where = _read_bytes(path)
    entries = parse_json(decode_text(data, where, ConfigError), where, ConfigError)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where} must hold a list of prompts, as VBench's {LIST_NAME} does")
    prompts: dict[str, Prompt] = {}
    for line, entry in enumerate(entries):
        text, dimensions, auxiliary = _entry(entry, f"{where}, entry {line + 1}")
        # Exact text is the key: "A fantasy landscape" and "a fantasy landscape" are two prompts of VBench.
        prompt = prompts.setdefault(text, Prompt(index=len(prompts), text=text))
        prompt.dimensions += [name for name in dimensions if name not in prompt.dimensions]
        prompt.auxiliary.update(auxiliary)
        prompt.lines.append(line)
    return Suite(prompts=list(prompts.values()), num_entries=len(entries), sha256=hashlib.sha256(data).hexdigest())


def read_augmented(path: Path, suite: Suite) -> dict[int, str]:
    """Read longer prompts, one line for each entry of the suite; return them by prompt index.

    Raises:
        ConfigError: another number of lines than entries, an empty line, or two texts for one prompt.
    """
    lines = split_lines(read_text(path, ConfigError))
    if len(lines) != suite.num_entries:
        raise ConfigError(
            f"{path} has {len(lines)} lines, expected one for each of the {suite.num_entries} entries of the suite"
        )
    texts: dict[int, str] = {}
    for prompt in suite.prompts:
        # Where VBench lists a prompt twice, augmented files often differ; the first is what is generated from.
        text = lines[prompt.lines[0]].strip()
        _check_text(text, f"{path}, line {prompt.lines[0] + 1}")
        texts[prompt.index] = text
    return texts


def _read_bytes(path: Path) -> tuple[bytes, str]:
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(LIST_NAME), f"{path}: {LIST_NAME}"
        return path.read_bytes(), str(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"no prompt list in {path}: {first_line(error)}; {HOW_TO_GET}") from error


def _entry(entry: Any, where: str) -> tuple[str, list[str], dict[str, Any]]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: expected an object, got {shown(entry)}")
    text, dimensions = entry.get("prompt_en"), entry.get("dimension")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: prompt_en must be a text, got {shown(text)}")
    _check_text(text, where)
    if not isinstance(dimensions, list) or not dimensions:
        raise ConfigError(f"{where}: dimension must be a list of names, got {shown(dimensions)}")
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise ConfigError(f"{where}: unknown dimension {shown(unknown[0])}; known are {', '.join(DIMENSIONS)}")
    auxiliary = entry.get("auxiliary_info") or {}
    if not isinstance(auxiliary, dict):
        raise ConfigError(f"{where}: auxiliary_info must be an object, got {shown(auxiliary)}")
    return text, dimensions, auxiliary


def _check_text(text: str, where: str) -> None:
    if not text.strip() or len(text) > MAX_PROMPT_CHARS:
        raise ConfigError(f"{where}: a prompt must have 1 to {MAX_PROMPT_CHARS} characters, got {shown(text)}")
    if any(ord(character) < 32 for character in text):
        raise ConfigError(f"{where}: a prompt must be one line without control characters, got {shown(text)}")

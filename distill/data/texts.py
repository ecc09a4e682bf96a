"""Training prompts from txt and jsonl files: one prompt a line, what was left out counted; knows no embeddings."""

from dataclasses import dataclass
from pathlib import Path

from codmd_serve.errors import ConfigError
from codmd_serve.prompts import is_blank, lone_surrogate
from codmd_serve.textfiles import parse_json, read_text, split_lines

JSONL_KEYS = ("prompt", "caption", "text")
TXT_SUFFIXES, JSONL_SUFFIXES = (".txt",), (".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Prompts as read, duplicates included.

    Attributes:
        texts: in the order of the file, without the white space around them.
        num_blank: lines that were dropped, because nothing of them would reach the text encoder.
    """

    texts: list[str]
    num_blank: int = 0

    @property
    def num_duplicates(self) -> int:
        """Prompts that stand there before."""
        return len(self.texts) - len(set(self.texts))


def read_prompt_file(path: Path) -> Prompts:
    r"""Read prompts: UTF-8 or what the byte order mark says; a line ends at \n or \r\n and nowhere else.

    Raises:
        ConfigError: missing, no text, of another kind, without a prompt, or a row that is none; the message names the
            line.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ConfigError(f"prompts {path} cannot be read: the folder holds no .tar")
    text = read_text(path, ConfigError) if path.exists() else None
    if text is None:
        raise ConfigError(f"prompts {path} cannot be read: there is no such file")
    if suffix not in (*TXT_SUFFIXES, *JSONL_SUFFIXES):
        raise ConfigError(f"prompts must be a .txt, .jsonl or .tar file or a folder of .tar files, got {path.name}")
    prompts, num_blank = [], 0
    for number, line in enumerate(split_lines(text), start=1):
        where = f"{path.name} line {number}"
        if suffix in JSONL_SUFFIXES and line.strip(" \t\r"):
            prompts.append(_jsonl_prompt(line, where))
        elif is_blank(line):
            num_blank += 1
        else:
            prompts.append(line.strip())
            check_prompt(prompts[-1], where)
    if not prompts:
        raise ConfigError(f"prompts {path} holds no prompt")
    return Prompts(texts=prompts, num_blank=num_blank)


def check_prompt(prompt: str, where: str) -> None:
    """Refuse a prompt that no tokenizer takes.

    Raises:
        ConfigError: it holds half of a character.
    """
    half = lone_surrogate(prompt)
    if half is not None:
        raise ConfigError(f"{where} holds half of a character, {half!r}: write it again as UTF-8")


def _jsonl_prompt(line: str, where: str) -> str:
    row = parse_json(line, where, ConfigError)
    found = [row[key] for key in JSONL_KEYS if key in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], str) or is_blank(found[0]):
        raise ConfigError(f"{where} needs a text under one of {', '.join(JSONL_KEYS)}")
    check_prompt(found[0], where)
    return found[0].strip()

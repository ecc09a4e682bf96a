"""Reads Markdown as a reader who copies from it: code blocks, shell commands, links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"<!-- run(?:: (?P<files>[^>]*?))? -->\s*\Z")
LINK = re.compile(r"(?<!\\)!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)(?:\s+\"[^\"]*\")?\)")
# What an indented block begins with when it holds commands.
PROGRAMS = ("codmd-serve", "codmd-distill", "torchrun", "make", "curl", ".venv/bin/")
SEPARATORS = {"|", "||", "&&", ";", "&", "(", ")", ";;"}


@dataclass(frozen=True, slots=True)
class Block:
    """A code block.

    Attributes:
        language: bash, python, ...; empty for none.
        text: of the block.
        line: of its first line.
        files: what it leaves when it is run; None for a block that is not marked `<!-- run: FILES -->`.
    """

    language: str
    text: str
    line: int
    files: tuple[str, ...] | None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, and its indented blocks of commands as bash."""
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        files = None if mark is None else tuple((mark["files"] or "").split())
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match["language"], match["text"], line, files))
    plain = FENCE.sub(lambda match: re.sub(r"[^\n]+", "", match[0]), text)
    for match in re.finditer(r"(?:^|(?<=\n\n))(?: {4}[^\n]*\n?)+", plain):
        body = re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)
        if any(line.startswith(PROGRAMS) for line in body.splitlines()):
            found.append(Block("bash", body, text.count("\n", 0, match.start()) + 1, None))
    return found


def commands(script: str) -> Iterator[list[str]]:
    """Yield the simple commands of a shell script as words, without redirections and leading assignments."""
    pending = ""
    for line in script.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            words = _words(_without_comment(pending))
        except ValueError:  # a quotation goes on
            pending += "\n"
            continue
        pending = ""
        yield from _simple(words)
    if pending.strip():
        raise ValueError(f"a quotation has no end: {pending[:80]!r}")


def _without_comment(line: str) -> str:
    quote, before = "", " "
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote and before != "\\" else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and before.isspace():
            return line[:index]
        before = character
    return line


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.wordchars += "$%{}[]!^,@+#"
    lexer.commenters = ""
    lexer.whitespace_split = True
    return list(lexer)


def _simple(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    skip = False
    for word in [*words, ";"]:
        if skip:
            skip = False
        elif word in SEPARATORS:
            command = _without_assignments(command)
            if command:
                yield command
            command = []
        elif set(word) <= set("<>&"):
            command = command[:-1] if command and command[-1].isdecimal() else command
            skip = True
        else:
            command.append(word)


def _without_assignments(command: list[str]) -> list[str]:
    while command and re.match(r"[A-Za-z_]\w*=", command[0]):
        command = command[1:]
    return command


def links(text: str) -> list[str]:
    """Return the targets of links and pictures outside of code."""
    plain = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return LINK.findall(plain)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a page, as MkDocs and GitHub make them."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.*?) *#*$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found.add(name if name not in found else f"{name}_{1}")
    return found


def code_spans(text: str) -> list[str]:
    """Return what stands between backticks in a page, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def pages(root: Path) -> list[Path]:
    """Return every Markdown page of the repository that a reader may follow."""
    folders = [root / "docs", root / "weights", root / "deploy"]
    found = [path for folder in folders if folder.is_dir() for path in folder.rglob("*.md")]
    return sorted([root / "README.md", root / "CONTRIBUTING.md", *found])

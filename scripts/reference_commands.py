"""Pages of docs/reference about the two commands and the environment; made from their parsers."""

import argparse
import ast
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "the embedded student"
# What the code reads beside the CODMD_* variables of flags; a test compares the names with the code.
OTHER_VARIABLES = {
    "CODMD_LOG_LEVEL": "`codmd-distill`: DEBUG, INFO (default), WARNING, ERROR or CRITICAL",
    "CXX": "`codmd-distill`: C++ compiler of `--compile` on a CPU; `g++` unless set",
    "MASTER_ADDR": "`codmd-distill` under srun or mpirun on several machines: the machine of rank 0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "`codmd-distill` under mpirun, beside OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK: "
    "how many processes this machine has",
    "SLURM_STEP_NUM_NODES": "`codmd-distill` under srun, beside SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID: "
    "how many machines",
    "XDG_CACHE_HOME": "`codmd-serve` on Linux: the default of `--cache` is `$XDG_CACHE_HOME/codmd-serve`; "
    "`~/.cache` unless set",
    "XDG_DATA_HOME": "`codmd-serve` on Linux: jobs and videos are kept in `$XDG_DATA_HOME/codmd-serve` unless "
    "`--data` says otherwise; `~/.local/share` unless set",
}


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hide CODMD_* variables, which would change defaults."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("CODMD_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def serve_parser() -> argparse.ArgumentParser:
    """Return the parser of codmd-serve with the defaults of the code."""
    from codmd_serve import cli

    with clean_environment():
        return cli._parser()


def distill_parser() -> argparse.ArgumentParser:
    """Return the parser of codmd-distill with the defaults of the code."""
    from distill.cli import build_parser

    return build_parser({})


def serve_page() -> str:
    """Return the page of codmd-serve."""
    return _command_page(
        serve_parser(),
        "Without a command, `codmd-serve` serves. Flags of `serve`, `work`, `generate` and `doctor` are also "
        "environment variables: `--queue-size` is `CODMD_QUEUE_SIZE`. A flag wins over its variable.\n\n"
        "Exit codes: 0 done, 1 failed, 2 for what the user can mend, 128 + N when signal N ended the command. An error "
        "is one line on standard error.",
    )


def distill_page() -> str:
    """Return the page of codmd-distill."""
    return _command_page(
        distill_parser(),
        "Exit codes: 0 done, 1 failed, 2 for what the user can mend, 128 + N when signal N ended the command. An error "
        "is one line on standard error. `--set` takes any key of [settings](settings.md).",
    )


def environment_page() -> str:
    """Return the page of environment variables."""
    rows: dict[str, str] = {}
    for path, parser in leaves(serve_parser()):
        for action in parser._actions:
            variable = re.search(r"also \$(CODMD_\w+)", action.help or "")
            if variable and variable[1] not in rows:
                flag = action.option_strings[-1] if action.option_strings else ""
                rows[variable[1]] = f"`{flag.replace('--no-', '--')}` of `{' '.join(path)}`"
    from codmd_serve.cpu import PASSIVE_WAITING, THREAD_COUNTS

    lines = ["# Environment variables", ""]
    lines += ["A variable that is empty counts as not set. Booleans are `1` or `0`.", ""]
    lines += table(("variable", "same as"), [(f"`{name}`", text) for name, text in sorted(rows.items())])
    lines += ["", "## Others", ""]
    lines += table(("variable", "what it does"), [(f"`{name}`", text) for name, text in OTHER_VARIABLES.items()])
    lines += [
        "",
        "## Set by the commands",
        "",
        "Both commands set these before torch is imported, unless you set them.",
    ]
    lines += ["They make idle threads sleep: a spinning thread takes the core from the one that works.", ""]
    counts = dict.fromkeys(THREAD_COUNTS, "`--threads`, or the cores that affinity and CPU quota leave")
    values = {name: f"`{value}`" for name, value in PASSIVE_WAITING.items()} | counts
    lines += table(("variable", "value"), [(f"`{name}`", value) for name, value in values.items()])
    return "\n".join(lines)


def variables_read() -> set[str]:
    """Return the names of environment variables that the code reads literally, beside the flags' own."""
    found = set()
    for package in ("codmd_serve", "distill", "app"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
                match = re.match(r"(?:os\.)?environ(?:ment)?(?:\.get\(|\[)'([A-Z][A-Z0-9_]*)'", text)
                if match and not (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)):
                    found.add(match[1])
    return found


def leaves(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command without subcommands, with its words, in order."""
    path = path or (parser.prog,)
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield path, parser
    for group in groups:
        for name, inner in group.choices.items():
            yield from leaves(inner, (*path, name))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _command_page(parser: argparse.ArgumentParser, note: str) -> str:
    lines = [f"# {parser.prog}", "", f"{parser.description}", "", note]
    summaries = _summaries(parser)
    for path, command in leaves(parser):
        lines += ["", f"## {' '.join(path)}", "", _sentence(command.description or summaries.get(path[1:], ""))]
        lines += ["", "```text", _synopsis(path, command), "```", ""]
        rows = [_row(action) for action in command._actions if not isinstance(action, argparse._HelpAction)]
        lines += table(("argument", "default", "meaning"), rows)
    return "\n".join(lines)


def _summaries(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {(*path, choice.dest): choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                found |= _summaries(inner, (*path, name))
    return found


def _synopsis(path: tuple[str, ...], command: argparse.ArgumentParser) -> str:
    words = [*path]
    for action in command._actions:
        if action.option_strings and action.required:
            words.append(f"{action.option_strings[-1]} {_metavar(action)}")
        elif not action.option_strings:
            words.append(f"[{_metavar(action)}]" if action.nargs in ("?", "*") else _metavar(action))
    return " ".join([*words, "[flags]"])


def _metavar(action: argparse.Action) -> str:
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices is not None:
        return "{" + ",".join(str(choice) for choice in action.choices) + "}"
    return action.dest.upper()


def _row(action: argparse.Action) -> tuple[str, str, str]:
    text = re.sub(r"\s+", " ", action.help or "").replace("%%", "%")
    text = re.sub(r" \((default: .*?; )?also \$CODMD_\w+\)$", "", text)
    text = re.sub(r" \(default:? [^()]*\)$", "", text) if _has_default(action) else text
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{_metavar(action)}`"
    takes_value = action.option_strings and action.nargs != 0
    if takes_value and not isinstance(action, argparse.BooleanOptionalAction):
        names = f"{names} `{_metavar(action)}`"
    default = "required" if action.required and action.option_strings else _default(action)
    return names, default, escape(text)


def _has_default(action: argparse.Action) -> bool:
    return action.default not in (None, "", [], argparse.SUPPRESS)


def _default(action: argparse.Action) -> str:
    from codmd_serve.config import default_bundle_path

    if isinstance(action, argparse.BooleanOptionalAction) and action.default is not None:
        return "on" if action.default else "off"
    if not _has_default(action) or action.default is False:
        return ""
    if str(action.default) == str(default_bundle_path()):
        return EMBEDDED
    return f"`{action.default}`".replace(str(ROOT) + os.sep, "")


def escape(text: str) -> str:
    """Escape what Markdown would take for HTML or emphasis outside of code."""
    parts = text.split("`")
    return "`".join(
        part if index % 2 else part.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
        for index, part in enumerate(parts)
    )


def _sentence(text: str) -> str:
    text = text.strip()
    return escape(text[:1].upper() + text[1:] + ("" if text.endswith(".") else "."))

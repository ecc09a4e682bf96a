"""Exit codes and the one line that both commands print for an error."""

import pytest

from codmd_serve.commands import OneLineParser, print_error, run_command
from codmd_serve.errors import (
    CancelledError,
    CheckpointError,
    CodmdError,
    ConfigError,
    GenerationError,
    InvalidRequestError,
    QueueFullError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a setting"), 2),
        (CheckpointError("weights"), 2),
        (InvalidRequestError("a request", "seed"), 2),
        (GenerationError("out of memory"), 1),
        (QueueFullError("full", 3), 1),
        (CancelledError("gone"), 1),
        (CodmdError("diverged"), 1),
    ],
)
def test_run_command_prints_one_line_and_returns_the_code_of_the_error(
    error: CodmdError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise error

    assert run_command("codmd-serve", run) == code
    assert capsys.readouterr().err == f"codmd-serve: {error}\n"


def test_run_command_returns_what_the_command_returns() -> None:
    assert run_command("codmd-distill", lambda: 143) == 143


def test_run_command_lets_a_bug_through() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("codmd-distill", lambda: 1 // 0)


def test_run_command_ends_as_ctrl_c_does() -> None:
    def run() -> int:
        raise KeyboardInterrupt

    assert run_command("codmd-distill", run) == 130


def test_print_error_joins_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("codmd-serve", "first\n  second")
    assert capsys.readouterr().err == "codmd-serve: first second\n"


def test_one_line_parser_raises_and_names_the_help() -> None:
    parser = OneLineParser(prog="codmd-distill")
    parser.add_argument("--seed", type=int)
    with pytest.raises(ConfigError, match="argument --seed: invalid int value: 'x'; see codmd-distill --help"):
        parser.parse_args(["--seed", "x"])

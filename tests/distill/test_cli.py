"""`codmd-distill`: every command reaches its own function, whatever its options are called."""

from pathlib import Path

import pytest

from distill import cli
from distill.cli import COMMANDS, build_parser, main

ARGUMENTS = {
    "train": ["--out", "x"],
    "export": ["--run", "x", "--out", "y"],
    "bench-step": ["--trials", "4"],
    "plan": ["--recipe", "wan_14b"],
    "teacher": ["--out", "x"],
    "eval": ["shapebench"],
    "shapeworld": ["preview"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_calls_its_own_function(command: str) -> None:
    assert build_parser().parse_args([command, *ARGUMENTS[command]]).handler is COMMANDS[command][2]


def test_exit_code_is_that_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run" in capsys.readouterr().err
    monkeypatch.setitem(cli.COMMANDS, "export", (*COMMANDS["export"][:2], lambda _args: 143))
    assert main(["export", "--run", "x", "--out", "y"]) == 143


def test_help_and_a_missing_command_are_argparse_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0 and "shapeworld" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 2

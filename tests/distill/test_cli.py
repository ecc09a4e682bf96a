"""`codmd-distill`: every command reaches its own function, whatever its options are called."""

from pathlib import Path

import pytest

from distill import cli
from distill.cli import COMMANDS, build_parser, main

ARGUMENTS = {
    "train": ["--out", "x"],
    "export": ["--run", "x", "--out", "y"],
    "extract": ["--bundle", "x", "--out", "y"],
    "curves": ["x", "--out", "y"],
    "bench-step": ["--trials", "4"],
    "plan": ["--recipe", "wan_14b"],
    "teacher": ["--out", "x"],
    "eval": ["shapebench"],
    "shapeworld": ["preview"],
    "sample-teacher": ["--cache", "x"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_calls_its_own_function(command: str) -> None:
    assert build_parser({}).parse_args([command, *ARGUMENTS[command]]).handler is COMMANDS[command][2]


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
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("codmd-distill: the following arguments are required: COMMAND; see codmd-distill --help")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["plan", "--gpus", "many"], "argument --gpus: invalid int value: 'many'"),
        (["bench-step", "--base", "/nonexistent"], "no pipeline at /nonexistent"),
        (["eval", "shapebench", "--teacher", "/nonexistent"], "no pipeline at /nonexistent"),
        (["teacher", "--out", "x", "--preset", "huge"], "--preset must be one of"),
        (["export", "--run", "/nonexistent", "--out", "x"], "holds no run"),
        (["shapeworld", "preview", "--num-clips", "0"], "--num-clips must be in"),
        (["train", "--out", "x", "--recipe", "wan_9b"], "--recipe must be one of"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("codmd-distill: ") and said in line
    assert list(tmp_path.iterdir()) == []


def test_compiler_of_the_environment_is_checked_before_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["train", "--out", str(tmp_path / "run"), "--device", "cpu", "--compile"]) == 2
    assert "no-such-compiler is not there" in capsys.readouterr().err
    assert main(["teacher", "--out", str(tmp_path / "teacher"), "--device", "cpu", "--compile"]) == 2
    assert "no-such-compiler is not there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_log_level_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CODMD_LOG_LEVEL", "chatty")
    assert main(["plan"]) == 2
    assert "$CODMD_LOG_LEVEL must be one of" in capsys.readouterr().err

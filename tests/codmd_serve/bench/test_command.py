"""`codmd-serve bench` refuses what it cannot do, in one sentence, before anything is loaded."""

from pathlib import Path

import pytest

from codmd_serve import cli
from codmd_serve.bench.command import BENCH_HELP, typed
from codmd_serve.bench.options import BenchConfig, writable_folder
from codmd_serve.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--random-weights", "wan-9b"), "random_weights must be one of wan-1.3b, wan-14b, tiny, got 'wan-9b'"),
        (("--against", "sora"), "against must be one of diffusers, lossy, none, got 'sora'"),
        (("--pairs", "0"), "pairs must be in 1..100, got 0"),
        (("--pairs", "many"), "--pairs: invalid int value: 'many'"),
        (("--teacher-pairs", "-1"), "teacher_pairs must be in 0..100, got -1"),
        (("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--dtype", "int4"), "dtype must be one of auto, "),
        (("--bundle", "nowhere"), "no student bundle at nowhere"),
        (("--random-weights", "wan-14b", "--device", "cpu"), "wan-14b needs a CUDA device, this would run on cpu"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    assert cli.main(["bench", "--out", str(out), *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["bench", "--out", str(tmp_path / "file" / "results")]) == 2
    assert "cannot be made: Not a directory; choose another with --out" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permission bits do not bind root, who may run these tests.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        writable_folder(str(tmp_path))


def test_every_setting_is_an_option_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert BENCH_HELP.keys() == BenchConfig.__dataclass_fields__.keys()
    for name in BENCH_HELP:
        assert "--" + name.replace("_", "-") in shown


def test_a_published_command_names_no_absolute_path() -> None:
    words = ["bench", "--bundle", "/home/somebody/my student", "--out", "docs/results", "--pairs", "3"]
    assert typed(words) == "codmd-serve bench --bundle 'my student' --out docs/results --pairs 3"

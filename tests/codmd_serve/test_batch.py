"""Many videos by one engine: those that exist are kept, and the process ends with whoever asked."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from codmd_serve import batch
from codmd_serve.errors import CodmdError, InvalidRequestError


def order(bundle: Path, folder: Path, *prompts: str) -> dict[str, object]:
    jobs = [
        {"prompt": prompt, "seed": 7, "path": str(folder / f"{number}.mp4")} for number, prompt in enumerate(prompts)
    ]
    return {"bundle": str(bundle), "device": "cpu", "dtype": "float32", "crf": 10, "jobs": jobs}


def test_batch_makes_what_is_missing_and_names_every_video(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "0.mp4").write_bytes(b"made before")
    given = json.dumps(order(tiny_bundle, tmp_path, "a red circle", "a blue ring"))
    command = [sys.executable, "-m", "codmd_serve.batch"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "0.mp4"), str(tmp_path / "1.mp4")]
    assert (tmp_path / "0.mp4").read_bytes() == b"made before"
    assert (tmp_path / "1.mp4").read_bytes()[4:8] == b"ftyp"


def test_batch_with_nothing_to_make_loads_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.mp4").write_bytes(b"made before")
    assert batch.make_videos(order(tmp_path / "no bundle", tmp_path, "a red circle"), os.getppid()) == 0
    assert capsys.readouterr().out == f"{tmp_path / '0.mp4'}\n"


def test_batch_ends_when_nobody_waits_for_it(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CodmdError, match="is gone"):
        batch.make_videos(order(tiny_bundle, tmp_path, "a red circle"), parent=-1)
    assert list(tmp_path.iterdir()) == []


def test_batch_refuses_a_prompt_that_the_server_would_refuse(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"the prompt of 0.mp4 cannot be drawn"):
        batch.make_videos(order(tiny_bundle, tmp_path, "x" * 5000), os.getppid())


def test_batch_says_in_one_line_that_there_is_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(order(tmp_path / "nowhere", tmp_path, "a red circle"))))
    assert batch.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("codmd_serve.batch: ") and error.count("\n") == 1 and "nowhere" in error

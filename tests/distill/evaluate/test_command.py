"""`codmd-distill eval shapebench` from arguments to files, with the tiny pipeline and bundle."""

import json
from pathlib import Path

import pytest
from PIL import Image

from distill.cli import build_parser, main

SMALL = ["--num-captions", "2", "--depth-captions", "1", "--depth-seeds", "2", "--steps", "2", "--few-steps", "1"]


@pytest.fixture(autouse=True)
def _few_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.evaluate.shapebench._MIN_REFERENCE", 4)


def test_eval_writes_the_same_report_twice(
    tiny_base: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", "shapebench", "--teacher", str(tiny_base), "--student", str(tiny_bundle), *SMALL]
    texts = []
    for name in ("one", "two"):
        out = tmp_path / name
        assert main([*given, "--out", str(out), "--samples", str(out / "sheet.png")]) == 0
        texts.append([(out / f"shapebench.{kind}").read_bytes() for kind in ("md", "json")])
        assert capsys.readouterr().out.encode() == texts[-1][0]
        with Image.open(out / "sheet.png") as sheet:
            assert sheet.width > 600
    assert texts[0] == texts[1]
    data = json.loads(texts[0][1])
    assert list(data["arms"]) == ["truth", "vae", "teacher", "teacher_again", "few", "few_unguided", "tiny-codmd"]
    assert data["arms"]["truth"]["scores"]["all"]["mean"] == 1.0
    assert data["arms"]["vae"]["psnr_db"] > 0
    assert "tiny-codmd - few" in data["differences"]


def test_eval_inserts_the_report_after_the_marker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("Above.\n<!-- shapebench -->\nold numbers\n")
    assert main(["eval", "shapebench", "--arms", "truth", "--insert", str(page), *SMALL]) == 0
    assert page.read_text() == f"Above.\n<!-- shapebench -->\n{capsys.readouterr().out}"


def test_eval_truth_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "shapebench", "--arms", "truth", "--teacher", "nowhere", *SMALL]) == 0
    assert "| ground truth | 1.000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "no-such-folder"], "no pipeline"),
        (["--student", "no-such-bundle"], "no student bundle"),
        (["--num-captions", "0"], "num captions"),
        (["--depth-seeds", "1"], "depth seeds"),
        (["--steps", "0"], "--steps"),
        (["--threads", "0"], "--threads"),
        (["--samples", "sheet.mp4"], ".png"),
        (["--insert", "no-such-page.md"], "expected a file with one line"),
        (["--arms", "students"], "--student"),
        (["--guidance", "nan"], "--guidance"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_eval_refuses_bad_input_in_one_line(
    arguments: list[str], message: str, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "shapebench", "--teacher", str(tiny_base), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codmd-distill: ") and message in error and error.count("\n") == 1


def test_eval_refuses_a_bundle_given_twice(tiny_base: Path, tiny_bundle: Path) -> None:
    twice = ["--student", str(tiny_bundle)] * 2
    assert main(["eval", "shapebench", "--teacher", str(tiny_base), *twice]) == 2


def test_eval_defaults_are_the_bench_of_the_weights_table() -> None:
    args = build_parser({}).parse_args(["eval", "shapebench"])
    assert (args.num_captions, args.seeds, args.depth_captions, args.depth_seeds) == (128, 1, 4, 32)
    assert (args.steps, args.few_steps, args.guidance) == (50, 4, 3.0)

"""`codmd-distill eval study` from arguments to files."""

import json
import os
from pathlib import Path

import pytest
from studies import PROMPTS, make_study, write_arms, write_clip

from codmd_serve import batch
from distill.cli import main
from distill.evaluate.study import generate
from distill.evaluate.study.design import read_study
from distill.evaluate.study.session import StudySession

STUDY = ["eval", "study"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two arms in arms/, and the study of them in study/."""
    folder = tmp_path_factory.mktemp("made")
    make_study(folder, "a", "b")
    return folder


def test_make_then_analyse_from_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arms(tmp_path, "a", "b")
    out = tmp_path / "study"
    given = [str(arms["a"]), f"other={arms['b']}", "--out", str(out), "--title", "Test"]
    assert main([*STUDY, "make", *given]) == 0
    said = capsys.readouterr().out
    assert "2 arms, 3 items, 3 pairs; each rater sees 3, 2 of them twice, and 2 catch trials" in said
    study = read_study(out)
    assert study.arms == ("a", "other") and study.title == "Test"
    assert main([*STUDY, "analyse", str(out)]) == 0
    assert capsys.readouterr().out.startswith("No rater has answered yet")
    session = StudySession(out)
    session.enrol()
    session.close()
    assert main([*STUDY, "analyse", str(out), "--out", str(tmp_path / "report")]) == 0
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.md", "analysis.json", "votes.csv", "study.png"}
    assert json.loads((tmp_path / "report" / "analysis.json").read_text())["raters_are_human"] is False
    assert main([*STUDY, "make", *given]) == 2
    assert "holds a study already" in capsys.readouterr().err


def test_make_lists_everything_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = write_arms(tmp_path, "a", "b")
    (arms["a"] / f"{PROMPTS[0]}-0.mp4").unlink()
    (arms["b"] / f"{PROMPTS[1]}-0.mp4").write_text("no video")
    write_clip(arms["b"] / f"{PROMPTS[2]}-0.mp4", 9, size=64)
    assert main([*STUDY, "make", *map(str, arms.values()), "--out", str(tmp_path / "study")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("  ", "codmd"))]
    assert len(lines) == 4 and lines[-1] == "codmd-distill: no study was made: 3 problems with the arms, listed above"
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make", "--out", "OUT"], "1 problems"),
        (["make", "A", "--out", "OUT"], "1 problems"),
        (["make", "A", "A", "--out", "OUT"], "two arms are called a"),
        (["make", "x=A", "=A", "--out", "OUT"], "FOLDER or NAME=FOLDER"),
        (["make", "A", "B", "--out", "A"], "holds something already"),
        (["make", "A", "B", "--out", "OUT", "--seeds-per-prompt", "0"], "--seeds-per-prompt"),
        (["make", "A", "B", "--out", "OUT", "--seeds-per-prompt", "2"], "needs --prompts"),
        (["make", "A", "B", "--out", "OUT", "--prompts", "nowhere.txt"], "cannot be read"),
        (["make", "A", "B", "--out", "OUT", "--pairs-per-rater", "99"], "pairs per rater"),
        (["make", "A", "BUNDLE", "--out", "OUT"], "--prompts"),
        (["serve", "A"], "is no study"),
        (["serve", "STUDY", "--port", "99999"], "--port must be in"),
        (["serve", "STUDY", "--host", "no.such.host.invalid"], "cannot listen"),
        (["analyse"], "name the folder of a study"),
        (["analyse", "A"], "is no study"),
        (["analyse", "--simulate", "--strength", "a", "--strength", "b=1"], "--strength"),
        (["analyse", "--simulate", "--strength", "a=1"], "two arms"),
        (["analyse", "--simulate", "--raters", "0"], "clickers"),
        (["analyse", "--simulate", "--num-prompts", "0"], "--num-prompts"),
        (["analyse", "STUDY", "--simulate", "--strength", "zebra=1"], "no strength for"),
        (["wipe"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: list[str], message: str, made: Path, tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "OUT": tmp_path / "out",
        "A": made / "arms" / "a",
        "B": made / "arms" / "b",
        "STUDY": made / "study",
        "BUNDLE": tiny_bundle,
    }
    for name, place in places.items():
        words = [str(place) if word == name else word.replace(f"={name}", f"={place}") for word in words]
    assert main([*STUDY, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("codmd-distill: ")]
    assert len(errors) == 1 and message in errors[0]


def test_simulation_says_in_its_first_line_that_it_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--simulate", "--strength", "ours=0.6", "--strength", "theirs=0", "--raters", "6", "--num-prompts", "10"]
    assert main([*STUDY, "analyse", *words, "--out", str(tmp_path / "out")]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert capsys.readouterr().out == report
    assert report.startswith("No human raters: 6 SIMULATED. This tests the tool and is not a result.\n")
    assert "| overall | ours over theirs | 60." in report
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert numbers["raters_are_human"] is False and numbers["kind"] == "simulated"


def test_simulation_of_a_made_study_leaves_its_folder_as_it_was(made: Path) -> None:
    before = sorted(path.name for path in (made / "study").iterdir())
    assert main([*STUDY, "analyse", str(made / "study"), "--simulate", "--raters", "3"]) == 0
    assert sorted(path.name for path in (made / "study").iterdir()) == before


def test_bundles_make_their_videos_and_the_next_make_finds_them(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bundles of the same weights but other steps, as a student of four steps beside one of two."""
    # In this process, which has torch already; tests of batch.py start it as a process of its own.
    monkeypatch.setattr(generate, "_run_batch", lambda order, *_: batch.make_videos(order, os.getppid()))
    other = tmp_path / "two-steps"
    other.mkdir()
    spec = json.loads((tiny_bundle / "student.json").read_text())
    spec |= {"base": str(tiny_bundle.parent / "tiny"), "sigmas": [1.0, 0.8333, 0.0], "timesteps": [1000.0, 833.3]}
    (other / "student.json").write_text(json.dumps(spec))
    (other / "transformer").symlink_to(tiny_bundle / "transformer")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\n")
    given = ["make", f"four={tiny_bundle}", str(other), "--prompts", str(prompts)]
    out = tmp_path / "study"
    assert main([*STUDY, *given, "--out", str(out), "--device", "cpu"]) == 0
    study = read_study(out)
    assert study.arms == ("four", "two-steps")
    assert [item.prompt for item in study.items] == ["a red circle", "a blue ring"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "study-generated").glob("*/*.mp4")}
    assert len(made) == 4
    again = ["--out", str(tmp_path / "again"), "--generated", str(tmp_path / "study-generated"), "--device", "cpu"]
    assert main([*STUDY, *given, *again]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made

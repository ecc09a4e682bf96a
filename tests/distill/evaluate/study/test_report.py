"""The report: its first line tells who the raters were, and simulated ones are never a result."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from studies import design

from distill.evaluate.study.analysis import analyse
from distill.evaluate.study.design import QUESTIONS, Study
from distill.evaluate.study.plot import draw_result
from distill.evaluate.study.report import as_csv, as_markdown, choose_raters, headline
from distill.evaluate.study.simulate import Crowd, simulate
from distill.evaluate.study.votes import Rater, read_votes


def raters_of(study: Study, *kinds: str, num_clickers: int = 0) -> list[Rater]:
    crowd = Crowd(strengths={"a": 0.8, "b": 0.0}, num_raters=len(kinds), num_clickers=num_clickers, seed=1)
    records = simulate(study, crowd)
    raters, _ = read_votes(study, records)
    for rater, kind in zip(raters, kinds, strict=True):
        rater.kind = kind
    return raters


@pytest.mark.parametrize(
    ("kinds", "line"),
    [
        (("human",) * 3, "Raters: 3 human."),
        (
            ("human", "automated", "rehearsal", "human", "simulated"),
            "Raters: 2 human. Left out: 1 automated (a program steered the browser), 1 rehearsing, 1 SIMULATED.",
        ),
        (("simulated",) * 2, "No human raters: 2 SIMULATED. This tests the tool and is not a result."),
        (
            ("automated", "automated", "rehearsal"),
            "No human raters: 2 automated (a program steered the browser). This tests the tool and is not a result. "
            "Left out: 1 rehearsing.",
        ),
        ((), "No rater has answered yet: there is no result."),
    ],
)
def test_first_line_says_who_the_raters_were(kinds: tuple[str, ...], line: str) -> None:
    study = design(2, 6)
    raters = raters_of(study, *kinds) if kinds else []
    kind, chosen = choose_raters(raters)
    assert headline(kind, chosen, raters) == line
    assert {rater.kind for rater in chosen} <= {kind}
    report = as_markdown(headline(kind, chosen, raters), analyse(study, chosen, num_draws=50))
    assert report.splitlines()[0] == line


def test_report_shows_the_result_with_and_without_those_who_failed() -> None:
    study = design(2, 16, num_catches=6)
    raters = raters_of(study, *["human"] * 5, num_clickers=2)
    report = as_markdown("first", analyse(study, raters, num_draws=50))
    assert "2 raters failed the catch trials and are left out" in report
    assert "With the 2 who failed the catch trials:" in report
    assert report.count("| overall | a | b |") == 2
    assert "48 answered pairs of 3 raters count" in report


def test_csv_has_a_line_for_every_answer_of_everybody() -> None:
    study = design(2, 4)
    raters = raters_of(study, "human", "simulated")
    rows = list(csv.DictReader(io.StringIO(as_csv(study, raters))))
    assert len(rows) == 2 * study.num_trials * len(QUESTIONS)
    assert {row["kind"] for row in rows} == {"human", "simulated"}
    for row in rows:
        expected = {"left": row["left"], "right": row["right"]}.get(row["answer"], row["answer"])
        assert row["preferred"] == expected
        assert (row["catch"] == "broken") == ("broken" in (row["left"], row["right"]))


def test_csv_is_no_program_for_a_spreadsheet() -> None:
    study = design(2, 4)
    (rater,) = raters_of(study, "human")
    vote = rater.votes[0]
    rater.votes = [type(vote)(vote.rater, 0, vote.trial, vote.answers, note='=HYPERLINK("x"),\n"quoted"')]
    rows = list(csv.DictReader(io.StringIO(as_csv(study, [rater]))))
    assert rows[0]["note"] == '\'=HYPERLINK("x"),\n"quoted"'


def test_numbers_are_plain_json() -> None:
    study = design(3, 4)
    crowd = Crowd(strengths={"a": 0.0, "b": 0.0, "c": 0.0}, num_raters=1)
    raters, _ = read_votes(study, simulate(study, crowd))
    json.dumps(analyse(study, raters, num_draws=20), allow_nan=False)
    json.dumps(analyse(study, [], num_draws=20), allow_nan=False)


def test_plot_has_a_bar_for_every_pair_and_question(tmp_path: Path) -> None:
    sizes = []
    for num_arms in (2, 3):
        study = design(num_arms, 4)
        crowd = Crowd(strengths=dict.fromkeys(study.arms, 0.0), num_raters=2)
        raters, _ = read_votes(study, simulate(study, crowd))
        draw_result(analyse(study, raters, num_draws=20), "No human raters: 2 SIMULATED.", tmp_path / "study.png")
        with Image.open(tmp_path / "study.png") as picture:
            sizes.append(picture.size)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 4
    assert sizes[1][1] > sizes[0][1]
    draw_result(analyse(design(2, 3), []), "No rater has answered yet.", tmp_path / "empty.png")

"""A study while it is served: raters go through it, come back to where they were, and cannot answer out of turn."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies import make_study

from codmd_serve.errors import ConfigError, ConflictError, InvalidRequestError, StorageFullError
from distill.evaluate.study.design import QUESTIONS, STUDY_FILE, VIDEO_DIR, read_study, write_study
from distill.evaluate.study.log import LOG_FILE, read_records
from distill.evaluate.study.session import MAX_NOTE_CHARS, StudySession, UnknownRaterError

ALL_LEFT = dict.fromkeys(QUESTIONS, "left")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_study(folder, "alpha", "omega")
    return folder / "study"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "study"))


def finish(session: StudySession, rater: str) -> list[dict[str, Any]]:
    shown = []
    while (trial := session.state(rater)["trial"]) is not None:
        shown.append(trial)
        session.answer(rater, trial["number"], ALL_LEFT, (1, 1))
    return shown


def test_rater_goes_through_all_pairs(folder: Path) -> None:
    session = StudySession(folder, clock=Clock())
    rater = session.enrol()
    shown = finish(session, rater)
    study = session.study
    assert [trial["number"] for trial in shown] == list(range(study.num_trials))
    assert session.state(rater)["num_done"] == study.num_trials
    assert {trial["prompt"] for trial in shown} == {"a red circle", "a blue ring", "a white triangle"}
    session.close()
    records, _ = read_records(folder / LOG_FILE)
    assert [record["type"] for record in records] == ["rater"] + ["answer"] * study.num_trials
    assert records[0]["kind"] == "human"
    assert all(record["shown_s"] >= 1.0 and record["time"] > 0 for record in records[1:])


def test_what_a_rater_is_told_names_no_arm(folder: Path) -> None:
    session = StudySession(folder, clock=Clock())
    rater = session.enrol()
    told = json.dumps([session.about(), session.state(rater), finish(session, rater), session.state(rater)])
    for secret in ("alpha", "omega", "broken", "mismatched", session.study.salt, session.study.id, VIDEO_DIR):
        assert secret not in told
    session.close()


def test_every_video_of_a_trial_has_the_size_of_the_other(folder: Path) -> None:
    session = StudySession(folder, clock=Clock())
    rater = session.enrol()
    for trial in finish(session, rater):
        left, right = (session.video(trial[side]) for side in ("left", "right"))
        assert left != right and left.stat().st_size == right.stat().st_size
    session.close()


def test_rater_resumes_after_a_restart(folder: Path) -> None:
    session = StudySession(folder, clock=Clock())
    rater, other = session.enrol(), session.enrol()
    for number in range(3):
        session.answer(rater, number, ALL_LEFT, (1, 2))
    expected = session.state(rater), session.state(other)
    session.close()
    again = StudySession(folder, clock=Clock())
    assert (again.state(rater), again.state(other)) == expected
    assert again.num_raters == 2
    again.answer(rater, 3, ALL_LEFT, (1, 1))
    third = again.enrol()
    again.close()
    records, _ = read_records(folder / LOG_FILE)
    assert [record["number"] for record in records if record["type"] == "rater"] == [0, 1, 2]
    assert third not in (rater, other)


def test_rater_resumes_after_a_torn_line(folder: Path) -> None:
    session = StudySession(folder, clock=Clock())
    rater = session.enrol()
    for number in range(3):
        session.answer(rater, number, ALL_LEFT, (1, 1))
    session.close()
    log = folder / LOG_FILE
    log.write_bytes(log.read_bytes()[:-20])
    again = StudySession(folder, clock=Clock())
    assert again.num_damaged == 1 and again.state(rater)["num_done"] == 2
    again.answer(rater, 2, ALL_LEFT, (1, 1))
    again.close()
    third = StudySession(folder)
    assert third.state(rater)["num_done"] == 3
    third.close()


def test_the_same_answer_twice_counts_once(folder: Path) -> None:
    session = StudySession(folder, clock=Clock())
    rater = session.enrol()
    first = session.answer(rater, 0, ALL_LEFT, (1, 1))
    assert session.answer(rater, 0, ALL_LEFT, (1, 1)) == first
    with pytest.raises(ConflictError, match="pair 2"):
        session.answer(rater, 0, dict.fromkeys(QUESTIONS, "right"), (1, 1))
    with pytest.raises(ConflictError):
        session.answer(rater, 5, ALL_LEFT, (1, 1))
    session.close()
    assert len(read_records(folder / LOG_FILE)[0]) == 2


@pytest.mark.parametrize(
    ("answers", "plays", "note", "message"),
    [
        ({}, (1, 1), "", "answer all of"),
        ({**ALL_LEFT, "sound": "left"}, (1, 1), "", "answer all of"),
        ({**ALL_LEFT, "look": "neither"}, (1, 1), "", "look must be one of"),
        (ALL_LEFT, (0, 1), "", "play to the end"),
        (ALL_LEFT, (1, 0), "", "play to the end"),
        (ALL_LEFT, (1, 10**9), "", "play to the end"),
        (ALL_LEFT, (1, 1), "x" * (MAX_NOTE_CHARS + 1), "a note has at most"),
    ],
)
def test_incomplete_answers_are_refused(
    folder: Path, answers: dict[str, str], plays: tuple[int, int], note: str, message: str
) -> None:
    session = StudySession(folder, clock=Clock())
    rater = session.enrol()
    with pytest.raises(InvalidRequestError, match=message):
        session.answer(rater, 0, answers, plays, note)
    assert session.state(rater)["num_done"] == 0
    session.close()


def test_answers_before_the_videos_can_have_ended_are_refused(folder: Path) -> None:
    clock = Clock()
    session = StudySession(folder, clock=lambda: clock.now_s)
    rater = session.enrol()
    assert session.state(rater)["trial"]["number"] == 0
    duration_s = session.study.items[0].duration_s
    assert duration_s == 0.5
    clock.now_s += 0.3
    with pytest.raises(InvalidRequestError, match="play to the end"):
        session.answer(rater, 0, ALL_LEFT, (1, 1))
    clock.now_s += 0.2
    session.answer(rater, 0, ALL_LEFT, (1, 1))
    session.close()


def test_unknown_raters_and_videos(folder: Path) -> None:
    session = StudySession(folder)
    for call in (
        lambda: session.state("nobody"),
        lambda: session.answer("nobody", 0, ALL_LEFT, (1, 1)),
        lambda: session.video("nothing"),
    ):
        with pytest.raises(UnknownRaterError):
            call()
    session.close()


def test_full_disk_counts_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = StudySession(folder, clock=Clock())
    rater = session.enrol()

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(session._log, "append", full)
        with pytest.raises(StorageFullError, match="cannot be written"):
            session.answer(rater, 0, ALL_LEFT, (1, 1))
        with pytest.raises(StorageFullError):
            session.enrol()
    assert session.state(rater)["num_done"] == 0 and session.num_raters == 1
    session.answer(rater, 0, ALL_LEFT, (1, 1))
    session.close()


def test_several_raters_at_once(folder: Path) -> None:
    session = StudySession(folder, clock=Clock())
    failures: list[BaseException] = []

    def take_part() -> None:
        try:
            finish(session, session.enrol())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=take_part) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    assert failures == []
    records, num_damaged = read_records(folder / LOG_FILE)
    assert num_damaged == 0
    assert sorted(record["number"] for record in records if record["type"] == "rater") == list(range(8))
    assert sum(record["type"] == "answer" for record in records) == 8 * session.study.num_trials


@pytest.mark.parametrize(("flags", "kind"), [((False, True), "automated"), ((True, False), "rehearsal")])
def test_robots_and_rehearsals_are_told_from_humans(folder: Path, flags: tuple[bool, bool], kind: str) -> None:
    session = StudySession(folder, is_rehearsal=flags[0])
    session.enrol(is_automated=flags[1])
    session.close()
    assert read_records(folder / LOG_FILE)[0][0]["kind"] == kind


def test_study_that_lost_a_video_is_not_served(folder: Path) -> None:
    next((folder / VIDEO_DIR).iterdir()).unlink()
    with pytest.raises(ConfigError, match="1 of 8 videos are missing"):
        StudySession(folder)


def test_log_of_another_study_is_refused(folder: Path) -> None:
    session = StudySession(folder)
    session.enrol()
    session.close()
    study = read_study(folder)
    (folder / STUDY_FILE).unlink()
    write_study(replace(study, id="another"), folder)
    with pytest.raises(ConfigError, match="another study"):
        StudySession(folder)
    write_study(study, folder)
    StudySession(folder).close()  # the refused one let go of the lock

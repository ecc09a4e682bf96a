"""A study while it is served: enrols raters, shows each the next trial, writes answers to the log.

Several raters at once, from several threads. Knows nothing of HTTP: app/study.py is given this object. Whatever is
answered is in the log, so a restarted server goes on where every rater was.

Records of the log:
    {"type": "rater", "rater": ID, "number": 0, "kind": "human", "time": SECONDS, "study": ID}
    {"type": "answer", "rater": ID, "trial": 0, "item": 3, "left": ARM, "right": ARM, "catch": null, "repeat_of": null,
     "answers": {"overall": "left", ...}, "plays": [1, 2], "shown_s": 12.5, "note": "", "time": SECONDS}
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError, ConflictError, InvalidRequestError, StorageFullError
from distill.evaluate.study.design import (
    ANSWERS,
    QUESTIONS,
    VIDEO_DIR,
    Study,
    Trial,
    file_name,
    read_study,
    trials_of,
    video_files,
    video_token,
)
from distill.evaluate.study.log import LOG_FILE, AnswerLog

HUMAN, AUTOMATED, REHEARSAL, SIMULATED = "human", "automated", "rehearsal", "simulated"
MAX_NOTE_CHARS = 500
MAX_PLAYS = 10_000
# Players round the length of a video.
CLOCK_SLACK = 0.9


class UnknownRaterError(Exception):
    """No such rater, or no such video for the trial that the rater is at."""


@dataclass(slots=True)
class _Rater:
    id: str
    trials: list[Trial]
    num_done: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    shown_at_s: float | None = None


class StudySession:
    """A study that raters take part in.

    Args:
        folder: of `codmd-distill eval study make`.
        is_rehearsal: whether raters only try it out; they never count.
        clock: seconds that never run backwards.

    Raises:
        ConfigError: no study there, a video missing, a log of another study, or another process that serves it.
    """

    def __init__(
        self, folder: Path, *, is_rehearsal: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.study: Study = read_study(folder)
        self._folder, self._clock = folder / VIDEO_DIR, clock
        self._is_rehearsal = is_rehearsal
        self._lock = threading.Lock()
        self._raters: dict[str, _Rater] = {}
        self._videos: dict[str, Path] = {}
        self._next_number = 0
        self._check_videos()
        self._log = AnswerLog(folder / LOG_FILE)
        try:
            self._replay()
        except BaseException:
            self._log.close()
            raise

    @property
    def num_raters(self) -> int:
        """Number of raters who have enrolled."""
        return len(self._raters)

    @property
    def num_damaged(self) -> int:
        """Number of lines of the log that cannot be read."""
        return self._log.num_damaged

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def about(self) -> dict[str, Any]:
        """Return what a visitor reads before the start."""
        return {"title": self.study.title, "num_trials": self.study.num_trials}

    def enrol(self, *, is_automated: bool = False) -> str:
        """Take in a new rater.

        Args:
            is_automated: whether a program steers the browser, as in a test; such raters never count as human.

        Returns:
            The rater's random id; the link with it resumes.

        Raises:
            StorageFullError: the log cannot be written.
        """
        kind = REHEARSAL if self._is_rehearsal else AUTOMATED if is_automated else HUMAN
        with self._lock:
            rater, number = secrets.token_hex(8), self._next_number
            record = {"type": "rater", "rater": rater, "number": number, "kind": kind, "study": self.study.id}
            self._write(record)
            self._raters[rater] = _Rater(rater, trials_of(self.study, number))
            self._next_number += 1
        return rater

    def state(self, rater: str) -> dict[str, Any]:
        """Return what the page shows: progress, and the trial that the rater is at.

        Raises:
            UnknownRaterError: nobody of that id.
        """
        with self._lock:
            return self._state(self._rater(rater))

    def answer(
        self, rater: str, number: int, answers: dict[str, str], plays: tuple[int, int], note: str = ""
    ) -> dict[str, Any]:
        """Write the answers of one trial to the log, then return the next one as `state` does.

        The same answers again, as a browser sends them that did not hear of the first time, change nothing.

        Args:
            rater: id.
            number: of the trial, 0 for the first.
            answers: one of ANSWERS for each of QUESTIONS.
            plays: how often the left and the right video were played to the end.
            note: whatever the rater wants to say.

        Raises:
            UnknownRaterError: nobody of that id.
            InvalidRequestError: answers that are not complete, or came before both videos can have ended.
            ConflictError: answers for a trial that the rater is not at.
            StorageFullError: the log cannot be written; nothing counts as answered.
        """
        with self._lock:
            person = self._rater(rater)
            body = {"answers": dict(answers), "plays": list(plays), "note": note}
            if number == person.num_done - 1 and person.last.get("answers") == body["answers"]:
                return self._state(person)
            if number != person.num_done or number >= len(person.trials):
                raise ConflictError(f"pair {number + 1} is not the one to answer now: it is pair {person.num_done + 1}")
            _check_answers(answers, plays, note)
            shown_s = self._shown_s(person)
            trial = person.trials[number]
            if shown_s is not None and shown_s < CLOCK_SLACK * self.study.items[trial.item].duration_s:
                raise InvalidRequestError("both videos have to play to the end before you can answer", "plays")
            record = {"type": "answer", "rater": rater, "trial": number, "item": trial.item, "left": trial.left}
            record |= {"right": trial.right, "catch": trial.catch, "repeat_of": trial.repeat_of}
            self._write(record | body | {"shown_s": None if shown_s is None else round(shown_s, 3)})
            person.num_done, person.last, person.shown_at_s = number + 1, body, None
            return self._state(person)

    def video(self, token: str) -> Path:
        """Return the file behind a video's address.

        Raises:
            UnknownRaterError: no address of a trial that a rater is at, or was since the server started.
        """
        try:
            return self._videos[token]
        except KeyError:
            raise UnknownRaterError("there is no such video") from None

    def _rater(self, rater: str) -> _Rater:
        try:
            return self._raters[rater]
        except KeyError:
            raise UnknownRaterError("nobody takes part under this link; start anew without it") from None

    def _state(self, person: _Rater) -> dict[str, Any]:
        trial = None
        if person.num_done < len(person.trials):
            trial = self._show(person)
        return {
            "title": self.study.title,
            "questions": QUESTIONS,
            "num_trials": len(person.trials),
            "num_done": person.num_done,
            "trial": trial,
        }

    def _show(self, person: _Rater) -> dict[str, Any]:
        number = person.num_done
        trial = person.trials[number]
        tokens = {}
        for side, name in zip(("left", "right"), video_files(self.study, trial), strict=True):
            tokens[side] = video_token(self.study, person.id, number, side)
            self._videos[tokens[side]] = self._folder / name
        if person.shown_at_s is None:
            person.shown_at_s = self._clock()
        return {"number": number, "prompt": self.study.items[trial.item].prompt, **tokens}

    def _shown_s(self, person: _Rater) -> float | None:
        """Return how long the trial has been shown; None where the server was restarted since."""
        return None if person.shown_at_s is None else self._clock() - person.shown_at_s

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._log.append(record | {"time": round(time.time(), 3)})
        except OSError as error:
            raise StorageFullError(f"answers cannot be written now: {error.strerror}") from error

    def _check_videos(self) -> None:
        study = self.study
        needed = {file_name(study, item, arm) for item in range(len(study.items)) for arm in study.arms}
        needed |= {file_name(study, catch.item, catch.kind, number) for number, catch in enumerate(study.catches)}
        missing = sum(not (self._folder / name).is_file() for name in needed)
        if missing:
            raise ConfigError(f"{missing} of {len(needed)} videos are missing in {self._folder}: make the study anew")

    def _replay(self) -> None:
        """Bring every rater to where the log says."""
        for record in self._log.records:
            kind, rater = record.get("type"), record.get("rater")
            if kind == "rater" and isinstance(rater, str) and rater not in self._raters:
                if record.get("study") != self.study.id:
                    raise ConfigError("the log is of another study: move answers.jsonl away")
                number = record.get("number")
                if not isinstance(number, int) or number < 0:
                    raise ConfigError(f"the log has no number for rater {rater}")
                self._raters[rater] = _Rater(rater, trials_of(self.study, number))
                self._next_number = max(self._next_number, number + 1)
            elif kind == "answer" and rater in self._raters:
                person = self._raters[rater]
                if record.get("trial") == person.num_done:
                    person.num_done, person.last = person.num_done + 1, record


def _check_answers(answers: dict[str, str], plays: tuple[int, int], note: str) -> None:
    missing = [name for name in QUESTIONS if name not in answers]
    if missing or len(answers) != len(QUESTIONS):
        raise InvalidRequestError(f"answer all of {', '.join(QUESTIONS)} and nothing else", "answers")
    for name, answer in answers.items():
        if answer not in ANSWERS:
            raise InvalidRequestError(f"{name} must be one of {', '.join(ANSWERS)}", "answers")
    if not all(1 <= count <= MAX_PLAYS for count in plays):
        raise InvalidRequestError("both videos have to play to the end before you can answer", "plays")
    if len(note) > MAX_NOTE_CHARS:
        raise InvalidRequestError(f"a note has at most {MAX_NOTE_CHARS} characters", "note")

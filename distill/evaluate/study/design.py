"""The design of a blind pairwise study: which rater sees which two videos, on which side, in which order.

A pure function of study.json and the number of a rater; knows nothing of files, answers or the page.

Every pair of arms is shown on every prompt. The pairs stand in one shuffled sequence, and raters take consecutive
stretches of it, around and around. Each time around swaps the sides, so a pair is shown as often with the one arm on
the left as with the other, and so is each pair of arms within one rater, give or take one.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_json
from codmd_serve.textfiles import read_json_object

STUDY_FILE = "study.json"
VIDEO_DIR = "videos"
FORMAT = 1
QUESTIONS = {
    "overall": "Which video is better overall?",
    "motion": "Which one moves more naturally and completely?",
    "prompt": "Which one shows better what the text says?",
    "look": "Which one looks better: sharpness and colours?",
}
# What a rater may answer; the page calls the left video A and the right one B.
ANSWERS = ("left", "right", "same", "bad")
SWAPPED = {"left": "right", "right": "left", "same": "same", "bad": "bad"}
BROKEN, MISMATCHED = "broken", "mismatched"
# The question that decides whether a rater saw through a catch trial.
CATCH_QUESTION = {BROKEN: "overall", MISMATCHED: "prompt"}
_SEQUENCE_STREAM, _RATER_STREAM = 1, 2


@dataclass(frozen=True, slots=True)
class Item:
    """What all arms made a video of.

    Attributes:
        name: of its files, without the suffix.
        prompt: the text that raters read; items with the same prompt are one cluster of the analysis.
        duration_s: of its videos.
    """

    name: str
    prompt: str
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Catch:
    """A trial with a known answer: the video of an arm beside one that is worse for sure.

    Attributes:
        kind: broken (the same video, destroyed) or mismatched (the arm's video of another prompt).
        item: index of the item whose prompt is shown.
        arm: whose video is shown.
        other_item: whose video the mismatched one is; the item itself for a broken one.
    """

    kind: str
    item: int
    arm: str
    other_item: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that is fixed before the first rater comes.

    Attributes:
        id: random name of the study.
        salt: secret that the names of files and the addresses of videos are made with.
        title: what raters read above the pairs.
        arms: names of what is compared, two or more.
        items, catches: see their classes.
        pairs_per_rater: trials that count, of each rater.
        num_repeats: trials of a rater that come a second time with swapped sides.
        catch_pass_share: least share of the catch trials that a rater has to answer right to pass.
        seed: of the order.
    """

    id: str
    salt: str
    title: str
    arms: tuple[str, ...]
    items: tuple[Item, ...]
    catches: tuple[Catch, ...]
    pairs_per_rater: int
    num_repeats: int
    catch_pass_share: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.arms)) != len(self.arms) or len(self.arms) < 2:
            raise ConfigError(f"a study compares two arms or more of different names, got {list(self.arms)}")
        if set(self.arms) & set(CATCH_QUESTION):
            raise ConfigError(f"an arm cannot be called {BROKEN} or {MISMATCHED}: name it with NAME=FOLDER")
        if not self.items:
            raise ConfigError("a study needs at least one prompt")
        if not 1 <= self.pairs_per_rater <= self.num_pairs:
            raise ConfigError(f"pairs per rater must be in 1..{self.num_pairs}, got {self.pairs_per_rater}")
        if not 0 <= self.num_repeats <= self.pairs_per_rater:
            raise ConfigError(f"repeats must be in 0..{self.pairs_per_rater}, got {self.num_repeats}")
        if not 0.0 <= self.catch_pass_share <= 1.0:
            raise ConfigError(f"catch_pass_share must be in 0..1, got {self.catch_pass_share}")

    @property
    def num_pairs(self) -> int:
        """Number of pairs that one time around shows: pairs of arms times items."""
        return len(self.items) * len(self.arms) * (len(self.arms) - 1) // 2

    @property
    def num_trials(self) -> int:
        """Number of trials of one rater."""
        return self.pairs_per_rater + self.num_repeats + len(self.catches)


@dataclass(frozen=True, slots=True)
class Trial:
    """Two videos that one rater compares.

    Attributes:
        item: index of the item whose prompt is shown.
        left, right: names of arms; broken or mismatched for the worse video of a catch trial.
        catch: index of the catch trial; None for a pair that counts.
        repeat_of: number of the trial that this one repeats with swapped sides; None for the first showing.
    """

    item: int
    left: str
    right: str
    catch: int | None = None
    repeat_of: int | None = None


def trials_of(study: Study, rater_number: int) -> list[Trial]:
    """Return the trials of a rater, in the order they are shown.

    Args:
        study: the design.
        rater_number: 0 for the first rater who came, 1 for the second, ...
    """
    rng = np.random.default_rng([study.seed, _RATER_STREAM, rater_number])
    sequence = _sequence(study)
    trials = []
    for place in range(rater_number * study.pairs_per_rater, (rater_number + 1) * study.pairs_per_rater):
        times_around, index = divmod(place, len(sequence))
        trial = sequence[index]
        trials.append(_swapped(trial) if times_around % 2 else trial)
    is_right = int(rng.integers(2))
    for index, catch in enumerate(study.catches):
        trial = Trial(catch.item, catch.arm, catch.kind, catch=index)
        trials.append(_swapped(trial) if (index + is_right) % 2 else trial)
    return _with_repeats(_spread(trials, rng), study.num_repeats, rng)


def file_name(study: Study, item: int, source: str, catch: int | None = None) -> str:
    """Return the name of a video in the study's folder, which tells nothing of arm, prompt or order.

    Args:
        study: whose salt makes the name.
        item: index of the item whose prompt is shown.
        source: an arm; broken or mismatched for the worse video of a catch trial.
        catch: index of the catch trial of a broken or mismatched video.
    """
    which = f"catch/{catch}" if source in CATCH_QUESTION else f"arm/{source}"
    return f"{_digest(study, f'file/{item}/{which}')}.mp4"


def video_files(study: Study, trial: Trial) -> tuple[str, str]:
    """Return the names of the left and the right video of a trial."""
    left, right = (file_name(study, trial.item, source, trial.catch) for source in (trial.left, trial.right))
    return left, right


def video_token(study: Study, rater: str, number: int, side: str) -> str:
    """Return the address of a video for one rater and one trial; the same video has another one in any other trial."""
    return _digest(study, f"token/{rater}/{number}/{side}")


def right_answer(study: Study, trial: Trial) -> tuple[str, str] | None:
    """Return the deciding question and the right answer of a catch trial; None for any other."""
    if trial.catch is None:
        return None
    kind = study.catches[trial.catch].kind
    return CATCH_QUESTION[kind], "right" if trial.left == kind else "left"


def write_study(study: Study, folder: Path) -> None:
    """Write study.json, atomically."""
    write_json(folder / STUDY_FILE, {"format": FORMAT, **asdict(study)})


def read_study(folder: Path) -> Study:
    """Read study.json.

    Raises:
        ConfigError: there is no study in the folder, or it is of another format or damaged.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no study: it has no {STUDY_FILE}; make one with `codmd-distill eval study make`"
        )
    data = read_json_object(path, ConfigError)
    if data.pop("format", None) != FORMAT:
        raise ConfigError(f"{path} is of another format than {FORMAT}: read it with the version that made it")
    try:
        return Study(**{**data, **_tuples(data)})
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "arms": tuple(data["arms"]),
        "items": tuple(Item(**entry) for entry in data["items"]),
        "catches": tuple(Catch(**entry) for entry in data["catches"]),
    }


def _sequence(study: Study) -> list[Trial]:
    """Return all pairs in shuffled order; the sides of each pair of arms alternate."""
    rng = np.random.default_rng([study.seed, _SEQUENCE_STREAM])
    pairs = list(itertools.combinations(study.arms, 2))
    trials = [Trial(item, first, second) for item in range(len(study.items)) for first, second in pairs]
    turns = {pair: int(rng.integers(2)) for pair in pairs}
    sequence = []
    for trial in (trials[index] for index in rng.permutation(len(trials))):
        pair = (trial.left, trial.right)
        sequence.append(_swapped(trial) if turns[pair] % 2 else trial)
        turns[pair] += 1
    return sequence


def _swapped(trial: Trial) -> Trial:
    return replace(trial, left=trial.right, right=trial.left)


def _spread(trials: list[Trial], rng: np.random.Generator) -> list[Trial]:
    """Shuffle, with the same prompt not twice in a row where that can be avoided."""
    waiting: dict[int, list[Trial]] = {}
    for index in rng.permutation(len(trials)):
        waiting.setdefault(trials[index].item, []).append(trials[index])
    order: list[Trial] = []
    while waiting:
        last = order[-1].item if order else None
        fresh = [item for item in waiting if item != last] or list(waiting)
        # The item with most trials left comes first, else it would be left over at the end, beside itself.
        most = max(len(waiting[item]) for item in fresh)
        item = int(rng.choice([item for item in fresh if len(waiting[item]) == most]))
        order.append(waiting[item].pop())
        if not waiting[item]:
            del waiting[item]
    return order


def _with_repeats(order: list[Trial], num_repeats: int, rng: np.random.Generator) -> list[Trial]:
    """Show trials of the first half again, swapped, in the second half."""
    counting = [number for number, trial in enumerate(order) if trial.catch is None]
    first_half = counting[: max(num_repeats, len(counting) // 2)]
    chosen = [int(number) for number in rng.permutation(first_half)[:num_repeats]]
    result = list(order)
    for number in chosen:
        original = order[number]
        shown_at = next(place for place, trial in enumerate(result) if trial is original)
        earliest = max(len(order) // 2, shown_at + 1)
        places = list(range(earliest, len(result) + 1))
        apart = [at for at in places if all(near.item != original.item for near in result[max(at - 1, 0) : at + 1])]
        place = int(rng.choice(apart or places))
        result.insert(place, replace(_swapped(original), repeat_of=number))
    # A repeat may have pushed back the original of another one.
    places_of = {id(trial): number for number, trial in enumerate(result)}
    return [
        trial if trial.repeat_of is None else replace(trial, repeat_of=places_of[id(order[trial.repeat_of])])
        for trial in result
    ]


def _digest(study: Study, text: str) -> str:
    return hmac.new(study.salt.encode(), text.encode(), hashlib.sha256).hexdigest()[:24]

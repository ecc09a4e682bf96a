"""Turns measured arms into numbers, Markdown and JSON; draws and measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill.evaluate.joint import TIED_PAIRS, dependence_distance, pair_taus
from distill.evaluate.shapebench import ArmResult, Reference, Suite
from distill.evaluate.stats import NUM_RESAMPLES, Interval, clustered_mean, paired_difference

DEPENDENCE = "dependence"
HEADROOM_METRICS = ("imaging", "all", "diversity", "marginal", DEPENDENCE)
HEADROOM_WANTED = 5.0
NO_UNIT = 1e-9  # rounding of the means
RETENTION_WANTED = 0.9


@dataclass(frozen=True, slots=True)
class Metric:
    """A column of the report: a score, the clips it is taken from, and which way is better.

    Attributes:
        key: unique name, as in the JSON file.
        score: name of a clip score, of a depth score, or "dependence".
        heading: of the column.
        better: "high", "low", or "target" when the ground truth's value is the best.
        count: only captions of this many objects; None is all.
        target: the best value, for "target".
    """

    key: str
    score: str
    heading: str
    better: str = "high"
    count: int | None = None
    target: float = 1.0

    def badness(self, value: float) -> float:
        """Return the distance of a value from the ideal, in its own unit; more is worse."""
        if self.better == "target":
            return abs(value - self.target)
        return -value if self.better == "high" else value


FOLLOWING = (
    Metric("one_object_colour", "object_colour", "1: object+colour", count=1),
    Metric("one_direction", "direction", "1: direction", count=1),
    Metric("one_all", "all", "1: all", count=1),
    Metric("two_count", "count", "2: count", count=2),
    Metric("two_all", "all", "2: all", count=2),
    *(
        Metric(name, name, name)
        for name in ("object", "colour", "count", "direction", "speed", "background", "relation", "all")
    ),
)
VIDEO_METRICS = (
    Metric("flicker", "flicker", "flicker (levels) v", "low"),
    Metric("smoothness", "smoothness", "smoothness ^"),
    Metric("dynamic", "dynamic", "dynamic", "target"),
    Metric("imaging", "imaging", "imaging ^"),
    Metric("saturation", "saturation", "saturation error", "target", target=0.0),
    Metric("saturation_abs", "saturation_abs", "abs. saturation error v", "low"),
)
FORM = tuple(
    Metric(f"{word}_{name}", name, f"{count}: {heading} ^", count=count)
    for name, heading in (("form", "form"), ("form_worst", "worst frame"), ("form_whole", "worst frame >= .75"))
    for count, word in ((1, "one"), (2, "two"))
)
JOINT = (
    Metric("diversity", "diversity", "diversity (1)", "target"),
    Metric("pixel_diversity", "pixel_diversity", "pixel diversity (1)", "target"),
    Metric("marginal", "marginal", "marginal v", "low"),
    Metric(DEPENDENCE, DEPENDENCE, "dependence v", "low"),
    Metric("bend_modes", "bend_modes", "bend modes ^"),
)
METRICS = FOLLOWING + VIDEO_METRICS + FORM + JOINT


class Analysis:
    """All numbers of a bench run: `value` of an arm, `difference` of two arms."""

    def __init__(self, arms: Sequence[ArmResult], suite: Suite, reference: Reference, seed: int) -> None:
        self.arms = {arm.name: arm for arm in arms}
        self.suite = suite
        self.reference = reference
        self.seed = seed
        self._counts = suite.num_objects
        self._truth_taus = pair_taus([reference.factors[index] for index in suite.depth])
        rng = np.random.default_rng(seed)
        self._draws = [
            rng.multinomial(len(rows), np.full(len(rows), 1.0 / len(rows)), size=NUM_RESAMPLES).astype(float)
            for rows in map(suite.rows, suite.depth)
        ]

    def metrics(self, group: Sequence[Metric] = METRICS) -> list[Metric]:
        """Return the metrics of a group that this suite can measure."""
        return [metric for metric in group if metric not in JOINT or self.suite.depth]

    def value(self, metric: Metric, name: str) -> Interval:
        """Return a score of an arm with its interval."""
        if metric.score == DEPENDENCE:
            return self._interval(*self._dependence(name))
        return clustered_mean(*self._values(metric, name), seed=self.seed)

    def difference(self, metric: Metric, first: str, second: str) -> Interval:
        """Return first - second on the same captions and noise, with its interval."""
        if metric.score == DEPENDENCE:
            (point, draws), (point2, draws2) = self._dependence(first), self._dependence(second)
            return self._interval(point - point2, draws - draws2)
        values, clusters = self._values(metric, first)
        return paired_difference(values, self._values(metric, second)[0], clusters, seed=self.seed)

    def taus(self, name: str | None) -> dict[str, float]:
        """Return Kendall's tau of each tied pair in the depth suite; of the reference when `name` is None."""
        taus = self._truth_taus if name is None else pair_taus(self._depth_factors(name))
        return {f"{a}-{b}": float(tau) for (a, b), tau in zip(TIED_PAIRS, taus[0], strict=True)}

    def _values(self, metric: Metric, name: str) -> tuple[np.ndarray, np.ndarray]:
        arm = self.arms[name]
        if metric.score in arm.depth_scores:
            return arm.depth_scores[metric.score], np.array(self.suite.depth)
        chosen = self.suite.is_breadth & ((self._counts == metric.count) if metric.count else True)
        return arm.scores[metric.score][chosen], self.suite.caption_index[chosen]

    def _depth_factors(self, name: str) -> list[np.ndarray]:
        return [self.arms[name].factors[self.suite.rows(index)] for index in self.suite.depth]

    def _dependence(self, name: str) -> tuple[float, np.ndarray]:
        groups = self._depth_factors(name)
        # Resampled by seed within each caption, the same seeds in every arm: a handful of captions is too few to
        # resample, and tau is a property of one caption's law.
        point = dependence_distance(pair_taus(groups), self._truth_taus)
        return float(point[0]), dependence_distance(pair_taus(groups, self._draws), self._truth_taus)

    def _interval(self, point: float, draws: np.ndarray) -> Interval:
        low, high = np.percentile(draws, [2.5, 97.5])
        num = sum(len(self.suite.rows(index)) for index in self.suite.depth)
        return Interval(point, float(low), float(high), float(draws.std()), num, len(self.suite.depth))


def comparisons(analysis: Analysis, students: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of arms to compare: A/A, few steps against many, each student against both."""
    wanted = [("teacher_again", "teacher"), ("few", "teacher"), ("few_unguided", "teacher")]
    wanted += [(student, other) for student in students for other in ("teacher", "few", "few_unguided")]
    return [(a, b) for a, b in wanted if a in analysis.arms and b in analysis.arms]


def headroom(analysis: Analysis) -> list[dict[str, float | str | bool | None]]:
    """Report how far few steps fall behind many, in units of the A/A difference.

    The unit is the larger of the A/A difference and its bootstrap standard deviation, since one difference may be
    small by luck. Where both are zero there is no unit, and `units` is None.
    """
    rows: list[dict[str, float | str | bool | None]] = []
    if not {"teacher", "teacher_again"} <= analysis.arms.keys():
        return rows
    for metric in analysis.metrics():
        if metric.key not in HEADROOM_METRICS:
            continue
        again, many = (analysis.value(metric, name).mean for name in ("teacher_again", "teacher"))
        noise = analysis.difference(metric, "teacher_again", "teacher").sd
        unit = max(abs(metric.badness(again) - metric.badness(many)), noise)
        for name in ("few", "few_unguided"):
            if name in analysis.arms:
                behind = metric.badness(analysis.value(metric, name).mean) - metric.badness(many)
                # Two samples that score alike, as on a handful of clips, are no measure of anything.
                wide = behind / unit if unit > NO_UNIT else None
                rows.append(
                    {
                        "metric": metric.key,
                        "arm": name,
                        "behind": behind,
                        "unit": unit,
                        "units": wide,
                        "enough": wide is not None and wide >= HEADROOM_WANTED,
                    }
                )
    return rows


def targets(analysis: Analysis, student: str) -> dict[str, object]:
    """Report a student's share of the teacher's following scores, and its video scores below guided few steps."""
    result: dict[str, object] = {}
    if "teacher" in analysis.arms:
        shares = {}
        for metric in FOLLOWING:
            best = analysis.value(metric, "teacher").mean
            if best > 0:
                shares[metric.key] = analysis.value(metric, student).mean / best
        result["share_of_teacher"] = shares
        result["below_wanted_share"] = [key for key, share in shares.items() if share < RETENTION_WANTED]
    for other in ("few", "few_unguided"):
        if other in analysis.arms:
            judged = analysis.metrics(
                [m for m in VIDEO_METRICS + FORM + JOINT if m.key not in ("dynamic", "saturation")]
            )
            result[f"worse_than_{other}"] = [
                metric.key
                for metric in judged
                if metric.badness(analysis.value(metric, student).mean)
                > metric.badness(analysis.value(metric, other).mean)
            ]
    return result


def analysis_json(analysis: Analysis, students: Sequence[str], settings: dict[str, object]) -> dict[str, object]:
    """Return all numbers of the tables, with intervals, as JSON values."""
    metrics = analysis.metrics()
    return {
        "settings": settings,
        "captions": list(dict.fromkeys(request.caption for request in analysis.suite.requests)),
        "truth_taus": _plain(analysis.taus(None)) if analysis.suite.depth else {},
        "arms": {
            name: {
                "label": arm.label,
                "psnr_db": arm.psnr_db,
                "scores": {metric.key: analysis.value(metric, name).as_dict() for metric in metrics},
                "taus": _plain(analysis.taus(name)) if analysis.suite.depth else {},
            }
            for name, arm in analysis.arms.items()
        },
        "differences": {
            f"{first} - {second}": {m.key: analysis.difference(m, first, second).as_dict() for m in metrics}
            for first, second in comparisons(analysis, students)
        },
        "headroom": headroom(analysis),
        "targets": {student: targets(analysis, student) for student in students},
    }


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if np.isnan(value) else value for key, value in values.items()}

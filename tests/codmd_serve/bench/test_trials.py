"""Trials alternate, ratios are of neighbours, spreads are quartiles."""

from itertools import islice

import pytest

from codmd_serve.bench.trials import Pair, Trial, requests, run_pairs, spread_of
from codmd_serve.bench.weights import PROMPTS
from codmd_serve.config import GenerateParams

PARAMS = GenerateParams(prompt="", seed=0, height=32, width=32, num_frames=9, fps=16, crf=18)


def trial(total_ms: float) -> Trial:
    return Trial(stages_ms={"text": total_ms}, total_ms=total_ms, cpu_ms=total_ms, device_ms=None, memory_bytes=None)


def test_pairs_alternate_and_share_prompt_and_seed() -> None:
    order: list[tuple[str, int, str]] = []

    def run(name: str) -> Trial:
        return trial(1.0 if name == "ours" else 2.0)

    def time_ours(params: GenerateParams) -> Trial:
        order.append(("ours", params.seed, params.prompt))
        return run("ours")

    def time_other(params: GenerateParams) -> Trial:
        order.append(("other", params.seed, params.prompt))
        return run("other")

    pairs = run_pairs(time_ours, time_other, requests(PARAMS, ("a", "b", "c")), most=3, may_go_on=lambda: True)
    assert [name for name, _, _ in order] == ["ours", "other", "other", "ours", "ours", "other"]
    assert [(seed, prompt) for _, seed, prompt in order] == [
        (0, "a"), (0, "a"), (1, "b"), (1, "b"), (2, "c"), (2, "c")
    ]  # fmt: skip
    assert [pair.ratio for pair in pairs] == [2.0, 2.0, 2.0]


def test_one_pair_is_run_even_when_there_is_no_time() -> None:
    asked = requests(PARAMS, ("a",))
    pairs = run_pairs(lambda _: trial(2.0), lambda _: trial(3.0), asked, most=5, may_go_on=lambda: False)
    assert [pair.ratio for pair in pairs] == [1.5]


def test_noise_that_hits_both_leaves_the_ratio_alone() -> None:
    noise = (1.0, 3.0, 9.0)
    pairs = [Pair(trial(2.0 * factor), trial(5.0 * factor)) for factor in noise]
    assert spread_of([pair.ours.total_ms for pair in pairs]).relative > 1.0
    ratios = spread_of([pair.ratio for pair in pairs])
    assert (ratios.median, ratios.relative) == (2.5, 0.0)


@pytest.mark.parametrize(
    ("values", "median", "q25", "q75"),
    [([4.0], 4.0, 4.0, 4.0), ([1.0, 3.0], 2.0, 1.5, 2.5), ([9.0, 1.0, 3.0, 5.0, 7.0], 5.0, 3.0, 7.0)],
)
def test_spread_holds_median_and_quartiles(values: list[float], median: float, q25: float, q75: float) -> None:
    spread = spread_of(values)
    assert (spread.median, spread.q25, spread.q75) == (median, q25, q75)
    assert (spread.lowest, spread.highest, spread.count) == (min(values), max(values), len(values))


def test_prompts_repeat_no_sooner_than_any_run_ends() -> None:
    # Warm-up, pairs and profile of the longest run; a repeated prompt would be answered from the cache of embeddings.
    asked = list(islice(requests(PARAMS, PROMPTS), 104))
    assert len({params.prompt for params in asked}) == len(asked)
    assert len({len(prompt.split()) for prompt in PROMPTS}) == 1

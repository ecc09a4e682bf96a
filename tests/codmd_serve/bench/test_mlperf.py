"""MLPerf's two numbers from times that are known."""

import pytest

from codmd_serve.bench.mlperf import in_mlperf_form, mlperf_line, percentile


@pytest.mark.parametrize(
    ("count", "rank"),
    [(1, 1), (2, 2), (9, 9), (10, 9), (11, 10), (100, 90)],
)
def test_p90_is_the_nearest_rank(count: int, rank: int) -> None:
    assert percentile([float(value) for value in range(count, 0, -1)]) == rank


def test_offline_counts_all_blocks_at_once() -> None:
    row = in_mlperf_form([100.0, 300.0], [4000.0, 1000.0], block_size=8)
    assert row == {
        "single_stream_p90_ms": 300.0,
        "num_single": 2,
        "offline_videos_per_s": 16 / 5.0,
        "num_offline": 16,
    }
    assert mlperf_line("engine", row) == (
        "- In MLPerf's form, engine: SingleStream p90 300 ms of 2 requests, Offline 3.2 videos/s of 16."
    )

"""The two numbers of MLPerf Inference's text-to-video: SingleStream p90 and Offline throughput; times nothing.

SingleStream: one request after the other, the 90th percentile of their latencies. Offline: all requests are there at
once, videos per second. Here on our requests and with far fewer of them than a submission needs, so these are numbers
in MLPerf's form and no results of MLPerf.
"""

import math
from collections.abc import Sequence
from typing import Any

PERCENTILE = 0.9


def percentile(values: Sequence[float], share: float = PERCENTILE) -> float:
    """Return the least value that at least `share` of all are not above (nearest rank), as LoadGen takes it."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def in_mlperf_form(single_ms: Sequence[float], blocks_ms: Sequence[float], block_size: int) -> dict[str, Any]:
    """Summarise latencies of single requests and times of whole blocks.

    Args:
        single_ms: of requests that ran one after the other; at least one.
        blocks_ms: of blocks of `block_size` requests that were there at once; at least one.
        block_size: requests of a block.
    """
    return {
        "single_stream_p90_ms": percentile(single_ms),
        "num_single": len(single_ms),
        "offline_videos_per_s": 1000 * block_size * len(blocks_ms) / sum(blocks_ms),
        "num_offline": block_size * len(blocks_ms),
    }


def mlperf_line(name: str, row: dict[str, Any]) -> str:
    """Return one line of Markdown."""
    return (
        f"- In MLPerf's form, {name}: SingleStream p90 {row['single_stream_p90_ms']:.0f} ms of {row['num_single']} "
        f"requests, Offline {row['offline_videos_per_s']:.3g} videos/s of {row['num_offline']}."
    )

"""What README promises of equal bytes: with the same number of threads, whichever engine; and what others change."""

import re
from dataclasses import replace

import pytest
import torch

from codmd_serve.bench.repeat import Repeated, repeated, thread_table
from codmd_serve.config import GenerateParams, default_bundle_path

PARAMS = GenerateParams(
    prompt="a red circle moves right quickly on a black background",
    seed=7,
    height=96,
    width=96,
    num_frames=9,
    fps=16,
    crf=18,
)
LEAST_PSNR_DB = {"float32": 85.0, "bfloat16": 55.0}  # 93 and 66 at 25 frames, see docs/results/precision.md
ROW = Repeated(
    threads=1, dtype="float32", latents="a" * 64, frames="b" * 64, file="c" * 64, is_same=True, psnr_db=100.0
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_number_of_threads_gives_the_same_bytes_and_another_is_near(dtype: str) -> None:
    before = torch.get_num_threads()
    rows = repeated(default_bundle_path(), PARAMS, threads=(2, 1, 2), dtypes=(dtype,))
    assert torch.get_num_threads() == before
    assert all(row.is_same for row in rows)
    first, other, again = rows
    assert again == first
    assert other.psnr_db >= LEAST_PSNR_DB[dtype]


def test_the_table_says_what_is_equal() -> None:
    other = replace(ROW, threads=2, frames="d" * 64, is_same=False, psnr_db=93.14)
    lines = thread_table([ROW, other, replace(ROW, dtype="bfloat16", frames="e" * 64)]).splitlines()[-3:]
    cells = [re.split(r" *\| *", line)[1:-1] for line in lines]
    assert cells[0] == ["float32", "1", f"`{'a' * 12}`", f"`{'b' * 12}`", f"`{'c' * 12}`", "yes", "equal"]
    assert cells[1][-2:] == ["no", "93.1 dB"] and cells[2][-1] == "equal"

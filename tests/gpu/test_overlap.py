"""Overlap on a device: frames copied by a stream of their own are the frames, and videos beside others keep theirs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codmd_serve.config import GenerateParams
from codmd_serve.loading import load_engine
from codmd_serve.stages import HostCopy
from codmd_serve.wan.checkpoint import default_bundle_path

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PARAMS = GenerateParams(prompt="a red circle", seed=7, height=64, width=64, num_frames=17, fps=16, crf=18)


def test_downloaded_frames_are_those_that_were_made_whatever_is_made_after_them() -> None:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    expected, downloads = [], []
    for number in range(20):
        frames = torch.full((16, 256, 256, 3), number, dtype=torch.uint8, device="cuda")
        frames.add_(torch.arange(3, dtype=torch.uint8, device="cuda"))
        downloads.append(HostCopy(frames, stream))
        expected.append(bytes([number, number + 1, number + 2]) * (16 * 256 * 256))
        del frames  # its memory is the next one's, as soon as the copy allows
    assert [download.bytes().tobytes() for download in downloads] == expected


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_overlapped_videos_have_the_bytes_of_videos_in_a_row(tiny_bundle: Path, tmp_path: Path, execution: str) -> None:
    engine = load_engine(tiny_bundle, "cuda", execution=execution)
    assert engine.facts.is_decoding_overlapped and engine.budget is not None
    jobs = [replace(PARAMS, seed=seed, prompt=f"a {colour} circle") for seed, colour in enumerate(["red", "blue"] * 3)]
    for number, params in enumerate(jobs):
        engine.generate(params, tmp_path / f"row-{number}.mp4")
    videos = [engine.begin(params, tmp_path / f"over-{number}.mp4") for number, params in enumerate(jobs)]
    for number, video in enumerate(videos):
        video.result()
        row, overlapped = (tmp_path / f"{name}-{number}.mp4" for name in ("row", "over"))
        assert row.read_bytes() == overlapped.read_bytes()


def test_a_video_is_denoised_while_the_one_before_is_decoded(tmp_path: Path) -> None:
    engine = load_engine(default_bundle_path(), "cuda", execution="eager")
    jobs = [replace(PARAMS, seed=seed) for seed in range(4)]
    videos = [engine.begin(params, tmp_path / f"{number}.mp4") for number, params in enumerate(jobs)]
    spans = [video.result().spans for video in videos]
    decoded_s = [max(span.end_s for span in each if span.stage == "decode") for each in spans]
    denoised_s = [next(span.start_s for span in each if span.stage == "denoise") for each in spans]
    assert any(start_s < end_s for start_s, end_s in zip(denoised_s[1:], decoded_s, strict=False))

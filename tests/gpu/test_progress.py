"""Progress, cancelling and previews on a device that runs behind the host."""

from pathlib import Path

import pytest
import torch

from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine
from codmd_serve.errors import CancelledError
from codmd_serve.loading import load_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PARAMS = GenerateParams(prompt="a red circle", seed=7, height=64, width=64, num_frames=17, fps=16, crf=18)


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return load_engine(tiny_bundle, "cuda", execution="eager")


def test_a_step_is_told_when_the_device_has_run_it(engine: Engine, tmp_path: Path) -> None:
    is_idle: list[bool] = []

    def on_progress(stage: str, *_: int) -> None:
        if stage == "denoise":
            is_idle.append(torch.cuda.current_stream().query())

    engine.generate(PARAMS, tmp_path / "a.mp4", on_progress)
    assert is_idle == [True] * 4


def test_cancelling_between_steps_leaves_the_device_to_the_next_video(engine: Engine, tmp_path: Path) -> None:
    engine.generate(PARAMS, tmp_path / "a.mp4")

    def on_progress(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("denoise", 2):
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        engine.generate(PARAMS, tmp_path / "b.mp4", on_progress)
    engine.generate(PARAMS, tmp_path / "c.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()
    assert not (tmp_path / "b.mp4").exists()


def test_previews_change_no_bit_and_peak_memory_is_the_devices(engine: Engine, tmp_path: Path) -> None:
    previews: list[bytes] = []
    plain = engine.generate(PARAMS, tmp_path / "a.mp4")
    engine.begin(PARAMS, tmp_path / "b.mp4", None, previews.append).result()
    assert len(previews) == 4
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert 0 < plain.peak_memory_mb <= torch.cuda.get_device_properties(0).total_memory / 2**20

"""The predicted time to ready: within its bars, as the docs say, and counted as a warm-up runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor

from codmd_serve import chunk_graphs, denoise, loading, warm
from codmd_serve.bench.ready import BARS_S, NAMES, count_warm_up, predict_ready, ready_table, weight_bytes
from codmd_serve.denoise import DenoiseLoop
from codmd_serve.loading import load_engine
from codmd_serve.wan.transformer import FewStepTransformer
from codmd_serve.wan.vae import StreamingDecoder

DOCS = Path(__file__).parents[3] / "docs" / "how-to" / "gpu.md"


@pytest.fixture(scope="module")
def table() -> str:
    return ready_table()


def test_a_first_start_is_predicted_within_its_bar(table: str) -> None:
    for name in NAMES:
        first, second = (sum(values) for values in zip(*predict_ready(name).values(), strict=True))
        assert second < first <= BARS_S[name]
    assert "| first start | " in table


def test_the_docs_have_the_table_as_it_is_computed(table: str) -> None:
    assert table in DOCS.read_text(encoding="utf-8"), "python -m codmd_serve.bench.ready prints the new one"


def test_the_bytes_are_those_of_the_published_models() -> None:
    # 1.42 and 14.29 billion parameters, 5.68 of the text encoder, 0.127 of the VAE.
    assert weight_bytes("wan-1.3b") / 1e9 == pytest.approx(2 * (1.42 + 5.68) + 4 * 0.127, rel=0.01)
    assert weight_bytes("wan-14b") / 1e9 == pytest.approx(2 * (14.29 + 5.68) + 4 * 0.127, rel=0.01)


def test_steps_and_latent_frames_are_counted_as_a_warm_up_runs_them(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "student"
    shutil.copytree(tiny_bundle, bundle)
    spec = json.loads((bundle / "student.json").read_text())
    spec["native"]["num_frames"] = 41  # chunks of 5, 4 and 2 latent frames
    (bundle / "student.json").write_text(json.dumps({**spec, "base": str(tiny_bundle.parent / "tiny")}))
    num_steps, latents, forward, decode_chunk = [0], [0], FewStepTransformer.forward, StreamingDecoder.decode_chunk

    def counted_step(self: FewStepTransformer, *words: Any) -> Tensor:
        num_steps[0] += 1
        return forward(self, *words)

    def counted_chunk(self: StreamingDecoder, part: Tensor, *words: Any) -> Tensor:
        latents[0] += part.shape[2]
        return decode_chunk(self, part, *words)

    recorders = {module: TapeRecorder() for module in (denoise, chunk_graphs)}
    for module, recorder in recorders.items():
        monkeypatch.setattr(module, "CudaRecorder", lambda _, recorder=recorder: recorder)
        monkeypatch.setattr(module, "MAX_TIME_RATIO", 0.0)  # neither graph wins
    monkeypatch.setattr(loading, "choose_execution", lambda *_: "auto")
    monkeypatch.setattr(warm, "chooses_kernels", lambda _: True)
    monkeypatch.setattr(loading, "fit_preview", lambda _: ())  # which decodes, too
    monkeypatch.setattr(DenoiseLoop, "_compiled_step_s", lambda *_: float("inf"))  # nothing is compiled on a device
    monkeypatch.setattr(FewStepTransformer, "forward", counted_step)
    monkeypatch.setattr(StreamingDecoder, "decode_chunk", counted_chunk)
    engine = load_engine(bundle, "cpu", "float32", vae_dtype="float32")
    assert (engine.facts.execution, engine.facts.vae_execution, engine.facts.fallback) == ("eager", "eager", "")
    want = count_warm_up(num_steps=4, num_latents=11)
    assert num_steps[0] == want.loop_steps + want.race_steps
    assert recorders[denoise].num_replayed == want.replayed_steps
    # A float32 VAE is not fitted: one chunk less of each dtype.
    assert latents[0] == want.half_latents - 4 + want.race_latents
    assert recorders[chunk_graphs].num_replayed == want.replayed_latents / 9 * 2
    assert torch.equal(engine.decoder.overflow, torch.tensor(False))

"""What is broken on a machine costs speed and no start: the same video, and one sentence each, all in the facts.

/health shows the facts (tests/codmd_serve/api/test_app.py). Triton is in wan/test_triton.py, a VAE out of range and a
chunk that does not fit are in wan/test_precision.py and test_warm.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from codmd_serve import loading
from codmd_serve.config import GenerateParams
from codmd_serve.engine import Engine
from codmd_serve.loading import load_engine
from codmd_serve.verdicts import FILE
from codmd_serve.wan import precision
from codmd_serve.wan.transformer import FewStepTransformer

PARAMS = GenerateParams(prompt="a red circle moves right", seed=7, height=32, width=48, num_frames=9, fps=16, crf=18)


@pytest.fixture(scope="module")
def want(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The video of an engine where nothing is broken."""
    return video(load_engine(tiny_bundle, "cpu"), tmp_path_factory.mktemp("want"))


def video(engine: Engine, folder: Path) -> bytes:
    engine.generate(PARAMS, folder / "a.mp4")
    return (folder / "a.mp4").read_bytes()


def no_compiler(*_: Any) -> Any:
    raise RuntimeError("No working C++ compiler found\nin any of 5 folders")


def failed_backend(*_: Any) -> Any:
    """As torch.compile raises it: what failed is in the second line."""
    failure: Exception = BackendCompilerFailed(lambda: None, ValueError("no kernel image\nis available"), None)
    raise failure


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (no_compiler, "blocks not compiled: RuntimeError: No working C++ compiler found"),
        (failed_backend, "blocks not compiled: ValueError: no kernel image"),
    ],
)
def test_a_compiler_that_is_missing_or_broken(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read_video: Callable[[Path], Any],
    broken: Callable[..., Any],
    said: str,
) -> None:
    def compile_blocks(self: FewStepTransformer) -> None:
        for block in self.blocks:
            monkeypatch.setattr(block, "_compiled_call_impl", broken)

    monkeypatch.setattr(FewStepTransformer, "compile_blocks", compile_blocks)
    engine = load_engine(tiny_bundle, "cpu", execution="compiled", cache=str(tmp_path))
    assert (engine.facts.execution, engine.facts.fallback) == ("eager", said)
    engine.generate(PARAMS, tmp_path / "a.mp4")
    assert len(read_video(tmp_path / "a.mp4").frames) == PARAMS.num_frames
    # A compiler that is mended is tried again at the next load.
    assert '"execution"' not in (tmp_path / FILE).read_text()


def test_a_cache_of_another_version_is_measured_anew(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, want: bytes
) -> None:
    monkeypatch.setattr(loading, "__version__", "0.0.1")
    load_engine(tiny_bundle, "cpu", cache=str(tmp_path))
    written = json.loads((tmp_path / FILE).read_text())
    monkeypatch.undo()
    engine = load_engine(tiny_bundle, "cpu", cache=str(tmp_path))
    (old,) = written
    both = json.loads((tmp_path / FILE).read_text())
    assert both[old] == written[old] and len(both) == 2
    assert engine.facts.fallback == "" and video(engine, tmp_path) == want


@pytest.mark.parametrize("kind", ["words of a later version", "half a file", "a folder", "no folder for it"])
def test_a_cache_that_cannot_be_used(tiny_bundle: Path, tmp_path: Path, kind: str, want: bytes) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if kind == "words of a later version":
        load_engine(tiny_bundle, "cpu", cache=str(cache))
        written = json.loads((cache / FILE).read_text())
        later = {key: {**dict.fromkeys(entry, "quantum"), "dtype": ["x"]} for key, entry in written.items()}
        (cache / FILE).write_text(json.dumps(later))
    elif kind == "half a file":
        (cache / FILE).write_text('{"a": {"dtype": "bfl')
    elif kind == "a folder":
        (cache / FILE).mkdir()
    else:
        cache.rmdir()
        cache.write_text("a file")
    engine = load_engine(tiny_bundle, "cpu", cache=str(cache))
    assert engine.facts.fallback == "" and video(engine, tmp_path) == want


def test_what_several_parts_say_stands_side_by_side(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(tiny_bundle, "cpu", execution="graph")
    first = engine.facts.fallback
    assert first.startswith("RuntimeError: CUDA graphs need a CUDA device, got cpu")
    overflows = iter([True])
    monkeypatch.setattr(engine.decoder, "has_overflowed", lambda: next(overflows, False))
    engine.decoder.problem = first
    engine.generate(PARAMS, tmp_path / "a.mp4")
    second = "VAE in float32: the activations of a request left the range of float16"
    assert engine.facts.fallback == f"{first}; {second}"
    assert precision.joined("", "a; b", "b", "c") == "a; b; c"
    assert engine.decoder.dtype == torch.float32

"""What a bundle says before it is loaded: a hash of what decides a video, and facts in which the engine agrees."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from codmd_serve import bundle as bundle_module
from codmd_serve.bundle import bundle_hash, declared_facts
from codmd_serve.config import default_bundle_path
from codmd_serve.loading import load_engine


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle and its base, to be changed."""
    shutil.copytree(tiny_bundle.parent, tmp_path / "weights")
    return tmp_path / "weights" / tiny_bundle.name


def test_equal_folders_have_the_same_hash_wherever_they_are(tiny_bundle: Path, copy: Path) -> None:
    before = bundle_hash(tiny_bundle)
    assert bundle_hash(copy) == before and len(before) == 64
    (copy / "server.log").write_text("beside it")
    assert bundle_hash(copy) == before


@pytest.mark.parametrize(
    "name", ["student.json", "transformer/config.json", "../tiny/vae/config.json", "../tiny/tokenizer/tokenizer.json"]
)
def test_any_part_changes_it(copy: Path, name: str) -> None:
    before = bundle_hash(copy)
    path = copy / name
    path.write_text(path.read_text() + " ")
    assert bundle_hash(copy) != before


def test_large_weights_count_by_samples(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "SAMPLED_FROM_BYTES", 1000)
    monkeypatch.setattr(bundle_module, "SAMPLE_BYTES", 100)
    before = bundle_hash(copy)
    (path,) = (copy / "transformer").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    assert len(content) > 64 * 100
    for index in (-1, 10):
        content[index] ^= 1
        path.write_bytes(content)
        assert bundle_hash(copy) != before
        content[index] ^= 1


def test_what_is_declared_is_what_the_engine_finds(tiny_bundle: Path) -> None:
    declared = declared_facts(tiny_bundle)
    engine = load_engine(tiny_bundle, device="cpu", execution="eager")
    assert declared is not None
    measured = {
        "device",
        "dtype",
        "attention",
        "execution",
        "service_s",
        "load_s",
        "max_video_px",
        "fallback",
        "threads",
    }
    shared = asdict(declared).keys() - measured
    assert {name: getattr(declared, name) for name in shared} == {name: getattr(engine.facts, name) for name in shared}


def test_the_embedded_bundle_declares_its_facts() -> None:
    facts = declared_facts(default_bundle_path())
    assert facts is not None and facts.num_steps == 4 and facts.size_multiple == 16


def test_a_bundle_that_does_not_say_declares_nothing(copy: Path, tmp_path: Path) -> None:
    assert declared_facts(tmp_path / "nowhere") is None
    spec = json.loads((copy / "student.json").read_text())
    for change in ({"native": None}, {"timesteps": 3}, {"base": "org/name"}, {"native": {"height": -1}}):
        (copy / "student.json").write_text(json.dumps({**spec, **change}))
        assert declared_facts(copy) is None
    (copy / "student.json").write_text("[" * 100_000)
    assert declared_facts(copy) is None and len(bundle_hash(copy)) == 64

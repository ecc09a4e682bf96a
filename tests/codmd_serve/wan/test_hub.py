"""Hub ids: one snapshot, from a complete cache without a network, and one sentence within seconds where there is none.

Every story runs in a process of its own: the hub's client reads its environment once, when it is imported.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_cache import COMMIT, add_to_cache, files_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.hub import find_pipeline, is_hub_id, lacking_file

REPOSITORY = "Some-Org/Wan-tiny"


@pytest.fixture
def cache(tiny_base: Path, tmp_path: Path) -> Path:
    """A hub cache as `hf download` leaves it."""
    add_to_cache(tmp_path / "hub", REPOSITORY, files_of(tiny_base))
    return tmp_path / "hub"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle with a hub id as its base."""
    path = tmp_path / "student"
    shutil.copytree(tiny_bundle, path)
    spec = json.loads((path / "student.json").read_text())
    (path / "student.json").write_text(json.dumps({**spec, "base": REPOSITORY}))
    return path


def run(words: list[str], cache: Path, folder: Path, offline: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1" if offline else "0"}
    # A port that nobody listens on: the hub cannot be reached, whatever network there is.
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_generate_runs_offline_from_a_cached_hub_base(cache: Path, bundle: Path, tmp_path: Path) -> None:
    done = run(["codmd_serve.cli", "generate", "a red circle", "--bundle", str(bundle), "-o", "a.mp4"], cache, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.mp4").stat().st_size > 500


@pytest.mark.parametrize("offline", [True, False])
def test_every_reader_of_a_base_takes_the_cached_snapshot(
    cache: Path, bundle: Path, tmp_path: Path, offline: bool
) -> None:
    """Export, convert, the trainer's base and doctor's table; online too, the complete cache is not asked about."""
    story = f"""
import sys
from pathlib import Path
import torch
from codmd_serve.wan.checkpoint import attention_shape, load_bundle, resolve_base
from codmd_serve.wan.convert import ConvertOptions, convert
from codmd_serve.wan.pipeline import save_pipeline
from distill.networks.base import open_base
from transformers import UMT5EncoderModel
from safetensors.torch import load_file, save_file

bundle = Path({str(bundle)!r})
snapshot = resolve_base(bundle, {REPOSITORY!r})
assert snapshot.name == {COMMIT!r}, snapshot
load_bundle(bundle)
assert attention_shape(bundle).num_tokens == 12
save_pipeline(bundle, Path("pipeline"))
assert not list(path for path in Path("pipeline").rglob("*") if path.is_symlink())
base = open_base({REPOSITORY!r})
assert base.transformer_config["num_layers"] == 2 and base.load_transformer(torch.float32) and base.load_tokenizer()
assert base.load(UMT5EncoderModel, "text_encoder") and base.scheduler_shift() == 3.0 and base.folder == snapshot
weights = load_file(bundle / "transformer/diffusion_pytorch_model.safetensors")
save_file({{name: 0.5 * tensor for name, tensor in weights.items()}}, "student.safetensors")
done = convert(Path("student.safetensors"), Path({REPOSITORY!r}), Path("converted"), ConvertOptions(), "1")
assert done.spec.base == done.spec.base_model == {REPOSITORY!r}
load_bundle(Path("converted"))
"""
    (tmp_path / "story.py").write_text(story)
    done = run(["story"], cache, tmp_path, offline)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_cache_that_lacks_a_file_is_named_with_what_to_do(cache: Path, bundle: Path, tmp_path: Path) -> None:
    (next(cache.glob("*/snapshots/*")) / "vae" / "config.json").unlink()
    done = run(["codmd_serve.cli", "generate", "a red circle", "--bundle", str(bundle)], cache, tmp_path)
    (line,) = done.stderr.strip().split("\n")
    assert done.returncode == 2
    assert "its cached copy lacks vae/config.json; run `hf download Some-Org/Wan-tiny` where there is a network" in line


def test_a_name_that_is_no_folder_says_so_before_the_hub_is_asked(cache: Path, bundle: Path, tmp_path: Path) -> None:
    shutil.rmtree(cache)
    done = run(["codmd_serve.cli", "generate", "a red circle", "--bundle", str(bundle)], cache, tmp_path, offline=False)
    first, last = done.stderr.strip().split("\n")
    folder = bundle / REPOSITORY
    assert done.returncode == 2
    assert f"there is no folder {folder}; asking the hub for {REPOSITORY}" in first
    assert f"there is no folder {folder}, and the hub does not give {REPOSITORY}: " in last
    assert "Traceback" not in done.stderr


def test_a_hub_that_never_answers_costs_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from codmd_serve.wan import hub

    silent = threading.Event()

    class Silent:
        def repo_info(self, name: str, timeout: float) -> None:
            silent.wait(60)  # as a name look-up that no time-out reaches

    monkeypatch.setattr(hub, "HfApi", Silent)
    monkeypatch.setattr(hub, "HUB_TIMEOUT_S", 0.1)
    monkeypatch.setattr(hub, "_cached", lambda name: None)
    start_s = time.monotonic()
    with pytest.raises(CheckpointError, match=r"there is no folder .*x/y, and the hub does not give x/y: .*no answer"):
        find_pipeline("x/y", [tmp_path])
    assert time.monotonic() - start_s < 10
    silent.set()


@pytest.mark.parametrize(
    "name",
    ["../gone", "/gone", "gone", "a/b/c", "./a/b", "a/", "a b/c", "~/a", "a/..", "", "x" * 100_000, "a/\x00", "é/a"],
)
def test_names_that_no_hub_id_has_are_refused_at_once(tmp_path: Path, name: str) -> None:
    assert not is_hub_id(name)
    if name:  # the empty name is the folder itself
        with pytest.raises(CheckpointError, match="there is no folder") as caught:
            find_pipeline(name, [tmp_path])
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_folders_come_before_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "second" / "org" / "model").mkdir(parents=True)
    places = [tmp_path / "first", tmp_path / "second"]
    assert find_pipeline("org/model", places) == (tmp_path / "second" / "org" / "model", True)


@pytest.mark.parametrize(
    ("path", "lacking"),
    [
        ("vae/config.json", "vae/config.json"),
        ("text_encoder/model.safetensors", "the weights of text_encoder/"),
        ("tokenizer", "tokenizer/"),
    ],
)
def test_what_a_pipeline_lacks_is_named(tiny_base: Path, tmp_path: Path, path: str, lacking: str) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    target = tmp_path / "base" / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert lacking_file(tmp_path / "base", ("tokenizer", "text_encoder", "vae")) == lacking
    assert lacking_file(tiny_base, ("tokenizer", "text_encoder", "vae")) is None


def test_a_part_that_an_index_names_and_that_is_not_there_is_named(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "base/text_encoder/model.safetensors.index.json").write_text(json.dumps(index))
    assert lacking_file(tmp_path / "base", ("text_encoder",)) == "text_encoder/model-00001-of-00002.safetensors"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.text(max_size=100) | st.text(st.sampled_from("ab/.\0-\ud800ü"), max_size=300))
def test_any_name_is_a_folder_a_hub_id_or_one_sentence(tmp_path: Path, name: str) -> None:
    if is_hub_id(name):
        return
    try:
        folder, is_folder = find_pipeline(name, [tmp_path])
    except CheckpointError:
        return
    assert is_folder and folder.is_dir()

"""`codmd-serve models` and hub ids for `--bundle`: from a cache without a network, from a hub, or one sentence.

Every story runs in a process of its own: the hub's client reads its environment once, when it is imported.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import WanPipeline
from hub_cache import COMMIT, add_to_cache, fake_hub, files_of
from safetensors.torch import load_file, save_file

from codmd_serve import cli
from codmd_serve.errors import ConfigError
from codmd_serve.models_cli import resolve_bundle
from codmd_serve.wan.checkpoint import load_bundle
from codmd_serve.wan.students import STUDENTS, markdown_sources, markdown_table, nearest_name

NOWHERE = "http://127.0.0.1:9"  # a port that nobody listens on
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "published-students.md"


@pytest.fixture
def student_file(tiny_pipeline: WanPipeline, tmp_path: Path) -> Path:
    """The tiny network as a file in diffusers' names."""
    path = tmp_path / "student.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in tiny_pipeline.transformer.state_dict().items()}, path)
    return path


def run(words: list[str], folder: Path, endpoint: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command with caches below `folder`; without an endpoint the hub may not be asked."""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "0" if endpoint else "1",
        "HF_ENDPOINT": endpoint or NOWHERE,
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        **more,
    }
    command = [sys.executable, "-m", "codmd_serve.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def hub_bundle(tiny_bundle: Path, folder: Path, base: str) -> Mapping[str, Path]:
    """The tiny bundle's files, with a hub id as its base."""
    shutil.copytree(tiny_bundle, folder)
    spec = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps({**spec, "base": base}))
    return files_of(folder)


def test_a_bundle_on_the_hub_is_served_from_the_cache_without_a_network(
    tiny_base: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    add_to_cache(tmp_path / "hub", "some-org/base", files_of(tiny_base))
    add_to_cache(tmp_path / "hub", "some-org/student", hub_bundle(tiny_bundle, tmp_path / "copy", "some-org/base"))
    done = run(["generate", "a red circle", "--bundle", "some-org/student", "-o", "a.mp4", "--seed", "1"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.mp4").stat().st_size > 500
    (bundle,) = (tmp_path / "cache" / "codmd-serve" / "students").glob("*/student")
    origin = json.loads((bundle / "origin.json").read_text())
    assert origin["repository"] == "some-org/student" and origin["commit"] == COMMIT


def test_a_file_is_downloaded_once_and_converted_once_and_then_needs_no_network(
    student_file: Path, tiny_base: Path, tmp_path: Path
) -> None:
    repositories = {
        "some-org/weights": {"a/model.safetensors": student_file, "b.safetensors": student_file, "README.md": PAGE},
        "some-org/base": files_of(tiny_base),
    }
    words = ["models", "some-org/weights:a/model.safetensors", "--base", "some-org/base"]
    with fake_hub(repositories) as hub:
        done = run(words, tmp_path, hub.address)
        assert done.returncode == 0, done.stderr
        num_asked = len(hub.asked)
        assert not [path for path in hub.asked if path.endswith(("b.safetensors", "README.md"))]
        assert run(words, tmp_path, hub.address).stdout == done.stdout and len(hub.asked) == num_asked
    shutil.rmtree(tmp_path / "hub" / "models--some-org--weights")  # what was converted does not need it
    assert run(words, tmp_path).stdout == done.stdout
    bundle = Path(done.stdout.strip())
    assert bundle.name == "weights" and bundle.is_relative_to(tmp_path / "cache")
    spec = json.loads((bundle / "student.json").read_text())
    assert spec["base"] == "some-org/base" and spec["method"] == "fastwan"
    converted = load_file(bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, converted[name]) for name, tensor in load_file(student_file).items())


def test_a_name_of_the_table_is_converted_as_the_table_says(
    tiny_pipeline: WanPipeline, tiny_base: Path, tmp_path: Path
) -> None:
    """The file of CausVid with the tiny network in it; its base is a folder here, as a mirror's would be."""
    student = STUDENTS["causvid-wan2.1-1.3b"]
    weights = {f"model.{name}": 0.5 * tensor for name, tensor in tiny_pipeline.transformer.state_dict().items()}
    torch.save({"generator": weights}, tmp_path / "model.pt")
    add_to_cache(tmp_path / "hub", student.repository, {student.file: tmp_path / "model.pt"})
    done = run(["models", student.name], tmp_path, CODMD_BASE=str(tiny_base), CODMD_CACHE=str(tmp_path / "mine"))
    assert done.returncode == 0, done.stderr
    bundle = Path(done.stdout.strip())
    assert bundle.name == student.name and bundle.is_relative_to(tmp_path / "mine")
    spec = load_bundle(bundle).spec
    assert spec.method == "causvid" and spec.timesteps == student.timesteps and spec.sampler == student.sampling


def test_convert_takes_a_file_of_the_hub_too(
    student_file: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to_cache(tmp_path / "hub", "some-org/weights", {"student.safetensors": student_file})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    output = tmp_path / "made"
    words = ["convert", "some-org/weights:student.safetensors", "--base", str(tiny_base), "-o", str(output)]
    assert cli.main(words) == 0
    assert load_bundle(output).spec.method == "fastwan"


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a refused command; what it was about to do may be logged before."""
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.strip().split("\n") if line.startswith("codmd-serve: ")]
    assert len(lines) == 1 and done.stderr.strip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize("command", [["serve", "--no-page"], ["generate", "a"], ["models"]])
def test_no_network_and_no_cache_is_one_sentence(tmp_path: Path, command: list[str]) -> None:
    name = "codmd-wan2.1-1.3b"
    words = [*command, name] if command == ["models"] else [*command, "--bundle", name]
    line = only_line(run(words, tmp_path, NOWHERE))
    assert "the hub does not give wzhangek/CoDMD:CoDMD_wan2.1_T2V_1.3B.pt: ConnectError" in line
    assert line.endswith("it is not in the cache")
    offline = only_line(run(words, tmp_path))
    assert "(HF_HUB_OFFLINE)" in offline and "run `hf download wzhangek/CoDMD CoDMD_wan2.1_T2V_1.3B.pt`" in offline


def test_an_unknown_name_is_told_the_nearest_known_one(tmp_path: Path) -> None:
    line = only_line(run(["generate", "a", "--bundle", "CoDMD-wan-14b"], tmp_path))
    assert "no student bundle at CoDMD-wan-14b" in line and "similar name is codmd-wan2.1-14b" in line
    assert nearest_name("rCM 1.3B") == "rcm-wan2.1-1.3b" and nearest_name("causvid") == "causvid-wan2.1-1.3b"


def test_a_student_that_cannot_be_served_says_why_before_the_hub_is_asked(tmp_path: Path) -> None:
    line = only_line(run(["generate", "a", "--bundle", "fastwan-wan2.1-1.3b"], tmp_path, NOWHERE))
    assert "cannot be served: it was trained with VSA" in line


@pytest.mark.parametrize(
    ("files", "file", "message"),
    [
        (["a.pt", "b.pt"], "", "holds several files; name one as some-org/weights:FILE of 'a.pt', 'b.pt'"),
        (["a.pt"], "aa.pt", "has no file 'aa.pt'; the most similar one is 'a.pt'"),
        (["README.md"], "", "holds no weights"),
    ],
)
def test_what_a_repository_does_not_hold_is_one_sentence(
    tmp_path: Path, tiny_base: Path, files: list[str], file: str, message: str
) -> None:
    with fake_hub({"some-org/weights": dict.fromkeys(files, PAGE)}) as hub:
        name = f"some-org/weights{':' if file else ''}{file}"
        assert message in only_line(run(["models", name, "--base", str(tiny_base)], tmp_path, hub.address))
    assert [path.name for path in tmp_path.glob("cache/codmd-serve/students/*/*")] == [".lock"]


def test_what_the_converting_process_says_is_the_answer(student_file: Path, tmp_path: Path) -> None:
    """Here that a width which Wan2.1 does not have needs a base."""
    add_to_cache(tmp_path / "hub", "some-org/weights", {"student.safetensors": student_file})
    line = only_line(run(["models", "some-org/weights"], tmp_path))
    assert line.startswith("codmd-serve: some-org/weights cannot be converted: ") and "name it with --base" in line
    assert [path.name for path in tmp_path.glob("cache/codmd-serve/students/*/*")] == [".lock"]


def test_a_base_that_is_neither_folder_nor_hub_id_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder '\./nowhere' for --base"):
        resolve_bundle("some-org/weights", "./nowhere", tmp_path)


@pytest.mark.parametrize("text", ["./nowhere", "/nowhere/at/all", "a/b/c", "../x", "x" * 5000, "a\0b", "~/x"])
def test_paths_are_left_to_the_loader(text: str, tmp_path: Path) -> None:
    assert resolve_bundle(text, "", tmp_path) == text and not list(tmp_path.iterdir())


def test_a_folder_comes_before_every_other_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("codmd-wan2.1-14b", "some-org/student"):
        Path(name).mkdir(parents=True)
        assert resolve_bundle(name, "", tmp_path / "cache") == name


def test_models_lists_every_student_with_a_source_for_each_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    said = capsys.readouterr().out
    for student in STUDENTS.values():
        assert f"{student.name}\n    {student.place}\n    base     {student.base}\n" in said
        facts = " ".join(source.facts for source in student.sources)
        assert "repository" in facts and "steps" in facts
        assert student.licence == "unknown" or "licence" in facts
        assert len(student.timesteps) in (3, 4) and student.sampling in ("sde", "ode")


def test_the_documentation_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert markdown_table() in page and markdown_sources() in page


def test_the_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = only_line(run(["models", "some-org/weights"], tmp_path, NOWHERE, CODMD_CACHE=str(tmp_path / "file")))
    assert "cannot be written to" in line and "--cache" in line

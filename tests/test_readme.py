"""The README's examples run as printed, and its tree is that of the disk."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from polling import wait_until
from readme_tree import replaced, tree

from codmd_serve.config import default_bundle_path
from codmd_serve.wan.pipeline import save_pipeline

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
START_S = 300.0  # for a machine that has little to spare; it takes a few seconds
# The examples talk to this machine; a proxy of the environment must not answer for it.
DIRECT = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `codmd-serve` with the embedded student; yields host:port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", "--port", str(port), "--data", str(tmp_path_factory.mktemp("data"))]
    process = subprocess.Popen([sys.executable, "-m", "codmd_serve.cli", *words], cwd=ROOT, env=DIRECT)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(port), START_S, "the server is ready")
        assert process.poll() is None, "the server ended"
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_curl_example_gives_an_mp4(server: str, tmp_path: Path) -> None:
    (command,) = [block for block in blocks("bash") if block.startswith("curl")]
    assert shutil.which("curl"), "curl is needed to run the README's example"
    subprocess.run(
        ["bash", "-ec", command.replace("localhost:8000", server)], cwd=tmp_path, check=True, timeout=120, env=DIRECT
    )
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"


def test_job_example_follows_a_job_to_its_mp4(server: str, tmp_path: Path) -> None:
    (command,) = [block for block in blocks("bash") if block.startswith("id=")]
    done = subprocess.run(
        ["bash", "-ec", command.replace("localhost:8000", server)],
        cwd=tmp_path,
        check=True,
        timeout=120,
        env=DIRECT,
        capture_output=True,
        text=True,
    )
    assert "event: done" in done.stdout and '"status":"completed"' in done.stdout
    assert (tmp_path / "job.mp4").read_bytes()[4:8] == b"ftyp"


def test_python_example_gives_an_mp4_and_prints_seed_and_times(server: str, tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "httpx" in block]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("localhost:8000", server)],
        cwd=tmp_path,
        env=DIRECT,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "b.mp4").read_bytes()[4:8] == b"ftyp"
    assert re.match(r"1 .*denoise;dur=[\d.]+", done.stdout)


def test_diffusers_example_gives_an_mp4(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "WanPipeline" in block]
    assert "runs/codmd/pipeline" in code
    save_pipeline(default_bundle_path(), tmp_path / "pipeline")
    subprocess.run(
        [sys.executable, "-c", code.replace("runs/codmd/pipeline", str(tmp_path / "pipeline"))],
        cwd=tmp_path,
        env=DIRECT | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    assert (tmp_path / "c.mp4").read_bytes()[4:8] == b"ftyp"


def test_generate_example_writes_the_file(tmp_path: Path) -> None:
    (command,) = [block for block in blocks("bash") if "codmd-serve generate" in block]
    command = command.replace(".venv/bin/codmd-serve", f"{sys.executable} -m codmd_serve.cli")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, timeout=120, env=environment)
    assert (tmp_path / "out.mp4").read_bytes()[4:8] == b"ftyp"


def test_distill_commands_of_the_readme_exist() -> None:
    from distill.cli import COMMANDS

    named = re.findall(r"codmd-distill ([a-z][\w-]*)", README)
    assert len(named) >= 5
    assert set(named) <= set(COMMANDS)


def test_tree_is_that_of_the_disk() -> None:
    assert replaced(README, tree(ROOT)) == README, "run: .venv/bin/python scripts/readme_tree.py --write"


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert [picture for picture in pictures if not (ROOT / picture).is_file()] == []

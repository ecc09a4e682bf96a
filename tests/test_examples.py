"""The examples of the documentation that are marked `<!-- run: FILES -->` run as printed and leave these videos."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mdpages import Block, blocks, pages
from polling import wait_until
from servers import READY_S, free_port, is_up

from codmd_serve.config import default_bundle_path
from codmd_serve.wan.pipeline import save_pipeline

ROOT = Path(__file__).resolve().parent.parent
# The examples talk to this machine; a proxy of the environment must not answer for it.
DIRECT = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
ENVIRONMENT = DIRECT | {"PYTHONPATH": str(ROOT)}
EXAMPLES = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}:{block.line}")
    for path in pages(ROOT)
    for block in blocks(path.read_text(encoding="utf-8"))
    if block.files is not None
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `codmd-serve` with the embedded student; yields host:port."""
    port = free_port()
    words = ["serve", "--port", str(port), "--data", str(tmp_path_factory.mktemp("data"))]
    process = subprocess.Popen([sys.executable, "-m", "codmd_serve.cli", *words], cwd=ROOT, env=DIRECT)
    try:
        url = f"http://127.0.0.1:{port}/ready"
        wait_until(lambda: process.poll() is not None or is_up(url), READY_S, "the server is ready")
        assert process.poll() is None, "the server ended"
        wait_until(lambda: is_up(f"http://127.0.0.1:{port}/"), READY_S, "the page is there")
        yield f"localhost:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_leaves_what_it_says(example: Block, server: str, tmp_path: Path) -> None:
    text = example.text.replace("localhost:8000", server).replace("127.0.0.1:8000", server)
    text = text.replace(".venv/bin/codmd-serve", f"{sys.executable} -m codmd_serve.cli")
    program = {"bash": ["bash", "-ec"], "python": [sys.executable, "-W", "ignore", "-c"]}[example.language]
    done = subprocess.run(
        [*program, text], cwd=tmp_path, env=ENVIRONMENT, check=False, timeout=180, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert example.files, "an example that is run says what it leaves"
    for name in example.files:
        assert (tmp_path / name).read_bytes()[4:8] == b"ftyp", name
    if "/events" in text:
        assert "event: done" in done.stdout and '"status":"completed"' in done.stdout
    if "Server-Timing" in text:
        assert re.match(r"1 .*denoise;dur=[\d.]+", done.stdout)


def test_examples_reach_the_server_by_curl_by_python_and_without() -> None:
    texts = [param.values[0].text for param in EXAMPLES]  # type: ignore[union-attr]
    for word in ("curl -s localhost:8000/generate", "/events", "import httpx", "openai", "codmd-serve generate"):
        assert any(word in text for text in texts), word


def test_diffusers_example_gives_an_mp4(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "diffusers.md").read_text(encoding="utf-8")
    (code,) = [block.text for block in blocks(page) if "WanPipeline" in block.text]
    assert "runs/codmd/pipeline" in code
    save_pipeline(default_bundle_path(), tmp_path / "pipeline")
    subprocess.run(
        [sys.executable, "-c", code.replace("runs/codmd/pipeline", str(tmp_path / "pipeline"))],
        cwd=tmp_path,
        env=ENVIRONMENT,
        check=True,
        timeout=180,
    )
    assert (tmp_path / "c.mp4").read_bytes()[4:8] == b"ftyp"

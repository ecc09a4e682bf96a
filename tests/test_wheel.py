"""The wheel that pip would install: what it puts into site-packages, and that it works from a folder of its own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest
from polling import wait_until
from servers import READY_S, free_port, is_up

ROOT = Path(__file__).resolve().parent.parent
RUN = "import sys; from codmd_serve.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages that holds this project alone, as the wheel has it."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def environment(site: Path, home: Path) -> dict[str, str]:
    """The environment of a program that finds the wheel's packages before those of a checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {"PYTHONPATH": str(site), "XDG_DATA_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def test_wheel_installs_no_package_but_its_own(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"codmd_serve", "distill"}
    assert (site / "codmd_serve" / "_weights" / "shapeworld-dmd" / "student.json").is_file()


def test_wheel_serves_page_and_video_from_any_folder(site: Path, tmp_path: Path) -> None:
    port = free_port()
    words = ["serve", "--port", str(port), "--data", str(tmp_path / "data"), "--no-spare-worker"]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *words], cwd=tmp_path, env=environment(site, tmp_path), stderr=log
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or is_up(url + "/ready"), READY_S, "the server is ready")
        assert process.poll() is None, (tmp_path / "log").read_text(errors="replace")
        wait_until(lambda: is_up(url + "/"), READY_S, "the page is there")
        body = {"prompt": "a red circle moves right quickly on a black background", "seed": 7}
        answer = httpx.post(url + "/generate", json=body, timeout=120, trust_env=False)
        assert answer.status_code == 200 and answer.content[4:8] == b"ftyp"
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def test_wheel_takes_its_pages_and_weights_from_itself(site: Path, tmp_path: Path) -> None:
    code = (
        "import distill; from codmd_serve.commands import app_module; from codmd_serve.config import *\n"
        "from distill.networks.base import open_base; teacher = open_base('weights/shapeworld').source\n"
        "print(app_module('demo').__file__, distill.__file__, default_bundle_path(), teacher, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(site, tmp_path),
        check=True,
        capture_output=True,
        text=True,
    )
    assert [Path(line).is_relative_to(site) for line in done.stdout.splitlines()] == [True] * 4

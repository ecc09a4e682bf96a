"""What the first `make` of a fresh clone installs; nothing is run."""

import shutil
import subprocess
from pathlib import Path

import pytest

from codmd_serve.bench.options import BenchConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def commands(folder: Path, target: str) -> str:
    """The commands that make would run."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_serve_installs_nothing_of_development(clone: Path) -> None:
    shown = commands(clone, "serve")
    assert "install -e ." in shown and "dev" not in shown.replace("/dev/nvidia0", "")
    assert shown.rstrip().endswith(".venv/bin/codmd-serve serve")


@pytest.mark.parametrize("target", ["test", "test-fast", "timing", "check", "format", "docs"])
def test_targets_of_development_install_its_tools(clone: Path, target: str) -> None:
    shown = commands(clone, target)
    assert shown.index("install -e .\n") < shown.index("install -e '.[dev]'")


def test_targets_install_once(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv/.installed").touch()
    assert "install" not in commands(clone, "serve")
    assert "install -e '.[dev]'" in commands(clone, "test")
    (clone / ".venv/.installed-dev").touch()
    assert "install" not in commands(clone, "test")


def test_bench_leaves_tracked_results_alone() -> None:
    tracked = subprocess.run(["git", "ls-files", BenchConfig().out], cwd=ROOT, capture_output=True, check=True)
    ignored = subprocess.run(["git", "check-ignore", "-q", BenchConfig().out], cwd=ROOT, check=False)
    assert tracked.stdout == b"" and ignored.returncode == 0

"""Fixtures of the VBench tests: folders with plans and videos, and an environment with a vbench of ours."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vbench_cases import ENTRIES, PLANNED, draw_video

from distill.evaluate.vbench.facts import PRESETS
from distill.evaluate.vbench.generate import VIDEOS_NAME
from distill.evaluate.vbench.manifest import Plan, make_plan, read_plan, write_plan
from distill.evaluate.vbench.suite import read_suite


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "prompts.json"
    path.write_text(json.dumps(ENTRIES), encoding="utf-8")
    return path


@pytest.fixture
def planned(suite_file: Path, tmp_path: Path) -> Callable[..., tuple[Path, Plan]]:
    """Makes a folder with a plan; two videos of each prompt unless told otherwise."""

    def plan(*dimensions: str, name: str = "run", samples: int = 2) -> tuple[Path, Plan]:
        wanted = dimensions or PLANNED
        made = make_plan(
            read_suite(suite_file), PRESETS["vbench"], dimensions=wanted, samples=samples, flicker_samples=samples
        )
        write_plan(made, tmp_path / name)
        return tmp_path / name, read_plan(tmp_path / name)

    return plan


@pytest.fixture
def filled(planned: Callable[..., tuple[Path, Plan]]) -> Callable[..., tuple[Path, Plan]]:
    """Makes a folder with a plan and all of its videos."""

    def fill(*dimensions: str, name: str = "run", samples: int = 2) -> tuple[Path, Plan]:
        folder, plan = planned(*dimensions, name=name, samples=samples)
        (folder / VIDEOS_NAME).mkdir()
        for _, video in plan.videos():
            draw_video(folder / VIDEOS_NAME / video.file, video.seed)
        return folder, plan

    return fill


@pytest.fixture(scope="session")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with a package `vbench` of ours, which answers in the form of the real one."""
    folder = tmp_path_factory.mktemp("environment")
    package = folder / "vbench"
    package.mkdir()
    (folder / "vbench-0.1.5.dist-info").mkdir()
    (folder / "vbench-0.1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
    (package / "__init__.py").write_text((Path(__file__).parent / "fake_vbench.py").read_text(encoding="utf-8"))
    (package / "human_action.py").write_text(
        "from pathlib import Path\nload_video = lambda path: Path(path).read_bytes()\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python

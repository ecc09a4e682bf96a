"""Making planned videos with the engine that serves: resumed, recorded, and never mixed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codmd_serve.config import default_bundle_path
from codmd_serve.engine import Engine
from codmd_serve.errors import ConfigError, GenerationError
from distill.evaluate.vbench.check import check_videos
from distill.evaluate.vbench.generate import (
    GENERATION_NAME,
    LEDGER_NAME,
    VIDEOS_NAME,
    GenerateSettings,
    failures,
    generate,
)
from distill.evaluate.vbench.manifest import Plan

Planned = Callable[..., tuple[Path, Plan]]


def settings(bundle: Path, **changes: Any) -> GenerateSettings:
    return GenerateSettings(bundle=bundle, **{"engine": {"device": "cpu"}, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / VIDEOS_NAME).iterdir()}


def test_generate_goes_on_where_it_was_and_makes_the_same_bytes(planned: Planned, tiny_bundle: Path) -> None:
    folder, plan = planned()
    first = generate(folder, settings(tiny_bundle))
    assert (first.num_made, first.num_kept, first.failed) == (12, 0, {})
    assert check_videos(folder, plan).is_clean
    whole = contents(folder)
    assert sorted(whole) == [video.file for _, video in plan.videos()]
    assert len(set(whole.values())) == 12
    for name in ("0000-01.mp4", "0005-00.mp4"):
        (folder / VIDEOS_NAME / name).unlink()
    again = generate(folder, settings(tiny_bundle))
    assert (again.num_made, again.num_kept) == (2, 10) and contents(folder) == whole
    # Nothing outside of the folder: a prompt of the suite is "../../a red circle/../moves".
    assert sorted(path.name for path in folder.parent.iterdir()) == ["run"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "generated.jsonl",
        "generation.json",
        "plan.json",
        "videos",
    ]


def test_generate_records_what_made_the_videos_and_does_not_mix(planned: Planned, tiny_bundle: Path) -> None:
    folder, plan = planned("scene")
    generate(folder, settings(tiny_bundle, num_frames=5, fps=8, crf=20))
    record = json.loads((folder / GENERATION_NAME).read_text())
    wanted = {"plan_sha256": plan.sha256, "bundle": "tiny-codmd", "num_frames": 5, "fps": 8, "crf": 20, "height": 32}
    assert {name: record[name] for name in wanted} == wanted
    lines = [json.loads(line) for line in (folder / LEDGER_NAME).read_text().splitlines()]
    assert [(line["file"], line["seed"], line["status"]) for line in lines] == [
        ("0002-00.mp4", 200, "done"),
        ("0002-01.mp4", 201, "done"),
    ]
    (folder / VIDEOS_NAME / "0002-01.mp4").unlink()
    with pytest.raises(ConfigError, match="made with num_frames 5 and now 9"):
        generate(folder, settings(tiny_bundle, fps=8, crf=20))


def test_generate_records_a_failure_and_tries_it_again(
    planned: Planned, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plan = planned("scene", "human_action")
    works = Engine.generate

    def fails(self: Engine, params: Any, path: Path) -> Any:
        if params.seed == 200:
            raise GenerationError("no memory", "out_of_memory")
        return works(self, params, path)

    monkeypatch.setattr(Engine, "generate", fails)
    outcome = generate(folder, settings(tiny_bundle))
    assert (outcome.num_made, outcome.failed) == (3, {"0002-00.mp4": "no memory"})
    assert failures(folder) == {"0002-00.mp4": "no memory"}
    assert check_videos(folder, plan).failed == {"0002-00.mp4": "no memory"}
    monkeypatch.setattr(Engine, "generate", works)
    assert generate(folder, settings(tiny_bundle)).num_made == 1
    assert failures(folder) == {} and check_videos(folder, plan).is_clean


def test_generate_stops_when_everything_fails(
    planned: Planned, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = planned()

    works = Engine.generate

    def fails(self: Engine, params: Any, path: Path) -> Any:
        if path.parent.name == VIDEOS_NAME:  # not the warm-up
            raise GenerationError("no memory", "out_of_memory")
        return works(self, params, path)

    monkeypatch.setattr(Engine, "generate", fails)
    with pytest.raises(GenerationError, match="5 videos in a row failed, the last: no memory"):
        generate(folder, settings(tiny_bundle))
    assert len(failures(folder)) == 5


def test_generate_shares_a_plan_between_processes(planned: Planned, tiny_bundle: Path) -> None:
    folder, _ = planned()
    parts = [generate(folder, settings(tiny_bundle, shard=(k, 3))) for k in (1, 2, 3)]
    assert [part.num_made for part in parts] == [4, 4, 4]
    assert generate(folder, settings(tiny_bundle)).num_kept == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 33}, "--height must be a multiple of 16"),
        ({"num_frames": 6}, "--num-frames must be 4k"),
        ({"num_frames": 1}, "--num-frames must be 4k"),
        ({"fps": 1000}, "--fps"),
        ({"crf": 0}, "--crf"),
        ({"shard": (3, 2)}, "--shard"),
    ],
)
def test_generate_refuses_what_the_model_cannot_make(
    changes: dict[str, Any], message: str, planned: Planned, tiny_bundle: Path
) -> None:
    folder, _ = planned("scene")
    with pytest.raises(ConfigError, match=message):
        generate(folder, settings(tiny_bundle, **changes))
    assert not (folder / GENERATION_NAME).exists()


def test_generate_runs_the_embedded_student(planned: Planned) -> None:
    folder, plan = planned("scene", samples=1)
    outcome = generate(folder, settings(default_bundle_path(), height=32, width=32, num_frames=5))
    assert outcome.num_made == 1 and check_videos(folder, plan).is_clean

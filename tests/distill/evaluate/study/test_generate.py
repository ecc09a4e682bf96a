"""Arms that are bundles: their videos are made once, under one seed for all arms, and kept."""

from pathlib import Path
from typing import Any

import pytest

from codmd_serve.errors import GenerationError
from distill.evaluate.study import generate
from distill.evaluate.study.design import Item
from distill.evaluate.study.generate import GenerateOptions, generate_arm, is_bundle, video_seed

ITEMS = (Item("0000", "a red circle"), Item("0001", "a blue ring"))


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the engine was asked for; it makes a file of a few bytes for what is missing."""
    seen: list[dict[str, Any]] = []

    def run(order: dict[str, Any], bundle: Path, on_video: Any) -> None:
        missing = [job for job in order["jobs"] if not Path(job["path"]).exists()]
        for job in missing:
            Path(job["path"]).write_text(f"{bundle.name} {job['prompt']} {job['seed']}")
        seen.append({**order, "missing": missing})

    monkeypatch.setattr(generate, "_run_batch", run)
    return seen


def test_videos_lie_under_the_names_of_their_items(
    tiny_bundle: Path, tmp_path: Path, orders: list[dict[str, Any]]
) -> None:
    folder = generate_arm(tiny_bundle, ITEMS, GenerateOptions(folder=tmp_path, seed=5))
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert made == {f"{item.name}.mp4": f"{tiny_bundle.name} {item.prompt} {video_seed(5, item)}" for item in ITEMS}
    assert is_bundle(tiny_bundle) and not is_bundle(folder)


def test_only_a_changed_prompt_is_made_anew(tiny_bundle: Path, tmp_path: Path, orders: list[dict[str, Any]]) -> None:
    options = GenerateOptions(folder=tmp_path)
    first = generate_arm(tiny_bundle, ITEMS, options)
    again = generate_arm(tiny_bundle, ITEMS, options)
    changed = generate_arm(tiny_bundle, (ITEMS[0], Item("0001", "a white triangle")), options)
    assert [len(order["missing"]) for order in orders] == [2, 0, 1]
    assert first == again != changed
    assert (first / "0001.mp4").read_text() != (changed / "0001.mp4").read_text()


def test_seeds_differ_between_items_and_are_those_of_every_arm() -> None:
    seeds = {video_seed(0, item) for item in (*ITEMS, Item("0000-1", "a red circle"))}
    assert len(seeds) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    assert video_seed(1, ITEMS[0]) != video_seed(0, ITEMS[0])


def test_failure_of_the_engine_is_told(tmp_path: Path, tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = GenerateOptions(folder=tmp_path, device="abacus")
    with pytest.raises(GenerationError, match="could not be made"):
        generate_arm(tiny_bundle, ITEMS, options)
    assert "abacus" in capfd.readouterr().err

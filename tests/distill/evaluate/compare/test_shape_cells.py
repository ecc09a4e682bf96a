"""ShapeWorld as a world of comparisons: cells of a tiny pipeline, counted calls, strips, one start for all arms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from codmd_serve.errors import ConfigError
from distill.cli import main
from distill.evaluate.compare.cells import all_cells, cell_config, check_cells, expected_calls
from distill.evaluate.compare.table import parse_table
from distill.evaluate.compare.worlds import WORLDS
from distill.methods.regression import start_of


def tiny_shapes(base: Path) -> dict[str, Any]:
    """A table that takes seconds: 32x32, 9 frames, of a random pipeline."""
    return {
        "name": "shapes",
        "recipe": "shapeworld",
        "baseline": "dmd",
        "guidance": [3.0],
        "budgets": [1],
        "curve": [2],
        "seeds": [1, 2],
        "tuning_seeds": [],
        "metrics": ["tau_err", "tau_err_truth", "w1", "frame_rho", "wrong_new", "wrong_far", "form_err"],
        "samples": 4,
        "bench": {"captions": 4, "deep_captions": 1, "reference": 4, "strips": 2},
        "settings": {
            "base": str(base),
            "native": {"height": 32, "width": 32, "num_frames": 9, "fps": 16},
            "precision": "fp32",
            "batch_size": 2,
            "num_captions": 4,
            "save_every_iterations": 4,
            "log_every_iterations": 4,
        },
        "arms": {
            "truth": {"kind": "truth"},
            "teacher_50": {"kind": "teacher", "steps": 50},
            "start_network": {"kind": "start"},
            "dmd": {"method": "dmd"},
            "codmd": {"method": "codmd"},
        },
        "start": {
            "arms": ["dmd", "codmd"],
            "settings": {"start.updates": 2, "start.paths": 4, "start.teacher_steps": 3},
            "unequal": "paths of the teacher",
        },
    }


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells of the tiny table, run by the command."""
    folder = tmp_path_factory.mktemp("shape-runs")
    table = folder / "shapes.json"
    table.write_text(json.dumps(tiny_shapes(tiny_base)), encoding="utf-8")
    command = ["eval", "compare", "run", str(table), "--out", str(folder / "runs"), "--cache", str(folder / "cache")]
    assert main([*command, "--jobs", "2", "--json", str(folder / "result.json")]) == 0
    return folder


@pytest.fixture(scope="module")
def data(runs: Path) -> dict[str, Any]:
    """The collected results."""
    found: dict[str, Any] = json.loads((runs / "result.json").read_text(encoding="utf-8"))
    return found


def cell(data: dict[str, Any], arm: str, seed: int = 1, budget: int = 1) -> dict[str, Any]:
    """Return one cell of the results."""
    wanted = (arm, seed, budget)
    return next(entry for entry in data["cells"] if (entry["arm"], entry["seed"], entry["budget"]) == wanted)


def test_every_cell_has_finite_scores_and_the_calls_that_the_methods_say(data: dict[str, Any], tiny_base: Path) -> None:
    table = parse_table(tiny_shapes(tiny_base))
    cells = {cell.name: cell for chain in all_cells(table, table.seeds) for cell in chain}
    assert len(data["cells"]) == len(cells) == 2 * (3 + 4 * 2)
    for found in data["cells"]:
        own = cells[f"{found['arm']} g={found['guidance']:g} seed={found['seed']} budget={found['budget']}"]
        (step,) = found["steps"]
        assert all(np.isfinite(step[name]) for name in WORLDS["shapeworld"].metrics)
        if own.arm.kind == "run":
            expected = expected_calls(cell_config(own))
            assert (found["calls"]["teacher"], found["calls"]["critic"]) == (expected["teacher"], expected["critic"])
        assert ("matrices" in found) == (found["budget"] == 1)


def test_the_teacher_copies_itself_and_the_world_is_never_wrong(data: dict[str, Any]) -> None:
    teacher, truth = (cell(data, name)["steps"][0] for name in ("teacher_50", "truth"))
    assert teacher["copying"] == pytest.approx(1.0) and abs(truth["copying"]) < 0.9
    assert truth["w1_truth"] < teacher["w1_truth"]
    assert teacher["w1"] < truth["w1"]
    for seed in (1, 2):
        assert cell(data, "start_network", seed)["steps"] != cell(data, "dmd+start", seed)["steps"]


def test_strips_are_found_from_the_folder_of_the_json(runs: Path, data: dict[str, Any]) -> None:
    clips = [cell(data, arm)["clips"] for arm in ("truth", "dmd", "dmd+start")]
    assert [len(own) for own in clips] == [2, 2, 2]
    assert [clip["caption"] for clip in clips[0]] == [clip["caption"] for clip in clips[1]]
    paths = {runs / clip["strip"] for own in clips for clip in own}
    assert len(paths) == 6
    for path in paths:
        with Image.open(path) as strip:
            assert strip.size == (7 * 32, 32)
    assert "clips" not in cell(data, "dmd", budget=2)


def test_one_start_is_made_for_all_arms_of_a_seed(runs: Path, data: dict[str, Any]) -> None:
    starts = [path for path in (runs / "cache" / "starts").iterdir() if path.is_dir()]
    assert len(starts) == 2
    linked = {path.resolve() for path in (runs / "runs").glob("shapes/*+start/g3/seed*/run/start")}
    assert linked == {path.resolve() for path in starts}
    # It counts for each of them all the same.
    assert cell(data, "dmd+start")["calls"]["teacher"] == cell(data, "codmd+start")["calls"]["teacher"]


def test_where_all_arms_have_a_start_the_row_of_the_start_is_its_student(tiny_base: Path) -> None:
    own = tiny_shapes(tiny_base)
    del own["start"]
    own["settings"] |= {"start.updates": 2, "start.paths": 4}
    table = parse_table(own)
    chains = {chain[0].arm.name: chain[0] for chain in all_cells(table, (1,))}
    starts = {name: start_of(cell_config(chains[name])) for name in ("start_network", "dmd", "codmd")}
    assert starts["start_network"] == starts["dmd"] == starts["codmd"] is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "wan_1_3b"}, "recipe must be one of analytic_ties.*shapeworld, got 'wan_1_3b'"),
        ({"metrics": ["mode_tv"]}, "unknown metric 'mode_tv' of shapeworld, expected some of wrong_new"),
        ({"samples": 2}, "samples must be 4 or more"),
        ({"bench": {"caption": 3}}, "unknown key 'caption' of bench, expected one of: captions"),
        ({"bench": {"captions": "many"}}, "bench.captions must be a whole number"),
        ({"bench": {"captions": 1}}, r"bench\.captions must be in 2\.\.1000"),
        ({"bench": {"captions": 4, "deep_captions": 5}}, r"bench\.deep_captions must be in 1\.\.4"),
        ({"bench": 3}, "bench of the table must be an object"),
        (
            {
                "arms": {"dmd": {"method": "dmd"}, "x": {"method": "dmd", "settings": {"num_captions": 8}}},
                "start": None,
            },
            "arm x: num_captions must be that of dmd",
        ),
    ],
)
def test_a_table_that_the_bench_cannot_score_is_refused(changes: dict[str, Any], message: str, tiny_base: Path) -> None:
    own = {key: value for key, value in {**tiny_shapes(tiny_base), **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        check_cells(parse_table(own), (1,))


def test_an_analytic_table_has_no_settings_of_a_bench(tiny_base: Path) -> None:
    own = {**tiny_shapes(tiny_base), "recipe": "analytic_ties", "metrics": ["tau_err"], "settings": {}}
    with pytest.raises(ConfigError, match="bench has no settings in analytic_ties, got captions"):
        check_cells(parse_table(own), (1,))


def test_the_report_is_made_of_them(runs: Path) -> None:
    out = runs / "evidence.md"
    assert main(["eval", "compare", "report", str(runs / "result.json"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    (heads,) = {line for line in page.splitlines() if line.startswith("| arm | ") and "wrong_far" in line}
    assert "| imaging_err | bend_err | copying |" in heads
    assert "`form_err`: " in page and "`mode_tv`" not in page

"""The report says what the numbers say, over all tables, and is made of their JSON alone."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_comparison import RULED, comparison

from distill.cli import main
from distill.evaluate.compare.claims import claims, spread
from distill.evaluate.compare.figures import all_plots
from distill.evaluate.compare.findings import details, first_paragraph
from distill.evaluate.compare.markdown import as_html
from distill.evaluate.compare.matrices import matrix_arms, matrix_names
from distill.evaluate.compare.report import README_BEGIN, README_END, as_markdown, limits
from distill.evaluate.compare.results import Comparison

TABLE = {**copy.deepcopy(RULED), "curve": [1]}
README = f"# Mine\n\n{README_BEGIN}\nold\n{README_END}\n\nMore.\n"


def made(errors: dict[str, float], *, has_matrices: bool = False, name: str = "tiny", **signed: float) -> Comparison:
    """Return a comparison in which arms have these errors in all metrics, the truth .01 and the others .2."""
    errors = {"truth": 0.01, **errors}
    table = {**TABLE, "name": name}
    found = comparison(
        table, lambda arm, updates, metric: errors.get(arm, 0.2), spread=0.004, has_matrices=has_matrices, **signed
    )
    return Comparison(found)


def bare(text: str) -> str:
    """Return text without its marks."""
    return text.replace("**", "")


def test_the_first_paragraph_names_gains_losses_and_null_results() -> None:
    text = bare(first_paragraph([made({"dmd+start": 0.05, "alone": 0.03, "rival": 0.15}, kept=1.1, tau_kept=0.9)]))
    for part in (
        "DMD loses dependence in 2 and overstates it in 2 of 2 settings (both in 2, by two measures; at most ",
        "0.9 times the right dependence of the tied factors in tiny, ",
        " times the right strong rank correlations in tiny, ",
        "The relational term (1 form) makes no difference that holds: better than DMD in 0 and worse in 0 of 4",
        "without its content, its content was not seen to matter: the term is better in 0 and worse in 0 of 4",
        "A start regressed on the teacher's own paths closes alone 89",
        "before DMD 79",
        "of the gap in tau_err; before DMD it is better than DMD alone in 4 and worse in 0 of 4 comparisons, 4 and 0",
        "Of other losses, only gains hold of rival (better in 4, worse in 0 of 4",
    ):
        rounded = re.sub(r"0\.90\d \[0\.\d+, 0\.\d+\]", "0.9", text)
        assert part in rounded, f"{part!r} is not in: {rounded}"


@pytest.mark.parametrize(
    ("errors", "part"),
    [
        ({"codmd": 0.3}, "does not help, and harms in places: better than DMD in 0 and worse in 4 of 4 comparisons"),
        (
            {"codmd": 0.1},
            "helps in places: better than DMD in 4 and worse in 0 of 4 comparisons, 4 and 0",
        ),
        ({"codmd": 0.1}, "its content matters in places: the term is better in 4 and worse in 0 of 4"),
        (
            {"codmd": 0.1, "control": 0.1},
            "its content was not seen to matter: the term is better in 0 and worse in 0 of 4",
        ),
        ({"codmd": 0.3}, "the control is better in places: the term is better in 0 and worse in 4 of 4"),
        ({"codmd": 0.3}, "(tiny, 2 updates) of DMD's gap to the floor in tau_err."),
        ({"rival": 0.3}, "only losses hold of rival (better in 0, worse in 4 of 4"),
        ({}, "DMD neither loses nor overstates dependence in any of 2 settings."),
        ({"truth": 0.2}, "regressed on the teacher's own paths finds no gap to close"),
    ],
)
def test_the_first_paragraph_turns_with_the_numbers(errors: dict[str, float], part: str) -> None:
    assert part in bare(first_paragraph([made(errors)]))


def test_few_seeds_are_called_preliminary() -> None:
    table = {**TABLE, "seeds": [1, 2]}
    few = Comparison(comparison(table, lambda arm, updates, metric: 0.2))
    assert first_paragraph([few]).startswith("Preliminary (seeds: tiny 2):")
    assert "Preliminary" not in first_paragraph([made({})])


def test_the_findings_are_of_all_tables_and_not_of_the_first() -> None:
    both = [made({}, kept=1.1, name="first"), made({"codmd": 0.3}, kept=0.8, name="second")]
    text = bare(first_paragraph(both))
    assert "loses dependence in 2 and overstates it in 2 of 4 settings" in text
    assert re.search(r"0\.\d+ \[.*\] times the right strong rank correlations in second.*; 1\.\d+ .* in first", text)
    assert "better than DMD in 0 and worse in 4 of 8 comparisons, 0 and 4 after Holm over all 8" in text
    (line,) = [line for line in details(both) if line.startswith("The relational term")]
    assert (
        "better in 0, worse in 4 (tau_err 2, w1 2) and undecided in 4 of 8 comparisons, 0 and 4 after Holm over all 8"
        in line
    )
    assert re.search(r"tau_err differs by [-+]0\.00\d .*first.* to \+0\.1\d\d .*second", line)


def test_a_table_without_exact_teacher_has_its_own_floor_limits_and_no_plot_of_steps() -> None:
    data = made({"teacher_4": 0.02, "alone": 0.05}, name="shapeworld").data
    for cell in data["cells"]:
        cell["steps"] = cell["steps"][-1:]
    found = [Comparison({**data, "table": {**data["table"], "recipe": "shapeworld"}})]
    assert "closes alone 83%" in bare(first_paragraph(found)), "of the gap from .2 to the teacher's .02"
    assert "ShapeWorld has videos" in limits(found) and "Gaussian" not in limits(found)
    assert [plot.key for plot in all_plots(found)] == ["overview", "shapeworld-curves", "shapeworld-forest"]


def test_claims_stand_beside_the_spread_of_one_teacher() -> None:
    text = claims()
    assert spread() == pytest.approx(1.24)
    for part in (
        "| CoDMD | 1.3B | 84.46 |",
        "| CoDMD | 14B | 84.87 |",
        "| CoDMD - DMD | 1.3B | +1.08 | 87% | yes |",
        "| CoDMD - DMD | 14B | +1.06 | 85% | yes |",
        "| CoDMD - rCM | 14B | -0.05 | 4% | no |",
        *(f"| CoDMD - teacher, 50 steps | 1.3B | {84.46 - total:+.2f} |" for total in (83.02, 83.31, 83.69, 84.26)),
        "83.02, 83.31, 83.69 and 84.26",
    ):
        assert part in text, part


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two results, one of them with matrices and clips, and a README."""
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    errors = {"dmd+start": 0.05, "codmd": 0.21}
    first, second = (
        made(errors, has_matrices=True, kept=1.1, name="first").data,
        made(errors, name="second").data,
    )
    rng = np.random.default_rng(0)
    for cell in first["cells"]:
        if cell["seed"] == 1 and cell["budget"] == 3 and cell["arm"] in ("truth", "dmd", "codmd"):
            strip = tmp_path / "strips" / f"{cell['arm']}.png"
            strip.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 40, 3), dtype=np.uint8)).save(strip)
            cell["clips"] = [{"caption": "a red ring", "strip": f"strips/{strip.name}"}]
    for data in (first, second):
        (tmp_path / f"{data['table']['name']}.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path


def test_the_report_and_readme_are_made_of_packed_json_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    report = ["eval", "compare", "report"]
    assert main(["eval", "compare", "pack", "first.json", "second.json", "--out", "docs/evidence"]) == 0
    sizes = [(folder / name).stat().st_size for name in ("first.json", "docs/evidence/first.json.gz")]
    assert sizes[1] < sizes[0] / 8
    packed = ["docs/evidence/first.json.gz", "docs/evidence/second.json.gz"]
    assert main([*report, *packed, "--out", "docs/evidence.md", "--insert", "README.md"]) == 0
    page, readme = (Path(name).read_text(encoding="utf-8") for name in ("docs/evidence.md", "README.md"))
    # The same as of the whole JSON, but for the commands.
    whole = [Comparison(json.loads(Path(f"{name}.json").read_text("utf-8")), folder) for name in ("first", "second")]
    shown = [line for line in page.splitlines() if line.startswith("![")]
    pictures = {re.sub(r".*/(.*)\.png\)$", r"\1", line): line for line in shown}
    assert pictures.keys() == {"overview", "first-curves", "first-matrices", "second-curves"}
    assert sorted(path.stem for path in Path("docs/evidence").glob("*.png")) == sorted(pictures)
    clips = page[page.index("Frames of the same captions") :].split("\n\n### ")[0].split("\n\n![")[0]
    assert "|  | a red ring |\n" in clips and "| codmd | ![codmd](evidence/first-clips/codmd-0.png) |" in clips
    pictures["first-clips"] = clips
    assert page.split("## Made by")[0] == as_markdown(whole, [], pictures).split("## Made by")[0]
    assert readme.startswith("# Mine\n") and readme.endswith("\n\nMore.\n") and "old" not in readme
    assert "](docs/evidence/overview.png)" in readme and "We would train **dmd+start**" in readme
    html = Path("docs/evidence.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 4 and html.count("data:image/png;base64") == 4 + 3 and "<table>" in html
    assert not re.search(r"(src|href)=\"(?!data:|#)", html), "the page loads something"
    # A second time the same bytes.
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main([*report, *packed, "--out", "docs/evidence.md", "--insert", "README.md"]) == 0
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    capsys.readouterr()


def test_reports_of_bad_input_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    report = ["eval", "compare", "report", "--out", "x.md", "first.json"]
    # Two that differ only in case are one file on some machines.
    (folder / "FIRST.json").write_bytes((folder / "first.json").read_bytes())
    assert main([*report, "FIRST.json"]) == 2
    assert "files must differ in more than case: FIRST.json, first.json" in capsys.readouterr().err
    (folder / "again.json").write_bytes((folder / "first.json").read_bytes())
    assert main([*report, "again.json"]) == 2
    assert "tables must differ in more than case: first, first" in capsys.readouterr().err
    (folder / "other.md").write_text("nothing", encoding="utf-8")
    assert main([*report, "--insert", "other.md"]) == 2
    assert f"expected a file with {README_BEGIN}" in capsys.readouterr().err
    (folder / "strips" / "dmd.png").write_text("no picture", encoding="utf-8")
    assert main(["eval", "compare", "pack", "first.json", "--out", "y"]) == 2
    assert "dmd.png cannot be read" in capsys.readouterr().err
    data = json.loads((folder / "first.json").read_text(encoding="utf-8"))
    for cell in data["cells"]:
        cell.get("clips", [{}])[0]["strip"] = "../secret.png"
    (folder / "first.json").write_text(json.dumps(data), encoding="utf-8")
    assert main(["eval", "compare", "pack", "first.json", "--out", "y"]) == 2
    assert "the clip ../secret.png is outside the folder of its JSON" in capsys.readouterr().err
    assert not (folder / "x.md").exists()
    (folder / "first.json").write_text(json.dumps({**data, "cells": data["cells"][1:]}), encoding="utf-8")
    assert main(report) == 2
    assert "no scores of truth g=1 budget=2 seed=1" in capsys.readouterr().err
    # What `collect --seeds 1` leaves; the tests of the report have nothing to test.
    alone = {"table": {**data["table"], "seeds": [1]}, "cells": [cell for cell in data["cells"] if cell["seed"] == 1]}
    (folder / "first.json").write_text(json.dumps({**data, **alone}), encoding="utf-8")
    assert main(report) == 2
    assert "first.json has scores of seed 1 alone: an interval is over seeds, give 2 or more" in capsys.readouterr().err


def test_matrices_are_drawn_where_all_cells_have_them_in_one_size() -> None:
    found = made({}, has_matrices=True)
    setting = found.last_settings[0]
    assert matrix_arms(setting) == ["truth", "teacher_4", "dmd", "codmd", "control", "dmd+start"]
    assert matrix_names(setting) == ["tau", "rho"]
    setting.cell("codmd", 3)["matrices"]["tau"].pop()
    assert matrix_names(setting) == ["rho"]
    dict.pop(setting.cell("dmd", 2), "matrices")  # type: ignore[arg-type]
    assert matrix_names(setting) == []


def test_markdown_becomes_html_that_shows_what_it_says() -> None:
    blocks = ["# A", "a **b** <c> _d_ `e_f_g`", "- x\n- y", "![k](p/q.png)", "| h | i |\n| --- | ---: |\n| 1 | _2_ |"]
    source = "\n\n".join([*blocks, "```bash\nx <y>\n```"])
    text = as_html(source, "T", {"p/q.png": "<img>"})
    for part in (
        "<h1>A</h1>",
        "<p>a <b>b</b> &lt;c&gt; <i>d</i> <code>e_f_g</code></p>",
        "<ul><li>x</li><li>y</li></ul>",
        "<figure><img><figcaption>k</figcaption></figure>",
        "<tr><td>1</td><td><i>2</i></td></tr>",
        "<pre>x &lt;y&gt;</pre>",
    ):
        assert part in text, part

"""The picture of a teacher's curve: every factor and pair has a line, and a file that is no curve is refused."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from codmd_serve.errors import CheckpointError
from distill.pretrain.curve_plot import plot_factor_curve

WEIGHTS = Path(__file__).parents[3] / "weights"


def test_every_factor_and_pair_is_drawn_up_to_the_end_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {}

    def keep(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"picture")
        for axes in self.axes:
            lines[axes.get_title()] = {line.get_label(): list(line.get_xdata()) for line in axes.lines}  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_factor_curve(WEIGHTS / "curve.json", tmp_path / "curve.png")
    rows = json.loads((WEIGHTS / "curve.json").read_text())["rows"]
    marginal, tau, share = lines.values()
    assert set(marginal) == {*rows[0]["marginal"], "bar 0.4"} and set(tau) == {*rows[0]["tau"], "bar 0.15"}
    seen = share["all"]
    assert seen[:-1] == [row["clips_seen"] / 1e6 for row in rows[:-1]]
    # The end does not know its step; its place is that of its progress.
    assert seen[-1] == pytest.approx(seen[-2] / rows[-2]["progress"])


@pytest.mark.parametrize(
    ("text", "said"), [('{"rows": []}', "no measurement"), ('{"a": 1}', "no curve"), ("[", "curve.json")]
)
def test_what_is_no_curve_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        plot_factor_curve(tmp_path / "curve.json", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()

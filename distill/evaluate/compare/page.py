"""Writes a report: the Markdown page with its figures as files, the same as one HTML file, and README's block."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from codmd_serve.errors import ConfigError
from codmd_serve.files import write_bytes, write_text
from codmd_serve.textfiles import read_text
from distill.evaluate.compare.clips import clip_arms, clip_table, clips_of, open_strip, strip_path
from distill.evaluate.compare.figures import Plot, all_plots, as_png, as_svg
from distill.evaluate.compare.markdown import as_html
from distill.evaluate.compare.report import README_BEGIN, README_END, TITLE, as_markdown, readme_block, replace_block
from distill.evaluate.compare.results import Comparison, Setting


def commands_of(comparisons: Sequence[Comparison], paths: Sequence[Path], out: Path, insert: Path | None) -> list[str]:
    """Return the commands that make the JSON of these files, and this report of them."""
    kept = out.with_suffix("").as_posix()
    files = " ".join(path.as_posix() for path in paths)
    whole = " ".join(f"runs/{own.table['name']}.json" for own in comparisons)
    end = f" --insert {insert.as_posix()}" if insert else ""
    return [
        *(f"codmd-distill eval compare run {_named(own)} --out runs" for own in comparisons),
        f"codmd-distill eval compare pack {whole} --out {kept}",
        f"codmd-distill eval compare report {files} --out {out.as_posix()}{end}",
    ]


def _named(own: Comparison) -> str:
    """Return a table with the seeds that are reported, which can be fewer than it declares."""
    return f"{own.table['name']} --seeds {' '.join(map(str, own.table['seeds']))}"


def page_text(comparisons: Sequence[Comparison], commands: Sequence[str], out: Path) -> str:
    """Return the Markdown of a report, which names the files of its figures and draws none."""
    kept = [plot for plot in all_plots(comparisons) if plot.is_kept]
    return as_markdown(comparisons, commands, _pictures(comparisons, kept, out))


def write_report(
    comparisons: Sequence[Comparison], commands: Sequence[str], out: Path, insert: Path | None
) -> list[Path]:
    """Write a report.

    Args:
        comparisons: of `results.read_results`.
        commands: of `commands_of`.
        out: of the Markdown; the figures go into the folder of its name, the HTML beside it.
        insert: a file whose block between the marks of `report` is replaced.

    Returns:
        What was written.

    Raises:
        ConfigError: insert has no such block, and nothing is written; or a clip cannot be read.
    """
    text = None if insert is None else _with_block(insert, comparisons, out)
    plots, folder = all_plots(comparisons), out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures, drawn = list[Path](), dict[str, str]()
    for plot in plots:
        name = f"{plot.key}.png"
        if plot.is_kept:
            data = as_png(plot.draw())
            pictures.append(folder / name)
            write_bytes(pictures[-1], data)
            drawn[f"{folder.name}/{name}"] = _element(data)
        else:
            drawn[f"{folder.name}/{name}"] = as_svg(plot.draw())
    page = out.with_suffix(".html")
    write_text(out, page_text(comparisons, commands, out))
    whole = as_markdown(comparisons, commands, _pictures(comparisons, plots, out))
    write_text(page, as_html(whole, TITLE, drawn | _strips(comparisons, out)))
    if insert is not None and text is not None:
        write_text(insert, text)
    return [out, page, *pictures, *([insert] if insert is not None else [])]


def block_for(insert: Path, comparisons: Sequence[Comparison], out: Path) -> str:
    """Return README's block, with links relative to it."""
    there = Path(os.path.relpath(out, insert.parent))
    figure = there.with_suffix("") / "overview.png"
    return readme_block(comparisons, figure.as_posix(), there.as_posix())


def _with_block(insert: Path, comparisons: Sequence[Comparison], out: Path) -> str:
    text = replace_block(read_text(insert, ConfigError), block_for(insert, comparisons, out))
    if text is None:
        raise ConfigError(f"--insert {insert}: expected a file with {README_BEGIN} and {README_END}")
    return text


def _pictures(comparisons: Sequence[Comparison], plots: Sequence[Plot], out: Path) -> dict[str, str]:
    """Return the Markdown of each figure and of each table of clips, by its key."""
    found = {plot.key: f"![{plot.caption}]({out.stem}/{plot.key}.png)" for plot in plots}
    for setting in _with_clips(comparisons):
        found[f"{setting.place}-clips"] = (
            f"Frames of the same captions from the same first noise, first seed, not picked, at {setting.budget:,} "
            f"updates:\n\n{clip_table(setting, out)}"
        )
    return found


def _strips(comparisons: Sequence[Comparison], out: Path) -> dict[str, str]:
    """Return an element with the data of each strip, by the name that the page gives it."""
    found = {}
    for setting in _with_clips(comparisons):
        for clip in (clip for arm in clip_arms(setting) for clip in clips_of(setting, arm)):
            path = strip_path(setting, clip)
            open_strip(setting, clip)
            found[Path(os.path.relpath(path, out.parent)).as_posix()] = _element(path.read_bytes())
    return found


def _with_clips(comparisons: Sequence[Comparison]) -> list[Setting]:
    return [setting for own in comparisons for setting in own.last_settings if clip_arms(setting)]


def _element(data: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{b64encode(data).decode()}">'

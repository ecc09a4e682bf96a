"""The little Markdown that reports are written in, and the same as HTML; knows nothing of what they say."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

STYLE = (
    "body{font:15px/1.55 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}"
    "p,li{max-width:60rem}"
    "table{border-collapse:collapse;font-size:12px;display:block;overflow-x:auto;margin:1rem 0}"
    "td,th{border-bottom:1px solid #ddd;padding:.2rem .5rem;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}tr:hover td{background:#f6f8fa}"
    "figure{margin:2rem 0}figcaption{font-size:13px;color:#57606a;max-width:60rem}"
    "svg,img{max-width:100%;height:auto}pre{background:#f6f8fa;padding:.6rem;overflow-x:auto;font-size:12px}"
)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; numbers, which all but the first column hold, stand to the right."""
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def as_html(markdown: str, title: str, figures: Mapping[str, str]) -> str:
    """Return a page that loads nothing.

    Args:
        markdown: blocks with empty lines between: headings, tables, lists, fenced code, pictures, paragraphs.
        title: of the page.
        figures: the HTML of each picture, by the name that the Markdown gives its file.

    Raises:
        KeyError: a picture that is not there.
    """
    body = "\n".join(_block(block, figures) for block in re.split(r"\n{2,}", markdown.strip()))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body>\n{body}\n</body></html>\n"
    )


def _block(block: str, figures: Mapping[str, str]) -> str:
    lines = block.split("\n")
    heading = re.match(r"(#+) (.*)", block)
    picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", block, re.DOTALL)
    if block.startswith("<!--"):
        return ""
    if heading:
        level = len(heading[1])
        return f"<h{level}>{_inline(heading[2])}</h{level}>"
    if picture:
        return f"<figure>{figures[picture[2]]}<figcaption>{_inline(picture[1])}</figcaption></figure>"
    if block.startswith("```"):
        return "<pre>" + html.escape("\n".join(lines[1:-1])) + "</pre>"
    if block.startswith("- "):
        items = re.split(r"\n- ", block[2:])
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
    if block.startswith("| "):
        rows = [[_inline(cell.strip(), figures) for cell in line.strip("|").split("|")] for line in lines]
        head = "".join(f"<th>{cell}</th>" for cell in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:])
        return f"<table><tr>{head}</tr>{body}</table>"
    return f"<p>{_inline(block)}</p>"


def _inline(text: str, figures: Mapping[str, str] | None = None) -> str:
    """Escape text, then turn bold, italic, code and links into their elements; a picture is all of a cell."""
    picture = re.fullmatch(r"!\[[^\]]*\]\((.*)\)", text)
    if picture and figures is not None:
        return figures[picture[1]]
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    escaped = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", escaped)
    escaped = re.sub(r"(?<![\w/])_([^_]+)_(?!\w)", r"<i>\1</i>", escaped)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', escaped)

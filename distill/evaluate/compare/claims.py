"""The published VBench totals as cited, and the gains that they claim beside the spread of one teacher's totals."""

from __future__ import annotations

from distill.evaluate.compare.markdown import table
from distill.evaluate.vbench.facts import CITED, CLAIMANT, SPREAD_NOTE, TEACHER


def claims() -> str:
    """Return what was published, and each claimed gain beside the spread of one teacher's totals."""
    rows = [[entry.what, entry.size, f"{entry.total:.2f}", entry.source] for entry in CITED]
    listed = table(["what", "size", "total", "by"], rows)
    heads = ["claimed gain", "size", "points", f"of the spread ({spread():.2f})", "one pipeline", "by"]
    return (
        "VBench totals of Wan2.1 and its few-step students as published; none is ours.\n\n"
        f"{listed}\n\n"
        "Each gain of CoDMD that these totals give, beside the spread of the published totals of one teacher, which is "
        f"the same network in all of them:\n\n{table(heads, _gains())}\n\n{SPREAD_NOTE}"
    )


def spread() -> float:
    """Return the largest less the smallest published total of one teacher, the widest over sizes."""
    totals = dict[str, list[float]]()
    for entry in CITED:
        if entry.what == TEACHER:
            totals.setdefault(entry.size, []).append(entry.total)
    return max(max(own) - min(own) for own in totals.values())


def _gains() -> list[list[str]]:
    rows = []
    for claimed in (entry for entry in CITED if entry.what == CLAIMANT):
        others = [entry for entry in CITED if entry.size == claimed.size and entry.what != CLAIMANT]
        for other in others:
            gain, is_one = claimed.total - other.total, claimed.source == other.source
            sources = claimed.source if is_one else f"{claimed.source}; {other.source}"
            share = f"{abs(gain) / spread():.0%}"
            name = f"{claimed.what} - {other.what}"
            rows.append([name, claimed.size, f"{gain:+.2f}", share, "yes" if is_one else "no", sources])
    return rows

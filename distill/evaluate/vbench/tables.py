"""Markdown of the VBench commands; computes no score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.evaluate.vbench.compare import Difference
from distill.evaluate.vbench.curve import cell
from distill.evaluate.vbench.facts import CITED, DIMENSIONS, SPREAD_NOTE, VBENCH2_NEEDS, Preset
from distill.evaluate.vbench.manifest import Plan
from distill.evaluate.vbench.results import DimensionResult
from distill.evaluate.vbench.score import Agreement, Row


def plan_text(plan: Plan) -> str:
    """Say what a plan asks for."""
    num_videos = sum(len(prompt.videos) for prompt in plan.prompts)
    lines = [f"{len(plan.prompts)} prompts, {num_videos} videos, preset {plan.preset}, seed {plan.base_seed}"]
    for name in plan.dimensions:
        prompts = plan.scored_on(name)
        videos = sum(len(prompt.videos) for prompt in prompts)
        lines.append(f"{name}: {len(prompts)} prompts, {videos} videos")
    if not plan.is_official:
        lines.append("note: this is not the prompt list of VBench 0.1.5; its scores compare with nothing published")
    return "\n".join(lines) + "\n"


def score_text(rows: Sequence[Row], results: Mapping[str, DimensionResult], preset: Preset) -> str:
    """Return the table of an arm, with what a reader must know, and the published totals as cited."""
    lines = [
        "| score (%) | value [95% over prompts] | normalised | weight | videos | failed, counted as 0 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.name in DIMENSIONS:
            dimension, result = DIMENSIONS[row.name], results[row.name]
            videos = str(result.num_videos) if result.num_videos else "unknown"
            rest = (
                f"{100 * dimension.normalise(result.raw):.2f} | {dimension.weight:g} | {videos} | {result.num_failed}"
            )
        else:
            rest = " | | |"
        lines.append(f"| {row.name} | {cell(row)} | {rest} |")
    notes = [f"{name}: {note}" for name, result in results.items() for note in result.notes]
    evaluators = {
        ", ".join(f"{key} {value}" for key, value in result.evaluator.items()): name for name, result in results.items()
    }
    notes += [f"evaluator: {text}" for text in evaluators if text]
    if preset.note:
        notes.append(preset.note)
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def cited_text() -> str:
    """Return the published totals, as cited, and why they compare with nothing of ours."""
    lines = ["| published, not ours | Wan2.1 | total | by |", "|---|---|---|---|"]
    lines += [f"| {row.what} | {row.size} | {row.total:.2f} | {row.source} |" for row in CITED]
    return "\n".join([*lines, "", SPREAD_NOTE, VBENCH2_NEEDS + "."]) + "\n"


def compare_text(differences: Sequence[Difference], first: str, second: str) -> str:
    """Return the table of two arms."""
    lines = [
        f"| score (%) | {first} | {second} | difference [95%] | p | p, Holm | prompts |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in differences:
        gap = f"{row.first - row.second:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        mark = " *" if row.is_clear else ""
        lines.append(
            f"| {row.name} | {row.first:.2f} | {row.second:.2f} | {gap} | {row.p:.4f} | {row.p_holm:.4f}{mark} | "
            f"{row.num_prompts} |"
        )
    note = "`*`: below .05 after Holm over the dimensions, and over the three totals. Resampled by prompt, paired."
    return "\n".join([*lines, "", note]) + "\n"


def agreement_text(found: Sequence[Agreement]) -> str:
    """Return published totals beside ours."""
    lines = ["| model | score | published | ours | |", "|---|---|---|---|---|"]
    for row in found:
        verdict = "agrees" if row.agrees else f"misprint: {row.misprint}" if row.misprint else "DIFFERS"
        lines.append(f"| {row.model} | {row.name} | {row.published:.2f} | {row.ours:.3f} | {verdict} |")
    rows = len({row.model for row in found})
    agreeing, misprints = sum(row.agrees for row in found), sum(not row.agrees and bool(row.misprint) for row in found)
    wrong = len(found) - agreeing - misprints
    lines += [
        "",
        f"{agreeing} of {len(found)} totals of {rows} rows agree within .01; misprints {misprints}; wrong {wrong}",
    ]
    return "\n".join(lines) + "\n"

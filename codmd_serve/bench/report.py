"""Formats result rows as Markdown: one section per row, and its targets.

Reads the JSON of a row (see `row.py`); measures nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from codmd_serve.bench.mlperf import mlperf_line
from codmd_serve.bench.units import count, duration, percent, rate, size

Row = dict[str, Any]

STAGE_ROWS = ("text", "denoise", "decode", "encode", "total")

PREFACE = """\
# Performance

Written by `codmd-serve bench` from the `performance-*.json` beside it; run the command of a section to make it again.

- Requests of the two sides alternate with the same prompt and seed, so that a busy machine hits both. A ratio is taken
  per pair of neighbours; shown are the median and, in brackets, the quartiles.
- Both sides have the same weights, shape and dtype and end with the same encoder. On a CPU with `--dtype auto` each has
  the dtype that it is faster in, of float32 and bfloat16. `diffusers` is the eager WanPipeline
  on the student's own noise levels, one forward pass per step, 512 prompt positions; `teacher` is the same pipeline
  with 50 steps and guidance, two forward passes per step.
- Work is counted on the modules of diffusers. The floor of a stage is its work at the rates of a large matrix product
  and a large copy on this machine, measured in the same run; "of floor" is the floor over the measured time, and can
  pass 100% where a stage avoids work that was counted. Bytes are weights, inputs and outputs only.
- `lossy` variants are the engine with 8-bit matrix products (`fp8`), with SageAttention (`sage`) or with both, opt-in
  and never chosen by `auto`. Their error is that of the output against the engine without them, same weights, prompts
  and seeds: |difference| / |latents| of the final latents, and the PSNR of the frames. With random weights it says what
  the arithmetic loses, not what a viewer would see.
- `encode` is what is waited for: we encode while the next frames are decoded.
- Operator calls include those that operators make themselves.
- Processor time is what counts on a CPU that is busy with other work: waiting for the processor is not in it.
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A performance target of the project.

    Attributes:
        text: what is compared.
        name: what the name of the bundle or preset that it is for begins with.
        device: what the device's name must contain.
        bar, stretch: numbers to reach.
        is_ceiling: whether lower is better.
        unit: `s`, `%` or `x`.
        value: from a row; None when it was not measured.
    """

    text: str
    name: str
    device: str
    bar: float
    stretch: float
    is_ceiling: bool
    unit: str
    value: Callable[[Row], float | None]


def _ratio(other: str) -> Callable[[Row], float | None]:
    return lambda row: row["ratios"][other]["total"]["median"] if other in row["ratios"] else None


def _of_floor(stage: str) -> Callable[[Row], float | None]:
    return lambda row: 100 * row["work"][stage]["floor_ms"] / row["contestants"]["ours"]["stages_ms"][stage]["median"]


def _total_s(row: Row) -> float | None:
    milliseconds: float = row["contestants"]["ours"]["total_ms"]["median"]
    return milliseconds / 1000


TARGETS = (
    Target("text to mp4", "wan-1.3b", "H200", 2.9, 2.3, True, "s", _total_s),
    Target("denoise, share of the measured peak", "wan-1.3b", "H200", 70, 80, False, "%", _of_floor("denoise")),
    Target("decode, share of the measured peak", "wan-1.3b", "H200", 35, 60, False, "%", _of_floor("decode")),
    Target("end to end against diffusers", "wan-1.3b", "H200", 2.0, 3.0, False, "x", _ratio("diffusers")),
    Target("end to end against the 50-step teacher", "wan-1.3b", "H200", 25, 35, False, "x", _ratio("teacher")),
    Target("end to end against diffusers", "shapeworld-", "cpu", 3.0, 4.0, False, "x", _ratio("diffusers")),
)


# What a server may add to the engine, in percent: latency of one request, and time of many at once.
SERVER_BAR, SERVER_STRETCH = 3.0, 1.0
BUSY_OVERLAP = (
    "; on a busy machine, which gives more of itself to more processes: no gain of overlap, to be made again."
)


def document(rows: Sequence[Row], serving: Sequence[Row] = ()) -> str:
    """Return all rows as one Markdown text, sorted by name, serving rows last."""
    parts = [section(row) for row in sorted(rows, key=lambda row: str(row["row"]))]
    parts += [serving_section(row) for row in sorted(serving, key=lambda row: str(row["row"]))]
    return "\n".join([PREFACE, *parts])


def serving_section(row: Row) -> str:
    """Return a row of `serving-ROW.json` as Markdown, with its picture."""
    picture = row["timeline"]["picture"]
    lines = [
        f"## {row['row']}, served",
        "",
        f"`{row['command']}`, {row['date']}, {row['machine']['text']}; commit {row['versions']['commit']}.",
        "",
        *serving_lines(row),
        "",
        f"![Timeline of three overlapped requests]({picture})",
        "",
        f"*Spans of the engine itself, three requests overlapped. {duration(row['timeline']['encode_beside_ms'])} of "
        "encoding lie beside other stages of a later request.*",
    ]
    return "\n".join(lines) + "\n"


def serving_lines(row: Row) -> list[str]:
    """Return the numbers of a serving row as lines; the command prints them last."""
    server, overlap = row["server"], row["overlap"]
    load = row["load_average"]
    lines = ["| target | bar | stretch | reached | |", "|---|---|---|---|---|"]
    for name, text, noun in (
        ("latency", "server over bare engine, one request", "pair"),
        ("saturation", f"server over bare engine, {overlap['num_jobs']} requests at once", "block"),
    ):
        if server is None:
            lines.append(f"| {text} | {SERVER_BAR:g}% | {SERVER_STRETCH:g}% | not measured | |")
            continue
        low, middle, high = (100 * (server[name][key] - 1) for key in ("q25", "median", "q75"))
        verdict = "met" if middle <= SERVER_BAR else "missed"
        if row["machine"]["is_busy"]:
            verdict = f"on a busy machine, to be made again: {verdict}"
        reached = f"{middle:.1f}% ({low:.1f} to {high:.1f}, {_counted(server[name]['count'], noun)})"
        lines.append(f"| {text} | {SERVER_BAR:g}% | {SERVER_STRETCH:g}% | {reached} | {verdict} |")
    ratio = overlap["ratio"]
    own = [] if server is None else [_own(server["own_ms"])]
    return [
        *lines,
        "",
        f"- {row['request']['text']}; load average before {load['before']:.1f}, up to {load['highest']:.1f}, "
        f"on {row['machine']['cores']} cores.",
        *own,
        *(mlperf_line(name, entry) for name, entry in row.get("mlperf", {}).items()),
        f"- {overlap['num_jobs']} queued requests: overlapped {ratio['median']:.2f}x as quick as one after the other "
        f"({ratio['q25']:.2f} to {ratio['q75']:.2f}, {_counted(ratio['count'], 'block')} in turns)"
        + (BUSY_OVERLAP if row["machine"]["is_busy"] else "."),
    ]


def section(row: Row) -> str:
    """Return one row as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items() if value)
    lines = [
        f"## {row['row']}",
        "",
        f"`{row['command']}`, {row['date']}, {row['machine']['text']}; {versions}.",
        f"{row['request']['text']}{_dtypes(row['request'])}. {_noise(row)}",
        "",
        *_stages(row),
        "",
        f"Ceilings: {rate(row['ceilings']['flop_per_s'])} in {row['request']['dtype']}, "
        f"{row['ceilings']['bytes_per_s'] / 1e9:.3g} GB/s. Picture: [roofline]({row['picture']}).",
        "",
        *_fact_lines(row),
        *_targets(row),
        *_profile(row),
    ]
    return "\n".join(lines) + "\n"


def _own(spread: Row) -> str:
    return (
        f"- Beyond the stages a request through HTTP takes {spread['median']:.1f} ms "
        f"({spread['q25']:.1f} to {spread['q75']:.1f}), by the server's own account of the same request."
    )


def _dtypes(request: Row) -> str:
    """Return the dtypes besides that of our network; older rows name none."""
    named = [("VAE", request.get("vae_dtype")), ("diffusers", request.get("diffusers_dtype"))]
    return "".join(f", {what} in {dtype}" for what, dtype in named if dtype)


def short_table(row: Row) -> str:
    """Return the summary that the command prints last."""
    return "\n".join([f"{row['row']}: {row['request']['text']}", *_stages(row), "", *_targets(row), _noise(row)])


def _noise(row: Row) -> str:
    load, cores = row["load_average"], row["machine"]["cores"]
    busiest = max(load.values())
    spreads = ", ".join(
        f"{name} {percent(entry['total_ms']['relative'])}" for name, entry in row["contestants"].items()
    )
    state = "The machine was busy with other work" if row["machine"]["is_busy"] else "The machine was free"
    return (
        f"{state}: load average before {load['before']:.1f}, up to {busiest:.1f}, on {cores} cores; "
        f"quartile distance of the totals: {spreads}."
    )


def _stages(row: Row) -> list[str]:
    others = [name for name in row["contestants"] if name != "ours"]
    head = ["stage", "ours", *others, *(f"{name} / ours" for name in others), "work", "floor", "ours, reached"]
    head += [f"{name}, of floor" for name in ("ours", *others[:1])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for stage in STAGE_ROWS:
        work = row["work"].get(stage)
        times = {name: _times(entry, stage) for name, entry in row["contestants"].items()}
        cells = [stage, *(duration(entry["median"]) for entry in times.values())]
        cells += [_quartiles(row["ratios"][name][stage]) for name in others]
        if work is None:
            cells += ["", "", "", *("" for _ in ("ours", *others[:1]))]
        else:
            ours_ms = times["ours"]["median"]
            cells += [f"{count(work['flop'])}FLOP", duration(work["floor_ms"]), rate(1000 * work["flop"] / ours_ms)]
            cells += [percent(work["floor_ms"] / times[name]["median"]) for name in ("ours", *others[:1])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(contestant: Row, stage: str) -> Row:
    entry: Row = contestant["total_ms"] if stage == "total" else contestant["stages_ms"][stage]
    return entry


def _quartiles(spread: Row | None) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.2f}x ({spread['q25']:.2f} to {spread['q75']:.2f}, {_counted(spread['count'], 'pair')})"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _fact_lines(row: Row) -> list[str]:
    lines = []
    cold = row["cold_start"]
    if cold is not None:
        peaks = [("host", cold["host_peak_bytes"]), ("device", cold["device_peak_bytes"])]
        said = ", ".join(f"{name} {size(peak)}" for name, peak in peaks if peak is not None)
        lines.append(
            f"- Cold start: {cold['ready_s']:.1f} s from the start of the process to /ready, page included, files in "
            f"the page cache or not; peak memory {said or 'unknown'}; weights on disk {size(cold['weights_bytes'])}."
        )
    lines += [_lossy(row, name, entry) for name, entry in row.get("lossy", {}).items()]
    times = ", ".join(f"{name} {duration(entry['cpu_ms']['median'])}" for name, entry in row["contestants"].items())
    against = ", ".join(f"{name} / ours {_quartiles(entry['cpu'])}" for name, entry in row["ratios"].items())
    lines.append(f"- Processor time per request, encoder included: {times}" + (f"; {against}." if against else "."))
    for name, entry in row["contestants"].items():
        if entry["memory_bytes"] is not None:
            held = "" if entry["held_bytes"] is None else f"{size(entry['held_bytes'])} held and "
            lines.append(
                f"- Device memory, {name}: {held}{size(entry['memory_bytes']['highest'])} more during a request."
            )
    calls = {name: operators["calls"] for name, operators in row["operators"].items()}
    if calls:
        lines.append(
            "- Operator calls per request: " + ", ".join(f"{name} {number:,}" for name, number in calls.items()) + "."
        )
    lines += [f"- Left out: {reason}." for reason in row["left_out"]]
    return [*lines, ""] if lines else []


def _lossy(row: Row, name: str, entry: Row) -> str:
    """Return one line per variant; old rows have none."""
    speed, loop = (1 / row["ratios"][name][stage]["median"] for stage in ("total", "denoise"))
    return (
        f"- {name} ({entry['attention']}, {entry['execution']}) against {row['request']['dtype']}: "
        f"latents off by {max(entry['latents']):.2g}, frames {min(entry['psnr_db']):.1f} dB, the worst of "
        f"{_counted(len(entry['latents']), 'seed')}; {speed:.2f}x as fast, denoise {loop:.2f}x."
    )


def targets_of(row: Row) -> list[tuple[Target, float | None]]:
    """Return the targets that apply to this row, with the values it reached."""
    meant = [
        target
        for target in TARGETS
        if row["name"].startswith(target.name) and target.device in row["machine"]["device"]
    ]
    return [(target, target.value(row)) for target in meant]


def is_met(target: Target, value: float) -> bool:
    """Return whether the target is met."""
    return value <= target.bar if target.is_ceiling else value >= target.bar


def _targets(row: Row) -> list[str]:
    found = targets_of(row)
    if not found:
        return []
    lines = ["| target | bar | stretch | reached | |", "|---|---|---|---|---|"]
    for target, value in found:
        shown = "not measured" if value is None else f"{value:.3g} {target.unit}"
        verdict = "" if value is None else ("met" if is_met(target, value) else f"missed: {_next_step(row)}")
        if verdict and row["machine"]["is_busy"]:
            verdict = f"on a busy machine, to be made again: {verdict}"
        lines.append(
            f"| {target.text} | {target.bar:g} {target.unit} | {target.stretch:g} {target.unit} | {shown} | {verdict} |"
        )
    return [*lines, ""]


def _next_step(row: Row) -> str:
    ours = row["contestants"]["ours"]
    stages = {name: entry["median"] for name, entry in ours["stages_ms"].items()}
    stage = max(stages, key=lambda name: stages[name])
    share = percent(stages[stage] / ours["total_ms"]["median"])
    top = row["operators"]["ours"]["top"]
    return f"{stage} is {share} of the request, {top[0][0]} {percent(top[0][2])} of the time in operators; start there"


def _profile(row: Row) -> list[str]:
    lines = []
    for name, operators in row["operators"].items():
        shown = ", ".join(f"{key} {percent(share)} ({calls:,})" for key, calls, share in operators["top"])
        lines.append(f"Time of their own in operators, {name} (calls): {shown}.")
    return lines

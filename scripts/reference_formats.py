"""Pages of docs/reference about what is on disk: settings of a run, run folders, bundles; made from the code."""

import ast
import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from reference_commands import escape, table

ROOT = Path(__file__).resolve().parent.parent
METHOD_GROUP = "method_settings"
RECIPES = (("shapeworld", "codmd"), ("wan_1_3b", "codmd"), ("wan_14b", "codmd"))
# Names in log.jsonl and on TensorBoard; a test trains and compares.
LOG_KEYS = {
    "iteration": "iterations done",
    "student_updates": "updates of the student since the start of the run",
    "num_skipped": "updates left out because a gradient was not finite",
    "elapsed_s": "seconds of training, over all sittings",
    "samples_per_s": "samples of the student per second, all processes together",
    "eta_s": "seconds that are left, by iterations or by --minutes",
    "student_loss": "loss of the student's turns",
    "student_grad_norm": "its gradient before clipping",
    "critic_loss": "loss of the critic's turns",
    "critic_grad_norm": "its gradient before clipping",
    "loss_dmd": "distribution matching: half the squared normalised direction",
    "loss_frame": "relations of frames within a clip, before its weight",
    "loss_batch": "relations of clips within a batch, before its weight",
    "score_gap_abs_mean": "how far critic and teacher are apart in x0",
    "x0_std_ratio": "spread of the student's sample over that of the guided teacher's",
    "loss_scm": "`rcm`, `dcm`: the consistency term",
    "tangent_norm": "`rcm`, `dcm`: norm of the tangent, mean over samples",
    "tangent_masked": "`rcm`, `dcm`: share of samples left out because their tangent was not finite",
    "loss_trajectory": "`dp-dmd`: distance of the first step from the teacher's trajectory",
    "loss_gan": "discriminator: the student's term, before its weight; .693 where it cannot tell",
    "loss_discriminator": "discriminator: its own loss, before its weight; 1.386 where it cannot tell",
    "logit_fake": "discriminator: mean logit of samples of the student; above 0 means real",
    "logit_real": "discriminator: mean logit of real latents",
    "weight_max": "`f-distill`: largest weight in the batch; their mean is 1",
    "loss_regression": "`avd`: flow error of the student on real latents, before its weights",
    "regression_weight": "`avd`: mean weight of samples in it; .5 at first",
    "loss_motion": "`avd`: -log of the variance over frames, where it is small",
    "loss_transport": "`vdot`: half the squared direction to where the plan leads",
}


def attributes(kind: type) -> dict[str, str]:
    """Return the meaning of every field that the Attributes section of a class's docstring names."""
    doc = inspect.getdoc(kind) or ""
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (section[1] if section else "").split("\n"):
        entry = re.match(r"    ([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2].strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def described(kind: type) -> dict[str, str]:
    """Return the meaning of every field of a dataclass.

    Raises:
        ValueError: a field is not described.
    """
    known = attributes(kind)
    names = [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")]
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"the docstring of {kind.__name__} has to describe {', '.join(missing)}")
    return {name: known[name] for name in names}


def settings_of(kind: type) -> dict[str, str]:
    """Return the meaning of every setting of a group, those of groups inside it by dotted names."""
    kinds, found = typing.get_type_hints(kind), dict[str, str]()
    for name, text in described(kind).items():
        if dataclasses.is_dataclass(kinds[name]):
            found |= {f"{name}.{inner}": meaning for inner, meaning in described(kinds[name]).items()}
        else:
            found[name] = text
    return found


def folder_lines(package: str, prefix: str) -> list[tuple[str, str]]:
    """Return what docstrings of modules say of files below a folder: lines of `PREFIX/name  meaning`.

    Args:
        package: folder of the modules.
        prefix: for example RUN.
    """
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found += re.findall(rf"^({prefix}/.*?)  +(\S.*)$", doc, re.MULTILINE)
    return [(f"`{name}`", escape(re.sub(r" \([a-z_, .]*\.py\)$", "", text))) for name, text in found]


def settings_page() -> str:
    """Return the page of the settings of a run."""
    from distill.config import RESUMABLE, DistillConfig, config_to_dict
    from distill.formats import RENAMED
    from distill.methods.registry import METHODS, recipe_config

    columns = [_flat(config_to_dict(recipe_config(*each))) for each in RECIPES]
    kinds = typing.get_type_hints(DistillConfig)
    groups = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind) and name != METHOD_GROUP}
    top = described(DistillConfig)
    keys = {name: text for name, text in top.items() if name not in groups and name != METHOD_GROUP}
    for group, kind in groups.items():
        keys |= {f"{group}.{name}": text for name, text in described(kind).items()}
    lines = ["# Settings of a training run", ""]
    lines += [
        "`--set KEY=VALUE` takes any of these keys, as do `config.json` of a run and `--dry-run`. Values are JSON;"
    ]
    lines += ["what is not JSON is text. The columns are the defaults by recipe with `--method codmd`.", ""]
    head = ("key", *(f"`{recipe}`" for recipe, _ in RECIPES), "meaning")
    lines += table(head, [_setting(key, text, columns) for key, text in keys.items()])
    for kind in dict.fromkeys(method.settings for method in METHODS.values()):
        names = [name for name, method in METHODS.items() if method.settings is kind]
        each = [_flat(config_to_dict(recipe_config(recipe, names[0]))) for recipe, _ in RECIPES]
        rows = [_setting(f"{kind.group}.{name}", text, each) for name, text in settings_of(kind).items()]
        lines += ["", f"## {kind.group}: {', '.join(f'`--method {name}`' for name in names)}", ""]
        lines += [_first_paragraph(kind), "", *table(head, rows)]
    lines += ["", "## Other methods", "", "Where another method's published settings differ from those of `codmd`:", ""]
    lines += table(("method", *head[1:-1]), [_differences(name) for name in METHODS if name != "codmd"])
    lines += ["", "## With --resume", "", "These keys may change when a run goes on; any other is refused:"]
    lines += [", ".join(f"`{key}`" for key in RESUMABLE) + ".", "", "## Older names", ""]
    return "\n".join([*lines, *table(("was", "is"), [(f"`{old}`", f"`{new}`") for old, new in RENAMED.items()])])


def run_folder_page() -> str:
    """Return the page of run folders and of the server's data folder."""
    lines = [
        "# Folders on disk",
        "",
        "`codmd-distill train` and `codmd-distill teacher` write one folder each, `--out`. A file or",
    ]
    lines += [
        "folder takes its name when it is whole, so a run killed while it saves goes on from the checkpoint before.",
        "",
    ]
    head = ("path", "what it is")
    lines += ["## codmd-distill train", "", *table(head, folder_lines("distill/run", "RUN")), "", "### log.jsonl", ""]
    lines += [
        "One JSON object per `log_every_iterations` iterations; means since the line before. A metric is there when"
    ]
    lines += ["its network had a turn; null is not finite.", ""]
    lines += table(("key", "what it is"), [(f"`{name}`", escape(text)) for name, text in LOG_KEYS.items()])
    lines += ["", "## codmd-distill teacher", "", *table(head, folder_lines("distill/pretrain", "RUN"))]
    lines += ["", "## The server's data folder", "", "`codmd-serve serve` and `work` keep theirs in `--data`.", ""]
    return "\n".join([*lines, *table(head, folder_lines("codmd_serve", "DATA"))])


def bundle_page() -> str:
    """Return the page of the bundle format."""
    from codmd_serve.grammar import Grammar
    from codmd_serve.wan.checkpoint import StudentSpec

    lines = [
        "# Student bundles",
        "",
        "A bundle is a folder that `codmd-serve` reads and `train`, `export` and `convert` write.",
        "",
    ]
    lines += [
        *table(("path", "what it is"), folder_lines("codmd_serve", "BUNDLE")),
        "",
        "## student.json",
        "",
        "Fields with a default may be missing.",
        "",
    ]
    defaults = {field.name: field.default for field in dataclasses.fields(StudentSpec)}
    rows = []
    for name, text in described(StudentSpec).items():
        default = defaults[name]
        shown = "required" if default is dataclasses.MISSING and name != "assumed" else f"`{_plain(default)}`"
        rows.append((f"`{name}`", "`[]`" if name == "assumed" else shown, escape(text)))
    lines += [*table(("field", "default", "meaning"), rows), "", "## world.json", ""]
    lines += ["The grammar of a world's captions. A server that finds it warns of prompts outside of it.", ""]
    rows = [(f"`{name}`", escape(text)) for name, text in described(Grammar).items()]
    return "\n".join([*lines, *table(("field", "meaning"), rows)])


def _first_paragraph(kind: type) -> str:
    return escape(" ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()))


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _setting(key: str, text: str, columns: list[dict[str, Any]]) -> tuple[str, ...]:
    return (f"`{key}`", *(_value(column[key]) for column in columns), escape(text))


def _differences(method: str) -> tuple[str, ...]:
    from distill.config import config_to_dict
    from distill.methods.registry import recipe_config

    cells = []
    for recipe, _ in RECIPES:
        ours = _flat(config_to_dict(recipe_config(recipe, method)))
        base = _flat(config_to_dict(recipe_config(recipe, "codmd")))
        changed = [key for key in ours if key in base and ours[key] != base[key] and key != "method"]
        cells.append(", ".join(f"`{key}` {_value(ours[key])}" for key in changed))
    return (f"`{method}`", *cells)


def _value(value: Any) -> str:
    text = _plain(value)
    return "" if text in ('""', "''") else f"`{text[:24]}...`" if len(text) > 40 else f"`{text}`"


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple | list) else f'"{value}"' if value == "" else str(value)

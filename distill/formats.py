"""Older formats of config.json: what their keys are called now, and what their values mean now.

A setting that gets another name or another meaning is entered here, so that runs and bundles of older versions load
with the meaning that they were made with. What only one method's settings changed stands in their `upgraded`.

Format 1 had every method's settings in one file, format 2 copula.permute, format 3 ema.start_update.
"""

from collections.abc import Mapping
from typing import Any

from codmd_serve.errors import ConfigError

# Keys up to the format of then and what they are called now. `--set` still takes the old ones.
RENAMED_IN_4 = {"ema.start_update": "ema.start_after_updates"}
RENAMED = {
    "max_steps": "max_iterations",
    "student_every_steps": "student_every_iterations",
    "critic_warmup_steps": "critic_warmup_iterations",
    "log_every_steps": "log_every_iterations",
    "save_every_steps": "save_every_iterations",
    "rcm.warmup_steps": "rcm.warmup_iterations",
    "copula.shared_sigma": "score_shared_sigma",
    "reference_compat": "copula.reference_compat",
    **RENAMED_IN_4,
}
# Keys of format 2 whose values changed too: the name of today, and the value of today by the value of then.
REVALUED: dict[str, tuple[str, dict[object, object]]] = {
    "copula.permute": ("copula.control", {False: "none", True: "teacher_only"}),
}


def name_of_today(name: str) -> str:
    """Return what a dotted key of any format is called now."""
    return REVALUED[name][0] if name in REVALUED else RENAMED.get(name, name)


def value_of_today(name: str, value: object) -> object:
    """Return what a value means now that stands under a dotted key of any format.

    Raises:
        ConfigError: the key never had that value.
    """
    if name not in REVALUED:
        return value
    values = REVALUED[name][1]
    if not isinstance(value, bool) or value not in values:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, values))}, got {value!r}")
    return values[value]


def current_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of format 2 under the names and with the values of today."""
    current = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for before, (after, _) in REVALUED.items():
        group, _, leaf = before.partition(".")
        settings = current.get(group)
        if isinstance(settings, dict) and leaf in settings:
            settings[after.partition(".")[2]] = value_of_today(before, settings.pop(leaf))
    return current


def current_names(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return settings of an older format under the names of today."""
    renamed = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for before, after in names.items():
        *groups, leaf = before.split(".")
        source = renamed.get(groups[0]) if groups else renamed
        if not isinstance(source, dict) or leaf not in source:
            continue
        value = source.pop(leaf)
        *groups, leaf = after.split(".")
        target = renamed.setdefault(groups[0], {}) if groups else renamed
        if not isinstance(target, dict):
            raise ConfigError(f"expected settings under {groups[0]}, got {target!r}")
        target[leaf] = value
    return renamed

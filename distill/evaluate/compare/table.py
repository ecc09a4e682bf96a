"""The declared table of a comparison: arms, seeds, budgets, guidance; read strictly, runs nothing."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codmd_serve.errors import ConfigError
from codmd_serve.textfiles import read_json_object

TABLES = Path(__file__).parent / "tables"
RUN, TEACHER, TRUTH, START = "run", "teacher", "truth", "start"
KINDS = (RUN, TEACHER, TRUTH, START)
START_SUFFIX = "+start"
LISTS = ("budgets", "curve", "guidance", "seeds", "tuning_seeds", "metrics")
NO_LOSS = "no_loss"
RULES = ("", NO_LOSS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One row of the table.

    Attributes:
        name: of the row; also the name of a folder.
        kind: "run" trains; "teacher" samples the exact teacher in few steps; "truth" is the law itself; "start" is the
            network that every student starts from.
        method: of a run.
        settings: of a run, as `--set` takes them.
        steps: Euler steps of the teacher.
        updates: student updates of a run, where they are not the budget's.
        unequal: why updates or calls may differ from the baseline's; empty where they must not.
    """

    name: str
    kind: str = RUN
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    updates: int = 0
    unequal: str = ""

    @property
    def has_budgets(self) -> bool:
        """Whether a budget changes its student."""
        return self.kind == RUN and not self.updates


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A comparison.

    Attributes:
        name: of the table; also the name of a folder.
        recipe: of all runs, see `worlds.WORLDS`.
        baseline: the arm that all others are compared with.
        budgets: student updates, ascending; each is tested.
        curve: further numbers of updates at which runs are scored, for the curves over training; never tested.
        guidance: scales of the teacher.
        seeds: reported.
        tuning_seeds: for choosing settings; never reported.
        metrics: tested, with Holm's correction over them.
        samples: of each caption; on ShapeWorld, of each deep one.
        bench: settings of the world's bench, where it has any.
        settings: of all runs, as `--set` takes them.
        rule: which one picks an arm, stated before the runs, see `rule.TEXTS`; empty for none.
    """

    name: str
    recipe: str
    baseline: str
    arms: tuple[Arm, ...]
    budgets: tuple[int, ...]
    guidance: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    curve: tuple[int, ...] = ()
    samples: int = 512
    bench: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""

    def arm(self, name: str) -> Arm:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def scored(self, arm: Arm) -> tuple[int, ...]:
        """Return the student updates after which an arm is scored, ascending."""
        return tuple(sorted({*self.budgets, *self.curve})) if arm.has_budgets else self.budgets


def find_table(name: str) -> Path:
    """Return the file of a table: a path, or one of those that come with the package.

    Raises:
        ConfigError: there is none.
    """
    path, shipped = Path(name), TABLES / f"{name}.json"
    if path.is_file():
        return path
    if shipped.is_file():
        return shipped
    known = ", ".join(sorted(entry.stem for entry in TABLES.glob("*.json")))
    raise ConfigError(f"no table {name}: name a JSON file, or one of {known}")


def read_table(path: Path) -> Table:
    """Read and check a table.

    Raises:
        ConfigError: unreadable, an unknown or missing key, or a table that compares nothing; the message names the
            file and the key.
    """
    try:
        return parse_table(read_json_object(path, ConfigError))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_table(data: Mapping[str, Any]) -> Table:
    """Return the table of a JSON object; `start` adds an arm NAME+start for each arm that it names.

    Raises:
        ConfigError: as `read_table`.
    """
    own = dict(data)
    start = own.pop("start", None)
    arms = [_arm(name, entry) for name, entry in _object(own.pop("arms", None), "arms").items()]
    if start is not None:
        arms += _started(arms, _object(start, "start"))
    _check_keys(own, Table, "the table", given=("arms",))
    lists = {key: tuple(own[key]) for key in LISTS if key in own}
    table = Table(**{**own, **lists, "arms": tuple(arms)})
    if table.rule not in RULES:
        raise ConfigError(f"rule must be {NO_LOSS} or left out, got {table.rule!r}")
    _check(table)
    return table


def check_names(names: Iterable[str], what: str, *, are_paths: bool = False) -> None:
    """Refuse names that are no folder, or that differ only in case: on some file systems they are one.

    With are_paths they are whole paths, of which only the case is judged.

    Raises:
        ConfigError: lists them.
    """
    names = list(names)
    bad = [
        name for name in names if not are_paths and (not name or set(name) & set('/\\:*?"<>|') or name.startswith("."))
    ]
    if bad:
        raise ConfigError(f"{what} {bad[0]!r} cannot be the name of a folder")
    counts = Counter(name.casefold() for name in names)
    same = sorted(name for name in names if counts[name.casefold()] > 1)
    if same:
        raise ConfigError(f"{what} must differ in more than case: {', '.join(same)}")


def as_dict(table: Table) -> dict[str, Any]:
    """Return the table as JSON values, with the arms that `start` added."""
    data = dataclasses.asdict(table)
    arms = {arm.pop("name"): {key: value for key, value in arm.items() if value} for arm in data.pop("arms")}
    return {**data, "arms": arms}


def _arm(name: str, data: object) -> Arm:
    entry = _object(data, f"arms.{name}")
    _check_keys(entry, Arm, f"arm {name}", given=("name",))
    arm = Arm(name=name, **entry)
    if arm.kind not in KINDS:
        raise ConfigError(f"arm {name}: kind must be one of {', '.join(KINDS)}, got {arm.kind!r}")
    if (arm.kind == RUN) != bool(arm.method):
        raise ConfigError(f"arm {name}: a {arm.kind} has {'a' if arm.kind == RUN else 'no'} method")
    if (arm.kind == TEACHER) != (arm.steps > 0):
        raise ConfigError(f"arm {name}: steps are those of a teacher")
    return arm


def _started(arms: list[Arm], start: Mapping[str, Any]) -> list[Arm]:
    unknown = sorted(start.keys() - {"arms", "settings", "unequal"})
    names = [arm.name for arm in arms]
    missing = [name for name in start.get("arms", []) if name not in names]
    if unknown or missing:
        raise ConfigError(f"start: unknown {'key' if unknown else 'arm'} {(unknown or missing)[0]!r}")
    return [
        dataclasses.replace(
            arm,
            name=arm.name + START_SUFFIX,
            settings={**arm.settings, **start.get("settings", {})},
            unequal="; ".join(filter(None, (arm.unequal, start.get("unequal", "")))),
        )
        for arm in arms
        if arm.name in start["arms"]
    ]


def _check(table: Table) -> None:
    check_names([arm.name for arm in table.arms], "arms")
    check_names([table.name], "name")
    if table.baseline not in [arm.name for arm in table.arms]:
        raise ConfigError(f"baseline must be an arm, got {table.baseline!r}")
    if table.arm(table.baseline).kind != RUN or table.arm(table.baseline).unequal:
        raise ConfigError(f"baseline {table.baseline} must be a run that declares nothing unequal")
    for key in ("budgets", "guidance", "seeds", "metrics"):
        values = getattr(table, key)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key} must be a list without repetitions, got {list(values)}")
    if table.curve and set(table.curve) & set(table.budgets):
        raise ConfigError(f"curve must hold no budget, got {list(table.curve)}")
    for key in ("budgets", "curve", "seeds", "tuning_seeds", "samples"):
        values = getattr(table, key) if key != "samples" else (table.samples,)
        if any(type(value) is not int or value < (0 if "seeds" in key else 1) for value in values):
            raise ConfigError(f"{key} must be whole numbers above 0, seeds from 0, got {list(values)}")
    if list(table.budgets) != sorted(table.budgets):
        raise ConfigError(f"budgets must ascend, got {list(table.budgets)}")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in table.guidance):
        raise ConfigError(f"guidance must be numbers, got {list(table.guidance)}")
    if len(table.seeds) < 2:
        raise ConfigError(f"seeds must be 2 or more: one has no interval, got {list(table.seeds)}")
    shared = sorted(set(table.seeds) & set(table.tuning_seeds))
    if shared:
        raise ConfigError(f"seed {shared[0]} is a tuning seed and is reported: what was chosen on it proves nothing")


def _object(data: object, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object, got {data!r}")
    return data


def _check_keys(data: Mapping[str, Any], kind: type, where: str, given: tuple[str, ...]) -> None:
    fields = {entry.name: entry for entry in dataclasses.fields(kind) if entry.name not in given}
    unknown = sorted(data.keys() - fields.keys())
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r} of {where}, expected one of: {', '.join(fields)}")
    required = {
        name
        for name, entry in fields.items()
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - data.keys())
    if missing:
        raise ConfigError(f"missing key {missing[0]!r} of {where}")
    for name in data.keys() & {"settings", "bench"}:
        _object(data[name], f"{name} of {where}")
    for name in data.keys() & set(LISTS):
        if not isinstance(data[name], list):
            raise ConfigError(f"{name} must be a list, got {data[name]!r}")

"""The captions a model was trained on: parses them, and finds the nearest one to any other text.

A bundle carries its grammar as world.json, so that a server can warn of a prompt without the trainer's package. Knows
words and their order; knows nothing of tokens, pixels or what the words mean.
"""

from __future__ import annotations

import difflib
import json
import re
import string
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from codmd_serve.errors import CheckpointError, ConfigError
from codmd_serve.files import first_line
from codmd_serve.textfiles import read_json_object

GRAMMAR_FILE = "world.json"
MAX_OBJECTS = 2
_CLOSE = 0.75
"""Least similarity, by difflib, at which an unknown word is taken for a misspelt one."""

Words = dict[str, tuple[str, ...]]
Move = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a caption says, in the grammar's names.

    Attributes:
        objects: (colour, shape) of each object, in the order of the text.
        moves: (motion, speed) of each object; the speed of one that is at rest is None.
        background: its name.
        relation: of the first object to the second; None when unsaid.
    """

    objects: tuple[tuple[str, str], ...]
    moves: tuple[Move, ...]
    background: str
    relation: str | None = None

    @property
    def is_apart(self) -> bool:
        """Return whether two objects have motions of their own."""
        return len(set(self.moves)) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """Words by the name they stand for, and the canonical sentence of a caption.

    Attributes:
        colours, shapes, backgrounds, speeds, motions: name to the words that mean it.
        relations: name to its one-word phrases; "left" and "right" before "of" are read without them.
        rest: the motion that has no speed.
        forms: templates of the canonical sentence: one, two and apart, with the phrases moves, move, rests and rest.
        vocabulary: every word of its captions, also those that decide nothing.
        near: words outside the grammar, and the name each is nearest to.
        about: one sentence on what the model can draw.
        examples: captions of the grammar.
    """

    colours: Words
    shapes: Words
    backgrounds: Words
    speeds: Words
    motions: Words
    relations: Words
    rest: str
    forms: dict[str, str]
    vocabulary: tuple[str, ...]
    near: dict[str, str]
    about: str
    examples: tuple[str, ...]
    _meanings: dict[str, tuple[str, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = ("colour", "shape", "background", "speed", "motion", "relation")
        tables: dict[str, Words] = {part: getattr(self, f"{part}s") for part in parts}
        meanings = {word: (part, key) for part, words in tables.items() for key in words for word in words[key]}
        object.__setattr__(self, "_meanings", meanings)

    def read(self, text: str) -> Reading:
        """Read any phrasing of the grammar; the order of clauses does not matter.

        A motion on either side of the second object's name gives each object its own.

        Raises:
            ConfigError: naming the part of the caption (objects, motion, speed, background) that is missing, doubled
                or has no meaning.
        """
        found = _Found.of(re.findall(r"[a-z]+", text.lower()), self._meanings)
        if not found.objects:
            raise ConfigError(f"no 'colour shape' pair found in {text!r}; expected for example 'a red circle'")
        if len(found.objects) > MAX_OBJECTS:
            raise ConfigError(f"expected one or two objects in {text!r}, got {len(found.objects)}")
        background = _single("background", found.words("background"), text)
        relation = _at_most_one("relation", found.words("relation"), text)
        moves: list[Move] = []
        if found.is_apart:
            for index, name in enumerate(("first", "second")):
                motion = _single(f"motion of the {name} object", found.words("motion", index), text)
                read = _at_most_one if motion == self.rest else _single
                moves.append((motion, read(f"speed of the {name} object", found.words("speed", index), text)))
        else:
            motion = _single("motion", found.words("motion"), text)
            moves = [(motion, _at_most_one("speed", found.words("speed"), text))] * len(found.objects)
        reading = Reading(found.objects, tuple(moves), background, relation)
        self._check(reading)
        return reading

    def _check(self, reading: Reading) -> None:
        """Raise ConfigError when the parts of a caption have no meaning together."""
        for motion, speed in reading.moves:
            if (speed is None) != (motion == self.rest):
                raise ConfigError(f"speed must be given exactly when something moves, got {speed!r} with {motion!r}")
        if reading.relation is not None and (len(reading.objects) != MAX_OBJECTS or reading.is_apart):
            raise ConfigError("a relation needs two objects that move alike")
        colours = [colour for colour, _ in reading.objects]
        if len(set(colours)) < len(colours):
            raise ConfigError(f"two objects must differ in colour, got {colours[0]} twice")

    def caption(self, reading: Reading) -> str:
        """Return the canonical sentence."""
        places = {
            f"{part}{index}": value
            for index, names in enumerate(reading.objects, start=1)
            for part, value in zip(("colour", "shape"), names, strict=True)
        }
        actions = {
            f"action{index}": self._action(move, "moves", "rests") for index, move in enumerate(reading.moves, start=1)
        }
        form = "one" if len(reading.objects) == 1 else ("apart" if reading.is_apart else "two")
        both = self._action(reading.moves[0], "move", "rest")
        relation = reading.relation or "and"
        return self.forms[form].format(
            **places, **actions, action=both, relation=relation, background=reading.background
        )

    def _action(self, move: Move, moving: str, resting: str) -> str:
        return self.forms[resting if move[0] == self.rest else moving].format(motion=move[0], speed=move[1])

    def nearest(self, text: str) -> str:
        """Return the canonical caption nearest to a text: known words are kept, the rest is filled in."""
        found = _Found.of(self._understood(text), self._meanings, is_lenient=True)
        objects: list[tuple[str, str]] = []
        for colour, shape in found.objects[:MAX_OBJECTS] or ((next(iter(self.colours)), next(iter(self.shapes))),):
            taken = [name for name, _ in objects]
            objects.append((colour if colour not in taken else next(c for c in self.colours if c not in taken), shape))
        moves = []
        for index in range(len(objects)):
            own = index if found.is_apart else None
            motions, speeds = found.words("motion", own), found.words("speed", own)
            motion = motions[0] if motions else (next(iter(self.motions)) if speeds else self.rest)
            speed = speeds[0] if speeds else next(iter(self.speeds))
            moves.append((motion, None if motion == self.rest else speed))
        background = (*found.words("background"), next(iter(self.backgrounds)))[0]
        relation = (*found.words("relation"), None)[0] if len(objects) == MAX_OBJECTS and len(set(moves)) == 1 else None
        return self.caption(Reading(tuple(objects), tuple(moves), background, relation))

    def warning(self, text: str) -> str | None:
        """Say why a text is outside the grammar, what the model can do and the nearest caption; None when inside."""
        try:
            self.read(text)
        except ConfigError as error:
            reason = str(error).replace(f" in {text!r}", "")
            return (
                f"outside the captions that this model knows: {reason}. {self.about} "
                f'The nearest caption it knows: "{self.nearest(text)}"'
            )
        return None

    def _understood(self, text: str) -> list[str]:
        """Return the words of a text, those near a word of the grammar, or misspelt, replaced by it."""
        known = {*self._meanings, *self.vocabulary}
        words = []
        for word in re.findall(r"[a-z]+", text.lower()):
            if word not in known:
                similar = difflib.get_close_matches(word, known, n=1, cutoff=_CLOSE) if len(word) > 3 else []
                word = self.near.get(word, similar[0] if similar else word)
            words.append(word)
        return words

    def save(self, folder: Path) -> None:
        """Write world.json into a bundle's folder."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        (folder / GRAMMAR_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Grammar | None:
        """Read the world.json of a bundle; None when it has none.

        Raises:
            CheckpointError: it cannot be read, or lacks a part.
        """
        path = folder / GRAMMAR_FILE
        if not path.exists():
            return None
        data = read_json_object(path, CheckpointError)
        try:
            unknown = data.keys() - {entry.name for entry in fields(cls) if entry.init}
            if unknown:
                raise ValueError(f"unknown parts: {', '.join(sorted(unknown))[:200]}")
            tables = ("colours", "shapes", "backgrounds", "speeds", "motions", "relations")
            values: dict[str, Any] = {entry.name: data[entry.name] for entry in fields(cls) if entry.init}
            values |= {name: {key: tuple(map(str, words)) for key, words in data[name].items()} for name in tables}
            values |= {name: tuple(map(str, data[name])) for name in ("vocabulary", "examples")}
            for form in values["forms"].values():
                _check_form(form)
            grammar = cls(**values)
            for example in grammar.examples:
                grammar.read(example)
                grammar.nearest(example)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            StopIteration,
            RecursionError,
            ConfigError,
        ) as error:
            raise CheckpointError(f"{path} is not a grammar: {first_line(error)[:300]}") from error
        return grammar


def _check_form(form: str) -> None:
    """Raise ValueError unless a template has plain names only: a width such as {motion:9999999999} fills the memory."""
    for _, name, width, conversion in string.Formatter().parse(form):
        if name is not None and (width or conversion or not name.isidentifier()):
            raise ValueError(f"a form may hold plain names only, got {name[:40]!r}")


@dataclass(frozen=True, slots=True)
class _Found:
    """The known words of a text.

    Attributes:
        objects: (colour, shape) pairs.
        parts: names found of every other part, each with whether it comes after the second object.
    """

    objects: tuple[tuple[str, str], ...]
    parts: dict[str, list[tuple[str, bool]]]

    @property
    def is_apart(self) -> bool:
        """Return whether a motion stands on either side of the second object's name."""
        return len(self.objects) > 1 and {is_second for _, is_second in self.parts["motion"]} == {False, True}

    def words(self, part: str, index: int | None = None) -> list[str]:
        """Return the names found of a part, for object 0 or 1 if given."""
        return [name for name, is_second in self.parts[part] if index is None or is_second == bool(index)]

    @classmethod
    def of(cls, words: list[str], meanings: dict[str, tuple[str, str]], is_lenient: bool = False) -> _Found:
        """Sort the words; when lenient, a shape without a colour has the first one that no other object has."""
        objects: list[tuple[str, str]] = []
        parts: dict[str, list[tuple[str, bool]]] = {part: [] for part in ("motion", "speed", "background", "relation")}
        colours = [name for part, name in meanings.values() if part == "colour"]
        colour: str | None = None
        for word, following in pairwise([*words, ""]):
            part, name = meanings.get(word, ("", ""))
            if word in ("left", "right") and following == "of":
                part, name = "relation", f"{word} of"
            if part == "colour":
                colour = name
            elif part == "shape" and (colour is not None or is_lenient):
                taken = [taken for taken, _ in objects]
                objects.append((colour or next(c for c in colours if c not in taken), name))
                colour = None
            elif part in parts:
                parts[part].append((name, len(objects) > 1))
        return cls(tuple(objects), parts)


def _at_most_one(part: str, found: list[str], text: str) -> str | None:
    return _single(part, found, text) if found else None


def _single(part: str, found: list[str], text: str) -> str:
    if len(found) != 1:
        got = f"{len(found)}: {', '.join(found)}" if found else "none"
        raise ConfigError(f"expected one {part} in {text!r}, got {got}")
    return found[0]

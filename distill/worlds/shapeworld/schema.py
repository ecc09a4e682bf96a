"""The one schema of ShapeWorld: names, colours and the `Scene` a caption states.

Knows nothing of phrasing, of the law of the open factors, or of pixels. Captions, law, renderer, parser and detector
import it, so a word added here exists everywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass

from codmd_serve.errors import ConfigError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 40),
    "green": (50, 205, 60),
    "blue": (60, 100, 255),
    "yellow": (245, 220, 40),
    "purple": (175, 60, 225),
    "cyan": (40, 215, 225),
    "white": (255, 255, 255),
}
"""Object palette, 8-bit RGB at full shade."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 10),
    "gray": (72, 72, 72),
    "navy": (16, 24, 80),
    "brown": (76, 46, 20),
    "teal": (8, 66, 64),
}
"""Background palette, 8-bit RGB at shade 1. No name is shared with COLOURS, so a word alone tells its role."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit motion (dx, dy) in image coordinates: x to the right, y downwards."""
STILL = "still"
MOTIONS = (*DIRECTIONS, STILL)
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.26, 0.42), "quickly": (0.64, 0.80)}
"""Speed range in world units (1/64 of the short side) per frame of the native 25-frame clip."""
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Unit offset of the FIRST object from the second."""

TRAIN, HELD_OUT, FAR = "train", "held_out", "far"
SPLITS = (TRAIN, HELD_OUT, FAR)
"""Combinations that are trained on, that never are, and the part of the latter that is farthest: see `Scene`."""

WORLD_SIZE = 64.0
"""World units across the short side of a frame."""
NATIVE_HEIGHT = NATIVE_WIDTH = 96
NATIVE_NUM_FRAMES = 25
NATIVE_FPS = 16
"""The default of whatever renders. A bundle trained at another size states its own, and the world renders at any."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything a caption states.

    Attributes:
        objects: one or two (colour, shape) pairs; two objects always differ in colour.
        motion: one of MOTIONS, of the first object, and of the second unless `second_move` says otherwise.
        speed: one of SPEEDS, or None exactly when `motion` is "still".
        background: one of BACKGROUNDS.
        relation: one of RELATIONS (first object relative to the second), or None when unsaid.
        second_move: (motion, speed) of the second object when it differs from the first's; None when both move alike.
            Objects that move apart have no stated relation, because it would not hold for the whole clip.

    Raises:
        ConfigError: when a value is outside the schema or the combination has no meaning.
    """

    objects: tuple[tuple[str, str], ...]
    motion: str
    speed: str | None
    background: str
    relation: str | None = None
    second_move: tuple[str, str | None] | None = None

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ConfigError(f"a scene has one or two objects, got {len(self.objects)}")
        for colour, shape in self.objects:
            _member("colour", colour, COLOURS)
            _member("shape", shape, SHAPES)
        _member("background", self.background, BACKGROUNDS)
        if self.second_move is not None:
            if len(self.objects) != 2 or self.relation is not None:
                raise ConfigError("a motion of its own needs a second object and no stated relation")
            if self.second_move == (self.motion, self.speed):
                raise ConfigError("two objects that move alike have one motion: leave second_move out")
        for motion, speed in self.moves:
            _member("motion", motion, MOTIONS)
            if (speed is None) != (motion == STILL):
                raise ConfigError(f"speed must be given exactly when something moves, got {speed!r} with {motion!r}")
            if speed is not None:
                _member("speed", speed, SPEEDS)
        if self.relation is not None:
            _member("relation", self.relation, RELATIONS)
            if len(self.objects) != 2:
                raise ConfigError("a relation needs two objects")
        if len(self.objects) == 2 and self.objects[0][0] == self.objects[1][0]:
            raise ConfigError(f"two objects must differ in colour, got {self.objects[0][0]} twice")

    @property
    def count(self) -> int:
        """Return the number of objects."""
        return len(self.objects)

    @property
    def moves(self) -> tuple[tuple[str, str | None], ...]:
        """Return (motion, speed) of every object."""
        first = (self.motion, self.speed)
        return (first, self.second_move or first)[: self.count]

    @property
    def is_held_out(self) -> bool:
        """Return whether no training caption shows this combination.

        One object: 1/8 of the (colour, shape, motion) triples. Two objects: 1/8 of the unordered object pairs.
        """
        return _is_kept_out(*sorted(_words(self.objects)), *((self.motion,) if self.count == 1 else ()))

    @property
    def is_far(self) -> bool:
        """Return whether two objects are held out together and each of them is, with its motion, alone too.

        No training caption of two objects shows the pair, none of one object shows either of its (colour, shape,
        motion) triples: all that training shows is each object with its motion, beside other objects.
        """
        words = _words(self.objects)
        alone = all(_is_kept_out(word, motion) for word, (motion, _) in zip(words, self.moves, strict=True))
        return self.count == 2 and self.is_held_out and alone


def _words(objects: tuple[tuple[str, str], ...]) -> list[str]:
    return [f"{colour} {shape}" for colour, shape in objects]


def _is_kept_out(*parts: str) -> bool:
    return zlib.crc32("|".join(parts).encode()) % 8 == 0


def _member(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {value!r}")

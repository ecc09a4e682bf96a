"""Grammar of ShapeWorld captions: canonical form, free phrasings, parser, vocabulary and the splits.

Knows nothing of pixels or of the law of what a caption leaves open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from codmd_serve.errors import ConfigError
from codmd_serve.grammar import Grammar, Reading
from distill.worlds.shapeworld.schema import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FAR,
    HELD_OUT,
    MOTIONS,
    RELATIONS,
    SHAPES,
    SPEEDS,
    SPLITS,
    STILL,
    TRAIN,
    Scene,
)

_COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "white": ("white", "ivory"),
}
_SHAPE_WORDS = {
    "circle": ("circle", "disc", "disk"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
}
_BACKGROUND_WORDS = {
    "black": ("black",),
    "gray": ("gray", "grey"),
    "navy": ("navy",),
    "brown": ("brown",),
    "teal": ("teal",),
}
_SPEED_WORDS = {"slowly": ("slowly", "gently", "leisurely"), "quickly": ("quickly", "rapidly", "swiftly", "fast")}
_VERBS = ("move", "glide", "drift", "slide", "travel")
_STILL_WORDS = ("still", "motionless", "rest", "rests", "not")
_BACKDROPS = ("background", "backdrop")
_MOTION_PHRASES = {d: (d, f"{d}ward", f"{d}wards", f"{d}") for d in ("up", "down")} | {
    d: (d, f"{d}wards", f"to the {d}", f"towards the {d}") for d in ("left", "right")
}
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_FUNCTION_WORDS = ("a", "one", "the", "single", "two", "shapes", "and", "while", "with", "on", "against")
_AUXILIARIES = ("do", "does", "is", "are", "stay", "stays", "remain", "remains")
_FREE_SHARE = 0.6
TWO_OBJECT_SHARE = 0.4
_APART_SHARE = 0.3
_RELATION_SHARE = 0.6
# Draws in a row that gave nothing new: there are no more scenes of that number of objects.
_MAX_DRAWS = 5000

_NEAR = {
    **dict.fromkeys(("ball", "sphere", "dot"), "circle"),
    **dict.fromkeys(("cube", "rectangle", "block"), "square"),
    **dict.fromkeys(("pyramid", "cone", "arrow"), "triangle"),
    **dict.fromkeys(("star", "x"), "cross"),
    **dict.fromkeys(("donut", "doughnut", "loop", "torus"), "ring"),
    **dict.fromkeys(("orange", "gold"), "yellow"),
    **dict.fromkeys(("pink", "magenta"), "purple"),
    **dict.fromkeys(("maroon", "ruby"), "red"),
    **dict.fromkeys(("aqua",), "cyan"),
    **dict.fromkeys(("night",), "black"),
    **dict.fromkeys(("slow",), "slowly"),
    **dict.fromkeys(("quick", "speedy"), "quickly"),
    **dict.fromkeys(("stationary", "static", "stops", "stands"), STILL),
    **dict.fromkeys(("rises", "jumps", "climbs"), "up"),
    **dict.fromkeys(("falls", "drops", "sinks"), "down"),
    **dict.fromkeys(("over",), "above"),
    **dict.fromkeys(("beneath",), "below"),
}
"""Words that people try, and the word of the grammar that says the most like it."""


def vocabulary() -> tuple[str, ...]:
    """Return all words of the grammar, sorted; the tokenizer is built from them."""
    words: set[str] = {*_FUNCTION_WORDS, *_AUXILIARIES}
    words.update(
        w for table in (_COLOUR_WORDS, _SHAPE_WORDS, _BACKGROUND_WORDS, _SPEED_WORDS) for v in table.values() for w in v
    )
    words.update(f"{verb}{s}" for verb in _VERBS for s in ("", "s"))
    words.update(_STILL_WORDS)
    words.update(_BACKDROPS)
    phrases = [p for table in (_MOTION_PHRASES, _RELATION_PHRASES) for v in table.values() for p in v]
    words.update(w for phrase in phrases for w in phrase.split())
    return tuple(sorted(words))


_GRAMMAR = Grammar(
    colours=_COLOUR_WORDS,
    shapes=_SHAPE_WORDS,
    backgrounds=_BACKGROUND_WORDS,
    speeds=_SPEED_WORDS,
    motions={d: tuple(f"{d}{suffix}" for suffix in ("", "ward", "wards")) for d in DIRECTIONS} | {STILL: _STILL_WORDS},
    relations={
        name: tuple(phrase for phrase in phrases if " " not in phrase) for name, phrases in _RELATION_PHRASES.items()
    },
    rest=STILL,
    forms={
        "one": "a {colour1} {shape1} {action1} on a {background} background",
        "two": "a {colour1} {shape1} {relation} a {colour2} {shape2} {action} on a {background} background",
        "apart": "a {colour1} {shape1} {action1} and a {colour2} {shape2} {action2} on a {background} background",
        "moves": "moves {motion} {speed}",
        "move": "move {motion} {speed}",
        "rests": "stays still",
        "rest": "stay still",
    },
    vocabulary=vocabulary(),
    near=_NEAR,
    about=(
        f"It draws one or two shapes ({', '.join(SHAPES)}; {', '.join(COLOURS)}), each still or moving left, right, up "
        f"or down, slowly or quickly, on a {', '.join(tuple(BACKGROUNDS)[:-1])} or {tuple(BACKGROUNDS)[-1]} background."
    ),
    examples=(
        "a red circle moves right quickly on a black background",
        "a white ring stays still on a navy background",
        "a green square left of a purple triangle move up slowly on a teal background",
        "a cyan cross moves right slowly and a yellow circle moves left quickly on a gray background",
    ),
)


def grammar() -> Grammar:
    """Return the grammar that a bundle carries, with which servers parse captions."""
    return _GRAMMAR


def canonical_caption(scene: Scene) -> str:
    """Return the canonical sentence of a scene."""
    return _GRAMMAR.caption(Reading(scene.objects, scene.moves, scene.background, scene.relation))


def free_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of the many phrasings of a scene: synonyms, adverb position, word order, articles."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    def noun(index: int) -> str:
        colour, shape = scene.objects[index]
        article = pick(("a", "a", "one", "the", "a single" if scene.count == 1 else "a"))
        return f"{article} {pick(_COLOUR_WORDS[colour])} {pick(_SHAPE_WORDS[shape])}"

    def action(motion: str, speed: str | None, is_plural: bool) -> str:
        if motion == STILL:
            plural = ("stay still", "remain still", "are motionless", "do not move", "rest")
            single = ("stays still", "remains still", "is motionless", "does not move", "rests")
            return pick(plural if is_plural else single)
        verb = pick(_VERBS) + ("" if is_plural else "s")
        where, how = pick(_MOTION_PHRASES[motion]), pick(_SPEED_WORDS[speed or ""])
        orders = (f"{verb} {where} {how}", f"{verb} {how} {where}")
        before = () if how == "fast" else (f"{how} {verb} {where}",)
        return pick(orders + before)

    subject = noun(0)
    if scene.second_move is not None:
        first, second = (action(*move, False) for move in scene.moves)
        sentence = f"{subject} {first} {pick(('and', 'and', 'while'))} {noun(1)} {second}"
    else:
        if scene.count == 2:
            join = pick(_RELATION_PHRASES[scene.relation]) if scene.relation else pick(("and", "and", "with"))
            subject = f"{subject} {join} {noun(1)}"
            if scene.relation is None and rng.random() < 0.25:
                subject = f"two shapes, {subject},"
        sentence = f"{subject} {action(scene.motion, scene.speed, scene.count == 2)}"
    ground = f"{pick(('on', 'on', 'against'))} a {pick(_BACKGROUND_WORDS[scene.background])} {pick(_BACKDROPS)}"
    return f"{ground}, {sentence}" if rng.random() < 0.2 else f"{sentence} {ground}"


def parse_caption(text: str) -> Scene:
    """Read any phrasing of the grammar back into its scene; the order of clauses does not matter.

    Raises:
        ConfigError: naming the part of the caption (objects, motion, speed, background) that is missing or doubled.
    """
    reading = _GRAMMAR.read(text)
    second = reading.moves[1] if reading.is_apart else None
    return Scene(reading.objects, *reading.moves[0], reading.background, reading.relation, second)


def sample_scene(
    rng: np.random.Generator,
    split: str = TRAIN,
    count: int | None = None,
    two_object_share: float = TWO_OBJECT_SHARE,
) -> Scene:
    """Draw a scene from the caption distribution of one split.

    Args:
        rng: source of randomness.
        split: "train", "held_out" (combinations never trained on, see `Scene.is_held_out`) or its part "far" (see
            `Scene.is_far`), whose scenes have two objects.
        count: 1 or 2 objects; None draws it.
        two_object_share: probability of two objects when the count is drawn.

    Raises:
        ConfigError: on an unknown split, or one object of split "far".
    """
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if split == FAR and count == 1:
        raise ConfigError("split far has scenes of two objects only, got count 1")
    if split == FAR:
        count = 2
    elif count is None:
        count = 2 if rng.random() < two_object_share else 1
    while True:
        scene = _draw_scene(rng, count)
        if scene.is_held_out == (split != TRAIN) and (split != FAR or scene.is_far):
            return scene


def sample_caption(rng: np.random.Generator, split: str = TRAIN, count: int | None = None) -> str:
    """Draw a caption: 60% free phrasings, the rest canonical."""
    scene = sample_scene(rng, split, count)
    return free_caption(scene, rng) if rng.random() < _FREE_SHARE else canonical_caption(scene)


def held_out_captions(num_captions: int, seed: int, count: int | None = None, split: str = HELD_OUT) -> list[str]:
    """Return distinct canonical held-out captions, the same ones for the same arguments.

    Args:
        num_captions: how many.
        seed: which draw.
        count: 1 or 2 objects; None alternates one and two, but in split "far", which has two only.
        split: "held_out" or "far".
    """
    rng = np.random.default_rng(seed)
    seen: dict[str, None] = {}
    while len(seen) < num_captions:
        wanted = count if count is not None or split == FAR else 1 + len(seen) % 2
        seen.setdefault(canonical_caption(sample_scene(rng, split, wanted)))
    return list(seen)


def unseen_captions(num_captions: int, seed: int, training: Collection[str]) -> list[str]:
    """Return distinct canonical captions of trained combinations that a run does not train on.

    Args:
        num_captions: how many at most, of one and two objects in turn.
        seed: which draw.
        training: prompts of the run; a scene that one of them shows is left out, whatever its phrasing.

    Returns:
        Fewer where there are no more. A long run trains on all scenes of one object; there are far more of two.
    """
    trained = {caption for text in training if (caption := _canonical(text))}
    rng = np.random.default_rng(seed)
    chosen: dict[str, None] = {}
    left = [1, 2]
    while len(chosen) < num_captions and left:
        count = left[len(chosen) % len(left)]
        for _ in range(_MAX_DRAWS):
            caption = canonical_caption(sample_scene(rng, TRAIN, count))
            if caption not in trained and caption not in chosen:
                chosen[caption] = None
                break
        else:
            left.remove(count)
    return list(chosen)


def _canonical(text: str) -> str:
    try:
        return canonical_caption(parse_caption(text))
    except ConfigError:  # a prompt that is no caption of the grammar
        return ""


def all_single_scenes() -> Iterator[Scene]:
    """Yield every one-object scene of the world, both splits."""
    for colour in COLOURS:
        for shape in SHAPES:
            for motion in MOTIONS:
                for speed in (None,) if motion == STILL else tuple(SPEEDS):
                    for background in BACKGROUNDS:
                        yield Scene(((colour, shape),), motion, speed, background)


def _draw_scene(rng: np.random.Generator, count: int) -> Scene:
    colours = [str(c) for c in rng.choice(list(COLOURS), size=count, replace=False)]
    objects = tuple((colour, str(rng.choice(SHAPES))) for colour in colours)
    background = str(rng.choice(list(BACKGROUNDS)))
    first = _draw_move(rng)
    if count == 2 and rng.random() < _APART_SHARE:
        second = first
        while second == first:
            second = _draw_move(rng)
        return Scene(objects, *first, background, second_move=second)
    relation = str(rng.choice(list(RELATIONS))) if count == 2 and rng.random() < _RELATION_SHARE else None
    return Scene(objects, *first, background, relation)


def _draw_move(rng: np.random.Generator) -> tuple[str, str | None]:
    motion = str(rng.choice(MOTIONS))
    return motion, None if motion == STILL else str(rng.choice(list(SPEEDS)))

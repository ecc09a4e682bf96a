"""The detector against renders whose every attribute and latent is known."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from codmd_serve.errors import ConfigError
from distill.evaluate.detect import Detection, detect, motion_of, relation_holds
from distill.worlds.shapeworld.captions import parse_caption
from distill.worlds.shapeworld.law import sample_latent
from distill.worlds.shapeworld.render import render, sample_clip
from distill.worlds.shapeworld.schema import BACKGROUNDS, COLOURS, SHAPES, Scene


def is_read_right(scene: Scene, found: Detection) -> bool:
    tracks = {track.colour: track for track in found.tracks}
    if sorted((track.colour, track.shape) for track in found.tracks) != sorted(scene.objects):
        return False
    if scene.relation and not relation_holds(scene.relation, *(tracks[colour] for colour, _ in scene.objects)):
        return False
    read = tuple((tracks[colour].motion, tracks[colour].speed_word) for colour, _ in scene.objects)
    return read == scene.moves and found.background.name == scene.background


def assert_factors(examples: list, found: list[Detection], least: dict[str, float]) -> None:
    """Correlation with the latent of every factor, one and two objects apart where their ranges differ."""
    pairs: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, measured: float, true: float) -> None:
        pairs.setdefault(name, []).append((measured, true))

    for example, detection in zip(examples, found, strict=True):
        z, scene = example.latent, example.scene
        if not is_read_right(scene, detection):
            continue
        tracks = {track.colour: track for track in detection.tracks}
        add("horizon", detection.horizon, z.horizon)
        add("background_shade", detection.background.shade, z.background_shade)
        for index, (colour, _) in enumerate(scene.objects):
            track = tracks[colour]
            add(f"radius {scene.count}", track.radius, z.radius[index])
            add(f"growth {scene.count}", track.growth, z.growth)
            add("fade", track.fade, z.fade)
            add("shade", track.shade, z.shade[index])
            add("x", track.start[0], z.start[index][0])
            add("y", track.start[1], z.start[index][1])
            word = scene.moves[index][1]
            if word:
                add(f"speed {word}", track.speed, z.speed[index])
                add("bend", track.bend, z.bend[index])
                assert np.sign(track.bend) == np.sign(z.bend[index])
    assert len(pairs) == 13
    for name, values in pairs.items():
        correlation = np.corrcoef(np.array(values).T)[0, 1]
        assert correlation > least.get(name, least[""]), f"{name}: {correlation:.4f}"


def unbiased(values: list[tuple[float, float]]) -> float:
    """Mean of measured less true, in standard deviations of the true values."""
    measured, true = np.array(values).T
    return float((measured - true).mean() / true.std())


def test_detect_reads_every_attribute_and_factor_of_renders(examples: list) -> None:
    found = [detect(example.clip) for example in examples]
    right = np.mean([is_read_right(e.scene, d) for e, d in zip(examples, found, strict=True)])
    assert right == 1.0
    assert_factors(examples, found, {"": 0.995})


def test_detect_measures_light_without_bias(examples: list) -> None:
    one = [example for example in examples if example.scene.count == 1][:40]
    tracks = [detect(example.clip).tracks[0] for example in one]
    factors = {
        "shade": [(t.shade, e.latent.shade[0]) for t, e in zip(tracks, one, strict=True)],
        "fade": [(t.fade, e.latent.fade) for t, e in zip(tracks, one, strict=True)],
        "x": [(t.start[0], e.latent.start[0][0]) for t, e in zip(tracks, one, strict=True)],
        "y": [(t.start[1], e.latent.start[0][1]) for t, e in zip(tracks, one, strict=True)],
        "radius": [(t.radius, e.latent.radius[0]) for t, e in zip(tracks, one, strict=True)],
    }
    for name, values in factors.items():
        assert abs(unbiased(values)) < 0.05, name


def test_detect_reads_the_first_edition_size(examples: list) -> None:
    some = examples[:48]
    found = [detect(render(example.scene, example.latent, 64, 64, 17)) for example in some]
    assert np.mean([is_read_right(e.scene, d) for e, d in zip(some, found, strict=True)]) >= 0.98


def test_detect_reads_compressed_and_blurred_renders(examples: list, degraded: Callable[..., np.ndarray]) -> None:
    some = examples[:72]
    found = [detect(degraded(example.clip, index)) for index, example in enumerate(some)]
    right = np.mean([is_read_right(e.scene, d) for e, d in zip(some, found, strict=True)])
    assert right >= 0.98
    assert_factors(some, found, {"": 0.97, "shade": 0.9})


@pytest.mark.parametrize("shape", SHAPES)
def test_detect_tells_small_blurred_shapes_apart(shape: str, degraded: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(3)
    scene = Scene((("cyan", shape), ("yellow", shape)), "left", "slowly", "brown")
    latent = replace(sample_latent(scene, rng), radius=(5.8, 5.8), growth=-0.12)
    tracks = detect(degraded(render(scene, latent), 0, noise=2.0, blur_px=1.0)).tracks
    assert [track.shape for track in tracks] == [shape, shape]


def test_detect_reads_every_colour_on_every_background_at_its_darkest() -> None:
    for background in BACKGROUNDS:
        for colour in COLOURS:
            rng = np.random.default_rng(4)
            scene = Scene(((colour, "ring"),), "up", "quickly", background)
            latent = sample_latent(scene, rng)
            latent = replace(latent, shade=(0.85,), fade=0.16, background_shade=1.25)
            assert is_read_right(scene, detect(render(scene, latent))), (colour, background)


def test_detect_at_another_size_and_length() -> None:
    scene = parse_caption("a red circle above a white cross moves right quickly on a teal background")
    rng = np.random.default_rng(5)
    latent = sample_latent(scene, rng, width=96.0)
    found = detect(render(scene, latent, 128, 192, 17))
    assert is_read_right(scene, found)
    assert found.speed == pytest.approx(latent.speed[0], abs=0.02)


def test_detect_finds_nothing_where_nothing_is() -> None:
    for level in (0, 10, 72, 255):
        found = detect(np.full((25, 96, 96, 3), level, dtype=np.uint8))
        assert (found.count, found.motion, found.speed_word, found.relation) == (0, "none", None, None)


@pytest.mark.parametrize("seed", range(3))
def test_detect_survives_noise_quickly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (17, 8 << seed, 8 << seed, 3)).astype(np.uint8)
    clip = coarse.repeat(8 >> seed, axis=1).repeat(8 >> seed, axis=2)
    start = time.perf_counter()
    detect(clip)
    assert time.perf_counter() - start < 2.0


def test_detect_counts_an_object_that_dissolves_as_missing(examples: list) -> None:
    example = next(e for e in examples if e.scene.count == 2)
    clip = example.clip.copy()
    assert detect(clip).count == 2
    gone = replace(example.latent, radius=(0.01, example.latent.radius[1]))
    clip[5:] = render(example.scene, gone)[5:]
    assert detect(clip).count == 1


def test_detect_keeps_touching_objects_of_two_colours_apart() -> None:
    scene = parse_caption("a red square left of a blue square stays still on a gray background")
    latent = sample_latent(scene, np.random.default_rng(0))
    side = 0.9 * sum(latent.radius) + 0.2
    latent = replace(latent, start=((25.0, 30.0), (25.0 + side, 30.0)), growth=0.0)
    found = detect(render(scene, latent))
    assert sorted((t.colour, t.shape) for t in found.tracks) == [("blue", "square"), ("red", "square")]


def test_detect_reads_motions_that_differ() -> None:
    scene = parse_caption("a red circle moves left slowly and a white square moves up quickly on a black background")
    found = detect(sample_clip(scene, np.random.default_rng(1)))
    read = {track.colour: (track.motion, track.speed_word) for track in found.tracks}
    assert read == {"red": ("left", "slowly"), "white": ("up", "quickly")}
    assert (found.motion, found.speed_word) == ("mixed", "mixed")


def test_motion_of_names_directions_and_stillness() -> None:
    assert motion_of((0.0, -0.5)) == "up"
    assert motion_of((-0.5, 0.2)) == "left"
    assert motion_of((0.08, 0.08)) == "still"


def test_detect_refuses_other_arrays() -> None:
    with pytest.raises(ConfigError, match="uint8 clip"):
        detect(np.zeros((17, 64, 64, 3), dtype=np.float32))
    with pytest.raises(ConfigError, match="uint8 clip"):
        detect(np.zeros((64, 64, 3), dtype=np.uint8))


def test_detect_is_fast_enough_for_thousands_of_clips() -> None:
    rng = np.random.default_rng(6)
    clips = [sample_clip(parse_caption(c), rng) for c in ("a red ring moves up slowly on a navy background",) * 8]
    detect(clips[0])
    start = time.process_time()
    for clip in clips:
        detect(clip)
    # About 10 ms each on a free core; this only catches a loss of its vectorisation.
    assert (time.process_time() - start) / len(clips) < 0.2

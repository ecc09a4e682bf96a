"""Draws the roofline of one row: the machine's peak rates, and each stage below them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from codmd_serve.bench.units import rate

WIDTH, HEIGHT = 960, 600
LEFT, TOP, RIGHT, BOTTOM = 130, 60, 260, 80
INK, GRID, ROOF = (30, 30, 30), (225, 225, 225), (120, 120, 120)
# Told apart without colour by the shape of their marks.
MARKS = (("circle", (0, 90, 181)), ("square", (220, 50, 32)), ("triangle", (90, 90, 90)))


# (FLOP per byte, FLOP per second) -> x and y in pixels
Place = Callable[[float, float], tuple[float, float]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Point:
    """A stage of a contestant: its least FLOP per byte, and the FLOP per second it reached."""

    contestant: str
    stage: str
    flop_per_byte: float
    flop_per_s: float


def draw_roofline(path: Path, title: str, flop_per_s: float, bytes_per_s: float, points: Sequence[Point]) -> None:
    """Draw the roofline to a PNG.

    Args:
        path: of the file.
        title: over the picture.
        flop_per_s, bytes_per_s: ceilings of this machine, measured.
        points: at least one, of at most three contestants.
    """
    ridge = flop_per_s / bytes_per_s
    xs = [ridge, *(point.flop_per_byte for point in points)]
    ys = [flop_per_s, *(point.flop_per_s for point in points)]
    low_x, high_x = math.floor(math.log10(min(xs)) - 0.3), math.ceil(math.log10(max(xs)) + 0.3)
    low_y, high_y = math.floor(math.log10(min(ys)) - 0.1), math.ceil(math.log10(max(ys)) + 0.1)

    def place(flop_per_byte: float, reached: float) -> tuple[float, float]:
        x = (math.log10(flop_per_byte) - low_x) / (high_x - low_x)
        y = (math.log10(reached) - low_y) / (high_y - low_y)
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(14), ImageFont.load_default(18)
    for power in range(low_x, high_x + 1):
        x, _ = place(10.0**power, 10.0**low_y)
        draw.line([(x, TOP), (x, HEIGHT - BOTTOM)], GRID)
        draw.text((x, HEIGHT - BOTTOM + 8), f"{10.0**power:g}", INK, small, "ma")
    for power in range(low_y, high_y + 1):
        _, y = place(10.0**low_x, 10.0**power)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID)
        draw.text((LEFT - 8, y), rate(10.0**power), INK, small, "rm")
    start = max(10.0**low_x, 10.0**low_y / bytes_per_s)
    roof = [place(start, start * bytes_per_s), place(ridge, flop_per_s), place(10.0**high_x, flop_per_s)]
    draw.line(roof, ROOF, 3)
    draw.text((LEFT, 18), title, INK, large)
    draw.text(
        ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 30), "FLOP per byte of weights, inputs and outputs", INK, small, "ma"
    )
    _draw_points(draw, small, points, place)
    legend_y = HEIGHT - BOTTOM - 48
    for line in (f"matrix product {rate(flop_per_s)}", f"copy {bytes_per_s / 1e9:.3g} GB/s"):
        draw.text((WIDTH - RIGHT + 12, legend_y), line, ROOF, small)
        legend_y += 20
    image.save(path, optimize=True)


def _draw_points(draw: ImageDraw.ImageDraw, font: Font, points: Sequence[Point], place: Place) -> None:
    contestants = list(dict.fromkeys(point.contestant for point in points))
    for index, name in enumerate(contestants):
        legend = (WIDTH - RIGHT + 20, TOP + 12 + 24 * index)
        _mark(draw, legend, *MARKS[index])
        draw.text((legend[0] + 14, legend[1]), name, INK, font, "lm")
    for point in points:
        at = place(point.flop_per_byte, point.flop_per_s)
        index = contestants.index(point.contestant)
        _mark(draw, at, *MARKS[index])
        if index == 0:
            draw.text((at[0] + 10, at[1]), point.stage, INK, font, "lm")


def _mark(draw: ImageDraw.ImageDraw, at: tuple[float, float], shape: str, colour: tuple[int, int, int]) -> None:
    x, y = at
    if shape == "circle":
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], colour)
    elif shape == "square":
        draw.rectangle([x - 5, y - 5, x + 5, y + 5], colour)
    else:
        draw.polygon([(x - 6, y + 5), (x + 6, y + 5), (x, y - 7)], colour)

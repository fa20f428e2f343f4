"""Pictures of the demo: a scene is plain data, `draw` turns it into 96 x 96 pixels.

A scene holds marks (a shape with a colour, a place and a radius) or bars (a colour and a height each), never
both. Scenes are compared and hashed as data, so what a picture is does not depend on the version of Pillow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 96  # pixels of a stored picture
OVERSAMPLING = 4  # drawn larger, then averaged: smooth edges

COLORS = {
    "red": (214, 40, 40),
    "blue": (36, 72, 214),
    "green": (32, 150, 60),
    "yellow": (244, 206, 20),
    "black": (20, 20, 20),
    "pink": (246, 120, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
BACKGROUNDS = {"white": (255, 255, 255), "gray": (222, 222, 226), "sand": (246, 236, 214), "land": (214, 232, 206)}


@dataclass(frozen=True, slots=True)
class Mark:
    """One shape: centre and radius in pixels of the stored picture."""

    shape: str
    color: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart: height in pixels of the stored picture."""

    color: str
    height: int


@dataclass(frozen=True, slots=True)
class Scene:
    """What one picture shows."""

    background: str
    marks: tuple[Mark, ...] = ()
    bars: tuple[Bar, ...] = ()


def _outline(mark: Mark) -> list[tuple[float, float]]:
    """Corners of a shape that is not a circle, in pixels of the oversampled picture."""
    x, y, r = (value * OVERSAMPLING for value in (mark.x, mark.y, mark.radius))
    if mark.shape == "square":
        s = 0.88 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if mark.shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if mark.shape == "star":
        lengths = [1.1 * r if k % 2 == 0 else 0.45 * r for k in range(10)]
        angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
        return [(x + n * math.cos(a), y + n * math.sin(a)) for n, a in zip(lengths, angles, strict=True)]
    if mark.shape == "cross":
        a, b = r, 0.36 * r
        arm = [(b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a)]  # the right half; the left is its mirror image
        return [(x + dx, y + dy) for dx, dy in [*arm, *((-dx, dy) for dx, dy in reversed(arm))]]
    raise ValueError(f"unknown shape {mark.shape!r}: accepted are {', '.join(SHAPES)}")


def _draw_bars(canvas: ImageDraw.ImageDraw, bars: tuple[Bar, ...]) -> None:
    """Bars stand on a line near the lower edge, spread evenly over the width."""
    scale = OVERSAMPLING
    slot = (SIDE - 12) / len(bars)
    ground = SIDE - 8
    for place, bar in enumerate(bars):
        left = 6 + slot * (place + 0.14)
        right = 6 + slot * (place + 0.86)
        box = [left * scale, (ground - bar.height) * scale, right * scale, ground * scale]
        canvas.rectangle(box, fill=COLORS[bar.color])
    canvas.rectangle([4 * scale, ground * scale, (SIDE - 4) * scale, (ground + 2) * scale], fill=(90, 90, 90))


def draw(scene: Scene) -> Image.Image:
    """Draw a scene; returns an RGB picture of SIDE x SIDE pixels."""
    size = SIDE * OVERSAMPLING
    image = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    if scene.bars:
        _draw_bars(canvas, scene.bars)
    for mark in scene.marks:
        if mark.shape == "circle":
            x, y, r = (value * OVERSAMPLING for value in (mark.x, mark.y, mark.radius))
            canvas.ellipse([x - r, y - r, x + r, y + r], fill=COLORS[mark.color])
        else:
            canvas.polygon(_outline(mark), fill=COLORS[mark.color])
    return image.reduce(OVERSAMPLING)

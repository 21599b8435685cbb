"""Vector drawings of everyday objects, for generated scenes.

Every kind is drawn once, in a unit square (x to the right, y downwards), as a list of flat polygons. A call of `draw`
only moves those points and fills them, so it is fast, and an object can be turned without resampling a bitmap.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (218, 32, 36),
    "orange": (247, 136, 22),
    "yellow": (250, 218, 44),
    "green": (44, 160, 60),
    "blue": (38, 98, 218),
    "purple": (124, 48, 168),
    "pink": (252, 156, 200),
    "brown": (112, 66, 34),
}

# Tones made from the object's own colour: the colour they move towards, and how far.
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_MIXED_TONES: dict[str, tuple[Colour, float]] = {
    "main": (_BLACK, 0.0),
    "dark": (_BLACK, 0.17),
    "deep": (_BLACK, 0.58),
    "light": (_WHITE, 0.18),
    "shine": (_WHITE, 0.58),
}
# Tones that are the same on every object. They stay small: an object must have one obvious colour.
_FIXED_TONES: dict[str, Colour] = {
    "black": (28, 28, 32),
    "white": (250, 250, 246),
    "glass": (206, 230, 242),
    "beak": (240, 170, 40),
}

_EDGE = 0.026  # width of the outline around a part, in units of the square
_MAX_MITRE = 2.2  # longest corner of an outline, in widths of it
_MAX_SHADE = 0.15


class Pen:
    """Collects the polygons of one object, in drawing order; each part has a dark outline unless `edge` is off."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, str]] = []

    def polygon(self, points: Sequence[Point] | np.ndarray, tone: str = "main", *, edge: bool = True) -> None:
        """A filled polygon with straight sides."""
        corners = np.asarray(points, dtype=float)
        if edge:
            self.parts.append((_grown(corners, _EDGE), "deep"))
        self.parts.append((corners, tone))

    def blob(self, points: Sequence[Point], tone: str = "main", *, edge: bool = True) -> None:
        """A filled smooth closed curve through `points`."""
        self.polygon(_smooth(points, closed=True), tone, edge=edge)

    def ellipse(
        self,
        x: float,
        y: float,
        radius_x: float,
        radius_y: float,
        tone: str = "main",
        *,
        turn: float = 0.0,
        edge: bool = True,
    ) -> None:
        """A filled ellipse around (x, y), turned clockwise by `turn` degrees."""
        across, down = _arc_points(0.0, 0.0, radius_x, radius_y, 0.0, 360.0)[:-1].T
        cosine, sine = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        points = np.stack([x + across * cosine - down * sine, y + across * sine + down * cosine], axis=1)
        self.polygon(points, tone, edge=edge)

    def line(
        self,
        points: Sequence[Point] | np.ndarray,
        width: float,
        tone: str = "main",
        *,
        smooth: bool = False,
        edge: bool = True,
    ) -> None:
        """A stroke with round ends through `points`, bent smoothly where `smooth` is on."""
        path = _smooth(points, closed=False) if smooth else np.asarray(points, dtype=float)
        if edge:
            self.parts.append((_stroke(path, width / 2 + _EDGE), "deep"))
        self.parts.append((_stroke(path, width / 2), tone))

    def arc(
        self,
        x: float,
        y: float,
        radius: float,
        start: float,
        end: float,
        width: float,
        tone: str = "main",
        *,
        edge: bool = True,
    ) -> None:
        """A stroke along a circle, from `start` to `end` degrees, clockwise from the right."""
        self.line(_arc_points(x, y, radius, radius, start, end), width, tone, edge=edge)

    def ring(self, x: float, y: float, radius_x: float, radius_y: float, width: float, tone: str = "main") -> None:
        """A closed band along an ellipse; what is inside stays see-through."""
        for half, fill in ((width / 2 + _EDGE, "deep"), (width / 2, tone)):
            outer = _arc_points(x, y, radius_x + half, radius_y + half, 0.0, 360.0)
            inner = _arc_points(x, y, radius_x - half, radius_y - half, 360.0, 0.0)
            self.parts.append((np.concatenate([outer, inner]), fill))


def _arc_points(x: float, y: float, radius_x: float, radius_y: float, start: float, end: float) -> np.ndarray:
    steps = max(4, round(abs(end - start) * (0.05 + 0.05 * min(1.0, 3 * max(radius_x, radius_y)))))
    angles = np.radians(np.linspace(start, end, steps + 1))
    return np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)


def _smooth(points: Sequence[Point] | np.ndarray, closed: bool, steps: int = 6) -> np.ndarray:
    """A Catmull-Rom curve through the points."""
    knots = np.asarray(points, dtype=float)
    if closed:
        padded = np.concatenate([knots[-1:], knots, knots[:2]])
    else:
        padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    before, first, second, after = (padded[i : len(padded) - 3 + i, None, :] for i in range(4))
    t = (np.arange(steps) / steps)[None, :, None]
    curve = 0.5 * (
        2 * first
        + (second - before) * t
        + (2 * before - 5 * first + 4 * second - after) * t**2
        + (3 * first - before - 3 * second + after) * t**3
    )
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, knots[-1:]])


def _corner_offsets(normal_in: np.ndarray, normal_out: np.ndarray) -> np.ndarray:
    """Where a corner goes when both its sides move out by one; long spikes are cut short."""
    both = normal_in + normal_out
    offset = 2 * both / np.maximum((both**2).sum(axis=1, keepdims=True), 1e-6)
    length = np.linalg.norm(offset, axis=1, keepdims=True)
    shortened: np.ndarray = offset * np.minimum(1.0, _MAX_MITRE / np.maximum(length, 1e-6))
    return shortened


def _normals(sides: np.ndarray) -> np.ndarray:
    turned = np.stack([sides[:, 1], -sides[:, 0]], axis=1)
    normals: np.ndarray = turned / np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-9)
    return normals


def _grown(points: np.ndarray, width: float) -> np.ndarray:
    """The polygon with every side moved outwards by `width`."""
    following = np.roll(points, -1, axis=0)
    area = (points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum()
    normals = _normals(following - points) * (1.0 if area > 0 else -1.0)
    return points + width * _corner_offsets(np.roll(normals, 1, axis=0), normals)


def _stroke(path: np.ndarray, half: float) -> np.ndarray:
    """The polygon around a path, `half` wide on either side, with round ends."""
    normals = _normals(np.diff(path, axis=0))
    offsets = half * _corner_offsets(np.concatenate([normals[:1], normals]), np.concatenate([normals, normals[-1:]]))
    caps = []
    for (x, y), (normal_x, normal_y) in ((path[-1], normals[-1]), (path[0], -normals[0])):
        begin = math.degrees(math.atan2(normal_y, normal_x))
        caps.append(_arc_points(x, y, half, half, begin, begin + 180.0))
    return np.concatenate([path + offsets, caps[0], (path - offsets)[::-1], caps[1]])


_DRAWINGS: dict[str, Callable[[Pen], None]] = {}


def _drawing(function: Callable[[Pen], None]) -> Callable[[Pen], None]:
    """Registers a function as the drawing of the kind it is named after."""
    _DRAWINGS[function.__name__.strip("_")] = function
    return function


@_drawing
def _apple(pen: Pen) -> None:
    pen.line([(0.50, 0.26), (0.52, 0.14), (0.58, 0.04)], 0.05, "deep", smooth=True, edge=False)
    pen.blob([(0.50, 0.26), (0.32, 0.19), (0.12, 0.28), (0.05, 0.52), (0.15, 0.80), (0.34, 0.97), (0.50, 0.93),
              (0.66, 0.97), (0.85, 0.80), (0.95, 0.52), (0.88, 0.28), (0.68, 0.19)])  # fmt: skip
    pen.blob([(0.56, 0.17), (0.66, 0.03), (0.88, 0.02), (0.78, 0.15)], "dark")
    pen.ellipse(0.25, 0.44, 0.06, 0.13, "shine", turn=20, edge=False)


@_drawing
def _banana(pen: Pen) -> None:
    pen.blob([(0.86, 0.06), (0.97, 0.36), (0.86, 0.70), (0.58, 0.92), (0.24, 0.94), (0.03, 0.82), (0.05, 0.74),
              (0.30, 0.74), (0.54, 0.62), (0.70, 0.40), (0.74, 0.10)])  # fmt: skip
    pen.line(
        [(0.88, 0.26), (0.82, 0.56), (0.62, 0.78), (0.32, 0.86), (0.14, 0.82)], 0.05, "dark", smooth=True, edge=False
    )
    pen.line([(0.80, 0.09), (0.79, 0.00)], 0.09, "deep", edge=False)
    pen.ellipse(0.05, 0.78, 0.04, 0.05, "deep", edge=False)


@_drawing
def _bell(pen: Pen) -> None:
    pen.ring(0.50, 0.10, 0.08, 0.07, 0.05, "dark")
    pen.ellipse(0.50, 0.88, 0.12, 0.11, "dark")
    pen.blob([(0.50, 0.15), (0.66, 0.20), (0.75, 0.36), (0.78, 0.58), (0.90, 0.78), (0.88, 0.84), (0.50, 0.85),
              (0.12, 0.84), (0.10, 0.78), (0.22, 0.58), (0.25, 0.36), (0.34, 0.20)])  # fmt: skip
    pen.line([(0.13, 0.78), (0.87, 0.78)], 0.07, "dark", edge=False)
    pen.line([(0.37, 0.32), (0.35, 0.46), (0.31, 0.62)], 0.07, "shine", smooth=True, edge=False)


@_drawing
def _bird(pen: Pen) -> None:
    for foot in (0.46, 0.58):
        pen.line([(foot, 0.78), (foot, 0.96), (foot + 0.09, 0.96)], 0.045, "beak", edge=False)
    pen.polygon([(0.84, 0.20), (1.02, 0.29), (0.84, 0.36)], "beak")
    pen.blob([(0.72, 0.10), (0.86, 0.17), (0.88, 0.34), (0.82, 0.56), (0.66, 0.77), (0.44, 0.82), (0.26, 0.72),
              (0.14, 0.56), (-0.02, 0.42), (0.04, 0.36), (0.26, 0.42), (0.46, 0.42),
              (0.57, 0.32), (0.60, 0.17)])  # fmt: skip
    pen.blob([(0.60, 0.46), (0.62, 0.60), (0.48, 0.68), (0.32, 0.64), (0.16, 0.50), (0.38, 0.48)], "dark")
    pen.ellipse(0.75, 0.25, 0.06, 0.06, "white", edge=False)
    pen.ellipse(0.765, 0.25, 0.035, 0.035, "black", edge=False)


@_drawing
def _boat(pen: Pen) -> None:
    pen.line([(0.48, 0.02), (0.48, 0.72)], 0.045, "deep", edge=False)
    pen.polygon([(0.55, 0.06), (0.92, 0.60), (0.55, 0.62)])
    pen.polygon([(0.41, 0.16), (0.41, 0.62), (0.10, 0.60)], "light")
    pen.polygon([(0.00, 0.70), (1.00, 0.70), (0.84, 0.92), (0.78, 0.96), (0.24, 0.96), (0.16, 0.92)])
    pen.polygon([(0.06, 0.78), (0.94, 0.78), (0.90, 0.84), (0.11, 0.84)], "dark", edge=False)


@_drawing
def _book(pen: Pen) -> None:
    pen.polygon([(0.14, 0.02), (0.86, 0.02), (0.86, 0.98), (0.20, 0.98), (0.12, 0.92), (0.10, 0.08)], "dark")
    pen.polygon([(0.20, 0.86), (0.82, 0.86), (0.82, 0.94), (0.20, 0.94)], "white")
    pen.polygon([(0.14, 0.02), (0.86, 0.02), (0.86, 0.84), (0.20, 0.84), (0.12, 0.90), (0.10, 0.08)])
    pen.polygon([(0.10, 0.05), (0.22, 0.02), (0.22, 0.84), (0.12, 0.90)], "dark", edge=False)
    pen.line([(0.38, 0.24), (0.72, 0.24)], 0.07, "shine", edge=False)
    pen.line([(0.44, 0.40), (0.66, 0.40)], 0.05, "shine", edge=False)


@_drawing
def _bottle(pen: Pen) -> None:
    pen.blob([(0.43, 0.10), (0.57, 0.10), (0.58, 0.28), (0.66, 0.38), (0.71, 0.50), (0.71, 0.90), (0.66, 0.98),
              (0.34, 0.98), (0.29, 0.90), (0.29, 0.50), (0.34, 0.38), (0.42, 0.28)])  # fmt: skip
    pen.polygon([(0.41, 0.01), (0.59, 0.01), (0.59, 0.12), (0.41, 0.12)], "dark")
    pen.polygon([(0.285, 0.58), (0.715, 0.58), (0.715, 0.80), (0.285, 0.80)], "shine", edge=False)
    pen.line([(0.38, 0.46), (0.43, 0.37)], 0.045, "shine", edge=False)


@_drawing
def _car(pen: Pen) -> None:
    pen.blob([(0.20, 0.46), (0.28, 0.27), (0.36, 0.21), (0.62, 0.21), (0.70, 0.27), (0.80, 0.46)])
    pen.polygon([(0.02, 0.48), (0.08, 0.43), (0.82, 0.43), (0.95, 0.48), (1.00, 0.56), (1.00, 0.72), (0.00, 0.72),
                 (0.00, 0.54)])  # fmt: skip
    pen.polygon([(0.31, 0.41), (0.36, 0.28), (0.45, 0.28), (0.45, 0.41)], "glass", edge=False)
    pen.polygon([(0.53, 0.41), (0.53, 0.28), (0.62, 0.28), (0.68, 0.41)], "glass", edge=False)
    pen.line([(0.03, 0.65), (0.97, 0.65)], 0.05, "dark", edge=False)
    for wheel in (0.23, 0.77):
        pen.ellipse(wheel, 0.72, 0.11, 0.11, "black", edge=False)
        pen.ellipse(wheel, 0.72, 0.055, 0.055, "shine", edge=False)


@_drawing
def _chair(pen: Pen) -> None:
    for top, foot in (((0.34, 0.58), (0.38, 0.92)), ((0.70, 0.58), (0.68, 0.92))):
        pen.line([top, foot], 0.06, "dark")
    for top, foot in (((0.20, 0.58), (0.14, 0.97)), ((0.84, 0.58), (0.88, 0.97))):
        pen.line([top, foot], 0.075)
    pen.polygon([(0.10, 0.02), (0.24, 0.02), (0.30, 0.56), (0.16, 0.56)])
    pen.polygon([(0.14, 0.50), (0.88, 0.50), (0.92, 0.63), (0.14, 0.63)])
    pen.line([(0.18, 0.08), (0.22, 0.44)], 0.035, "light", edge=False)


@_drawing
def _clock(pen: Pen) -> None:
    for side in (-1, 1):
        pen.line([(0.50 + side * 0.22, 0.80), (0.50 + side * 0.34, 0.97)], 0.07, "dark")
        pen.ellipse(0.50 + side * 0.30, 0.15, 0.17, 0.11, "dark", turn=side * 40)
    pen.ellipse(0.50, 0.55, 0.41, 0.41)
    pen.ring(0.50, 0.55, 0.36, 0.36, 0.035, "dark")
    for hour in range(0, 360, 90):
        across, down = math.cos(math.radians(hour)), math.sin(math.radians(hour))
        pen.line([(0.50 + 0.25 * across, 0.55 + 0.25 * down), (0.50 + 0.27 * across, 0.55 + 0.27 * down)], 0.055,
                 "white", edge=False)  # fmt: skip
    pen.line([(0.50, 0.32), (0.50, 0.55), (0.66, 0.64)], 0.06, "black", edge=False)


@_drawing
def _cup(pen: Pen) -> None:
    pen.ring(0.76, 0.52, 0.17, 0.17, 0.075)
    pen.blob([(0.05, 0.20), (0.77, 0.20), (0.76, 0.55), (0.70, 0.82), (0.58, 0.92), (0.24, 0.92), (0.12, 0.82),
              (0.06, 0.55)])  # fmt: skip
    pen.ellipse(0.41, 0.20, 0.37, 0.10, "light")
    pen.ellipse(0.41, 0.22, 0.28, 0.06, "deep", edge=False)
    pen.line([(0.15, 0.42), (0.18, 0.64), (0.23, 0.76)], 0.06, "shine", smooth=True, edge=False)


@_drawing
def _fish(pen: Pen) -> None:
    pen.polygon([(0.34, 0.32), (0.48, 0.08), (0.70, 0.26)], "dark")
    pen.polygon([(0.42, 0.74), (0.46, 0.92), (0.62, 0.74)], "dark")
    pen.polygon([(0.28, 0.50), (0.00, 0.22), (0.07, 0.50), (0.00, 0.78)], "dark")
    pen.blob([(0.99, 0.52), (0.84, 0.32), (0.60, 0.22), (0.36, 0.32), (0.19, 0.50), (0.36, 0.68), (0.60, 0.78),
              (0.84, 0.70)])  # fmt: skip
    pen.arc(0.58, 0.50, 0.17, -55, 55, 0.04, "dark", edge=False)
    pen.ellipse(0.86, 0.45, 0.055, 0.055, "white", edge=False)
    pen.ellipse(0.87, 0.45, 0.034, 0.034, "black", edge=False)
    pen.line([(0.40, 0.40), (0.56, 0.31)], 0.05, "shine", edge=False)


@_drawing
def _flower(pen: Pen) -> None:
    pen.line([(0.50, 0.50), (0.50, 0.98)], 0.05, "dark")
    pen.blob([(0.51, 0.92), (0.62, 0.74), (0.86, 0.72), (0.76, 0.88)], "dark")
    for petal in range(6):
        turn = 60 * petal
        across, down = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        pen.ellipse(0.50 + 0.225 * across, 0.36 + 0.225 * down, 0.155, 0.125, turn=turn)
    pen.ellipse(0.50, 0.36, 0.115, 0.115, "white")


@_drawing
def _hammer(pen: Pen) -> None:
    pen.line([(0.06, 0.94), (0.60, 0.40)], 0.12, "light")
    pen.line([(0.06, 0.94), (0.26, 0.74)], 0.14)
    pen.blob([(0.50, 0.10), (0.58, 0.14), (0.74, 0.24), (0.86, 0.36), (0.70, 0.52), (0.56, 0.44), (0.44, 0.32),
              (0.28, 0.26), (0.26, 0.20), (0.38, 0.12)])  # fmt: skip
    pen.polygon([(0.84, 0.26), (1.02, 0.44), (0.80, 0.66), (0.62, 0.48)])
    pen.line([(0.42, 0.19), (0.64, 0.29)], 0.05, "shine", edge=False)


@_drawing
def _hat(pen: Pen) -> None:
    pen.blob([(0.00, 0.68), (0.08, 0.66), (0.26, 0.76), (0.50, 0.79), (0.74, 0.76), (0.92, 0.66), (1.00, 0.68),
              (0.92, 0.84), (0.70, 0.92), (0.50, 0.94), (0.30, 0.92), (0.08, 0.84)])  # fmt: skip
    pen.polygon([(0.20, 0.14), (0.50, 0.18), (0.80, 0.14), (0.75, 0.78), (0.50, 0.82), (0.25, 0.78)])
    pen.ellipse(0.50, 0.15, 0.30, 0.055, "light")
    pen.polygon(
        [(0.235, 0.57), (0.50, 0.61), (0.765, 0.57), (0.75, 0.76), (0.50, 0.80), (0.25, 0.76)], "deep", edge=False
    )
    pen.line([(0.31, 0.28), (0.33, 0.48)], 0.06, "shine", edge=False)


@_drawing
def _house(pen: Pen) -> None:
    pen.polygon([(0.70, 0.06), (0.82, 0.06), (0.82, 0.40), (0.70, 0.40)], "dark")
    pen.polygon([(0.12, 0.46), (0.88, 0.46), (0.88, 0.98), (0.12, 0.98)])
    pen.polygon([(0.50, 0.04), (1.00, 0.50), (0.00, 0.50)], "dark")
    pen.polygon([(0.24, 0.64), (0.44, 0.64), (0.44, 0.82), (0.24, 0.82)], "glass")
    pen.polygon([(0.58, 0.62), (0.78, 0.62), (0.78, 0.98), (0.58, 0.98)], "deep", edge=False)


@_drawing
def _key(pen: Pen) -> None:
    pen.line([(0.38, 0.38), (0.94, 0.94)], 0.10)
    for bit in (0.70, 0.86):
        pen.line([(bit, bit), (bit + 0.12, bit - 0.12)], 0.09)
    pen.line([(0.40, 0.40), (0.94, 0.94)], 0.10, edge=False)
    pen.ring(0.23, 0.23, 0.18, 0.18, 0.12)
    pen.arc(0.23, 0.23, 0.18, 170, 250, 0.045, "shine", edge=False)


@_drawing
def _lamp(pen: Pen) -> None:
    pen.line([(0.50, 0.50), (0.50, 0.90)], 0.07, "dark")
    pen.blob([(0.26, 0.97), (0.28, 0.90), (0.50, 0.84), (0.72, 0.90), (0.74, 0.97), (0.50, 0.98)])
    pen.line([(0.70, 0.50), (0.70, 0.68)], 0.025, "deep", edge=False)
    pen.polygon([(0.32, 0.02), (0.68, 0.02), (0.92, 0.54), (0.08, 0.54)])
    pen.polygon([(0.115, 0.47), (0.885, 0.47), (0.92, 0.54), (0.08, 0.54)], "dark", edge=False)
    pen.polygon([(0.37, 0.07), (0.45, 0.07), (0.36, 0.42), (0.22, 0.42)], "shine", edge=False)


@_drawing
def _leaf(pen: Pen) -> None:
    pen.line([(0.04, 0.97), (0.20, 0.80)], 0.06, "deep", edge=False)
    pen.polygon(np.concatenate([
        _smooth([(0.98, 0.02), (0.56, 0.08), (0.22, 0.30), (0.12, 0.60), (0.18, 0.82)], closed=False),
        _smooth([(0.18, 0.82), (0.40, 0.88), (0.70, 0.78), (0.92, 0.44), (0.98, 0.02)], closed=False)[1:-1],
    ]))  # fmt: skip
    pen.line([(0.18, 0.82), (0.50, 0.48), (0.86, 0.14)], 0.045, "deep", edge=False)
    for x, y in ((0.36, 0.63), (0.54, 0.44), (0.70, 0.29)):
        pen.line([(x, y), (x - 0.05, y - 0.18)], 0.03, "deep", edge=False)
        pen.line([(x, y), (x + 0.18, y + 0.05)], 0.03, "deep", edge=False)


@_drawing
def _mushroom(pen: Pen) -> None:
    pen.blob([(0.38, 0.50), (0.62, 0.50), (0.63, 0.74), (0.70, 0.92), (0.62, 0.98), (0.38, 0.98), (0.30, 0.92),
              (0.37, 0.74)], "light")  # fmt: skip
    pen.blob([(0.50, 0.03), (0.76, 0.10), (0.94, 0.32), (0.99, 0.52), (0.92, 0.58), (0.70, 0.60), (0.50, 0.61),
              (0.30, 0.60), (0.08, 0.58), (0.01, 0.52), (0.06, 0.32), (0.24, 0.10)])  # fmt: skip
    for x, y, radius in ((0.50, 0.22, 0.10), (0.22, 0.39, 0.075), (0.78, 0.39, 0.075)):
        pen.ellipse(x, y, radius, radius, "white", edge=False)
    pen.ellipse(0.50, 0.48, 0.055, 0.05, "white", edge=False)


@_drawing
def _scissors(pen: Pen) -> None:
    pen.polygon([(0.76, 0.00), (0.78, 0.10), (0.48, 0.66), (0.38, 0.60)], "light")
    pen.polygon([(0.24, 0.00), (0.22, 0.10), (0.52, 0.66), (0.62, 0.60)], "light")
    for side in (-1, 1):
        pen.line([(0.50 + side * 0.04, 0.60), (0.50 + side * 0.14, 0.70)], 0.09)
        pen.ring(0.50 + side * 0.23, 0.81, 0.14, 0.14, 0.10)
    pen.ellipse(0.50, 0.52, 0.035, 0.035, "deep", edge=False)


@_drawing
def _star(pen: Pen) -> None:
    tips = [math.radians(36 * i - 90) for i in range(10)]
    points = [(0.50 + r * math.cos(a), 0.52 + r * math.sin(a)) for a, r in zip(tips, [0.5, 0.215] * 5, strict=True)]
    pen.polygon(points)
    for tip in range(0, 10, 2):
        pen.polygon([(0.50, 0.52), points[tip], points[(tip + 1) % 10]], "light" if tip == 8 else "dark", edge=False)


@_drawing
def _tree(pen: Pen) -> None:
    pen.polygon([(0.43, 0.78), (0.57, 0.78), (0.57, 0.99), (0.43, 0.99)], "deep", edge=False)
    for top, bottom, half in ((0.42, 0.84, 0.40), (0.22, 0.60, 0.31), (0.02, 0.36, 0.22)):
        pen.polygon([(0.50, top), (0.50 + half, bottom), (0.50 - half, bottom)])
        pen.polygon([(0.50, top + 0.05), (0.50 + half, bottom), (0.50 + half / 3, bottom)], "dark", edge=False)


@_drawing
def _umbrella(pen: Pen) -> None:
    hook = _arc_points(0.60, 0.86, 0.10, 0.10, 180.0, 0.0)
    pen.line(np.concatenate([[(0.50, 0.04)], hook]), 0.045, "dark")
    scallops = [_arc_points(x, 0.52, 1 / 6, 0.09, 0.0, -180.0) for x in (5 / 6, 3 / 6, 1 / 6)]
    pen.polygon(np.concatenate([_arc_points(0.50, 0.52, 0.50, 0.44, 180.0, 360.0), *scallops]))
    pen.line([(0.34, 0.44), (0.40, 0.22), (0.50, 0.09)], 0.03, "dark", smooth=True, edge=False)
    pen.line([(0.66, 0.44), (0.60, 0.22), (0.50, 0.09)], 0.03, "dark", smooth=True, edge=False)
    pen.line([(0.13, 0.38), (0.20, 0.25), (0.29, 0.17)], 0.05, "shine", smooth=True, edge=False)


KINDS: tuple[str, ...] = tuple(sorted(_DRAWINGS))


class _Plan(NamedTuple):
    """The polygons of a kind, with all their points in one array so that they are moved together."""

    points: np.ndarray
    parts: list[tuple[int, int, str]]  # where a part's coordinates start and end in the flat list, and its tone


@cache
def _plan(kind: str) -> _Plan:
    pen = Pen()
    _DRAWINGS[kind](pen)
    ends = np.cumsum([2 * len(points) for points, _ in pen.parts]).tolist()
    parts = [(end - 2 * len(points), end, tone) for end, (points, tone) in zip(ends, pen.parts, strict=True)]
    return _Plan(np.concatenate([points for points, _ in pen.parts]), parts)


def _mix(colour: Colour, towards: Colour, amount: float) -> Colour:
    red, green, blue = (round(a + (b - a) * amount) for a, b in zip(colour, towards, strict=True))
    return red, green, blue


@lru_cache(maxsize=4096)
def _tones(colour: Colour, shade: float) -> dict[str, Colour]:
    shaded = _mix(colour, _WHITE if shade > 0 else _BLACK, _MAX_SHADE * min(1.0, abs(shade)))
    return _FIXED_TONES | {name: _mix(shaded, towards, amount) for name, (towards, amount) in _MIXED_TONES.items()}


def draw(
    kind: str,
    colour: Colour,
    size: int,
    *,
    angle: float = 0.0,
    stretch: float = 1.0,
    shade: float = 0.0,
    flip: bool = False,
) -> Image.Image:
    """Draws an object as an RGBA picture, cropped to what is not transparent.

    Args:
        kind: One of `KINDS`.
        colour: The colour of most of the object, as in `COLOURS`.
        size: Larger side of the picture in pixels.
        angle: Degrees by which the object is turned clockwise.
        stretch: Factor of its width over its height, before it is turned.
        shade: From -1 (a little darker) to 1 (a little lighter).
        flip: Whether the object is mirrored left to right, before it is turned.
    """
    if kind not in _DRAWINGS:
        raise ValueError(f"unknown kind {kind!r}, the kinds are {', '.join(KINDS)}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
    plan = _plan(kind)
    across = -stretch if flip else stretch
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = plan.points @ np.array([[across * cosine, across * sine], [-sine, cosine]])
    low = points.min(axis=0)
    extent = points.max(axis=0) - low

    # Drawn larger and reduced, for smooth edges. Pillow also fills the pixel that a polygon ends on: one less.
    factor = 4 if size <= 40 else 3 if size <= 128 else 2
    scale = (size * factor - 1) / extent.max()
    flat = ((points - low) * scale).ravel().tolist()
    width, height = (math.ceil((side * scale + 1) / factor - 1e-6) * factor for side in extent.tolist())
    tones = _tones(colour, shade)
    picture = Image.new("RGBA", (width, height))
    canvas = ImageDraw.Draw(picture)
    for start, end, tone in plan.parts:
        canvas.polygon(flat[start:end], fill=tones[tone])
    picture = picture.reduce(factor)
    box = picture.getbbox()
    return picture if box == (0, 0, *picture.size) else picture.crop(box)

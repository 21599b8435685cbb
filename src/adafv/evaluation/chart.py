"""Charts as SVG: lines against a budget, and values with their intervals. Readable in light and in dark, and on a phone.

An SVG is text, so that results can be compared line by line, it needs no package to be drawn, and it follows the reader's
colour scheme by itself. Text in it comes from users (names of methods, classes of objects): it is escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH = 660
"""Of every chart, in units of its own; it scales with the page."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 66, 58
_SIZE = 14
"""Of letters."""
_LINE = 17
"""Between two labels, one above the other."""
_DASHES = ("", "7 4", "2 3")
"""Where there are more lines than colours."""

_LIGHT = ("#0b62b8", "#c2410c", "#15803d", "#9333ea", "#be123c", "#0e7490", "#a16207", "#4d4d57")
_DARK = ("#6cb4ff", "#ff9b5e", "#5fd38a", "#c79bff", "#ff8095", "#5fd0e6", "#e6c04d", "#b4b4c0")
"""Colours that can be told apart, in both schemes at least 4.5 to 1 against the paper; and a grey one."""
_COLOURS = len(_LIGHT) - 1


def _style() -> str:
    def scheme(colours: Sequence[str], paper: str, ink: str, pale: str, grid: str) -> str:
        named = "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))
        return f"svg{{--paper:{paper};--ink:{ink};--pale:{pale};--grid:{grid};{named}}}"

    light = scheme(_LIGHT, "#ffffff", "#18181b", "#5b5f6b", "#e2e3e8")
    dark = scheme(_DARK, "#16181d", "#f1f1f4", "#a6abb8", "#343843")
    return (
        f"{light}@media(prefers-color-scheme:dark){{{dark}}}"
        f"text{{font:{_SIZE}px system-ui,-apple-system,'Segoe UI',sans-serif;fill:var(--ink)}}"
        ".title{font-size:17px;font-weight:600}.pale{fill:var(--pale)}.grid{stroke:var(--grid)}"
        ".head{font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:5px}"
        ".axis{stroke:var(--pale)}.middle{text-anchor:middle}.end{text-anchor:end}"
    )


_STYLE = _style()


@dataclass(frozen=True)
class Point:
    """One measured value."""

    x: float
    y: float
    half: float | None = None
    """Half the width of its interval; None: it is not drawn."""


@dataclass(frozen=True)
class Line:
    """What was measured at several places."""

    name: str
    points: Sequence[Point]
    strong: bool = False
    """Drawn thicker, and on top."""
    band: bool = False
    """Whether intervals are a band, in place of bars."""
    grey: bool = False
    """Of what others are held against, such as chance."""


@dataclass(frozen=True)
class Level:
    """A value that does not depend on what is on the x axis: a dashed line across."""

    name: str
    y: float


@dataclass(frozen=True)
class Value:
    """One value in a row of `value_chart`."""

    series: str
    value: float
    half: float | None = None


def line_chart(
    title: str,
    subtitle: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]],
    levels: Sequence[Level] = (),
    y_range: tuple[float, float] | None = None,
    log: bool = True,
    falling: bool = False,
) -> str:
    """One line a series, its name at its right end.

    Args:
        x_ticks: (place, label) of the marks on the x axis, in the units of `Point.x`.
        y_range: lowest and highest value shown. None: what the values need.
        log: whether the x axis is logarithmic; then every x is above 0.
        falling: whether the smallest x is on the right, with the names: where lines are told apart is where they differ.
    """
    place = math.log if log else float
    names = [line.name for line in lines] + [level.name for level in levels]
    right = _RIGHT + 14 + max((_length(name) for name in names), default=0.0)
    height = max(420, _TOP + _BOTTOM + _LINE * (len(names) + 1))
    xs = [place(tick) for tick, _ in x_ticks] + [place(point.x) for line in lines for point in line.points]
    low, high = y_range or _range(lines, levels)
    across = _Scale(min(xs), max(xs), _LEFT + 14, WIDTH - right - 14)
    if falling:
        across = _Scale(min(xs), max(xs), across.last, across.first)
    down = _Scale(low, high, height - _BOTTOM, _TOP)

    parts = [*_frame(down, y_label, WIDTH - right)]
    for tick, label in x_ticks:
        x = across(place(tick))
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{height - _BOTTOM}" y2="{height - _BOTTOM + 5}"/>'
        )
        parts.append(f'<text class="pale middle" x="{x:.1f}" y="{height - _BOTTOM + 19}">{escape(label)}</text>')
    middle = (_LEFT + WIDTH - right) / 2
    parts.append(f'<text class="pale middle" x="{middle:.1f}" y="{height - 12}">{escape(x_label)}</text>')
    ends: list[_End] = []
    for level in levels:
        y = down(level.y)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--pale)" stroke-dasharray="3 3"/>'
        )
        ends.append(_End(y, WIDTH - right, level.name, "var(--pale)", ""))
    for number, line in sorted(enumerate(lines), key=lambda each: each[1].strong):
        points = [(across(place(point.x)), down(point.y)) for point in line.points]
        colour, dash = f"var(--c{number % _COLOURS})", _DASHES[number // _COLOURS % len(_DASHES)]
        if line.grey:
            colour, dash = f"var(--c{_COLOURS})", _DASHES[0]
        parts += _intervals(line, points, down, colour)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        width = 3 if line.strong else 1.6
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        stroke = f'stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"{dashed}'
        parts.append(f'<polyline fill="none" {stroke} points="{path}"/>')
        if len(points) <= 12:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 1:g}" fill="{colour}"/>' for x, y in points]
        x, y = max(points)
        ends.append(_End(y, x, line.name, colour, dash))
    parts += _labels(ends, WIDTH - right + 14, _TOP, height - _BOTTOM)
    return _drawing(title, subtitle, height, parts)


def value_chart(
    title: str,
    subtitle: str,
    groups: Sequence[tuple[str, Sequence[Value]]],
    *,
    x_label: str,
    reference: float | None = None,
    x_range: tuple[float, float] | None = None,
) -> str:
    """Values with their intervals as dots, one row each, in groups with a heading; a series has one colour throughout.

    Args:
        reference: a value that has a meaning of its own, such as chance: a dashed line.
    """
    values = [value for _, row in groups for value in row]
    series = list(dict.fromkeys(value.series for value in values))
    left = 22 + max((_length(name) for name in series), default=0.0)
    height = _TOP + _BOTTOM + sum(_LINE * 1.3 * len(row) + 30 for _, row in groups)
    ends = [edge for value in values for edge in (value.value - (value.half or 0), value.value + (value.half or 0))]
    ends += [] if reference is None else [reference]
    low, high = x_range or (min(ends), max(ends))
    pad = 0.0 if x_range else 0.04 * (high - low or 1)
    across = _Scale(low - pad, high + pad, left, WIDTH - 124)
    parts = []
    for tick in _ticks(low - pad, high + pad):
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM:.1f}"/>')
        parts.append(
            f'<text class="pale middle" x="{x:.1f}" y="{height - _BOTTOM + 18:.1f}">{_number(tick, high - low)}</text>'
        )
    if reference is not None:
        x = across(reference)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM:.1f}" stroke="var(--pale)" '
            'stroke-width="1.5" stroke-dasharray="4 3"/>'
        )
    y = float(_TOP)
    for heading, row in groups:
        y += 20
        parts.append(f'<text class="head" x="14" y="{y:.1f}">{escape(heading)}</text>')
        y += 4
        for value in row:
            y += _LINE * 1.3
            colour = f"var(--c{series.index(value.series) % len(_LIGHT)})"
            x, half = across(value.value), value.half or 0.0
            name, middle = escape(value.series), y - 4.5
            parts.append(f'<text class="pale end" x="{left - 10:.1f}" y="{y:.1f}">{name}</text>')
            parts.append(
                f'<line x1="{across(value.value - half):.1f}" x2="{across(value.value + half):.1f}" y1="{middle:.1f}" '
                f'y2="{middle:.1f}" stroke="{colour}" stroke-width="2"/>'
            )
            parts.append(f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="4.5" fill="{colour}"/>')
            said = _number(value.value, (high - low) / 10)
            said += f" ± {_number(value.half, (high - low) / 10)}" if value.half is not None else ""
            parts.append(f'<text class="end" x="{WIDTH - 14}" y="{y:.1f}">{said}</text>')
        y += 6
    middle = (left + WIDTH - 124) / 2
    parts.append(f'<text class="pale middle" x="{middle:.1f}" y="{height - 12:.1f}">{escape(x_label)}</text>')
    return _drawing(title, subtitle, height, parts)


@dataclass(frozen=True)
class _Scale:
    """Values to places."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.first + share * (self.last - self.first)


def _range(lines: Sequence[Line], levels: Sequence[Level]) -> tuple[float, float]:
    """What is to be seen: all points, all levels, and the intervals that are drawn."""
    values = [level.y for level in levels]
    for line in lines:
        for point in line.points:
            values += [point.y - (point.half or 0.0), point.y + (point.half or 0.0)]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low or 1.0)
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(step * factor for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if (high - low) / (step * factor) <= 8)
    return [count * step for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float, spread: float) -> str:
    """As many digits as tell values apart that lie within `spread`."""
    digits = max(0, 1 - math.floor(math.log10(spread))) if spread > 0 else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text and spread > 0.05 else text


def _frame(down: _Scale, label: str, right: float) -> list[str]:
    parts = []
    for tick in _ticks(down.low, down.high):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="pale end" x="{_LEFT - 7}" y="{y + 4.5:.1f}">{_number(tick, down.high - down.low)}</text>'
        )
    middle = (down.first + down.last) / 2
    parts.append(
        f'<text class="pale middle" transform="translate(15 {middle:.1f}) rotate(-90)" x="0" y="0">{escape(label)}</text>'
    )
    return parts


def _intervals(line: Line, points: list[tuple[float, float]], down: _Scale, colour: str) -> list[str]:
    halves = [point.half for point in line.points]
    if all(half is None for half in halves):
        return []
    edges = [(down(p.y + (p.half or 0.0)), down(p.y - (p.half or 0.0))) for p in line.points]
    if line.band:
        there = [f"{x:.1f},{top:.1f}" for (x, _), (top, _) in zip(points, edges, strict=True)]
        back = [f"{x:.1f},{low:.1f}" for (x, _), (_, low) in zip(points, edges, strict=True)]
        return [f'<polygon fill="{colour}" opacity="0.16" points="{" ".join([*there, *reversed(back)])}"/>']
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{low:.1f}" stroke="{colour}" stroke-width="1.3" opacity="0.7"/>'
        for (x, _), (top, low) in zip(points, edges, strict=True)
    ]


class _End(NamedTuple):
    """Where a line ends, and what stands beside it."""

    y: float
    x: float
    name: str
    colour: str
    dash: str


def _labels(ends: list[_End], x: float, top: float, bottom: float) -> list[str]:
    """Names beside the ends of lines, moved apart where they would lie on one another, with a thread to their end."""
    ends = sorted(ends)
    places = [end.y for end in ends]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + _LINE)
    if places and places[-1] > bottom:
        places[-1] = bottom
    for number in range(len(places) - 2, -1, -1):
        places[number] = min(places[number], places[number + 1] - _LINE)
    parts = []
    for place, end in zip(places, ends, strict=True):
        dashed = f' stroke-dasharray="{end.dash}"' if end.dash else ""
        thread = f"{end.x + 5:.1f},{end.y:.1f} {x - 3:.1f},{place:.1f}"
        parts.append(f'<polyline fill="none" stroke="{end.colour}" opacity="0.6"{dashed} points="{thread}"/>')
        parts.append(f'<text x="{x:.1f}" y="{place + 4.5:.1f}" style="fill:{end.colour}">{escape(end.name)}</text>')
    return parts


def _length(text: str) -> float:
    """Width of a label, about: its font is the reader's."""
    return 7.4 * len(text)


def _drawing(title: str, subtitle: str, height: float, parts: Sequence[str]) -> str:
    size = f"{WIDTH} {height:.0f}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="var(--paper)"/>',
        f'<text class="title" x="14" y="26">{escape(title)}</text>',
        f'<text class="pale" x="14" y="46">{escape(subtitle)}</text>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"

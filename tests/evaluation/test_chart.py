"""Charts: what is drawn is where its value says, in XML that any text leaves whole."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from adafv.evaluation.chart import Level, Line, Point, Value, _ticks, line_chart, value_chart

SVG = "{http://www.w3.org/2000/svg}"


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """Points of the drawn lines; threads from lines to their names are fainter."""
    root = ElementTree.fromstring(svg)
    drawn = [each for each in root.iter(f"{SVG}polyline") if "opacity" not in each.attrib]
    return [[tuple(map(float, pair.split(","))) for pair in each.attrib["points"].split()] for each in drawn]  # type: ignore[misc]


def chart(**options: object) -> str:
    made = [
        Line("<one> & two", [Point(0.1, 10, 2), Point(0.2, 20, 2), Point(0.4, 40, 2)], strong=True, band=True),
        Line("flat", [Point(0.1, 40), Point(0.4, 40)]),
    ]
    more: dict[str, object] = {"levels": [Level("top", 50.0)], "x_ticks": [(0.1, "10 %"), (0.4, "40 %")], **options}
    return line_chart("T", "S", made, x_label="x", y_label="y", **more)  # type: ignore[arg-type]


def test_points_lie_where_their_values_say() -> None:
    flat, rising = lines(chart())  # the strong one is drawn last
    assert flat[0][1] == flat[1][1] == rising[2][1]
    assert rising[1][0] - rising[0][0] == pytest.approx(rising[2][0] - rising[1][0], abs=0.2)  # doubling, on a log axis
    assert rising[0][1] - rising[1][1] == pytest.approx((rising[1][1] - rising[2][1]) / 2, abs=0.2)


def test_an_axis_that_is_not_logarithmic() -> None:
    _, rising = lines(chart(log=False))
    assert rising[1][0] - rising[0][0] == pytest.approx((rising[2][0] - rising[1][0]) / 2, abs=0.2)


def test_the_smallest_on_the_right() -> None:
    _, rising = lines(chart(falling=True))
    assert rising[0][0] > rising[1][0] > rising[2][0]
    assert rising[0][1] > rising[2][1]


def test_text_is_escaped() -> None:
    assert "<one> & two" in "".join(ElementTree.fromstring(chart()).itertext())


def test_both_schemes() -> None:
    assert "prefers-color-scheme:dark" in chart()


def test_names_do_not_lie_on_one_another() -> None:
    many = [Line(f"method {n}", [Point(0.1, 50), Point(0.2, 50 + n / 100)]) for n in range(30)]
    svg = line_chart("T", "S", many, x_label="x", y_label="y", x_ticks=[(0.1, "a"), (0.2, "b")])
    places = sorted(float(y) for y in re.findall(r'y="([\d.]+)" style="fill', svg))
    assert len(places) == 30
    assert min(b - a for a, b in pairwise(places)) > 14
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', svg)[1])  # type: ignore[index]
    assert 0 < places[0] < places[-1] < height


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.48, 0.71), (30, 101), (-3, 99), (0, 9.5), (0.001, 0.0013)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 3 <= len(ticks) <= 9
    assert low - 1e-9 <= ticks[0] < ticks[-1] <= high + 1e-9


def test_values_and_their_intervals() -> None:
    groups = [("all", [Value("word", 0.7, 0.1), Value("saliency", 0.6)]), ("small", [Value("word", 0.5, 0.05)])]
    root = ElementTree.fromstring(value_chart("T", "S", groups, x_label="x", reference=0.5))
    xs = [float(each.attrib["cx"]) for each in root.iter(f"{SVG}circle")]
    assert (xs[0] - xs[1]) == pytest.approx(xs[1] - xs[2], abs=0.2)
    bars = [each for each in root.iter(f"{SVG}line") if each.attrib.get("stroke-width") == "2"]
    assert [float(bar.attrib["x2"]) - float(bar.attrib["x1"]) for bar in bars] == pytest.approx(
        [2 * (xs[0] - xs[1]), 0.0, xs[0] - xs[1]], abs=0.3
    )
    assert "0.700 ± 0.100" in "".join(root.itertext())

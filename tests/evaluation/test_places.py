"""Where tokens lie in a picture: read off stock processors, against what these do written out by hand."""

from itertools import product
from typing import Any

import pytest
import torch
from models import FAMILIES
from PIL import Image
from stock_processors import PROCESSORS

from adafv.asking.session import Session
from adafv.core import ImageLayout
from adafv.evaluation.places import Places, PlacesError, places_of

CPU = torch.device("cpu")
CLOSE = 0.004
"""Shares of a side; a colour has 255 steps."""


def places(session: Session, size: tuple[int, int]) -> tuple[Places, ImageLayout]:
    layout = session.encoded(session.inputs(Image.new("RGB", size), "what?")).images["image"][0].layout
    return places_of(session, layout, size, "what?"), layout


def check(found: Places, expected: list[tuple[float, float] | None]) -> None:
    """(x, y) of every token; None for one that shows nothing of the picture."""
    assert found.seen.tolist() == [place is not None for place in expected]
    for number, place in enumerate(expected):
        if place is not None:
            assert float(found.x[number]) == pytest.approx(place[0], abs=CLOSE)
            assert float(found.y[number]) == pytest.approx(place[1], abs=CLOSE)


@pytest.fixture(scope="module")
def bundled() -> Session:
    return Session.load("bundled", "float32", CPU)


def test_what_is_cropped_away_is_nowhere(bundled: Session) -> None:
    """CLIP's processor scales the shorter side to 144 pixels and cuts the middle out: of 200 x 100, the middle half."""
    found, _ = places(bundled, (200, 100))
    check(found, [(0.25 + (column + 0.5) / 24, (row + 0.5) / 12) for row in range(12) for column in range(12)])
    assert found.width.unique().tolist() == pytest.approx([1 / 24], abs=0.001)
    assert found.height.unique().tolist() == pytest.approx([1 / 12], abs=0.001)
    assert not found.on([(0.0, 0.0, 0.2, 1.0)]).any()


def test_thumbnail_and_crops_without_padding() -> None:
    """LLaVA-NeXT: 300 x 200 is squeezed into the thumbnail, and scaled to 288 x 192 in the middle of 2 x 2 crops of 144."""
    found, layout = places(Session.load("bundled-next", "float32", CPU), (300, 200))
    expected: list[tuple[float, float] | None] = []
    for source in layout.source.tolist():
        if source < 0:
            expected.append(None)  # a newline
            continue
        crop, row, column = source // 144, source % 144 // 12, source % 12
        if crop == 0:
            expected.append(((column + 0.5) / 12, (row + 0.5) / 12))
            continue
        down, across = divmod(crop - 1, 2)
        expected.append(((across * 144 + column * 12 + 6) / 288, (down * 144 + row * 12 + 6 - 48) / 192))
    assert None in expected
    assert len(expected) == 12 * 12 + 16 * 25
    check(found, expected)


@pytest.mark.parametrize(
    ("family", "size", "grids"),
    [
        # Tiles of 2 x 2 tokens, the whole picture last: rows and columns of tokens over the picture.
        ("idefics3", (200, 90), [(2, 2, 2, 4), (2, 2)]),
        # A grid in the picture's own shape, packed.
        ("paddleocr-vl", (80, 300), [(9, 2)]),
        ("gemma3", (90, 100), [(4, 4)]),
    ],
)
def test_families(family: str, size: tuple[int, int], grids: list[tuple[int, ...]]) -> None:
    model = next(row for row in FAMILIES if row.name == family).build().eval()
    found, layout = places(Session(model, PROCESSORS[family](model)), size)
    middles = {(round(float(x), 2), round(float(y), 2)) for x, y in zip(found.x, found.y, strict=True)}
    expected = set()
    for grid in grids:
        rows, columns = grid[0] if len(grid) == 2 else 2, grid[1] if len(grid) == 2 else 4
        expected |= {
            (round((column + 0.5) / columns, 2), round((row + 0.5) / rows, 2))
            for row, column in product(range(rows), range(columns))
        }
    assert len(middles) == len(expected)
    for x, y in middles:
        assert min(abs(x - a) + abs(y - b) for a, b in expected) < 0.025
    assert bool(found.seen.all())
    assert layout.tokens == sum(2 * 4 if len(grid) == 4 else grid[0] * grid[1] for grid in grids)


class TestOn:
    grid = Places(
        x=torch.tensor([0.25, 0.75, 0.25, float("nan")]),
        y=torch.tensor([0.25, 0.25, 0.75, float("nan")]),
        width=torch.full((4,), 0.5),
        height=torch.full((4,), 0.5),
    )

    @pytest.mark.parametrize(
        ("boxes", "expected"),
        [
            ([(0.0, 0.0, 1.0, 0.5)], [True, True, False, False]),
            ([(0.2, 0.2, 0.3, 0.8)], [True, False, True, False]),
            # Smaller than a patch, and no middle in it: the patch that holds its middle.
            ([(0.55, 0.05, 0.6, 0.1)], [False, True, False, False]),
            ([(0.55, 0.05, 0.6, 0.1), (0.2, 0.7, 0.3, 0.8)], [False, True, True, False]),
            # Where no token looks.
            ([(0.8, 0.8, 0.9, 0.9)], [False, False, False, False]),
        ],
    )
    def test_boxes(self, boxes: list[Any], expected: list[bool]) -> None:
        assert self.grid.on(boxes).tolist() == expected

    def test_border(self) -> None:
        assert self.grid.border.tolist() == [0.25, 0.25, 0.25, 0.0]


def test_a_processor_that_shows_something_else_is_refused(bundled: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = bundled.encoded(bundled.inputs(Image.new("RGB", (144, 144)), "what?")).images["image"][0].layout
    monkeypatch.setattr(Session, "tower_view", lambda self, inputs: torch.full((1, 3, 144, 144), 40.0))
    with pytest.raises(PlacesError, match="nothing of a picture"):
        places_of(bundled, layout, (144, 144), "what?")

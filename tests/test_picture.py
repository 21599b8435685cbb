"""`adafv.picture`: what is drawn where, checked at single pixels."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adafv import picture
from adafv.core import ImageLayout
from adafv.core.tokens import Kept
from adafv.engines.transformers import ImageRecord, Record
from adafv.errors import OptionError
from adafv.picture import _level, draw, panels, tower_view

GREY = 200.0
TOP = 24 + (22 + 7 + 2) + (15 + 5 + 2) + 8
"""Pixels above the drawings: margin, title, subtitle, gap."""
LEFT = 24


def record(
    layout: ImageLayout, kept: list[int], saliency: bool = True, text_attention: bool = True, **changes: Any
) -> Record:
    """A run over one image that kept the tokens `kept`; scores rise with the token's number."""
    index = torch.tensor([kept])
    scores = torch.linspace(0.01, 0.2, layout.tokens).unsqueeze(0)
    chosen = Kept(
        index,
        text_attention=scores.flip(1) if text_attention else None,
        objective=torch.tensor([0.5]),
        certificate=torch.tensor([0.001]),
    )
    image = {
        "number": 0,
        "modality": "image",
        "prompt": 0,
        "frame": None,
        "method": "adafv",
        "layout": layout,
        "tokens_before": layout.tokens,
        "tokens_after": len(kept),
        "columns": torch.arange(layout.tokens),
        "fed": layout,
        "selected": chosen,
        "scores": scores if saliency else None,
        "place": 0,
    }
    return Record(
        images=[ImageRecord(**{**image, **changes})],  # type: ignore[arg-type]
        prompt_length_before=layout.tokens,
        prompt_length_after=len(kept),
        config=None,
        element=4,
        columns=index,
        given=layout.tokens,
    )


def one_crop(rows: int = 4, columns: int = 4) -> ImageLayout:
    return ImageLayout(torch.arange(rows * columns), 1, rows, columns)


def many_crops() -> ImageLayout:
    """A thumbnail and 1 x 2 crops of 4 x 4; the raster's first and last row are padding, each row ends in a newline."""
    numbers = torch.arange(16, 48).view(2, 4, 4)
    raster = torch.cat((numbers[0], numbers[1]), dim=1)[1:3]
    raster = torch.cat((raster, torch.full((2, 1), -1)), dim=1)
    return ImageLayout(torch.cat((torch.arange(16), raster.flatten())), 3, 4, 4, (1, 2))


def pixel(image: Image.Image, x: float, y: float) -> tuple[int, int, int]:
    value = image.getpixel((round(x), round(y)))
    assert isinstance(value, tuple)
    return value  # type: ignore[return-value]


def plain(crops: int = 1, side: int = 32) -> torch.Tensor:
    return torch.full((crops, 3, side, side), GREY)


def panel_size(panels: int, finest: int, width: int = 1400) -> int:
    return (width - 48 - (max(panels, 3) - 1) * 20) // max(panels, 3) // finest * finest


class TestKept:
    def test_kept_patches_are_as_they_were_and_dropped_ones_dark(self) -> None:
        drawn = draw(record(one_crop(), [0, 5, 6, 15]), 0, plain())
        patch = panel_size(4, 4) // 4
        for token in range(16):
            centre = pixel(drawn, LEFT + (token % 4 + 0.5) * patch, TOP + (token // 4 + 0.5) * patch)
            if token in (0, 5, 6, 15):
                assert centre == (200, 200, 200)
            else:
                assert max(centre) < 80

    def test_outline_surrounds_regions_not_patches(self) -> None:
        drawn = draw(record(one_crop(), [5, 6]), 0, plain())
        patch = panel_size(4, 4) // 4
        middle = TOP + 1.5 * patch
        assert pixel(drawn, LEFT + patch, middle) == (255, 214, 64)
        assert pixel(drawn, LEFT + 3 * patch - 1, middle) == (255, 214, 64)
        assert pixel(drawn, LEFT + 2 * patch, middle) == (200, 200, 200)

    def test_everything_kept(self) -> None:
        everything = record(one_crop(), list(range(16)), selected=None, scores=None)
        drawn = draw(everything, 0, plain())
        side = panel_size(1, 4)
        inside = np.asarray(drawn)[TOP : TOP + side, LEFT : LEFT + side]
        assert (inside == 200).all()

    def test_not_square(self) -> None:
        crops = torch.full((1, 3, 20, 60), GREY)
        drawn = draw(record(one_crop(2, 6), [11]), 0, crops)
        patch = panel_size(4, 6) // 6
        assert pixel(drawn, LEFT + 5.5 * patch, TOP + 1.5 * patch) == (200, 200, 200)
        assert max(pixel(drawn, LEFT + 4.5 * patch, TOP + 1.5 * patch)) < 80


class TestPanels:
    def test_size(self) -> None:
        drawn = draw(record(one_crop(), [1]), 0, plain())
        assert drawn.mode == "RGB"
        assert 1300 <= drawn.width <= 1400
        assert draw(record(one_crop(), [1]), 0, plain(), width=800).width <= 800

    def test_missing_scores_leave_their_panels_out(self) -> None:
        widths = [
            draw(record(one_crop(), [1], saliency=saliency, text_attention=text), 0, plain()).width
            for saliency, text in ((False, False), (True, False), (False, True))
        ]
        assert widths[0] < widths[1] == widths[2] < draw(record(one_crop(), [1]), 0, plain()).width

    def test_heat_follows_the_scores(self) -> None:
        drawn = draw(record(one_crop(), [1]), 0, plain())
        side = panel_size(4, 4)
        patch = side // 4
        for panel, rising in ((1, True), (2, False)):
            left = LEFT + panel * (side + 20)
            first, last = (sum(pixel(drawn, left + (i + 0.5) * patch, TOP + (i + 0.5) * patch)) for i in (0, 3))
            assert (first < last) == rising

    @pytest.mark.parametrize(
        ("method", "meaning"), [("adafv", "what the search ranks by"), ("facet", "the two scores, added")]
    )
    def test_only_of_adafv_it_is_said_that_the_search_ranks_by_both(self, method: str, meaning: str) -> None:
        drawn = panels(record(one_crop(), [1], method=method), 0, plain(), width=100)
        assert (drawn[-1].title, drawn[-1].subtitle) == ("both", meaning)

    def test_level(self) -> None:
        level = _level(torch.tensor([0.0, 0.25, 1.0, float("nan")]))
        assert level[0] == 0
        assert level[2] == 1
        assert level[:3].diff().gt(0).all()
        assert level[3].isnan()
        assert (_level(torch.full((5,), 0.3)) == 0).all()
        one_peak = _level(torch.tensor([0.0] * 300 + [1.0]))
        assert one_peak[-1] == 1
        assert one_peak[:-1].max() == 0

    def test_long_texts_wrap(self) -> None:
        short = draw(record(one_crop(), [1]), 0, plain(), question="Why?", answer="So.")
        long = draw(record(one_crop(), [1]), 0, plain(), question="Why? " * 100, answer="x" * 400)
        assert long.width == short.width
        assert long.height > short.height + 100
        endless = draw(record(one_crop(), [1]), 0, plain(), question="Why? " * 100_0, answer="\n\n")
        assert endless.height < 1000

    def test_any_language(self) -> None:
        draw(record(one_crop(), [1]), 0, plain(), question="Was ist das für ein Vogel? 这是什么? \N{DOG FACE}")


class TestManyCrops:
    def test_thumbnail_above_and_crops_below(self) -> None:
        layout = many_crops()
        kept = [3, 16]  # a patch of the thumbnail, and the first that is left of the first crop: its second row
        drawn = draw(record(layout, kept), 0, plain(3))
        side = panel_size(4, 8)
        large, small = side // 4, side // 8
        assert pixel(drawn, LEFT + 3.5 * large, TOP + 0.5 * large) == (200, 200, 200)
        assert max(pixel(drawn, LEFT + 2.5 * large, TOP + 0.5 * large)) < 80
        below = TOP + side + 6 + (14 + 4 + 2) + 12
        assert pixel(drawn, LEFT + 0.5 * small, below + 1.5 * small) == (200, 200, 200)
        assert max(pixel(drawn, LEFT + 1.5 * small, below + 1.5 * small)) < 80
        for row in (0, 3):  # padding is hatched
            seen = {pixel(drawn, LEFT + 2 * small + x, below + (row + 0.5) * small) for x in range(12)}
            assert seen == {(208, 208, 212), (182, 182, 188)}

    def test_kept_newlines_show_nowhere(self) -> None:
        layout = many_crops()
        newline = int((layout.source < 0).nonzero()[0])
        with_newline, without = (draw(record(layout, kept), 0, plain(3)) for kept in ([3, newline], [3]))
        side = panel_size(4, 8)
        first = [np.asarray(drawn)[TOP:, LEFT : LEFT + side][: 2 * side] for drawn in (with_newline, without)]
        assert np.array_equal(first[0][:side], first[1][:side])

    def test_surplus_crops_are_ignored(self) -> None:
        layout = many_crops()
        padded = torch.cat((plain(3), torch.zeros(2, 3, 32, 32)))
        same = (np.asarray(draw(record(layout, [3]), 0, crops)) for crops in (padded, plain(3)))
        assert np.array_equal(*same)

    def test_arrangement(self) -> None:
        """2 x 1 crops: the second stands below the first."""
        layout = ImageLayout(torch.arange(12), 3, 2, 2, (2, 1))
        crops = plain(3)
        crops[2] = 100.0
        drawn = draw(record(layout, list(range(12)), saliency=False, text_attention=False), 0, crops)
        side = panel_size(1, 2)
        below = TOP + side + 6 + 20 + 12
        assert pixel(drawn, LEFT + 0.5 * side, below + 0.5 * side) == (200, 200, 200)
        assert pixel(drawn, LEFT + 0.5 * side, below + 1.5 * side) == (100, 100, 100)


class TestCrops:
    def test_arrays_and_tensors(self) -> None:
        tensor = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8)
        array = tensor.permute(0, 2, 3, 1).numpy()
        run = record(one_crop(), [1, 2])
        pictures = [np.asarray(draw(run, 0, crops)) for crops in (tensor, tensor.float(), array, array.astype(float))]
        assert all(np.array_equal(pictures[0], picture) for picture in pictures[1:])

    def test_wrong_shapes(self) -> None:
        for crops in (torch.zeros(1, 32, 32), torch.zeros(0, 3, 8, 8), np.zeros((1, 3, 8, 8))):
            with pytest.raises(OptionError, match="give a tensor"):
                draw(record(one_crop(), [1]), 0, crops)

    def test_tower_view_undoes_the_normalisation(self) -> None:
        seen = torch.rand(2, 3, 8, 8) * 255
        mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
        normalised = (seen / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert torch.allclose(tower_view(normalised, mean, std), seen, atol=1e-3)


@pytest.mark.parametrize(("crops", "across"), [(2, 2), (4, 2), (6, 3), (7, 7), (12, 4)])
def test_frames_of_a_video_are_drawn_one_after_the_other(crops: int, across: int) -> None:
    layout = ImageLayout(torch.arange(crops * 4), crops, 2, 2)
    frames = torch.stack([torch.full((3, 8, 8), float(number)) for number in range(crops)])
    [view] = picture._views(layout, frames)
    assert view.label == f"{crops} crops, one after the other"
    assert view.pixels.shape == (3, crops // across * 8, across * 8)
    assert view.pixels[0, ::8, ::8].flatten().tolist() == list(range(crops))
    assert (view.patches // 4)[::2, ::2].flatten().tolist() == list(range(crops))

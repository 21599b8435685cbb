"""Taking columns out of prompts: every row keeps its tokens, in order, whatever its padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adafv.core import ImageLayout
from adafv.engines.transformers.prompt import compact, nothing_removed
from adafv.errors import PromptError
from adafv.prompts.prompt import place_images


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """(attended, stays) of a batch padded on one side; padding is never dropped, and some token always stays."""
    side = draw(st.sampled_from(["left", "right"]))
    rows = []
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    length = max(lengths) + draw(st.integers(0, 3))
    for real in lengths:
        drops = draw(st.lists(st.booleans(), min_size=real, max_size=real))
        drops[draw(st.integers(0, real - 1))] = False
        padding = [(False, True)] * (length - real)
        tokens = [(True, not drop) for drop in drops]
        rows.append(padding + tokens if side == "left" else tokens + padding)
    pairs = torch.tensor(rows)
    return pairs[..., 0], pairs[..., 1]


@given(batches())
@settings(max_examples=300, deadline=None)
def test_every_row_keeps_its_tokens_in_order(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    attended, stays = case
    dropped = (~stays).sum(1).tolist()
    found = compact(attended, dropped, stays)
    length = attended.shape[1]
    values = torch.arange(length).expand(attended.shape) + 1
    new_mask = found.take(attended.long(), 0)
    for row in range(len(attended)):
        kept = values[row][attended[row] & stays[row]].tolist()
        assert found.take(values, 0)[row][new_mask[row].bool()].tolist() == kept
    # as short as the longest row allows, and never shorter than the row that loses most
    longest = int((attended & stays).sum(1).max())
    assert found.columns.shape[1] == (max(longest, length - max(dropped)) if any(dropped) else length)
    assert found.removed == length - found.columns.shape[1]
    assert found.changed == any(dropped)
    # padding stays on one side
    assert all(
        sorted(row.tolist()) == row.tolist() or sorted(row.tolist(), reverse=True) == row.tolist() for row in new_mask
    )


@given(batches())
@settings(max_examples=100, deadline=None)
def test_lost_counts_tokens_not_padding(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    attended, stays = case
    stays = stays.clone()
    for row, real in zip(stays, attended, strict=True):  # what is lost lies between tokens that stay
        ends = real.nonzero().flatten()
        row[ends[0]] = row[ends[-1]] = True
    dropped = (~stays).sum(1)
    found = compact(attended, dropped.tolist(), stays)
    inside = (found.columns >= 0) & found.take(attended, False)
    trimmed = type(found)(found.columns.where(inside, -1), found.length, found.changed)
    assert torch.equal(trimmed.lost, dropped)


def test_side_by_side() -> None:
    stays = torch.tensor([[True, False, True]])
    first = compact(torch.ones(1, 3, dtype=torch.bool), [1], stays)
    both = first.then(nothing_removed(1, 2)).then(first)
    assert both.columns.tolist() == [[0, 2, 3, 4, 5, 7]]
    assert (both.length, both.removed, both.changed) == (8, 2, True)


def test_take_fills_padding_put_in() -> None:
    attended = torch.ones(2, 4, dtype=torch.bool)
    stays = torch.tensor([[True, False, False, True], [True, True, True, True]])
    found = compact(attended, [2, 0], stays)
    assert found.columns.tolist() == [[-1, -1, 0, 3], [0, 1, 2, 3]]
    embeds = torch.arange(8.0).view(2, 4, 1).expand(2, 4, 3)
    assert found.take(embeds, -7.0)[0, :, 0].tolist() == [-7, -7, 0, 3]


def test_masked_inside_stays_masked() -> None:
    """A caller may mask tokens in the middle; that is no padding."""
    attended = torch.tensor([[False, True, False, True, True]])
    found = compact(attended, [1], torch.tensor([[True, True, True, False, True]]))
    assert found.columns.tolist() == [[-1, 1, 2, 4]]
    assert found.take(attended.long(), 0).tolist() == [[0, 1, 0, 1]]


def test_images_must_fit_exactly() -> None:
    layout = ImageLayout(torch.arange(3), crops=1, rows=1, columns=3)
    is_image = torch.tensor([[False, True, True, True, True], [True, True, False, False, False]])
    with pytest.raises(PromptError, match="spread over two prompts"):
        place_images("image", is_image, [layout, layout])
    with pytest.raises(PromptError, match=r"6 image placeholders, but its 1 image\(s\) make 3"):
        place_images("image", is_image, [layout])
    adjacent = place_images("image", torch.ones(1, 6, dtype=torch.bool), [layout, layout])
    assert [image.columns.tolist() for image in adjacent] == [[0, 1, 2], [3, 4, 5]]

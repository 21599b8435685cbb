"""Taking columns out of prompts: every row keeps its tokens, in order, whatever its padding."""

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st

from adafv.core import ImageLayout
from adafv.engines.transformers.compaction import compact, nothing_removed
from adafv.errors import PromptError
from adafv.prompts.prompt import place_images


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """(attended, stays) of a batch padded on either side; padding is never dropped, and some token always stays."""
    rows = []
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    length = max(lengths) + draw(st.integers(0, 3))
    for real in lengths:
        drops = draw(st.lists(st.booleans(), min_size=real, max_size=real))
        drops[draw(st.integers(0, real - 1))] = False
        front = draw(st.integers(0, length - real))
        tokens = [(True, not drop) for drop in drops]
        rows.append([(False, True)] * front + tokens + [(False, True)] * (length - real - front))
    pairs = torch.tensor(rows)
    return pairs[..., 0], pairs[..., 1]


@given(batches())
@examples(300)
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
    # what stands behind the last token that was dropped keeps its distance from the end of the row
    for row, columns in enumerate(found.columns.tolist()):
        last_dropped = int((~stays[row]).nonzero().max()) if dropped[row] else -1
        first = int(attended[row].nonzero().min())
        for column in range(max(last_dropped + 1, first), length):
            assert columns[column - length] == column
    # as short as the longest row allows, with its trailing padding, and never shorter than the row that loses most
    needed = [
        int((attended[row] & stays[row]).sum()) + length - 1 - int(attended[row].nonzero().max())
        for row in range(len(attended))
    ]
    assert found.columns.shape[1] == (max(*needed, length - max(dropped)) if any(dropped) else length)
    assert found.removed == length - found.columns.shape[1]
    assert found.changed == any(dropped)
    assert found.lost.tolist() == dropped


@given(batches(), st.lists(st.booleans(), min_size=4, max_size=4))
@examples(200)
def test_rows_without_an_image_may_lose_trailing_padding(
    case: tuple[torch.Tensor, torch.Tensor], text: list[bool]
) -> None:
    """So a short text beside pictures, padded on the right, does not keep the batch long."""
    attended, stays = case
    anchored = ~torch.tensor(text[: len(attended)])
    stays = stays | ~anchored.unsqueeze(1)
    dropped = (~stays).sum(1).tolist()
    found = compact(attended, dropped, stays, anchored)
    length = attended.shape[1]
    new_mask = found.take(attended.long(), 0)
    values = torch.arange(length).expand(attended.shape) + 1
    for row in range(len(attended)):
        assert (
            found.take(values, 0)[row][new_mask[row].bool()].tolist()
            == values[row][attended[row] & stays[row]].tolist()
        )
    if any(dropped):
        needed = [
            int((attended[row] & stays[row]).sum())
            + (length - 1 - int(attended[row].nonzero().max()) if anchored[row] else 0)
            for row in range(len(attended))
        ]
        assert found.columns.shape[1] == max(*needed, length - max(dropped))


@given(batches(), st.integers(1, 14))
@examples(200)
def test_values_are_given_back_where_they_were(case: tuple[torch.Tensor, torch.Tensor], last: int) -> None:
    attended, stays = case
    found = compact(attended, (~stays).sum(1).tolist(), stays)
    length = attended.shape[1]
    values = torch.arange(attended.numel()).view(attended.shape).double() + 1
    back = found.give_back(found.take(values, 0.0)[..., None], fill=float("nan"), dropped=~stays)[..., 0]
    assert torch.equal(back[attended & stays], values[attended & stays])
    assert torch.equal(back.isnan(), ~stays if found.changed else torch.zeros_like(stays))
    some = min(last, found.columns.shape[1])
    part = found.give_back(found.take(values, 0.0)[:, -some:, None], last, fill=float("nan"), dropped=~stays)[..., 0]
    torch.testing.assert_close(part, back[:, -min(last, length) :], equal_nan=True)
    # and where somebody trains: every column has what the next token that stayed is predicted from
    filled = found.give_back(found.take(values, 0.0)[..., None], fill=None)[..., 0]
    for row in range(len(attended)):
        for column in range(1, length):
            if attended[row, column] and stays[row, column] and (attended[row, :column] & stays[row, :column]).any():
                before = (found.columns[row] == column).nonzero().item() - 1
                assert filled[row, column - 1] == values[row, found.columns[row, before]]


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

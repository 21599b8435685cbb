"""What is true of every family whose tower has a [CLS] and whose tokens are 2 x 2 patches of a tile."""

from typing import Any

import torch
from models import PATCH, SIDE, FamilyRow, make_inputs

from adafv import compress
from adafv.core import ImageLayout
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt


def check_saliency(row: FamilyRow, model: Any, layer: int, attention: str) -> None:
    """It is the row of [CLS] in the attention maps of the stock tower, joined as the tokens are."""
    tower = model.model.vision_tower
    tower.set_attn_implementation(attention)
    inputs = make_inputs(row, model, [2])
    record = compress(model, inputs, keep=0.3).record
    assert record is not None
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    # hidden_states[-1] is the output of the last layer, hidden_states[1] that of the first
    heard = maps[layer if layer < 0 else layer - 1][:, :, 0, 1:].mean(1)
    side = SIDE // PATCH
    squares = torch.nn.functional.avg_pool2d(heard.view(-1, 1, side, side), 2).flatten()
    torch.testing.assert_close(torch.cat(record.saliency), squares, atol=1e-6, rtol=1e-5)


def check_changed_token(
    row: FamilyRow, model: Any, layers: Any, tile: int, line: int, column: int
) -> tuple[torch.Tensor, ImageLayout, int]:
    """Without attention a tower's patches do not mix, so one patch changes one token: that which the layout names.

    Args:
        layers: of the tower.
        tile, line, column: of the patch.

    Returns:
        The changed pixels, the layout, and the crop that the tile is.
    """
    with torch.no_grad():
        for layer in layers:
            layer.attention.projection_layer.weight.zero_()
    inputs = make_inputs(row, model, [1])
    other = inputs["pixel_values"].clone()
    other[tile, :, line * PATCH : (line + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1
    family = family_of(model)
    [layout] = family.layouts(model, "image", inputs, read_prompt(model, family, inputs).runs("image"))
    features = [
        family.encode(model, "image", {"pixel_values": pixels}, [layout], signals=frozenset()).features[0]
        for pixels in (inputs["pixel_values"], other)
    ]
    [changed] = (features[0] - features[1]).abs().amax(-1).gt(1e-6).nonzero().tolist()
    crop = (tile + 1) % layout.crops  # the last tile is the thumbnail, which is crop 0
    assert [int(place) for place in layout.place(torch.tensor(changed))] == [crop, line // 2, column // 2]
    return other, layout, crop

"""PaddleOCR-VL and Kimi K2.5: towers that leave patches in rows, so a token's four are not neighbours; no videos."""

import sys
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, PATCH, VIDEO, FamilyRow, make_inputs, noise
from packaging.version import Version
from torch import Tensor

from adafv import AdaFV
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers import towers
from adafv.engines.transformers.families import family_of
from adafv.errors import UnsupportedCallError

ROWS = [row for row in FAMILIES if row.name in ("paddleocr-vl", "kimi-k2.5")]


@pytest.fixture(params=ROWS, ids=[row.name for row in ROWS])
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


def tower_and_attention(row: FamilyRow, model: Any) -> tuple[Any, Any]:
    if row.name == "kimi-k2.5":
        return model.model.vision_tower, model.model.vision_tower.layers[-1].attn
    return model.model.visual, model.model.visual.vision_model.encoder.layers[-1].self_attn


def received(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
    """The plain attention received, so that the test is about places and not about what makes a patch salient."""
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(-3).mean(-2)


def test_saliency_lines_up_with_the_stock_attention(row: FamilyRow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the eager attention maps, patch by patch and without a reshape."""
    model = row.build()
    visuals, _ = row.images(model, [row.sizes], 0)
    monkeypatch.setattr(towers, "patch_score", received)
    family = family_of(model)
    layouts = family.layouts(model, "image", visuals, [])
    with torch.no_grad():
        found = family.encode(model, "image", visuals, layouts, signals=frozenset({SALIENCY})).saliency
        _, attention = tower_and_attention(row, model)
        maps: list[Tensor] = []
        stock = sys.modules[type(attention).__module__]
        eager = stock.eager_attention_forward

        def recording(module: Any, *given: Any, **options: Any) -> Any:
            output, weights = eager(module, *given, **options)
            if module is attention:
                maps.append(weights)
            return output, weights

        monkeypatch.setattr(stock, "eager_attention_forward", recording)
        monkeypatch.setattr(attention.config, "_attn_implementation_internal", "eager")
        model.model.get_image_features(visuals["pixel_values"], visuals["image_grid_thw"], return_dict=True)
    assert len(maps) == len(found) == len(row.sizes)
    for attended, saliency, (height, width) in zip(maps, found, row.sizes, strict=True):
        columns = width // PATCH
        by_patch = attended[0].mean(0).mean(0)
        for token, value in enumerate(saliency):
            down, across = divmod(token, columns // 2)
            first = 2 * down * columns + 2 * across
            four = by_patch[[first, first + 1, first + columns, first + columns + 1]]
            torch.testing.assert_close(value, four.mean(), atol=1e-6, rtol=1e-5)
        assert len(saliency) == height // PATCH * columns // 4


def test_a_patch_belongs_to_the_token_that_the_layout_says(row: FamilyRow) -> None:
    """Without attention between patches, a changed patch changes the one token whose place in the picture it has."""
    model = row.build()
    tower, _ = tower_and_attention(row, model)
    for name, module in tower.named_modules():
        if name.endswith(("self_attn.out_proj", "attn.proj")):
            module.weight.data.zero_()
    [size] = row.sizes[:1]
    visuals, _ = row.images(model, [[size]], 0)
    [layout] = family_of(model).layouts(model, "image", visuals, [])
    columns = size[1] // PATCH
    stock = features(model, visuals)
    for down, across in ((0, 0), (1, 2), (3, 5), (5, 7)):
        changed = visuals["pixel_values"].clone()
        changed[down * columns + across] += 1
        moved = (features(model, {**visuals, "pixel_values": changed}) - stock).abs().amax(-1) > 1e-5
        assert moved.nonzero().flatten().tolist() == [down // 2 * layout.columns + across // 2]


def features(model: Any, visuals: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model.model.get_image_features(**visuals, return_dict=True)
    return torch.cat(list(output.pooler_output))


def test_the_picture_of_the_choice_shows_the_image(row: FamilyRow) -> None:
    model = row.build()
    visuals, _ = row.images(model, [row.sizes[:2]], 0)
    family = family_of(model)
    shown = family.view(model, visuals, family.layouts(model, "image", visuals, []))
    height, width = row.sizes[0]
    assert shown.shape == (1, 3, height, width)
    second_of_third_row = visuals["pixel_values"][2 * (width // PATCH) + 1]
    assert torch.equal(shown[0, :, 2 * PATCH : 3 * PATCH, PATCH : 2 * PATCH], second_of_third_row)


def test_videos_are_refused() -> None:
    [row] = [row for row in FAMILIES if row.name == "kimi-k2.5"]
    model = row.build()
    entries = {"pixel_values_videos": noise(0, 2 * 4 * 4, 3, PATCH, PATCH), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    inputs = make_inputs(row, model, [0])
    inputs["input_ids"] = torch.cat((torch.full((1, 4), VIDEO), inputs["input_ids"]), 1)
    del inputs["attention_mask"]
    if Version(transformers.__version__) < Version("5.24"):
        with pytest.raises(RuntimeError, match="split"):
            model(**inputs, **entries)
    with AdaFV(keep=0.5)(model), pytest.raises(UnsupportedCallError, match="pass the frames as images"):
        model(**inputs, **entries)

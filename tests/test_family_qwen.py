"""Qwen-VL and its kin: the saliency belongs to the token it is said to belong to, whatever order the tower works in."""

from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, VIDEO, FamilyRow, make_inputs
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.qwen2_vl import modeling_qwen2_vl

from adafv import compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers import plan, towers
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.families.qwen2_5_vl import window_order
from adafv.prompts.text import text_columns

NAMES = (
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "qwen3-moe-vl",
    "glm-4v",
    "glm-4.6v",
    "glm-moe-4v",
    "glm-ocr",
    "qwen2.5-omni",
    "qwen3-omni",
)
PACKED = [row for row in FAMILIES if row.name in NAMES]
SHOWN = [(row, "image") for row in PACKED] + [(row, "video") for row in PACKED if row.videos is not None]


def mean_received(maps: Tensor) -> Tensor:
    """[1, H, N, N] -> [1, N]"""
    return maps.mean(1).mean(1)


def plainly_received(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    """In place of the score: the plain attention received, so that the test is about places and not about what is salient."""
    return mean_received((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1))


@pytest.mark.parametrize(("row", "modality"), SHOWN, ids=[f"{row.name}-{modality}" for row, modality in SHOWN])
def test_saliency_lines_up_with_the_attention_maps(
    row: FamilyRow, modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = row.build()
    if modality == "image":
        visuals, _ = row.images(model, [[size] for size in row.sizes], 0)
    else:
        visuals, _ = row.videos(model, [[count] for count in row.clips], 0)
    family = family_of(model)
    monkeypatch.setattr(towers, "patch_score", plainly_received)
    layouts = family.layouts(model, modality, visuals, [])
    with torch.no_grad():
        encoded = family.encode(model, modality, visuals, layouts, signals=frozenset({SALIENCY}))
        maps, order = maps_and_order(model, family, visuals, modality, monkeypatch)
    in_tower_order = torch.cat([mean_received(attention).flatten() for attention in maps])
    by_patch = torch.empty_like(in_tower_order)
    by_patch[order] = in_tower_order
    # the processor writes the four patches of a token one after the other, token by token in reading order
    expected = by_patch.unflatten(0, (-1, 4)).mean(-1).split([layout.tokens for layout in layouts])
    assert len(encoded.saliency) == len(layouts)
    for saliency, wanted, layout in zip(encoded.saliency, expected, layouts, strict=True):
        assert layout.tokens == layout.crops * layout.rows * layout.columns
        torch.testing.assert_close(saliency, wanted, atol=1e-6, rtol=1e-5)


def maps_and_order(
    model: Any, family: Any, visuals: dict[str, Any], modality: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], Tensor]:
    """The stock tower's attention maps in the tapped block, and which patch of the inputs it has at each place."""
    tower = model.model.visual
    tapped = max(getattr(tower, "fullatt_block_indexes", [len(tower.blocks) - 1]))
    maps: list[Tensor] = []
    attention = tower.blocks[tapped].attn

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        output, weights = modeling_qwen2_vl.eager_attention_forward(module, query, key, value, **options)
        if module is attention:
            maps.append(weights)
        return output, weights

    AttentionInterface.register("recording", recording)
    monkeypatch.setattr(tower.config, "_attn_implementation_internal", "recording")
    pixels = visuals[family.inputs(modality)[0]]
    entered: list[Tensor] = []
    hooks = [
        tower.patch_embed.register_forward_hook(lambda module, given, output: entered.append(output)),
        tower.blocks[0].register_forward_pre_hook(
            lambda module, given, named: entered.append(given[0] if given else named["hidden_states"]), with_kwargs=True
        ),
    ]
    try:
        getattr(model.model, f"get_{modality}_features")(pixels, visuals[family.inputs(modality)[1]], return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    embedded, first = (part.flatten(0, -2) for part in entered)
    if not hasattr(tower, "fullatt_block_indexes"):
        return maps, torch.arange(len(embedded))  # sorted nowhere, and position embeddings were added
    return maps, torch.cdist(first, embedded).argmin(-1)


@pytest.mark.parametrize("sizes", [[(1, 4, 4)], [(1, 6, 10), (3, 2, 14)], [(2, 8, 8), (1, 10, 2), (1, 2, 2)]])
def test_windows_are_those_of_the_stock_model(sizes: list[tuple[int, int, int]]) -> None:
    """Also where the last window of a row or column is not full."""
    stock = pytest.importorskip("transformers.vision_utils").get_vision_window_index
    [row] = [row for row in FAMILIES if row.name == "qwen2.5-vl"]
    tower, grids = row.build().model.visual, torch.tensor(sizes)
    for window in (28, 56, 84, 112):
        tower.window_size = window
        if window // tower.spatial_merge_size // tower.patch_size == 0:
            continue
        expected, _ = stock(grids, tower.spatial_merge_size, window, tower.patch_size)
        assert torch.equal(window_order(tower, grids), expected)
        assert torch.equal(expected.sort().values, torch.arange(len(expected)))


@pytest.mark.parametrize("row", PACKED, ids=[row.name for row in PACKED])
def test_the_stock_attention_is_told_its_own_name(row: FamilyRow) -> None:
    """Flash attention looks up its kernel by the name in the config of the module that it is called for."""
    model, seen = row.build(), []

    def named(module: Any, *args: Any, **options: Any) -> Any:
        seen.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **options)

    AttentionInterface.register("named", named)
    model.model.visual.config._attn_implementation_internal = "named"
    visuals, _ = row.images(model, [[row.sizes[0]]], 0)
    family = family_of(model)
    with torch.no_grad():
        family.encode(
            model, "image", visuals, family.layouts(model, "image", visuals, []), signals=frozenset({SALIENCY})
        )
    assert set(seen) == {"named"}
    assert len(seen) == len(model.model.visual.blocks) + windows_beyond_one(model, visuals)


def windows_beyond_one(model: Any, visuals: dict[str, Any]) -> int:
    """A block that attends in windows runs its attention once for each."""
    tower = model.model.visual
    if not hasattr(tower, "fullatt_block_indexes"):
        return 0
    _, rows, columns = visuals["image_grid_thw"][0].tolist()
    side = tower.window_size // tower.patch_size
    windows = -(-rows // side) * -(-columns // side)
    return (windows - 1) * (len(tower.blocks) - len(tower.fullatt_block_indexes))


@pytest.mark.parametrize("video", ["clip", "frame"])
@pytest.mark.parametrize("name", ["qwen3-vl", "video-llama3"])
def test_times_between_frames_are_not_the_question(name: str, video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = [row for row in FAMILIES if row.name == name]
    model, asked = row.build(), []
    inputs = make_inputs(row, model, [0], videos_per_prompt=[1])

    def spy(*args: Any) -> Tensor:
        asked.append(text_columns(*args))
        return asked[-1]

    monkeypatch.setattr(plan, "text_columns", spy)
    compress(model, inputs, keep=2, video=video)
    shown = (inputs["input_ids"][0] == VIDEO).nonzero().flatten()
    assert (inputs["input_ids"][0, shown[0] : shown[-1]] != VIDEO).any()  # there are times between the frames
    assert len(asked) == (1 if video == "clip" else row.clips[0] // (2 if name == "qwen3-vl" else 1))
    for columns in asked:
        assert (columns < shown[0]).any()
        assert (columns > shown[-1]).any()
        assert ((columns < shown[0]) | (columns > shown[-1])).all()


PROCESSORS = {
    "qwen2-vl": "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil",
    "glm-4v": "transformers.models.glm4v.image_processing_pil_glm4v:Glm4vImageProcessorPil",
    "glm-4.6v": "transformers.models.glm46v.image_processing_pil_glm46v:Glm46VImageProcessorPil",
    "video-llama3": "transformers.models.video_llama_3.image_processing_pil_video_llama_3:VideoLlama3ImageProcessorPil",
}
PHOTOS = [(480, 640), (640, 427), (1080, 1920), (60, 900), (336, 336)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_places_in_what_the_stock_processor_makes(name: str) -> None:
    """A photo that is black but for one token's square: that token, by its row and column, is the one that differs."""
    module, _, kind = PROCESSORS[name].partition(":")
    processor = getattr(pytest.importorskip(module), kind)()
    [row] = [row for row in FAMILIES if row.name == name]
    model = row.build()
    merge = processor.merge_size
    for height, width in PHOTOS:
        photo = np.zeros((height, width, 3), dtype=np.uint8)
        _, down, across = processor(photo, return_tensors="pt")["image_grid_thw"][0].tolist()
        side = merge * processor.patch_size
        photo = np.zeros((down * processor.patch_size, across * processor.patch_size, 3), dtype=np.uint8)
        place = (down // merge - 2, across // merge // 3)
        photo[place[0] * side : (place[0] + 1) * side, place[1] * side : (place[1] + 1) * side] = 255
        inputs = dict(processor([photo, photo[::-1].copy()], return_tensors="pt"))
        assert inputs["image_grid_thw"][0].tolist() == [1, down, across]  # it was not scaled again
        layouts = family_of(model).layouts(model, "image", inputs, [])
        # as the processors count placeholders: replace_image_token
        assert [layout.tokens for layout in layouts] == (inputs["image_grid_thw"].prod(-1) // merge**2).tolist()
        white = (inputs["pixel_values"] > 0).float().mean(-1).unflatten(0, (2, -1, merge**2)).mean(-1)
        for layout, found, vertical in zip(layouts, white, (place[0], down // merge - 1 - place[0]), strict=True):
            _, rows, columns = layout.place(torch.arange(layout.tokens))
            assert (rows[found.argmax()], columns[found.argmax()]) == (vertical, place[1])
            assert (found > 0.5).sum() == 1

"""VideoLLaMA3: the saliency of a token is that of its own patches, merged or not, and also where tokens are left out."""

from typing import Any

import pytest
import torch
from models import FAMILIES, FamilyRow, make_inputs
from torch import Tensor

from adafv import AdaFV, compress
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.families.video_llama3 import VideoLlama3
from adafv.engines.transformers.towers import Tap
from adafv.errors import PromptError


@pytest.fixture(scope="module")
def row() -> FamilyRow:
    [found] = [row for row in FAMILIES if row.name == "video-llama3"]
    return found


@pytest.fixture(scope="module")
def model(row: FamilyRow) -> Any:
    return row.build()


def scores_by_patch(model: Any, pixels: Tensor, sizes: Tensor, merges: Tensor) -> Tensor:
    """Saliency of every patch, in the order of the inputs, which is the tower's: position embeddings alone are sorted."""
    tap = Tap(model.model.vision_model, VideoLlama3.tower_shape, {SALIENCY})
    tap.tower(pixels, sizes, merges)
    [scores] = tap.read(lambda patches: [patches])[SALIENCY]
    return scores


@pytest.mark.parametrize("merge", [1, 2])
def test_saliency_of_images(row: FamilyRow, model: Any, merge: int) -> None:
    import rows.video_llama3

    sizes = [[(56, 84)], [(28, 56)], [(84, 56)]]
    visuals, tokens = rows.video_llama3.images(model, sizes, 0, merge=merge)
    family = family_of(model)
    layouts = family.layouts(model, "image", visuals, [])
    assert [layout.tokens for layout in layouts] == [len(part) for part in tokens]
    with torch.no_grad():
        encoded = family.encode(model, "image", visuals, layouts, signals=frozenset({SALIENCY}))
        patches = scores_by_patch(model, *visuals.values())
    # the processor writes the patches of a token one after the other
    expected = patches.unflatten(0, (-1, merge**2)).mean(-1).split([layout.tokens for layout in layouts])
    for saliency, wanted in zip(encoded.saliency, expected, strict=True):
        torch.testing.assert_close(saliency, wanted)


def test_tokens_left_out_by_the_processor(row: FamilyRow, model: Any) -> None:
    visuals, _ = row.videos(model, [[4], [3]], 0)
    family = family_of(model)
    layouts = family.layouts(model, "video", visuals, [])
    kept = visuals["video_compression_mask"]
    assert not kept.all()
    assert sum(layout.tokens for layout in layouts) == int(kept.sum())
    with torch.no_grad():
        encoded = family.encode(model, "video", visuals, layouts, signals=frozenset({SALIENCY}))
        stock = model.model.get_video_features(*list(visuals.values())[:3], return_dict=True).pooler_output
        patches = scores_by_patch(model, *list(visuals.values())[:3])
    assert torch.equal(torch.cat(encoded.features), torch.cat(list(stock))[kept])
    torch.testing.assert_close(torch.cat(encoded.saliency), patches.unflatten(0, (-1, 4)).mean(-1)[kept])
    [first, second] = (family.take(model, "video", visuals, layouts, [number]) for number in range(2))
    for alone, layout, count in ((first, layouts[0], 4), (second, layouts[1], 3)):
        [again] = family.layouts(model, "video", alone, [])
        assert torch.equal(again.source, layout.source)
        assert again.crops == count


def test_without_the_mask_all_tokens_count(row: FamilyRow, model: Any) -> None:
    """The prompt says what was left out; inputs that contradict it are refused."""
    inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
    with torch.no_grad(), AdaFV(keep=0.3)(model), pytest.raises(PromptError, match="visual tokens"):
        model(**{name: value for name, value in inputs.items() if name != "video_compression_mask"})


def test_budget_is_of_the_tokens_that_the_prompt_has(row: FamilyRow, model: Any) -> None:
    inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
    record = compress(model, inputs, keep=0.5).record
    assert record.tokens_before == [int(inputs["video_compression_mask"].sum())]
    assert record.tokens_after == [round(record.tokens_before[0] * 0.5)]

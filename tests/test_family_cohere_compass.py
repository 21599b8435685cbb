"""North Micro Vision: the saliency belongs to its tokens, and videos work where older stock releases fail with them."""

from typing import Any

import pytest
import torch
from models import IMAGE, VIDEO, FamilyRow, make_inputs
from oracle import encoded_by_prompt, masked_inputs, same_logits
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from adafv import AdaFV
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers import towers
from adafv.engines.transformers.families import family_of

compass = pytest.importorskip("rows.cohere_compass")
ROW = FamilyRow(
    "cohere-compass",
    compass.build,
    compass.images,
    compass.ROW.sizes,
    compass.videos,
    clips=(6, 4),
    token_types=compass.ROW.token_types,
    rotary=True,
)
GREEDY = {
    "max_new_tokens": 6,
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": [IMAGE, VIDEO],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return compass.build()


def plainly_received(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    """In place of the score: the plain attention received, so that the test is about places and not about what is salient."""
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1).mean(1)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_saliency_lines_up_with_the_attention_maps(model: Any, modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if modality == "image":
        visuals, _ = ROW.images(model, [[size] for size in ROW.sizes], 0)
    else:
        visuals, _ = compass.videos(model, [[count] for count in ROW.clips], 0)
    family = family_of(model)
    monkeypatch.setattr(towers, "patch_score", plainly_received)
    layouts = family.layouts(model, modality, visuals, [])
    maps: list[Tensor] = []

    def recording(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        if module is model.model.visual.blocks[-1].attn:
            maps.append(weights.mean(1).mean(1).flatten())
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("recording", recording)
    with torch.no_grad():
        encoded = family.encode(model, modality, visuals, layouts, signals=frozenset({SALIENCY}))
        monkeypatch.setattr(model.model.visual.config, "_attn_implementation_internal", "recording")
        getattr(model.model, f"get_{modality}_features")(*visuals.values(), return_dict=True)
    # the processor writes the four patches of a token one after the other, token by token in reading order
    expected = torch.cat(maps).unflatten(0, (-1, 4)).mean(-1).split([layout.tokens for layout in layouts])
    for saliency, wanted in zip(encoded.saliency, expected, strict=True):
        torch.testing.assert_close(saliency, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [([0], [1]), ([0, 0], [1, 1]), ([1, 0], [1, 1])], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_videos_in_every_release(model: Any, batch: tuple[list[int], list[int]], options: dict[str, Any]) -> None:
    """`generate` of transformers 5.18 encodes the images of this model, not its videos, and then fails."""
    images, clips = batch
    inputs = make_inputs(ROW, model, images, videos_per_prompt=clips)
    with torch.no_grad(), AdaFV(keep=0.3)(model) as adafv:
        logits, mask = model(**inputs).logits, adafv.last.keep_mask
        pruned = model.generate(**inputs, **GREEDY, **options)
    with torch.no_grad():
        expected = model(**masked_inputs(inputs, mask, row=ROW, model=model)).logits
        same_logits(logits, expected, inputs["attention_mask"], mask)
        if not compass.GENERATES_FROM_VIDEOS:
            with pytest.raises(ValueError, match="cannot specify both"):
                model.generate(**inputs, **GREEDY, **options)
        oracle = masked_inputs(inputs, adafv.last.keep_mask, row=ROW, model=model, generates=True)
        wanted = model.generate(**encoded_by_prompt(model, oracle), **GREEDY, **options)
    assert pruned.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(wanted.logits), atol=2e-5, rtol=2e-5)

"""GLM-4V: images and videos with one placeholder, and where stock transformers errs over beams."""

import pytest
import torch
from models import FAMILIES, IMAGE, FamilyRow, make_inputs, token_types, words
from oracle import encoded_by_prompt
from rows.glm4v import TOKENS
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv import AdaFV
from adafv.errors import PromptError

ROWS = [row for row in FAMILIES if row.name in ("glm-4v", "glm-4.6v", "glm-moe-4v", "glm-ocr")]
OPTIONS = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}


@pytest.fixture(params=ROWS, ids=[row.name for row in ROWS])
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


def test_stock_repeats_no_video(row: FamilyRow) -> None:
    """Beam search looks for the video's own token, of which there is none; the pruned model searches all the same."""
    model = row.build()
    inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
    with pytest.raises((RuntimeError, ValueError)):
        model.generate(**inputs, num_beams=2, **OPTIONS)
    with AdaFV(keep=0.3)(model):
        assert len(model.generate(**inputs, num_beams=2, **OPTIONS).logits) == OPTIONS["max_new_tokens"]


@pytest.mark.parametrize("pixels", ["all", "new"])
@pytest.mark.parametrize("first", ["image", "video"])
def test_an_image_and_a_video_in_turns(row: FamilyRow, first: str, pixels: str) -> None:
    """What the stock model cannot see in one call; it can where it is given both as encoded images."""
    model = row.build()
    image, [image_tokens] = row.images(model, [[row.sizes[0]]], 0)
    video, [video_tokens] = row.videos(model, [[4]], 1)
    [(old, old_tokens), (new, new_tokens)] = [(image, image_tokens), (video, video_tokens)][
        :: 1 if first == "image" else -1
    ]
    start = torch.tensor([[1, *words(3, 0), *old_tokens, *words(2, 1)]])
    options = {**OPTIONS, "do_sample": False}
    with AdaFV(keep=0.3)(model) as adafv:
        one = model.generate(input_ids=start, **token_types(row, start), **old, **options)
        tail = torch.tensor([[*words(3, 7), *new_tokens, *words(4, 8)]])
        conversation = torch.cat((one.sequences, tail), 1)
        types = token_types(row, conversation)
        shown = {**old, **new} if pixels == "all" else new
        two = model.generate(input_ids=conversation, past_key_values=one.past_key_values, **types, **shown, **options)
        kept = adafv.last.keep_mask
    assert adafv.last.tokens_before == [new_tokens.count(IMAGE)]
    sizes = {name: value for name, value in {**image, **video}.items() if name.endswith("thw")}
    positions, _ = model.model.get_rope_index(conversation, **types, **sizes)
    with torch.no_grad():
        encoded = [
            *model.model.get_image_features(*image.values(), return_dict=True).pooler_output,
            *model.model.get_video_features(*video.values(), return_dict=True).pooler_output,
        ][:: 1 if first == "image" else -1]
        logits = model(
            input_ids=conversation,
            attention_mask=kept.long(),
            position_ids=positions,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=encoded)},
        ).logits
    torch.testing.assert_close(two.logits[0], logits[:, -1], atol=2e-5, rtol=2e-5)


def test_a_video_without_its_marks_is_refused(row: FamilyRow) -> None:
    """Without the tokens that begin and end it, its placeholders are those of images, and there are none."""
    model = row.build()
    inputs = make_inputs(row, model, [0], videos_per_prompt=[1])
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == TOKENS["video_start_token_id"], 40)
    with AdaFV(keep=0.3)(model), pytest.raises(PromptError, match="placeholders"):
        model(**inputs)


def test_stock_repeats_several_images_in_the_wrong_order(row: FamilyRow) -> None:
    """With one image per prompt it is right, with two it is not; the pruned model is right in both cases."""
    model = row.build()
    for images, right in ((1, True), (2, False)):
        inputs = make_inputs(row, model, [images])
        types = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw")}
        kinds, sizes = types["mm_token_type_ids"], types["image_grid_thw"]
        positions, _ = model.model.get_rope_index(inputs["input_ids"], mm_token_type_ids=kinds, image_grid_thw=sizes)
        positions = torch.cat((torch.arange(inputs["input_ids"].shape[1]).expand(1, 1, -1), positions))
        options = {**OPTIONS, "num_beams": 2, "position_ids": positions}
        stock = model.generate(**inputs, **options)
        expected = model.generate(**encoded_by_prompt(model, inputs), **options)
        close = torch.allclose(stock.logits[0], expected.logits[0], atol=1e-4)
        assert close == right
        with AdaFV(keep=1.0)(model):
            mine = model.generate(**inputs, **{**OPTIONS, "num_beams": 2})
        torch.testing.assert_close(mine.logits[0], expected.logits[0], atol=1e-4, rtol=1e-4)

"""The same question on the same picture: the same tokens are kept, and the same is answered, as in transformers."""

from pathlib import Path
from typing import Any

import pytest
from both import NAMES, Both, checkpoint
from engines import alike, answers, chat, picture, sparing
from transformers import AutoConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from adafv.core import Budget
from adafv.engines.transformers.families.base import family_of
from adafv.engines.vllm.families.llava_next import anyres_layout_of
from adafv.errors import UnsupportedModelError

QUESTIONS = [
    ("bird", "What color is the banana?"),
    ("cars", "How many cars are there?"),
    ("key", "Is there a key?"),
    ("tree", "What color is the background?"),
]
SERVERS_KEEP = {"llava": 200, "llava_next": 500, "llava_onevision": 200}
"""By model type: more than LLaVA's pictures have, and between two pictures of different sizes in the other models."""
SIZES = {"tiny": (40, 30), "portrait": (300, 700), "landscape": (900, 350), "banner": (1600, 60), "huge": (2400, 2300)}


@pytest.fixture(scope="module", params=list(NAMES))
def both(request: pytest.FixtureRequest, checkpoints: Path) -> Both:
    return Both.of(request.param, checkpoints, {"keep": SERVERS_KEEP[request.param.replace("-", "_")]})


def placeholders(both: Both, content: list[Any], keep: int | float | None) -> list[int]:
    """The lengths of the runs of placeholders in the prompt; keep None: the server's."""
    placeholder = both.model.config.image_token_id
    tokens = answers(both.llm, [chat(*content)], keep, tokens=1)[0].prompt_token_ids
    return [len(run) for run in "".join("i" if token == placeholder else " " for token in tokens).split()]


@pytest.mark.parametrize("keep", sparing([1, 36, 0.1, 0.75, 1.0], 1, 0.1, 1.0))
def test_one_picture(both: Both, keep: int | float) -> None:
    for name, question in QUESTIONS:
        both.agree([picture(name), question], keep)


@pytest.mark.parametrize("shape", list(SIZES))
def test_a_picture_of_any_shape(both: Both, shape: str) -> None:
    shown = picture("mushrooms").resize(SIZES[shape])
    for keep in (12, 0.2, 1.0):
        both.agree([shown, "What color is the mushroom?"], keep)


def test_every_token_comes_from_the_same_patch(both: Both) -> None:
    if both.model.config.model_type == "llava":
        pytest.skip("one crop, whose tokens are its patches")
    front = MULTIMODAL_REGISTRY.create_processor(both.llm.model_config).info
    for size in SIZES.values():
        shown = picture("bird").resize(size)
        inputs = both.processor(images=[shown], text="<image>", return_tensors="pt")
        [theirs] = family_of(both.model).layouts(both.model, "image", inputs, [])
        height_and_width = inputs["image_sizes"][0]
        [in_worker] = both.llm.apply_model(
            lambda model, size=height_and_width: anyres_layout_of(model.config, model.packing, size)
        )
        in_front = front.layout({"image_sizes": height_and_width})
        for ours in (in_worker, in_front):
            assert ours.source.tolist() == theirs.source.tolist()
            assert (ours.crops, ours.rows, ours.columns) == (theirs.crops, theirs.rows, theirs.columns)
            assert ours.tiling == theirs.tiling


def test_two_pictures_in_one_prompt(both: Both) -> None:
    both.agree([picture("bird"), picture("cars"), "How many cars are there?"], 12)


def test_two_pictures_of_different_shapes_in_one_prompt(both: Both) -> None:
    """The smaller one is sent with empty crops."""
    small, large = picture("bird").resize((60, 130)), picture("cars").resize((800, 800))
    both.agree([small, "Is there a bird?", large, "How many cars are there?"], 0.2)
    both.agree([large, small, "How many cars are there?"], 12)


def test_the_question_may_stand_in_front(both: Both) -> None:
    both.agree(["What color is the banana?", picture("bird")], 12)


def test_without_words_saliency_chooses(both: Both) -> None:
    # A word that the models do not know; the small LLaVA-OneVision has the token of such words for videos.
    unknown = " " if both.model.config.model_type == "llava_onevision" else "hello"
    for keep in (12, 0.2):
        both.agree([picture("cars").resize((500, 260))], keep, "saliency")
        both.agree([picture("bird"), " ", picture("key").resize((60, 130)), unknown], keep, "saliency")


def test_the_prompt_holds_as_many_placeholders_as_tokens_stay(both: Both) -> None:
    small, large = picture("bird").resize((150, 60)), picture("cars")
    two = [small, "Is there a bird, or are there", large, "cars?"]
    whole = placeholders(both, two, 1.0)
    assert len(whole) == 2
    assert min(whole) > 40
    assert placeholders(both, [large, "How many cars are there?"], 7) == [7]
    assert placeholders(both, two, 7) == [7, 7]
    assert placeholders(both, two, 0.3) == [Budget(0.3).tokens(count) for count in whole]


def test_a_number_of_tokens_is_an_upper_bound(both: Both) -> None:
    """For each picture by itself, whoever gave the number: the smaller one keeps all that it has."""
    small, large = picture("bird").resize((150, 60)), picture("cars")
    two = [small, "Is there a bird?", large, "How many cars are there?"]
    whole, servers = placeholders(both, two, 1.0), SERVERS_KEEP[both.model.config.model_type]
    assert min(whole) < servers
    if both.model.config.model_type != "llava":  # whose pictures all have one size
        assert max(whole) > servers
        both.agree(two, servers)
    for keep, most in ((None, servers), (min(whole) + 1, min(whole) + 1), (10**6, 10**6)):
        assert placeholders(both, two, keep) == [min(most, count) for count in whole]
    everything, above = (answers(both.llm, [chat(*two)], keep)[0] for keep in (1.0, 10**6))
    assert alike(above, everything)


def test_a_packing_that_vllm_does_not_know_is_refused(checkpoints: Path) -> None:
    from adafv.engines.vllm.families.llava_onevision import AdaFVLlavaOnevisionForConditionalGeneration as Pruned

    config = AutoConfig.from_pretrained(checkpoint("llava-onevision", checkpoints))
    Pruned.check_config(config)
    config.vision_aspect_ratio = "anyres_max_4"
    with pytest.raises(UnsupportedModelError, match="anyres_max_4"):
        Pruned.check_config(config)

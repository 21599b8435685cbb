"""What a request wants of an image: it reaches the worker as it is, and no cache takes it for something else."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from adafv import bundled
from adafv.core.budget import MOST_TOKENS, Budget
from adafv.core.crops import Crops
from adafv.engines.serving.request import Reader, Wish, budget_from, digest
from adafv.engines.serving.settings import ServerSettings
from adafv.errors import PromptError
from adafv.prompts.text import ChatTemplate

KEEPS = st.integers(1, MOST_TOKENS) | st.floats(0.0, 1.0, exclude_min=True)
TEXTS = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
CROPS = st.sampled_from(["all", "thumbnail", 1, 2, 10**9 - 1]).map(Crops.of)
WISHES = st.builds(Wish, st.builds(Budget, KEEPS), TEXTS, CROPS)
NAMES = st.text(max_size=5)
IDENTITIES = st.sampled_from([ServerSettings.of({"keep": 1, "method": name}).identity for name in ("adafv", "text")])


def exact(wish: Wish) -> tuple[Any, ...]:
    """Of which two are equal only if nothing differs; to Python 1 == 1.0 == True."""
    return type(wish.budget.keep), wish.budget, wish.text, wish.crops


@given(WISHES)
def test_a_wish_reaches_the_worker_as_it_is(wish: Wish) -> None:
    text, budget = wish.encoded()
    kept, crops = budget_from(budget)
    assert crops == wish.crops
    assert (kept.keep, type(kept.keep)) == (wish.budget.keep, type(wish.budget.keep))
    assert tuple(text.tolist()) == wish.text
    assert text.dtype == budget.dtype == torch.long  # vLLM converts floating-point inputs to the model's precision
    assert budget.shape == (3,)
    stacked = torch.stack([budget, Wish(Budget(1), ()).encoded()[1]])  # as those of several images are
    assert budget_from(stacked[0])[0].keep == wish.budget.keep


@given(WISHES, st.integers(1, 10_000))
def test_the_worker_keeps_what_the_front_wrote_placeholders_for(wish: Wish, available: int) -> None:
    assert budget_from(wish.encoded()[1])[0].tokens(available) == wish.budget.tokens(available)


@given(WISHES, WISHES, NAMES, NAMES, IDENTITIES, IDENTITIES)
def test_keys_differ_where_anything_does(
    first: Wish, second: Wish, image: str, other: str, identity: str, changed: str
) -> None:
    for wish, name, settings in ((first, image, identity), (first, other, identity), (second, image, changed)):
        same = (exact(wish), name, settings) == (exact(first), image, identity)
        assert (wish.key(name, settings) == first.key(image, identity)) == same


def test_a_key_knows_the_type_of_a_budget() -> None:
    budgets = [Budget(1), Budget(1.0), Budget(0.1), Budget(0.1 + 2**-56)]
    assert len({Wish(budget, (5,)).key("image", "") for budget in budgets}) == len(budgets)


def test_a_key_does_not_run_its_parts_together() -> None:
    keys = [
        Wish(Budget(1), text).key(image, "x")
        for text, image in (((1, 23), "a"), ((12, 3), "a"), ((123,), "a"), ((1, 23), 'a", "x'))
    ]
    assert len(set(keys)) == len(keys)


def test_keys_are_the_same_in_every_process() -> None:
    """The front and the workers may be several, and a cache may outlive them. Python's own hashes differ in the other."""
    program = (
        "from adafv.engines.serving.request import Budget, Wish, digest;"
        "print(Wish(Budget(0.1), (7, 8)).key('image', 'settings'), digest('image').sum().item(), hash('image'))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.split()
    assert said[:-1] == [Wish(Budget(0.1), (7, 8)).key("image", "settings"), str(digest("image").sum().item())]
    assert said[-1] != str(hash("image"))


def test_an_images_name_travels_in_full() -> None:
    digests = [bytes(digest(name).tolist()) for name in ("a", "b", "ab", "A", "ä" * 1000)]
    assert len(set(digests)) == 5
    assert {len(each) for each in digests} == {32}


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(Path(bundled.__file__).parent / "llava")


def read(processor: Any, scope: str, chat: list[tuple[str, list[str | None]]]) -> list[str]:
    """The words that count for each image of a chat; None is an image."""
    messages = [
        {
            "role": role,
            "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
        }
        for role, parts in chat
    ]
    tokens = processor.tokenizer(processor.apply_chat_template(messages, add_generation_prompt=True)).input_ids
    words = processor.tokenizer
    ends = frozenset({words.eos_token_id})
    special = ends | {words.bos_token_id, words.pad_token_id}
    template = ChatTemplate.of(processor) if scope == "question" else None
    reader = Reader(words.convert_tokens_to_ids("<image>"), ends, special - {None}, scope, template)
    images = sum(part is None for _, parts in chat for part in parts)
    return [words.decode(list(text)) for text in reader.texts(tokens, images)]


TURN = ("user", [None, "is there a key?"])
CHAT = [TURN, ("assistant", ["yes"]), ("user", ["what color is it?"])]
SECOND = [TURN, ("assistant", ["yes"]), ("user", [None, "what color is it?"])]


def test_the_question_is_that_of_the_images_own_turn(processor: Any) -> None:
    assert read(processor, "question", [TURN]) == read(processor, "question", CHAT) == ["is there a key?"]
    assert read(processor, "question", SECOND) == ["is there a key?", "what color is it?"]
    assert read(processor, "turn", [TURN]) == read(processor, "turn", CHAT) == read(processor, "turn", SECOND)[:1]


def test_everything_after_an_image_grows_with_the_chat(processor: Any) -> None:
    assert read(processor, "after", [TURN]) != read(processor, "after", CHAT)


def test_images_of_one_turn_share_its_question(processor: Any) -> None:
    assert read(processor, "question", [("user", [None, "is there", None, "a key?"])]) == ["is there a key?"] * 2


@pytest.mark.parametrize(("content", "images"), [([None, None, "a"], 1), ([None, "a"], 2), (["a"], 1)])
def test_placeholders_must_be_as_many_as_images(processor: Any, content: list[str | None], images: int) -> None:
    reader = Reader(5, frozenset(), frozenset(), "turn", None)
    with pytest.raises(PromptError, match=f"{content.count(None)} image placeholders for {images} image"):
        reader.texts([5 if part is None else 7 for part in content], images)


@pytest.mark.parametrize("content", [[None], [None, ""], [None, " \n "], ["", None], [None, "hello"]])
def test_an_image_that_no_word_counts_for_has_no_text(processor: Any, content: list[str | None]) -> None:
    """ "hello" is no word of the bundled model's closed vocabulary."""
    assert read(processor, "question", [("user", content)]) == [""]
    assert read(processor, "question", [TURN, ("assistant", ["yes"]), ("user", content)]) == ["is there a key?", ""]


def test_a_key_tells_words_from_none() -> None:
    assert Wish(Budget(8), ()).key("image", "x") != Wish(Budget(8), (0,)).key("image", "x")

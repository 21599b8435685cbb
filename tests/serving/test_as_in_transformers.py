"""The same question on the same picture: the same tokens are kept, and the same is answered, as in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import bundled
from engines import answers, chat, choices, engine, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from adafv import AdaFV

QUESTIONS = [
    ("bird", "What color is the banana?"),
    ("cars", "How many cars are there?"),
    ("key", "Is there a key?"),
    ("tree", "What color is the background?"),
]
PICTURES = ("bird", "boats", "cars", "key", "mushrooms", "tree")
NAMES = {"llava": "LlavaForConditionalGeneration", "llava-next": "LlavaNextForConditionalGeneration"}


@pytest.fixture(scope="module", params=list(NAMES))
def served(request: pytest.FixtureRequest, checkpoints: Path) -> Any:
    folder = bundled(request.param, checkpoints)
    return folder, engine(folder, NAMES[request.param], {"keep": 16}, limit_mm_per_prompt={"image": 2})


def in_transformers(
    folder: Path, pictures: list[Any], messages: Any, keep: int | float
) -> tuple[list[list[int]], list[int], Any]:
    """(kept tokens per image, tokens of the answer, log probabilities of the first token)."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    with torch.no_grad(), AdaFV(keep=keep, processor=processor)(model) as adafv:
        output = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    kept = [] if adafv.last is None else [indices.tolist() for indices in adafv.last.kept]
    return kept, new.tolist(), output.logits[0][0].log_softmax(-1)


def ask_both(served: Any, content: list[str], keep: int | float) -> None:
    """Names of pictures and words, as one turn; both engines must keep the same and say the same."""
    folder, llm = served
    shown = [picture(part) if part in PICTURES else part for part in content]
    pictures = [part for part in shown if not isinstance(part, str)]
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in shown],
        }
    ]
    kept, answer, first = in_transformers(folder, pictures, messages, keep)
    with choices(llm) as chosen:
        output = answers(llm, [chat(*shown)], keep)[0].outputs[0]
    assert list(output.token_ids) == answer
    if keep != 1.0:
        assert chosen == kept
    for token, given in output.logprobs[0].items():
        assert given.logprob == pytest.approx(float(first[token]), abs=2e-4)


@pytest.mark.parametrize("keep", [8, 36, 0.1, 1.0])
def test_one_picture(served: Any, keep: int | float) -> None:
    for name, question in QUESTIONS:
        ask_both(served, [name, question], keep)


def test_two_pictures_in_one_prompt(served: Any) -> None:
    ask_both(served, ["bird", "cars", "How many cars are there?"], 12)


def test_the_question_may_stand_in_front(served: Any) -> None:
    ask_both(served, ["What color is the banana?", "bird"], 12)

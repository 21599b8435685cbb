"""Chats in batches give what the model gives for each alone; likelihoods are those of the model's own decoding."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from adafv.asking.failures import UsageError
from adafv.asking.padding import Prompt, in_one_batch
from adafv.asking.session import Session
from adafv.bundled import bundled_model
from adafv.errors import ImageError
from adafv.evaluation.batched import BatchedModel, Chat

PICTURES = [
    Image.open(path).convert("RGB") for path in sorted((bundled_model("llava").parent / "samples").glob("*.png"))
]


@pytest.fixture(scope="module", params=["bundled", "bundled-next"])
def session(request: pytest.FixtureRequest) -> Session:
    return Session.load(request.param, "float32", torch.device("cpu"))


def chats() -> list[Chat]:
    """Pictures of other shapes, which LLaVA-NeXT cuts into other numbers of crops; two pictures; none."""
    bird, boats, cars = PICTURES[:3]
    wide, high = boats.resize((240, 90)), cars.resize((80, 230))
    return [
        Chat.of("what color is the banana?", [bird]),
        Chat.of("how many boats are there?", [wide]),
        Chat.of("is there a red key?"),
        Chat.of("is there a car in the picture?", [high]),
        Chat.of("what is on the left of the tree?", [boats.resize((150, 150))]),
        Chat.of("is there a bird?", [bird, cars]),
    ]


def alone(session: Session, chat: Chat, pruner: Any, **options: Any) -> tuple[Any, int]:
    """(what `generate` returns, length of the prompt) as anybody would ask."""
    prompt = session.processor.apply_chat_template(list(chat.messages), add_generation_prompt=True)
    pictures = {"images": list(chat.images)} if chat.images else {}
    inputs = session.processor(**pictures, text=prompt, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True} | options
    if pruner is None:
        return session.model.generate(**inputs, **options), inputs["input_ids"].shape[1]
    with pruner(session.model):
        return session.model.generate(**inputs, **options), inputs["input_ids"].shape[1]


@pytest.mark.parametrize("keep", [10, pytest.param("20%", marks=pytest.mark.release), None])
def test_batches_answer_as_one_alone(session: Session, keep: Any) -> None:
    pruner = None if keep is None else session.pruner("adafv", keep)
    model = BatchedModel(session, pruner, 3)
    found = dict(model.answers(chats(), max_new_tokens=8))
    assert sorted(found) == list(range(6))
    for number, chat in enumerate(chats()):
        output, length = alone(session, chat, pruner)
        text = session.processor.tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True)
        assert found[number].text == text.strip()
        assert found[number].tokens == output.sequences.shape[1] - length
    assert model.tally.images == (0 if pruner is None else 6)
    if keep == 10:
        assert model.tally.after == 60 < model.tally.before


@pytest.mark.parametrize("text", ["question", "after"])
def test_likelihoods_are_those_of_decoding(session: Session, text: str) -> None:
    """With "after", all behind the picture counts, so an answer written there in advance would change what is kept."""
    pruner = session.pruner("adafv", 10, text)
    asked, expected = [], []
    tokenizer = session.processor.tokenizer
    for chat in chats()[:4]:
        output, length = alone(session, chat, pruner, output_logits=True)
        tokens = output.sequences[0, length:-1]  # less the token that ends it
        logs = torch.cat(output.logits).log_softmax(-1)[: len(tokens)]
        answer = " " + tokenizer.decode(tokens)
        assert tokenizer(answer, add_special_tokens=False)["input_ids"] == tokens.tolist()
        asked.append((chat, ["key", answer, "a banana"]))
        expected.append(logs.gather(1, tokens.unsqueeze(1)).sum().item())
    found = dict(BatchedModel(session, pruner, 3).likelihoods(asked))
    for number, total in enumerate(expected):
        key, answer, banana = found[number]
        assert answer.total == pytest.approx(total, abs=1e-4)
        assert answer.greedy
        assert answer.mean == pytest.approx(total / answer.tokens, abs=1e-4)
        assert (key.tokens, banana.tokens) == (1, 2)
        assert not key.greedy
        assert max(key.total, banana.total) < 0


def test_until(session: Session) -> None:
    model = BatchedModel(session, session.pruner("adafv", 10), 4)
    whole = {number: written for number, written in model.answers(chats()[:3], max_new_tokens=8) if written.text}
    cut = dict(model.answers(chats()[:3], ["o", "e"], max_new_tokens=8))
    assert {number: re.split("[oe]", written.text)[0].strip() for number, written in whole.items()} == {
        number: cut[number].text for number in whole
    }
    assert any(cut[number].text != whole[number].text for number in whole)


class TestRefused:
    def test_a_placeholder_among_the_words(self, session: Session) -> None:
        with pytest.raises(UsageError, match=r"^number 7: the question holds <image>"):
            BatchedModel(session, None).prompt(Chat.of("what is <image>?", PICTURES[:1], "number 7"))

    def test_a_picture_that_would_be_scaled_to_a_giant(self, session: Session) -> None:
        with pytest.raises(ImageError, match=r"^number 8: the picture"):
            BatchedModel(session, None).prompt(Chat.of("is there a key?", [Image.new("RGB", (2, 30_000))], "number 8"))

    def test_half_a_letter(self, session: Session) -> None:
        with pytest.raises(UsageError, match="not text"):
            BatchedModel(session, None).prompt(Chat.of("is there a \ud800?"))

    def test_an_empty_answer(self, session: Session) -> None:
        with pytest.raises(UsageError, match="empty"):
            next(BatchedModel(session, None).likelihoods([(Chat.of("is there a key?"), [""])]))


def test_joined_tokens_belong_to_the_answer() -> None:
    """A tokenizer may join the end of the prompt with the start of the answer; each length of prompt is run for itself."""
    letters = {"a": 1, "b": 2, "c": 3, "x": 4, "ab": 5}

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [letters[part] for part in re.findall("ab|.", text)]}

    model = BatchedModel(SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer)), None)  # type: ignore[arg-type]
    ids = torch.tensor([[9, 4, 1]])
    prompt = Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids), "sizes": torch.ones(1, 2)}, "xa")
    runs = model._runs(0, prompt, ["b", "c", "bc", "cc", "x"])
    assert [(run.prompt.inputs["input_ids"].tolist(), run.answers) for run in runs] == [
        ([[9, 4]], [(2, [5, 3]), (0, [5])]),
        ([[9, 4, 1]], [(3, [3, 3]), (1, [3]), (4, [4])]),
    ]
    assert all(run.prompt.inputs["sizes"].shape == (1, 2) for run in runs)


def test_a_prompt_without_a_mask_gets_one() -> None:
    """Nothing else would tell what fills it up from what it says."""
    prompts = [Prompt({"input_ids": torch.tensor([row]), "types": torch.ones(1, len(row))}) for row in ([5], [6, 7, 8])]
    found = in_one_batch(prompts, 3)
    assert found["input_ids"].tolist() == [[3, 3, 5], [6, 7, 8]]
    assert found["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert found["types"].tolist() == [[0, 0, 1], [1, 1, 1]]

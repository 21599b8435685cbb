"""Two workers that share the heads of tower and language model keep and say what one does, and what transformers does.

What is kept is looked at in each of them, not only in the first, whose choice goes to the other: kept tokens that differ
would mix two sets of them in every layer of the language model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from both import Both
from engines import alike, answers, chat, choices, engine, picture, sparing
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.distributed import cleanup_dist_env_and_memory
from workers import kept_by_each, llava, own_heads_alone, second_worker_chooses_others, several_workers

from adafv import AdaFV

QUESTIONS = [
    ("bird", "What color is the banana?"),
    ("cars", "How many cars are there?"),
    ("key", "Is there a key?"),
    ("tree", "What color is the background?"),
]
BUDGETS = [8, 0.25, 1.0]
WITH_OWN_HEADS, WITH_ANOTHER_CHOICE = 24, 25
"""Budgets that are asked for once, so that no cache of vLLM's has seen them."""


def ask(llm: Any, keep: int | float) -> list[Any]:
    """All questions in one batch, and answers long enough that an error in the cache of keys and values would show."""
    return answers(llm, [chat(picture(name), question) for name, question in QUESTIONS], keep, tokens=32)


@dataclass
class Served:
    """One checkpoint, by one worker and by two."""

    folder: Path
    kept: dict[int | float, list[list[int]]]
    """What one worker kept, per budget."""
    said: dict[int | float, list[Any]]
    """What one worker answered, per budget."""
    two: Any


@pytest.fixture(scope="module", params=sparing(["clip", "siglip"], "clip"))
def served(request: pytest.FixtureRequest, checkpoints: Path) -> Iterator[Served]:
    folder = llava(request.param, checkpoints)
    kept, said = {}, {}
    options = {"keep": 16, "tower_cache_mb": 0}
    llm = engine(folder, "LlavaForConditionalGeneration", options)
    for keep in [*BUDGETS, WITH_OWN_HEADS, WITH_ANOTHER_CHOICE]:
        with choices(llm) as kept[keep]:
            said[keep] = ask(llm, keep)
    del llm
    cleanup_dist_env_and_memory()
    with several_workers(folder, tensor_parallel_size=2) as two:
        yield Served(folder, kept, said, two)


@pytest.mark.parametrize("keep", BUDGETS)
def test_as_one_worker(served: Served, keep: int | float) -> None:
    found = ask(served.two, keep)
    assert kept_by_each(served.two) == [served.kept[keep]] * 2
    assert all(alike(*pair) for pair in zip(found, served.said[keep], strict=True))


@pytest.mark.parametrize("keep", BUDGETS)
def test_as_in_transformers(served: Served, keep: int | float) -> None:
    """One worker does, and so two do."""
    both = Both(
        None, AutoModelForImageTextToText.from_pretrained(served.folder), AutoProcessor.from_pretrained(served.folder)
    )
    for (name, question), kept, output in zip(QUESTIONS, served.kept[keep], served.said[keep], strict=True):
        pruner = AdaFV(keep=keep, processor=both.processor)
        expected, answer, first = both.in_transformers([picture(name), question], pruner)
        assert keep == 1.0 or expected == [kept]
        assert list(output.outputs[0].token_ids[: len(answer)]) == answer
        for token, given in output.outputs[0].logprobs[0].items():
            assert given.logprob == pytest.approx(float(first[token]), abs=1e-4)


def test_a_worker_scores_by_all_heads(served: Served) -> None:
    with own_heads_alone(served.two):
        ask(served.two, WITH_OWN_HEADS)
    first, second = kept_by_each(served.two)
    assert first == second
    assert first != served.kept[WITH_OWN_HEADS]


def test_the_first_worker_chooses_for_the_second(served: Served) -> None:
    with second_worker_chooses_others(served.two):
        found = ask(served.two, WITH_ANOTHER_CHOICE)
    assert kept_by_each(served.two) == [served.kept[WITH_ANOTHER_CHOICE]] * 2
    assert all(alike(*pair) for pair in zip(found, served.said[WITH_ANOTHER_CHOICE], strict=True))

"""No cache gives a wrong answer, and none that could help is missed.

vLLM has three (processed images, encoded images, keys and values of the prompt), and adafv one (images before pruning).
"""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import bundled
from engines import alike, answers, chat, choices, engine, generate, picture, prompt, tower_runs

from adafv.core import Budget
from adafv.core.encoded import TowerCache
from adafv.engines.serving.request import Wish
from adafv.errors import BudgetError, UnsupportedCallError

PICTURES = ("bird", "cars", "key")
QUESTIONS = (
    "What color is the banana?",
    "How many cars are there?",
    "Is there a key?",
    "What color is the background?",
)
KEEPS = (8, 0.1)
Case = tuple[str, str, float]
CASES: list[Case] = list(itertools.product(PICTURES, QUESTIONS, KEEPS))
random.Random(0).shuffle(CASES)

NAME = "LlavaForConditionalGeneration"
BLOCK = 32
"""Tokens that the prefix cache knows as one; no smaller one fits vLLM's attention on a CPU."""
TOKENS = 144
"""Of an image, before pruning."""


@dataclass(frozen=True)
class Answered:
    output: Any
    kept: list[int] | None
    """None: the image came from one of vLLM's caches."""


def ask(llm: Any, case: Case) -> Answered:
    """One request, alone."""
    name, question, keep = case
    with choices(llm) as chosen:
        output = generate(llm, [prompt(llm, chat(picture(name), question), keep)])[0]
    assert len(chosen) <= 1
    return Answered(output, chosen[0] if chosen else None)


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> Path:
    return bundled("llava", checkpoints)


@pytest.fixture(scope="module")
def uncached(model: Path) -> Any:
    """An engine that remembers nothing."""
    return engine(
        model,
        NAME,
        {"keep": 16, "tower_cache_mb": 0},
        limit_mm_per_prompt={"image": 3},
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        block_size=BLOCK,
    )


@pytest.fixture(scope="module")
def expected(uncached: Any) -> dict[Case, Answered]:
    with tower_runs(uncached) as runs:
        answers = {case: ask(uncached, case) for case in CASES}
    assert runs == [1] * len(CASES), "a cache was on"
    kept = {(case[0], tuple(answer.kept or ())) for case, answer in answers.items()}
    assert len(kept) == len(CASES), "cases that keep the same tokens of a picture prove nothing"
    return answers


@pytest.fixture(scope="module")
def cached(model: Path) -> Any:
    """An engine with every cache."""
    return engine(model, NAME, limit_mm_per_prompt={"image": 3}, enable_prefix_caching=True, block_size=BLOCK)


def forget(llm: Any) -> None:
    """Empty all of its caches."""

    def forget_images(model: Any) -> None:
        model.adafv_cache = TowerCache(model.adafv_cache.capacity)

    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    llm.apply_model(forget_images)


@pytest.fixture
def fresh(cached: Any) -> Any:
    """The same, with nothing in its caches."""
    forget(cached)
    return cached


def test_the_same_answers_with_caches_as_without(fresh: Any, expected: dict[Case, Answered]) -> None:
    """First every case is new to the caches, though its picture, its question and its budget are not; then none is."""
    with tower_runs(fresh) as runs:
        for case in CASES:
            answer = ask(fresh, case)
            assert answer.kept == expected[case].kept, case
            assert alike(answer.output, expected[case].output), case
        assert sum(runs) == len(PICTURES)
        for case in reversed(CASES):
            answer = ask(fresh, case)
            assert answer.kept is None
            assert alike(answer.output, expected[case].output), case
            assert answer.output.num_cached_tokens == len(answer.output.prompt_token_ids) // BLOCK * BLOCK
        assert sum(runs) == len(PICTURES)


def test_the_same_answers_in_batches(fresh: Any, expected: dict[Case, Answered]) -> None:
    """Budgets, questions and pictures in one step, some of them twice."""
    asked = [*CASES, *CASES[::3]]
    random.Random(1).shuffle(asked)
    outputs = generate(fresh, [prompt(fresh, chat(picture(name), question), keep) for name, question, keep in asked])
    assert [case for case, output in zip(asked, outputs, strict=True) if not alike(output, expected[case].output)] == []


def no_key(wish: Wish, key: Callable[[Wish, str, str], str], image: str, identity: str) -> str:
    return image


def no_text(wish: Wish, key: Callable[[Wish, str, str], str], image: str, identity: str) -> str:
    return key(replace(wish, text=()), image, identity)


def no_budget(wish: Wish, key: Callable[[Wish, str, str], str], image: str, identity: str) -> str:
    return key(replace(wish, budget=Budget(1.0)), image, identity)


@pytest.mark.parametrize(
    ("broken", "distinct"),
    [
        (no_key, len(PICTURES)),
        (no_text, len(PICTURES) * len(KEEPS)),
        (no_budget, len(PICTURES) * len(QUESTIONS)),
    ],
)
def test_without_the_key_the_caches_are_wrong(
    fresh: Any, expected: dict[Case, Answered], monkeypatch: pytest.MonkeyPatch, broken: Any, distinct: int
) -> None:
    """The tests above can fail: whatever is left out of the key, who asks first decides for all whom it cannot tell apart."""
    key = Wish.key
    monkeypatch.setattr(Wish, "key", lambda wish, image, identity: broken(wish, key, image, identity))
    answers = {case: ask(fresh, case) for case in CASES}
    assert sum(answer.kept is not None for answer in answers.values()) == distinct
    wrong = [case for case in CASES if not alike(answers[case].output, expected[case].output)]
    assert len(wrong) == len(CASES) - distinct
    assert any(answers[case].output.outputs[0].text != expected[case].output.outputs[0].text for case in wrong)


def turn_two(llm: Any, first: list[Any], second: list[Any], keep: float) -> tuple[Any, int, Any]:
    """(prompt of the second turn, its first tokens that the engine has read or written already, output)."""
    one = generate(llm, [prompt(llm, first, keep)])[0]
    answer = {"role": "assistant", "content": one.outputs[0].text.strip()}
    asked = prompt(llm, [*first, answer, *second], keep)
    two = generate(llm, [asked])[0]
    read = [*one.prompt_token_ids, *one.outputs[0].token_ids[:-1]]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(read, two.prompt_token_ids, strict=False))
    return asked, len(list(same)), two


def test_turn_two_reads_the_new_words_alone(fresh: Any, uncached: Any) -> None:
    first = chat(picture("cars"), QUESTIONS[1])
    with tower_runs(fresh) as runs, choices(fresh) as chosen:
        asked, known, output = turn_two(fresh, first, chat(QUESTIONS[3]), 60)
    assert runs == [1]
    assert len(chosen) == 1  # nothing is even chosen again
    assert known >= 2 * BLOCK
    assert output.num_cached_tokens == known // BLOCK * BLOCK
    assert alike(output, generate(uncached, [asked])[0])


def test_turn_two_with_another_picture(fresh: Any, uncached: Any) -> None:
    first, second = chat(picture("cars"), QUESTIONS[1]), chat(picture("key"), QUESTIONS[2])
    with tower_runs(fresh) as runs, choices(fresh) as chosen:
        asked, known, output = turn_two(fresh, first, second, 60)
    assert runs == [1, 1]
    assert len(chosen) == 2
    assert output.num_cached_tokens == known // BLOCK * BLOCK >= 2 * BLOCK
    assert alike(output, generate(uncached, [asked])[0])


def test_turn_two_with_another_budget(fresh: Any, uncached: Any) -> None:
    asked, _, _ = turn_two(fresh, chat(picture("cars"), QUESTIONS[1]), chat(QUESTIONS[3]), 60)
    asked["mm_processor_kwargs"] = {"adafv": {"keep": 59}}
    output = generate(fresh, [asked])[0]
    assert output.num_cached_tokens == 0
    assert alike(output, generate(uncached, [asked])[0])


@pytest.fixture(scope="module")
def narrow(model: Path) -> Any:
    """An engine that remembers two and a half pictures, and compares them with everything behind them."""
    width = json.loads((model / "config.json").read_text())["text_config"]["hidden_size"]
    size = TOKENS * (width + 1) * 4
    options = {"keep": 16, "text": "after", "tower_cache_mb": 2.5 * size / 2**20}
    llm = engine(model, NAME, options, enable_prefix_caching=True, block_size=BLOCK)
    assert llm.apply_model(lambda model: model.adafv_cache.capacity) == [int(2.5 * size)]
    return llm


def test_everything_behind_a_picture_changes_in_turn_two(narrow: Any) -> None:
    """So that text is not the default: nothing can be reused but the encoded picture."""
    forget(narrow)
    with tower_runs(narrow) as runs, choices(narrow) as chosen:
        asked, known, output = turn_two(narrow, chat(picture("cars"), QUESTIONS[1]), chat(QUESTIONS[3]), 60)
    assert runs == [1]
    assert len(chosen) == 2
    assert known >= 2 * BLOCK
    assert chosen[0] != chosen[1]
    assert output.num_cached_tokens == 0
    forget(narrow)
    assert alike(output, generate(narrow, [asked])[0])


def test_the_cache_of_encoded_pictures_is_bounded(narrow: Any) -> None:
    forget(narrow)
    names = ("bird", "boats", "cars", "key", "mushrooms")
    sizes = []
    with tower_runs(narrow) as runs:
        for question in QUESTIONS[:2]:
            for name in names:
                ask(narrow, (name, question, 8))
                sizes += narrow.apply_model(lambda model: (len(model.adafv_cache), model.adafv_cache.bytes))
        assert len(runs) == 2 * len(names)
        for name in names[-2:]:
            ask(narrow, (name, QUESTIONS[2], 8))
        assert len(runs) == 2 * len(names)
    assert [images for images, _ in sizes] == [1] + [2] * (2 * len(names) - 1)
    assert {size / images for images, size in sizes} == {sizes[0][1]}


def test_new_weights_encode_anew(fresh: Any) -> None:
    with tower_runs(fresh) as runs:
        ask(fresh, ("bird", QUESTIONS[0], 8))
        ask(fresh, ("bird", QUESTIONS[1], 8))
        assert runs == [1]
        fresh.apply_model(lambda model: model.load_weights(iter(())))
        ask(fresh, ("bird", QUESTIONS[2], 8))
        assert runs == [1, 1]


def test_a_picture_is_encoded_once_in_one_prompt(fresh: Any, uncached: Any) -> None:
    twice = prompt(fresh, chat(picture("tree"), picture("tree"), picture("cars"), QUESTIONS[1]), 12)
    with tower_runs(fresh) as runs:
        output = generate(fresh, [twice])[0]
    assert sum(runs) == 2
    assert alike(output, generate(uncached, [twice])[0])


def test_a_picture_is_encoded_once_in_one_step(fresh: Any, expected: dict[Case, Answered]) -> None:
    cases = [case for case in CASES if case[0] == "bird"]
    with tower_runs(fresh) as runs:
        outputs = generate(fresh, [prompt(fresh, chat(picture(name), words), keep) for name, words, keep in cases])
    assert runs == [1]
    assert all(alike(output, expected[case].output) for case, output in zip(cases, outputs, strict=True))


def test_pictures_of_one_prompt_are_not_mixed_up(fresh: Any, uncached: Any) -> None:
    """Neither where some of them come from a cache."""
    for names in (("bird",), ("bird", "cars"), ("cars", "bird"), ("key", "cars", "tree"), ("tree", "key", "bird")):
        asked = prompt(fresh, chat(*map(picture, names), QUESTIONS[1]), 12)
        assert alike(generate(fresh, [asked])[0], generate(uncached, [asked])[0]), names


def test_a_refused_budget_leaves_nothing_behind(fresh: Any, uncached: Any) -> None:
    asked = chat(picture("bird"), QUESTIONS[0])
    for _ in range(2):
        with pytest.raises(BudgetError, match="no image has so many"):
            generate(fresh, [prompt(fresh, asked, 2**31)])
    whole = [generate(fresh, [prompt(fresh, asked, keep)])[0] for keep in (TOKENS, TOKENS + 1, 1.0)]
    assert alike(whole[0], whole[1])
    assert alike(whole[0], whole[2])
    assert alike(whole[0], generate(uncached, [prompt(uncached, asked, 1.0)])[0])


def test_words_and_none_are_told_apart(fresh: Any, uncached: Any) -> None:
    """Of one picture at one budget; "hello" is no word of the model, so nothing but the prompt's length differs there."""
    asked = [[picture("bird"), QUESTIONS[0]], [picture("bird")], [picture("bird"), "hello"]]
    kept = []
    for content in [*asked, *asked[::-1]]:
        wish = prompt(fresh, chat(*content), 8)
        with choices(fresh) as chosen:
            output = generate(fresh, [wish])[0]
        assert alike(output, generate(uncached, [wish])[0])
        kept += chosen
    assert len(kept) == 2  # "hello" finds in the caches what the picture alone put there
    assert kept[0] != kept[1]


def test_turn_two_with_a_picture_and_no_words(fresh: Any, uncached: Any) -> None:
    with choices(fresh) as chosen:
        asked, _, output = turn_two(fresh, chat(picture("cars"), QUESTIONS[1]), chat(picture("key")), 60)
    with choices(uncached) as alone:
        assert alike(output, generate(uncached, [asked])[0])
        generate(uncached, [prompt(uncached, chat(picture("key")), 60)])
    assert chosen == alone[:2]
    assert alone[1] == alone[2]


def test_a_name_given_by_the_client_is_the_pictures_alone(fresh: Any, expected: dict[Case, Answered]) -> None:
    with tower_runs(fresh) as runs:
        for case in CASES:
            name, question, keep = case
            output = generate(fresh, [prompt(fresh, chat(picture(name), question), keep, [f"my {name}"])])[0]
            assert alike(output, expected[case].output), case
    assert sum(runs) == len(PICTURES)


def test_one_name_for_two_pictures(fresh: Any, expected: dict[Case, Answered]) -> None:
    """Whoever asks something new about a name is answered about the picture that was sent."""
    for question, name in zip(QUESTIONS[: len(PICTURES)], PICTURES, strict=True):
        output = generate(fresh, [prompt(fresh, chat(picture(name), question), 8, ["mine"])])[0]
        assert alike(output, expected[name, question, 8].output)


def test_a_picture_that_is_named_but_not_sent(fresh: Any, expected: dict[Case, Answered]) -> None:
    case = name, question, keep = CASES[0]
    sent = prompt(fresh, chat(picture(name), question), keep, ["mine"])
    generate(fresh, [sent])
    named = sent | {"multi_modal_data": {"image": [None]}}
    assert alike(generate(fresh, [named])[0], expected[case].output)
    other = next(words for words in QUESTIONS if words != question)
    for asked in (prompt(fresh, chat(picture(name), other), keep), prompt(fresh, chat(picture(name), question), 37)):
        named = asked | {"multi_modal_data": {"image": [None]}, "multi_modal_uuids": {"image": ["mine"]}}
        with pytest.raises(UnsupportedCallError, match="send it again"):
            generate(fresh, [named])
    assert alike(generate(fresh, [sent])[0], expected[case].output)


def test_names_in_a_chat(fresh: Any, expected: dict[Case, Answered]) -> None:
    for case in CASES[:12]:
        name, question, keep = case
        messages = chat(picture(name), question)
        messages[0]["content"][0]["uuid"] = name
        for shown in (picture(name), None):
            messages[0]["content"][0]["image_pil"] = shown
            assert alike(answers(fresh, [messages], keep)[0], expected[case].output), case

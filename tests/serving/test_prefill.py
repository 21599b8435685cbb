"""However a prompt gets into the engine, whole, in pieces, with others or twice, its answer is the same."""

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from both import Both
from checkpoints import bundled
from engines import alike, chat, engine, generate, picture, prompt
from transformers import AutoModelForImageTextToText, AutoProcessor

PIECE = 32
"""Tokens that are read at a time: fewer than most images have here."""
BLOCK = 32
CONTENTS: list[tuple[list[str], int | float | None]] = [
    (["bird", "What color is the banana?"], 8),
    (["bird", "What color is the banana?"], 36),
    (["bird", "What color is the banana?"], 1.0),
    (["cars", "How many cars are there?"], None),
    (["cars", "How many cars are there?"], 0.5),
    (["cars", "How many cars are there?"], 65),
    (["Is there a key?", "key"], 36),
    (["key", "Is there a key?"], 0.9),
    (["tree", "What color is the background?"], 33),
    (["bird", "cars", "How many cars are there?"], 40),
    (["cars", "bird", "How many cars are there?"], 40),
    (["Is there a tree?", "tree", "or a key?", "key", "bird"], 0.25),
    (["tree", "tree", "What color is the background?"], 50),
    (["Is there a key?"], None),
    (["What color is the banana? " * 10], None),
]
PICTURES = ("bird", "cars", "key", "tree")


def shown(content: list[str]) -> list[Any]:
    return [picture(part) if part in PICTURES else part for part in content]


def prompts(llm: Any) -> list[Any]:
    return [prompt(llm, chat(*shown(content)), keep) for content, keep in CONTENTS]


def served(model: Path, **arguments: Any) -> Any:
    return engine(
        model,
        "LlavaForConditionalGeneration",
        limit_mm_per_prompt={"image": 3},
        block_size=BLOCK,
        max_model_len=256,
        **arguments,
    )


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> Path:
    return bundled("llava", checkpoints)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[int, list[Any]]:
    """Answers to `CONTENTS`, of so many tokens: each by itself, read at once, with nothing remembered."""
    options = {"keep": 16, "tower_cache_mb": 0}
    llm = served(model, options=options, enable_prefix_caching=False, mm_processor_cache_gb=0)
    asked = prompts(llm)
    short = [generate(llm, [each])[0] for each in asked]
    long = [generate(llm, [each], 40, ignore_eos=True)[0] for each in asked]
    del llm
    gc.collect()  # an engine that ends takes the others of its process with it
    return {8: short, 40: long}


@pytest.fixture(
    scope="module",
    params=[pytest.param(False, marks=pytest.mark.release), True],
    ids=["no prefix cache", "prefix cache"],
)
def pieces(request: pytest.FixtureRequest, model: Path, alone: dict[int, list[Any]]) -> Any:
    """An engine that reads prompts in pieces, several at a time, and has memory for two or three of them alone."""
    llm = served(
        model,
        enable_prefix_caching=request.param,
        max_num_batched_tokens=PIECE,
        max_num_seqs=4,
        num_gpu_blocks_override=10,
        disable_log_stats=False,
    )
    assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == PIECE
    return llm


def wrong(outputs: list[Any], expected: list[Any]) -> list[int]:
    return [number for number, pair in enumerate(zip(outputs, expected, strict=True)) if not alike(*pair)]


def test_each_by_itself(pieces: Any, alone: dict[int, list[Any]]) -> None:
    assert sum(len(output.prompt_token_ids) > PIECE for output in alone[8]) > len(CONTENTS) // 2
    assert wrong([generate(pieces, [each])[0] for each in prompts(pieces)], alone[8]) == []


def test_all_together_in_any_order(pieces: Any, alone: dict[int, list[Any]]) -> None:
    """With each three times, some of them in the same step and some later."""
    order = [*range(len(CONTENTS))] * 3
    random.Random(0).shuffle(order)
    asked = prompts(pieces)
    outputs = generate(pieces, [asked[number] for number in order])
    assert wrong(outputs, [alone[8][number] for number in order]) == []


def test_requests_that_lose_their_place(pieces: Any, alone: dict[int, list[Any]]) -> None:
    """Where memory runs out, vLLM throws a request's keys and values away and reads it once more later."""

    def lost() -> float:
        return sum(metric.value for metric in pieces.get_metrics() if metric.name == "vllm:num_preemptions")

    before = lost()
    assert wrong(generate(pieces, prompts(pieces), 40, ignore_eos=True), alone[40]) == []
    assert lost() > before


def test_as_in_transformers(pieces: Any, model: Path) -> None:
    reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    both = Both(pieces, reference, AutoProcessor.from_pretrained(model))
    both.agree(shown(["cars", "bird", "How many cars are there?"]), 41)
    both.agree(shown(["Is there a tree?", "tree", "or a key?", "key", "bird"]), 0.3)
    both.agree(shown(["key", "Is there a key?"]), 0.9)

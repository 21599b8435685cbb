"""Crops that are chosen: what vLLM keeps and says is what transformers does, whatever is in its caches."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from both import NAMES, Both
from engines import alike, answers, chat, choices, engine, generate, picture, prompt, spied, tower_runs
from vllm.distributed import cleanup_dist_env_and_memory
from workers import kept_by_each, llava, several_workers

from adafv.core.encoded import TowerCache
from adafv.core.layout import ImageLayout
from adafv.engines.vllm.families.llava_next import anyres_layout_of
from adafv.errors import OptionError, UnsupportedCallError

QUESTIONS = (
    "What color is the banana?",
    "How many cars are there?",
    "Is there a key?",
    "What color is the background?",
)
SIDE = 144
SHAPES = {"small": (90, 80), "wide": (290, 100), "large": (250, 240)}
"""Pixels, of pictures for crops of `SIDE` pixels: one to four of them beside the thumbnail."""
CROPS: tuple[str | int, ...] = ("thumbnail", 1, 2)


@pytest.fixture(scope="module", params=["llava-next", "llava-onevision"])
def both(request: pytest.FixtureRequest, checkpoints: Path) -> Both:
    return Both.of(request.param, checkpoints, {"keep": 16, "crops": 1})


@pytest.fixture
def fresh(both: Both) -> Both:
    """With nothing in its caches."""
    forget(both.llm)
    return both


def forget(llm: Any) -> None:
    def forget_images(model: Any) -> None:
        model.adafv_cache = TowerCache(model.adafv_cache.capacity)

    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    llm.apply_model(forget_images)


def shown(both: Both, name: str, shape: str) -> Any:
    side = both.model.config.vision_config.image_size
    width, height = SHAPES[shape]
    return picture(name).resize((width * side // SIDE, height * side // SIDE))


def crops_run(llm: Any) -> Any:
    """Collects, per run of the tower that sees some crops alone, which crops it saw."""
    return spied(llm, "encode_crops", lambda arguments, _: [crop for _, crop in arguments[2]])


def layout_of(both: Both, image: Any) -> ImageLayout:
    size = torch.tensor([image.height, image.width])
    [layout] = both.llm.apply_model(lambda model: anyres_layout_of(model.config, model.packing, size))
    return layout


def asked(llm: Any, image: Any, question: str, keep: int | float, crops: str | int) -> Any:
    """One prompt of a batch."""
    wish = prompt(llm, chat(image, question), keep)
    wish["mm_processor_kwargs"]["adafv"]["crops"] = crops
    return wish


@pytest.mark.parametrize("crops", CROPS)
def test_as_in_transformers(fresh: Both, crops: str | int) -> None:
    for (name, shape), keep in itertools.product([("bird", "wide"), ("cars", "large"), ("key", "small")], (12, 0.2)):
        fresh.agree([shown(fresh, name, shape), QUESTIONS[0]], keep, crops=crops)


def test_no_more_is_kept_than_there_is(fresh: Both) -> None:
    image = shown(fresh, "mushrooms", "large")
    for crops, keep in itertools.product(("thumbnail", 1), (layout_of(fresh, image).tokens - 1, 1.0)):
        fresh.agree([image, QUESTIONS[2]], keep, crops=crops)


def test_two_pictures_with_different_numbers_of_crops(fresh: Both) -> None:
    for crops in ("thumbnail", 1):
        fresh.agree(
            [shown(fresh, "bird", "wide"), QUESTIONS[0], shown(fresh, "cars", "large"), QUESTIONS[1]], 12, crops=crops
        )


def test_without_words_saliency_alone_ranks_crops(fresh: Both) -> None:
    fresh.agree([shown(fresh, "cars", "large")], 12, "saliency", crops=1)


def test_the_same_in_batches_and_from_caches(fresh: Both) -> None:
    """Pictures, questions, budgets and crops in one step; then one by one, where everything was seen in parts before."""
    cases = list(
        itertools.product(
            [shown(fresh, "bird", "large"), shown(fresh, "cars", "wide")],
            QUESTIONS[:2],
            (8, 0.3),
            ("thumbnail", 1, "all"),
        )
    )
    expected, kept = [], []
    for case in cases:
        forget(fresh.llm)
        with choices(fresh.llm) as chosen:
            expected += generate(fresh.llm, [asked(fresh.llm, *case)])
        kept += chosen
    forget(fresh.llm)
    together = generate(fresh.llm, [asked(fresh.llm, *case) for case in cases])
    assert [case[1:] for case, *pair in zip(cases, together, expected, strict=True) if not alike(*pair)] == []
    for order in (cases, cases[::-1]):
        fresh.llm.reset_prefix_cache()
        fresh.llm.reset_mm_cache()
        fresh.llm.llm_engine.reset_encoder_cache()  # the cache of the tower alone is left
        for case in order:
            place = next(i for i, other in enumerate(cases) if other is case)
            with choices(fresh.llm) as chosen:
                [found] = generate(fresh.llm, [asked(fresh.llm, *case)])
            assert chosen == [kept[place]], case[1:]
            assert alike(found, expected[place]), case[1:]


def test_the_tower_sees_no_crop_twice(fresh: Both) -> None:
    image, llm = shown(fresh, "cars", "large"), fresh.llm
    with crops_run(llm) as runs, tower_runs(llm) as whole:
        answers(llm, [chat(image, QUESTIONS[0])], 8, crops="thumbnail")
        assert runs == [[0]]
        answers(llm, [chat(image, QUESTIONS[1])], 8, crops="thumbnail")
        assert runs == [[0]]
        answers(llm, [chat(image, QUESTIONS[0])], 8, crops=1)
        assert [len(run) for run in runs] == [1, 1]
        assert runs[1] != [0]
        answers(llm, [chat(image, QUESTIONS[0])], 12, crops=2)
        assert [len(run) for run in runs] == [1, 1, 1]
        assert len({run[0] for run in runs}) == 3
        assert whole == []
        answers(llm, [chat(image, QUESTIONS[0])], 8, crops="all")
        answers(llm, [chat(image, QUESTIONS[3])], 8, crops=99)
        answers(llm, [chat(image, QUESTIONS[3])], 8, crops=2)
        assert whole == [1]
        assert len(runs) <= 4  # all crops beside those that were there
    forget(llm)
    with crops_run(llm) as runs:
        answers(llm, [chat(image, words) for words in QUESTIONS], 8, crops=1)
    assert len(runs) == 2
    assert runs[0] == [0]
    assert len(runs[1]) == len(set(runs[1]))


def test_refused(fresh: Both) -> None:
    question = chat(shown(fresh, "bird", "large"), QUESTIONS[0])
    with pytest.raises(OptionError, match="ask with crops='thumbnail' and logprobs"):
        answers(fresh.llm, [question], 8, crops="auto")
    with pytest.raises(OptionError, match="is no number of crops"):
        answers(fresh.llm, [question], 8, crops="some")
    if fresh.model.config.model_type == "llava_onevision":  # more than nine crops: their tokens are scaled down
        huge = chat(picture("mushrooms").resize((2400, 2300)), QUESTIONS[0])
        with pytest.raises(UnsupportedCallError, match="mixes some of several crops"):
            answers(fresh.llm, [huge], 8, crops=1)
        fresh.agree([picture("mushrooms").resize((2400, 2300)), QUESTIONS[0]], 8, crops="thumbnail")


@pytest.mark.release
def test_two_workers_choose_the_same_crops(checkpoints: Path) -> None:
    folder, options = llava("clip", checkpoints, crops=True), {"keep": 12, "crops": 1}
    pictures = picture("bird").resize(SHAPES["large"]), picture("cars").resize(SHAPES["wide"])
    chats = [chat(*pair) for pair in zip(pictures, QUESTIONS[:2], strict=True)]
    llm = engine(folder, NAMES["llava-next"], options)
    with choices(llm) as kept:
        expected = answers(llm, chats)
    del llm
    cleanup_dist_env_and_memory()
    with several_workers(folder, NAMES["llava-next"], options, tensor_parallel_size=2) as two:
        assert all(alike(*pair) for pair in zip(answers(two, chats), expected, strict=True))
        assert kept_by_each(two) == [kept, kept]

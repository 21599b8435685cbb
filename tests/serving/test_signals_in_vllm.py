"""Keys, hidden states and saliency of the tower are in vLLM what they are in transformers, in every layer that is run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from both import NAMES, OTHERS, checkpoint
from engines import answers, chat, engine, picture, sparing, spied
from qwen_checkpoints import BUILDERS, SIDE, qwen
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.distributed import cleanup_dist_env_and_memory
from workers import llava, several_workers, signals_of_each

from adafv.core.tokens import HIDDEN, KEYS, SALIENCY, Signal, hidden_of, keys_of, saliency_of
from adafv.engines.transformers.families.base import family_of
from adafv.errors import UnsupportedModelError

WANTED = frozenset({SALIENCY, KEYS, HIDDEN, hidden_of(0), hidden_of(1), keys_of(1), keys_of(-3), saliency_of(2)})
PICTURES = [picture("bird").resize((9 * SIDE, 4 * SIDE)), picture("cars").resize((5 * SIDE, 12 * SIDE))]
ALL = [*NAMES, *OTHERS, *BUILDERS]


def folder_of(name: str, checkpoints: Path) -> tuple[Path, str]:
    """(checkpoint, stock architecture)."""
    if name in BUILDERS:
        return qwen(name, checkpoints), name
    return checkpoint(name, checkpoints), (NAMES | OTHERS)[name]


def in_transformers(folder: Path) -> dict[Signal, list[torch.Tensor]]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=PICTURES, text=text, return_tensors="pt")
    family = family_of(model)
    visuals = {name: value for name, value in inputs.items() if name in family.images}
    with torch.no_grad():
        layouts = family.layouts(model, "image", visuals, [])
        return family.encode(model, "image", visuals, layouts, WANTED).signals


def ask_for_all(model: Any) -> None:
    model.adafv_signals = WANTED
    model.adafv_tap = model.tap()


@pytest.fixture(params=sparing(ALL, list(BUILDERS)[-1]))
def served(request: pytest.FixtureRequest, checkpoints: Path) -> Iterator[tuple[Path, Any]]:
    folder, architecture = folder_of(request.param, checkpoints)
    options = {"keep": 8, "tower_cache_mb": 0}
    yield folder, engine(folder, architecture, options, limit_mm_per_prompt={"image": 2})
    cleanup_dist_env_and_memory()


def test_as_in_transformers(served: tuple[Path, Any]) -> None:
    folder, llm = served
    llm.apply_model(ask_for_all)
    with spied(llm, "encode", lambda arguments, images: images) as runs:
        answers(llm, [chat(*PICTURES, "Which?")])
    images = [image for run in runs for image in run]
    assert len(images) == len(PICTURES)
    for signal, expected in in_transformers(folder).items():
        for image, values in zip(images, expected, strict=True):
            shows = image.layout.shows_patch
            assert image.signals[signal].shape == values.shape, signal
            torch.testing.assert_close(image.signals[signal][shows], values[shows], atol=1e-4, rtol=1e-3)
    llm.apply_model(refuses_what_is_not_there)


def refuses_what_is_not_there(model: Any) -> None:
    for signal in (keys_of(0), hidden_of(9), saliency_of(-9)):
        model.adafv_signals = frozenset({signal})
        with pytest.raises(UnsupportedModelError, match=f"the {signal} cannot be read in vLLM: .*ask for"):
            model.tap()


@pytest.mark.release
def test_two_workers_have_the_keys_of_all_heads(checkpoints: Path) -> None:
    folder = llava("clip", checkpoints)
    with several_workers(folder, tensor_parallel_size=2) as two:
        found = signals_of_each(two, WANTED, lambda: answers(two, [chat(*PICTURES, "Which?")]))
    assert len(found) == 2
    for signal, expected in in_transformers(folder).items():
        for of_worker in found:
            for values, wanted in zip((image[signal] for image in of_worker), expected, strict=True):
                torch.testing.assert_close(torch.tensor(values), wanted, atol=1e-4, rtol=1e-3)

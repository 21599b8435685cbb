"""Every method, scope of the text, precision and tower keeps what it keeps in transformers."""

from pathlib import Path
from typing import Any

import pytest
from both import OTHERS, Both
from engines import picture

from adafv import AdaFV


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("saliency", {}, marks=pytest.mark.release),
        pytest.param("random", {"seed": 3}, marks=pytest.mark.release),
        pytest.param("uniform", {}, marks=pytest.mark.release),
        pytest.param("text", {"text": "turn"}, marks=pytest.mark.release),
        pytest.param("facet", {"far": 0.25}, marks=pytest.mark.release),
        ("adafv", {"text": "after", "objective": "split"}),
    ],
)
def test_every_method(method: str, options: dict[str, Any], checkpoints: Path) -> None:
    scope = {name: value for name, value in options.items() if name == "text"}
    parameters = {name: value for name, value in options.items() if name != "text"}
    both = Both.of("llava-next", checkpoints, {"keep": 16, "method": method, "parameters": parameters} | scope)
    for keep in (12, 0.2, 0.98):
        both.agree(
            ["Is there a house?", picture("bird").resize((500, 260)), "What color is the banana?"],
            keep,
            method,
            **options,
        )


@pytest.mark.release
def test_without_words_saliency_chooses(checkpoints: Path) -> None:
    """In place of text; of adafv: see test_as_in_transformers.py."""
    both = Both.of("llava-next", checkpoints, {"keep": 16, "method": "text"})
    for keep in (12, 0.2):
        both.agree([picture("cars").resize((500, 260))], keep, "saliency")
        both.agree([picture("bird"), " ", picture("key").resize((60, 130)), "hello"], keep, "saliency")


def test_bfloat16(checkpoints: Path) -> None:
    """The two engines round differently, so that now and then another token is kept; most are the same."""
    both = Both.of("llava-next", checkpoints, {"keep": 36}, dtype="bfloat16")
    same = 0
    for name, question in [("bird", "What color is the banana?"), ("cars", "How many cars are there?")]:
        content = [picture(name), question]
        kept, answer, _ = both.in_transformers(content, AdaFV(keep=36, processor=both.processor))
        chosen, output = both.in_vllm(content, 36)
        assert list(output.token_ids) == answer
        same += len(set(kept[0]) & set(chosen[0]))
    assert same >= 0.9 * 36 * 2


@pytest.mark.release
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_towers(name: str, checkpoints: Path) -> None:
    both = Both.of(name, checkpoints, {"keep": 16})
    for keep in (6, 0.3, 1.0):
        both.agree([picture("cars").resize((300, 200)), "How many cars are there?"], keep)

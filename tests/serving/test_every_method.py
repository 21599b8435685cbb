"""Every method, scope of the text, precision and tower keeps what it keeps in transformers."""

from pathlib import Path
from typing import Any

import pytest
from both import OTHERS, Both
from engines import picture

from adafv import AdaFV

METHODS: dict[str, dict[str, Any]] = {
    "saliency": {},
    "random": {"seed": 3},
    "uniform": {},
    "text": {"text": "turn"},
    "adafv": {"text": "after", "objective": "split"},
}
"""Method -> its options, and the scope of the text."""


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, checkpoints: Path) -> Both:
    """By the method that is asked for; tests of one method share its engine."""
    scope = {name: value for name, value in METHODS[request.param].items() if name == "text"}
    parameters = {name: value for name, value in METHODS[request.param].items() if name != "text"}
    return Both.of("llava-next", checkpoints, {"keep": 16, "method": request.param, "parameters": parameters} | scope)


@pytest.mark.parametrize(("method", "served"), [(name, name) for name in METHODS], indirect=["served"])
def test_every_method(method: str, served: Both) -> None:
    for keep in (12, 0.2, 0.98):
        served.agree(
            ["Is there a house?", picture("bird").resize((500, 260)), "What color is the banana?"],
            keep,
            method,
            **METHODS[method],
        )


@pytest.mark.parametrize("served", ["text"], indirect=True)
def test_without_words_saliency_chooses(served: Both) -> None:
    """For adafv: see test_as_in_transformers.py."""
    for keep in (12, 0.2):
        served.agree([picture("cars").resize((500, 260))], keep, "saliency")
        served.agree([picture("bird"), " ", picture("key").resize((60, 130)), "hello"], keep, "saliency")


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


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_towers(name: str, checkpoints: Path) -> None:
    both = Both.of(name, checkpoints, {"keep": 16})
    for keep in (6, 0.3, 1.0):
        both.agree([picture("cars").resize((300, 200)), "How many cars are there?"], keep)

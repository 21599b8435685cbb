"""Methods that mix what the projector reads: the same weights, through vLLM's own projector."""

from pathlib import Path
from typing import Any

import pytest
from both import Both
from engines import picture

from adafv.errors import UnsupportedModelError

MERGING: dict[str, dict[str, Any]] = {
    "visionzip": {"contextual": 0.4},
    "prumerge-plus": {"fill": True, "neighbours": 4},
    "trim": {"fill": True},
    "tome": {},
}


@pytest.mark.release  # with the options of the catalogue: test_catalogue.py
@pytest.mark.parametrize(("name", "method"), [("llava", "visionzip"), *(("llava-next", method) for method in MERGING)])
def test_as_in_transformers(name: str, method: str, checkpoints: Path) -> None:
    options = MERGING[method]
    both = Both.of(name, checkpoints, {"keep": 16, "method": method, "parameters": options})
    for keep in (12, 0.3):
        both.agree([picture("bird").resize((500, 260)), "What color is the banana?"], keep, method, **options)
    both.agree([picture("cars"), "How many?", picture("key"), "Is there a key?"], 8, method, **options)


def test_models_whose_projector_is_not_the_last_word(checkpoints: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"visionzip mixes what the projector reads.*before_projector=false"
    ):
        Both.of("llava-onevision", checkpoints, {"keep": 16, "method": "visionzip"})
    options = {"contextual": 0.4, "before_projector": False}
    both = Both.of("llava-onevision", checkpoints, {"keep": 16, "method": "visionzip", "parameters": options})
    both.agree([picture("bird").resize((500, 260)), "What color is the banana?"], 12, "visionzip", **options)

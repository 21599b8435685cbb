"""keep=1.0 is stock vLLM, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
from both import NAMES, checkpoint
from checkpoints import for_stock_vllm
from engines import answers, chat, engine, picture, sparing

CHATS = [
    chat(picture("bird"), "What color is the banana?"),
    chat("How many cars are there?", picture("cars").resize((300, 700))),
    chat(picture("key").resize((40, 30)), picture("tree").resize((900, 900)), "Is there a key?"),
    chat("Is there a key?"),
]


def said(folder: Path, architecture: str | None, options: dict[str, Any] | None = None) -> list[Any]:
    """Prompt, answer and all log probabilities of every chat, each asked alone."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = engine(folder, architecture, options, limit_mm_per_prompt={"image": 2, "video": 0})
    outputs = [answers(llm, [each])[0] for each in CHATS]
    del llm
    cleanup_dist_env_and_memory()
    return [
        (
            output.prompt_token_ids,
            list(output.outputs[0].token_ids),
            [{token: given.logprob for token, given in step.items()} for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


@pytest.mark.parametrize("name", sparing(NAMES, "llava-next"))
def test_keeping_everything_is_stock_vllm(name: str, checkpoints: Path) -> None:
    saved = checkpoint(name, checkpoints)
    stock = said(for_stock_vllm(saved, checkpoints), None)
    assert len(stock[0][0]) > 100
    for ours, theirs in zip(said(saved, NAMES[name], {"keep": 1.0}), stock, strict=True):
        assert ours == theirs

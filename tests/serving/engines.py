"""vLLM's engine in this process, and what its workers chose."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adafv.engines.vllm import architectures

SAMPLES = Path(__file__).parents[2] / "src/adafv/bundled/samples"
BUNDLED = Path(__file__).parents[2] / "src/adafv/bundled"


def picture(name: str) -> Image.Image:
    """One of the pictures that come with adafv."""
    return Image.open(SAMPLES / f"{name}.png").convert("RGB")


def chat(*content: Any) -> list[dict[str, Any]]:
    """One turn of the user: strings are text, pictures are pictures."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_pil", "image_pil": part}
        for part in content
    ]
    return [{"role": "user", "content": parts}]


def engine(folder: Path, architecture: str | None, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """vLLM's `LLM`. `architecture` is a stock one, served pruned with `options`; None: stock vLLM."""
    from vllm import LLM

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "seed": 0, "max_num_seqs": 16}
    if architecture is not None:
        assert architecture in architectures()
        defaults["hf_overrides"] = {"architectures": [f"AdaFV{architecture}"], "adafv": options or {"keep": 16}}
    return LLM(str(folder), **(defaults | arguments))


def answers(llm: Any, chats: list[Any], keep: int | float | None = None, tokens: int = 8) -> list[Any]:
    """Greedy, one after the other in one batch: vLLM's completion of each chat, with log probabilities."""
    from vllm import SamplingParams

    options = None if keep is None else {"adafv": {"keep": keep}}
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=5)
    return llm.chat(chats, sampling, use_tqdm=False, mm_processor_kwargs=options)


@contextmanager
def choices(llm: Any) -> Iterator[list[list[int]]]:
    """Collects, per image that is pruned meanwhile, the tokens that were kept."""
    found: list[list[int]] = []

    with pytest.MonkeyPatch.context() as patch:

        def spy(model: Any) -> None:
            hand_over = type(model).hand_over

            def recording(self: Any, image: Any, kept: Any, features: Any) -> Any:
                found.append(kept.tolist())
                return hand_over(self, image, kept, features)

            patch.setattr(type(model), "hand_over", recording)

        llm.apply_model(spy)
        yield found

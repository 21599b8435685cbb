"""vLLM's engine in this process, and what its workers chose."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adafv.engines.vllm import architectures

SAMPLES = Path(__file__).parents[2] / "src/adafv/bundled/samples"
BUNDLED = Path(__file__).parents[2] / "src/adafv/bundled"
KV_CACHE = 128 * 2**20


def sparing(values: Iterable[Any], *often: Any) -> list[Any]:
    """Parameters of a test, of which those not named run before a release alone: an engine takes seconds to start."""
    return [pytest.param(value, marks=() if value in often else pytest.mark.release) for value in values]


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
    """vLLM's `LLM`, once any engine that was let go of is gone.

    Args:
        architecture: a stock one, served pruned with `options`; None: stock vLLM.
    """
    from vllm import LLM

    gc.collect()
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "seed": 0, "max_num_seqs": 16}
    defaults["kv_cache_memory_bytes"] = (
        KV_CACHE  # the least that a variable can say is a gigabyte, to be written with zeros
    )
    if architecture is not None:
        assert architecture in architectures()
        defaults["hf_overrides"] = {"architectures": [f"AdaFV{architecture}"], "adafv": options or {"keep": 16}}
    return LLM(str(folder), **(defaults | arguments))


def answers(
    llm: Any, chats: list[Any], keep: int | float | None = None, tokens: int = 8, crops: str | int | None = None
) -> list[Any]:
    """Greedy, one after the other in one batch: vLLM's completion of each chat, with log probabilities."""
    from vllm import SamplingParams

    asked = {name: value for name, value in (("keep", keep), ("crops", crops)) if value is not None}
    options = {"adafv": asked} if asked else None
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=5)
    return llm.chat(chats, sampling, use_tqdm=False, mm_processor_kwargs=options)


@contextmanager
def spied(llm: Any, method: str, seen: Any) -> Iterator[list[Any]]:
    """Collects what `seen` makes of (arguments, result) of every call of one of the model's methods meanwhile."""
    found: list[Any] = []

    with pytest.MonkeyPatch.context() as patch:

        def spy(model: Any) -> None:
            original = getattr(type(model), method)

            def recording(self: Any, *arguments: Any) -> Any:
                result = original(self, *arguments)
                found.append(seen(arguments, result))
                return result

            patch.setattr(type(model), method, recording)

        llm.apply_model(spy)
        yield found


def choices(llm: Any) -> Any:
    """Collects, per image that is pruned meanwhile, the tokens that were kept."""
    return spied(llm, "hand_over", lambda arguments, _: arguments[1].tolist())


def tower_runs(llm: Any) -> Any:
    """Collects the number of images of every run of the vision tower."""
    return spied(llm, "encode", lambda _, encoded: len(encoded))


def prompt(
    llm: Any, messages: list[Any], keep: int | float | None = None, uuids: list[str | None] | None = None
) -> Any:
    """What `LLM.generate` takes for a chat, so that one batch can hold several budgets.

    Args:
        uuids: names that a client gives the images; see vLLM's `multi_modal_uuids`.
    """
    shown = []
    pictures = []
    for message in messages:
        parts = (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
        pictures += [part["image_pil"] for part in parts if part["type"] == "image_pil"]
        content = [{"type": "image"} if part["type"] == "image_pil" else part for part in parts]
        shown.append({"role": message["role"], "content": content})
    tokens = llm.get_tokenizer().apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
    found: dict[str, Any] = {"prompt_token_ids": tokens}
    if pictures:
        found["multi_modal_data"] = {"image": pictures}
        found["mm_processor_kwargs"] = {} if keep is None else {"adafv": {"keep": keep}}
    if uuids is not None:
        found["multi_modal_uuids"] = {"image": uuids}
    return found


def generate(llm: Any, prompts: list[Any], tokens: int = 8, **sampling: Any) -> list[Any]:
    """Greedy, all in one batch: vLLM's output of each prompt, with log probabilities."""
    from vllm import SamplingParams

    return llm.generate(
        prompts, SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=5, **sampling), use_tqdm=False
    )


def alike(first: Any, second: Any) -> bool:
    """Whether two outputs are the same answer to the same prompt, with the same log probabilities up to rounding."""
    one, other = first.outputs[0], second.outputs[0]
    if list(first.prompt_token_ids) != list(second.prompt_token_ids) or list(one.token_ids) != list(other.token_ids):
        return False
    return all(
        abs(given[token].logprob - expected[token].logprob) < 1e-4
        for given, expected in zip(one.logprobs, other.logprobs, strict=True)
        for token in given.keys() & expected.keys()
    )

"""One checkpoint in vLLM and in transformers: the same tokens must stay, and the same be answered."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import bundled, reading_layer, with_siglip
from engines import answers, chat, choices, engine
from transformers import AutoModelForImageTextToText, AutoProcessor

from adafv import Pruner

NAMES = {
    "llava": "LlavaForConditionalGeneration",
    "llava-next": "LlavaNextForConditionalGeneration",
    "llava-onevision": "LlavaOnevisionForConditionalGeneration",
}
"""Checkpoint -> the stock architecture."""

OTHERS = {
    "llava-siglip": "LlavaForConditionalGeneration",
    "llava-next reading -2": "LlavaNextForConditionalGeneration",
}
"""Towers, and layers of them, that the bundled checkpoints do not have."""


def checkpoint(name: str, folder: Path) -> Path:
    if name in ("llava-onevision", "llava-siglip"):
        return with_siglip(name, folder)
    name, _, layer = name.partition(" reading ")
    return reading_layer(int(layer), bundled(name, folder), folder) if layer else bundled(name, folder)


@dataclass
class Both:
    """One checkpoint in both engines."""

    llm: Any
    model: Any
    processor: Any

    @classmethod
    def of(cls, name: str, folder: Path, options: dict[str, Any], dtype: str = "float32") -> "Both":
        """Let go of one before making the next: one engine at a time."""
        saved = checkpoint(name, folder)
        llm = engine(saved, (NAMES | OTHERS)[name], options, limit_mm_per_prompt={"image": 2}, dtype=dtype)
        model = AutoModelForImageTextToText.from_pretrained(saved, dtype=getattr(torch, dtype)).eval()
        return cls(llm, model, AutoProcessor.from_pretrained(saved))

    def in_transformers(self, content: list[Any], pruner: Pruner) -> tuple[list[list[int]], list[int], torch.Tensor]:
        """(kept tokens per image, tokens of the answer, log probabilities of the first token)."""
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        # A flat list: LLaVA-OneVision then cuts each of several pictures into crops, as vLLM does.
        pictures = [part for part in content if not isinstance(part, str)]
        inputs = self.processor(images=pictures, text=text, return_tensors="pt").to(self.model.dtype)
        with torch.no_grad(), pruner(self.model) as pruned:
            output = self.model.generate(
                **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        kept = [indices.tolist() for indices in pruned.last.kept] if pictures else []
        return kept, new.tolist(), output.logits[0][0].float().log_softmax(-1)

    def in_vllm(
        self, content: list[Any], keep: int | float, crops: str | int | None = None
    ) -> tuple[list[list[int]], Any]:
        """(kept tokens per image, vLLM's completion)."""
        with choices(self.llm) as chosen:
            return chosen, answers(self.llm, [chat(*content)], keep, crops=crops)[0].outputs[0]

    def agree(self, content: list[Any], keep: int | float, method: str = "adafv", **options: Any) -> None:
        """Pictures and words, as one turn; both engines must keep the same and say the same."""
        self.agree_unless(lambda kept, chosen: False, content, keep, method, **options)

    def agree_unless(
        self,
        excused: Callable[[list[list[int]], list[list[int]]], bool],
        content: list[Any],
        keep: int | float,
        method: str = "adafv",
        **options: Any,
    ) -> None:
        """`excused` (kept in transformers, in vLLM) says whether there is a reason for a difference."""
        pruner = Pruner(method, keep, processor=self.processor, **options)
        kept, answer, first = self.in_transformers(content, pruner)
        chosen, output = self.in_vllm(content, keep, options.get("crops"))
        if keep != 1.0 or "crops" in options:  # transformers keeps no record of an image that loses nothing
            if chosen != kept and excused(kept, chosen):
                return
            assert chosen == kept
        assert list(output.token_ids) == answer
        for token, given in output.logprobs[0].items():
            assert given.logprob == pytest.approx(float(first[token]), abs=2e-4)

"""Small models with random weights, of the stock classes, and prompts for them.

Weights are large enough that every visual token matters to the logits; a test whose model ignored its image could not
fail. `FAMILIES` is the table that all model tests run over: one row per family.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    ViTConfig,
)

VOCABULARY = 120
IMAGE, PAD, BEGIN, END = 119, 0, 1, 2
SIDE, PATCH = 56, 14


def vision_config(tower: str = "clip", **overrides: Any) -> Any:
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        **overrides,
    }
    return CLIPVisionConfig(**options) if tower == "clip" else ViTConfig(**options)


def text_config(**overrides: Any) -> LlamaConfig:
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        **overrides,
    }
    return LlamaConfig(**options)


def finish(model: Any, seed: int, dtype: torch.dtype) -> Any:
    """Give every weight a lively size, and evaluation settings without surprises."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
            elif "embed_tokens" in name or "position" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = END
    return model.eval().to(dtype)


def llava(seed: int = 0, dtype: torch.dtype = torch.float32, tower: str = "clip", **options: Any) -> Any:
    config = LlavaConfig(
        vision_config=vision_config(tower, **options.pop("vision", {})),
        text_config=text_config(**options.pop("text", {})),
        image_token_id=options.pop("image_token_id", IMAGE),
        image_seq_length=(SIDE // PATCH) ** 2,
        **options,
    )
    return finish(LlavaForConditionalGeneration(config), seed, dtype)


def llava_next(seed: int = 0, dtype: torch.dtype = torch.float32, tower: str = "clip", **options: Any) -> Any:
    config = LlavaNextConfig(
        vision_config=vision_config(tower, **options.pop("vision", {})),
        text_config=text_config(**options.pop("text", {})),
        image_token_id=options.pop("image_token_id", IMAGE),
        image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]],
        image_seq_length=(SIDE // PATCH) ** 2,
        **options,
    )
    return finish(LlavaNextForConditionalGeneration(config), seed, dtype)


def llava_images(model: Any, sizes: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(len(sizes), 3, SIDE, SIDE, generator=generator)}


def llava_next_images(model: Any, sizes: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    generator = torch.Generator().manual_seed(seed)
    crops = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, SIDE) for size in sizes]
    pixels = torch.zeros(len(sizes), max(crops), 3, SIDE, SIDE)
    for image, count in zip(pixels, crops, strict=True):
        image[:count] = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


@dataclass(frozen=True)
class FamilyRow:
    name: str
    build: Callable[..., Any]
    images: Callable[..., dict[str, Any]]
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) of four images; what the family cannot tell apart does not matter to it."""


FAMILIES = [
    FamilyRow("llava", llava, llava_images, [(56, 56)] * 4),
    FamilyRow("llava-next", llava_next, llava_next_images, [(90, 100), (56, 130), (120, 40), (64, 64)]),
]


def image_lengths(model: Any, images: dict[str, Any]) -> list[int]:
    """Number of visual tokens of each image, asked of the stock model itself."""
    with torch.no_grad():
        return [len(features) for features in model.get_image_features(**images).pooler_output]


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 1, (count,), generator=generator).tolist()


def make_inputs(
    row: FamilyRow, model: Any, images_per_prompt: list[int], padding: str = "left", seed: int = 0
) -> dict[str, Any]:
    """A batch of prompts with the given numbers of images, texts of different lengths, padded on one side."""
    count = sum(images_per_prompt)
    inputs: dict[str, Any] = row.images(model, (row.sizes * count)[:count], seed) if count else {}
    lengths = iter(image_lengths(model, inputs) if count else [])
    prompts = []
    for number, images in enumerate(images_per_prompt):
        prompt = [BEGIN, *words(3 + number, seed + 10 * number)]
        for place in range(images):
            prompt += [IMAGE] * next(lengths) + words(2 + 2 * number + place, seed + 10 * number + place + 1)
        prompts.append(prompt + words(4, seed + 99 + number))
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), None) if padding == "left" else slice(len(prompt))
        ids[number, columns], mask[number, columns] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask, **inputs}

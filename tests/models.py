"""Small models with random weights, of the stock classes, and prompts for them.

Weights are large enough that every visual token matters to the logits; a test whose model ignored its image could not
fail. `FAMILIES` is the table that all model tests run over: one row per family, one file per row in `rows/`.
"""

import copy
import importlib
import pkgutil
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
    SiglipVisionConfig,
    ViTConfig,
)

VOCABULARY = 120
IMAGE, VIDEO, PAD, BEGIN, END = 119, 118, 0, 1, 2
MARKERS = range(110, 118)
"""Tokens that models put around images."""
SIDE, PATCH = 56, 14
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
"""Size of a small vision tower, by the names that most configs have."""


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
    if tower == "siglip":
        return SiglipVisionConfig(vision_use_head=False, **options)
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
    return {"pixel_values": torch.stack([noise(seed + number, 3, SIDE, SIDE) for number in range(len(sizes))])}


def llava_next_images(model: Any, sizes: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    crops = [image_size_to_num_patches(size, model.config.image_grid_pinpoints, SIDE) for size in sizes]
    pixels = torch.zeros(len(sizes), max(crops), 3, SIDE, SIDE)
    for number, count in enumerate(crops):
        pixels[number, :count] = noise(seed + number, count, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Pixels of one image; each image has a seed of its own, so that it is the same image in whatever batch."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def clips(model: Any, frames: list[list[int]], seed: int) -> torch.Tensor:
    """[videos, frames, 3, SIDE, SIDE]; the stock models that want one tensor take videos of one length, the shortest."""
    counts = [count for prompt in frames for count in prompt]
    pixels = [noise(50 + seed + number, min(counts), 3, SIDE, SIDE) for number in range(len(counts))]
    return torch.stack(pixels).to(model.dtype)


Visuals = tuple[dict[str, Any], list[list[int]]]
"""Entries of the inputs, and for each image (or video) the tokens that stand for it in the prompt, markers included."""


@dataclass(frozen=True)
class Refusal:
    """A way of calling that is refused, and what the stock model makes of it."""

    message: str
    """A part of the error of the pruned model."""
    stock: type[Exception] | tuple[type[Exception], ...] | None = None
    """What the stock model raises."""
    stock_answers_otherwise: bool = False
    """The stock model goes on, but as if it were shown other images."""


NO_CHUNKS = Refusal("chunked prefill", TypeError)
CUTS_IMAGES = Refusal("chunked prefill", stock_answers_otherwise=True)
NO_STATIC_CACHE = Refusal("static cache", AttributeError)
NO_GUIDANCE = Refusal("guidance", (RuntimeError, ValueError))


@dataclass(frozen=True)
class FamilyRow:
    """A row of the test table: a small random model of the stock class, and inputs as its processor would make them."""

    name: str
    build: Callable[..., Any]
    """(seed=0, dtype=float32, **config options) -> model"""
    images: Callable[[Any, list[list[tuple[int, int]]], int], Visuals]
    """(model, sizes (height, width) of the images of each prompt, seed) -> visuals. Image i is drawn from seed + i."""
    sizes: list[tuple[int, int]]
    """Of four images; what the family cannot tell apart does not matter to it."""
    videos: Callable[[Any, list[list[int]], int], Visuals] | None = None
    """The same for videos of so many frames; None where the family has none."""
    clips: tuple[int, ...] = (4, 2)
    """Frames of two videos."""
    token_types: dict[str, dict[int, int] | Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    """Entries along the prompt that tell kinds of tokens apart: name -> token -> number (0 for all others), or name ->
    (tokens -> numbers)."""
    one_placeholder: bool = False
    """Images and videos have the same placeholder; the stock model then takes either, but not both in one call."""
    answer_types: dict[str, int] = field(default_factory=dict)
    """Entry along the prompt -> number of all that follows the first prompt, where that is not 0."""
    joined: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    """(entries of one image, of another) -> of both in one prompt; None: joined along the first axis."""
    needs_ids: bool = False
    """Whether embeddings alone are refused: which tiles make an image is known from the tokens between them."""
    rotary: bool = False
    """Positions in time, height and width (M-RoPE)."""
    mixes_up_images: bool = False
    """Whether the stock model repeats images wrongly for beams and return sequences in every release, see oracle.py."""
    looks_ahead: bool = False
    """Tokens of an image look at each other both ways, as `token_types` say."""
    packed_rows: bool = True
    """Whether the stock model, in this release, keeps prompts packed into one row apart."""
    first_position: int = 0
    """What the stock `forward` counts positions from."""
    refuses: dict[str, "Refusal"] = field(default_factory=dict)
    """Way of calling (see test_oracle.py) -> how it is refused, because the stock model cannot do it either."""
    continued_with_images: bool = True
    """Whether the stock model, in this release, can be shown an image behind what is cached."""
    offloads: bool = True
    """Whether the stock model runs with its weights offloaded; some ask one that is not there for its device or type."""
    deep: bool = False
    """Whether the tests of the wrapper itself, which do not depend on the family, run over it too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "build", copied(self.build))


def copied(build: Callable[..., Any]) -> Callable[..., Any]:
    """Built once as the row has it, and copied: a third of the seconds."""
    built: list[Any] = []

    def build_or_copy(**options: Any) -> Any:
        if options:
            return build(**options)
        if not built:
            built.append(build())
        return copy.deepcopy(built[0])

    return build_or_copy


def _every_row() -> list[FamilyRow]:
    import rows

    names = sorted(module.name for module in pkgutil.iter_modules(rows.__path__))
    found = [importlib.import_module(f"rows.{name}").ROW for name in names]
    return [row for row in found if row is not None]  # None: this release of transformers lacks the class


def layouts_of(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """Layouts of the images of a prompt, as the engine asks for them."""
    from adafv.engines.transformers.families import family_of
    from adafv.engines.transformers.reading import read_prompt

    family = family_of(model)
    return family.layouts(model, "image", inputs, read_prompt(model, family, inputs).runs("image"))


def image_lengths(model: Any, images: dict[str, Any]) -> list[int]:
    """Number of visual tokens of each image, asked of the stock model itself."""
    with torch.no_grad():
        return [len(features) for features in model.get_image_features(**images).pooler_output]


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, MARKERS.start, (count,), generator=generator).tolist()


def make_inputs(
    row: FamilyRow,
    model: Any,
    images_per_prompt: list[int],
    padding: str = "left",
    seed: int = 0,
    videos_per_prompt: list[int] | None = None,
) -> dict[str, Any]:
    """A batch of prompts with the given numbers of images and videos, texts of different lengths, padded on one side."""
    clips_per_prompt = [0] * len(images_per_prompt) if videos_per_prompt is None else videos_per_prompt
    inputs: dict[str, Any] = {}
    shown: list[list[list[int]]] = []
    for count, draw, kinds in (
        (images_per_prompt, row.images, row.sizes),
        (clips_per_prompt, row.videos, list(row.clips)),
    ):
        tokens: list[list[int]] = []
        if sum(count):
            kinds_in_order = iter((kinds * sum(count))[: sum(count)])
            entries, tokens = draw(model, [[next(kinds_in_order) for _ in range(n)] for n in count], seed)
            inputs |= entries
        shown.append(tokens)
    images, videos = (iter(tokens) for tokens in shown)
    prompts = []
    for number, (stills, clips) in enumerate(zip(images_per_prompt, clips_per_prompt, strict=True)):
        prompt = [BEGIN, *words(3 + number, seed + 10 * number)]
        for place in range(stills + clips):
            prompt += next(images if place < stills else videos)
            prompt += words(2 + 2 * number + place, seed + 10 * number + place + 1)
        prompts.append(prompt + words(4, seed + 99 + number))
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), None) if padding == "left" else slice(len(prompt))
        ids[number, columns], mask[number, columns] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask, **token_types(row, ids), **inputs}


def token_types(row: FamilyRow, ids: torch.Tensor, prompt: int | None = None) -> dict[str, torch.Tensor]:
    """The entries along the prompt that the processor of the family would add.

    With `prompt`, a number of columns, for a conversation of which these were the first prompt.
    """
    found = {}
    for name, kinds in row.token_types.items():
        if callable(kinds):
            found[name] = kinds(ids)
            continue
        found[name] = torch.zeros_like(ids)
        for token, kind in kinds.items():
            found[name][ids == token] = kind
        if prompt is not None and name in row.answer_types:
            found[name][:, prompt:] = row.answer_types[name]
    return found


FAMILIES = _every_row()
DEEP = [row for row in FAMILIES if row.deep]


def present(*names: str) -> list[str]:
    """Those of these rows that the installed transformers has."""
    return [name for name in names if any(row.name == name for row in FAMILIES)]

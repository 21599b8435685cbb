"""Models to measure: a checkpoint, or a named shape with random weights and nothing to download.

Speed depends on shapes alone, so random weights do. A shape is built whole where memory allows; else with fewer decoder
layers, whose share is then scaled, and every result says so.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adafv.asking.models import BUNDLED
from adafv.errors import OptionError
from adafv.printable import shortened

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK = 1_000_003
"""Random numbers that are repeated into all weights; a prime, so that no two rows are alike."""
ROOM = 1.15
"""How much more than its weights a model may take."""
FEWEST_LAYERS = 2
QUESTION = "What color is the largest object in the picture, and where does it stand?"

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CLIP_TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
VICUNA_7B = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
HALF_B = {
    "vocab_size": 32064,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN_3B = {
    **QWEN_7B,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Shape:
    """A named shape."""

    family: str
    """"llava", "llava-next" or "qwen2.5-vl"."""
    vision: dict[str, Any]
    text: dict[str, Any]
    picture: tuple[int, int]
    """Width and height of the picture asked about."""
    budgets: tuple[int, ...]
    """What is measured where no budget is given."""


SHAPES = {
    "llava-1.5-7b": Shape("llava", CLIP_L, VICUNA_7B, (672, 672), (192, 58, 29)),
    "llava-next-7b": Shape("llava-next", CLIP_L, VICUNA_7B, (672, 672), (640, 320, 144)),
    "qwen2.5-vl-7b": Shape("qwen2.5-vl", QWEN_TOWER, QWEN_7B, (1008, 1008), (324, 130, 65)),
    "qwen2.5-vl-3b": Shape("qwen2.5-vl", QWEN_TOWER, QWEN_3B, (1008, 1008), (324, 130, 65)),
    "llava-0.5b": Shape("llava", CLIP_L, HALF_B, (672, 672), (192, 58, 29)),
    "llava-next-0.5b": Shape("llava-next", CLIP_L, HALF_B, (672, 672), (640, 320, 144)),
    "llava-tiny": Shape("llava", CLIP_TINY, TINY, (56, 56), (8, 4)),
    "llava-next-tiny": Shape("llava-next", CLIP_TINY, TINY, (112, 112), (24, 8)),
    "qwen2.5-vl-tiny": Shape(
        "qwen2.5-vl",
        {
            **QWEN_TOWER,
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
        },
        {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
        (112, 140),
        (8, 4),
    ),
}
"""The last three are for a try: they take a second."""


@dataclass
class Subject:
    """A model on its device, and what it is asked."""

    name: str
    model: Any
    prepare: Callable[[], dict[str, Any]]
    """The image processor at work: a picture and a question -> inputs of one prompt, on the host."""
    budgets: tuple[int | float | str, ...]
    layers: int
    """Decoder layers of the shape ..."""
    built: int
    """... and of those, how many are there."""
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    @property
    def whole(self) -> bool:
        return self.built == self.layers

    @property
    def scale(self) -> float:
        """What the layers that were built are multiplied by."""
        return self.layers / self.built

    def inputs(self, batch: int = 1) -> dict[str, Any]:
        """Inputs of a batch of like prompts, on the device of the model."""
        return self.moved(self.prepare(), batch)

    def moved(self, prepared: dict[str, Any], batch: int = 1) -> dict[str, Any]:
        """What `prepare` made, on the device, `batch` times."""

        def there(name: str, value: Tensor) -> Tensor:
            value = value.to(self.device, self.dtype if value.is_floating_point() else None)
            return value.repeat(batch, *[1] * (value.dim() - 1)) if batch > 1 else value

        return {name: there(name, value) for name, value in prepared.items() if isinstance(value, Tensor)}


def subject(
    name: str,
    device: str | torch.device = "cpu",
    dtype: str = "bfloat16",
    picture: Path | None = None,
    question: str = QUESTION,
    layers: int | None = None,
) -> Subject:
    """A named shape, or a checkpoint by folder, name on the Hub or "bundled".

    Args:
        picture: None: noise for a shape, a bundled picture for a checkpoint.
        layers: decoder layers to build of a shape; None: all that memory allows.

    Raises:
        OptionError, LoadError: there is no such thing.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r}; known are: {', '.join(DTYPES)}")
    device = torch.device(device)
    if name in SHAPES:
        return _of_shape(name, device, DTYPES[dtype], picture, question, layers)
    if "/" not in name and name not in BUNDLED and not Path(name).is_dir():
        raise OptionError(f"there is no shape and no folder {shortened(name)}; shapes are: {', '.join(SHAPES)}")
    if layers is not None:
        raise OptionError("layers are counted for named shapes; a checkpoint is measured as it is")
    return _of_checkpoint(name, device, DTYPES[dtype], picture, question)


def _of_shape(
    name: str, device: torch.device, dtype: torch.dtype, picture: Path | None, question: str, layers: int | None
) -> Subject:
    shape = SHAPES[name]
    depth = shape.text["num_hidden_layers"]
    notes = ["random weights"]
    if layers is None:
        layers, note = _that_fit(shape, device, dtype)
        notes += note
    elif not 1 <= layers <= depth:
        raise OptionError(f"layers={layers}; {name} has {depth}")
    if layers < depth:
        notes.append(f"{layers} of {depth} decoder layers were built; their share is scaled by {depth / layers:g}")
    model = build(shape, device, dtype, layers)
    processor = image_processor(shape)
    photo = noise_picture(shape.picture) if picture is None else opened(picture)
    words = len(question.split()) + 40  # with a system prompt

    def prepare() -> dict[str, Any]:
        return prompt_of(shape, model, dict(processor(images=[photo], return_tensors="pt")), words)

    return Subject(name, model, prepare, shape.budgets, depth, layers, notes)


def _of_checkpoint(name: str, device: torch.device, dtype: torch.dtype, picture: Path | None, question: str) -> Subject:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from adafv.asking.models import checked_model, folder_or_id, hub_options
    from adafv.bundled import sample_pictures

    source = folder_or_id(checked_model(name))
    options = hub_options(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **options).eval().to(device)
    processor = AutoProcessor.from_pretrained(source, **options)
    photo = opened(sample_pictures()[0] if picture is None else picture)
    text = f"USER: {getattr(processor, 'image_token', '<image>')}\n{question} ASSISTANT:"
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def prepare() -> dict[str, Any]:
        return dict(processor(images=[photo], text=[text], return_tensors="pt"))

    depth = model.config.get_text_config().num_hidden_layers
    return Subject(name, model, prepare, ("25%", "10%", "5%"), depth, depth)


# Building ----------------------------------------------------------------------------------------------------------------


def config_of(shape: Shape, layers: int) -> Any:
    """The configuration of a shape with so many decoder layers."""
    import transformers

    text = {**shape.text, "num_hidden_layers": layers}
    if shape.family == "qwen2.5-vl":
        image = text["vocab_size"] - 9
        return transformers.Qwen2_5_VLConfig(
            vision_config={**shape.vision, "out_hidden_size": text["hidden_size"]},
            text_config=text,
            image_token_id=image,
            video_token_id=image + 1,
            vision_start_token_id=image - 3,
            vision_end_token_id=image - 2,
        )
    side, patch = shape.vision["image_size"], shape.vision["patch_size"]
    shared = {
        "vision_config": transformers.CLIPVisionConfig(**shape.vision),
        "text_config": transformers.LlamaConfig(**text),
        "image_token_id": text["vocab_size"] - 64,
        "vision_feature_layer": -2,
        "image_seq_length": (side // patch) ** 2,
    }
    if shape.family == "llava":
        return transformers.LlavaConfig(**shared)
    return transformers.LlavaNextConfig(image_grid_pinpoints=_pinpoints(side), **shared)


def _pinpoints(side: int) -> list[list[int]]:
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]


def _class_of(shape: Shape) -> Any:
    import transformers

    return {
        "llava": transformers.LlavaForConditionalGeneration,
        "llava-next": transformers.LlavaNextForConditionalGeneration,
        "qwen2.5-vl": transformers.Qwen2_5_VLForConditionalGeneration,
    }[shape.family]


def build(shape: Shape, device: torch.device, dtype: torch.dtype, layers: int) -> Any:
    """A stock model of a shape with random weights, made where it shall stand."""
    from transformers.initialization import no_init_weights

    with device, no_init_weights():
        model = _class_of(shape)._from_config(config_of(shape, layers), dtype=dtype)
    fill_weights(model)
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def fill_weights(model: Any) -> None:
    """Random weights in a fraction of the time of `normal_` on a CPU: one block of noise, over and over."""
    noise = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    blocks: dict[Any, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
            continue
        kind = (parameter.dtype, parameter.device)
        block = blocks.setdefault(kind, noise.to(parameter.device, parameter.dtype))
        flat = parameter.view(-1)
        whole = flat.numel() // BLOCK * BLOCK
        if whole:
            flat[:whole].view(-1, BLOCK).copy_(block.expand(whole // BLOCK, BLOCK))
        flat[whole:].copy_(block[: flat.numel() - whole])


def _that_fit(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[int, list[str]]:
    """(decoder layers that memory allows, what to say of it)."""
    depth = shape.text["num_hidden_layers"]
    element = torch.empty((), dtype=dtype).element_size()
    one, two = (ROOM * element * _parameters(shape, layers) for layers in (1, 2))
    layer, others = two - one, 2 * one - two
    free = free_memory(device)
    if others + depth * layer <= free:
        return depth, []
    layers = min(depth, int((free - others) // layer))
    needed, there = (round(number / 1e9, 1) for number in (others + depth * layer, free))
    if layers < FEWEST_LAYERS:
        raise OptionError(
            f"{needed} GB are needed on {device} and {there} are free, which is too little for a slice of it; use a smaller "
            "shape, or another device"
        )
    return layers, [f"all of it would need {needed} GB on {device}, and {there} are free"]


def _parameters(shape: Shape, layers: int) -> int:
    with torch.device("meta"):
        model = _class_of(shape)(config_of(shape, layers))
    return sum(parameter.numel() for parameter in model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that a program may take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no better word of it there


# What it is asked ----------------------------------------------------------------------------------------------------


def image_processor(shape: Shape) -> Any:
    """The stock image processor of a shape, as its checkpoints set it up."""
    transformers = importlib.import_module("transformers")
    if shape.family == "qwen2.5-vl":
        return transformers.Qwen2VLImageProcessor()
    side = shape.vision["image_size"]
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if shape.family == "llava":
        return transformers.CLIPImageProcessor(**sizes)
    return transformers.LlavaNextImageProcessor(image_grid_pinpoints=_pinpoints(side), **sizes)


def noise_picture(size: tuple[int, int]) -> Any:
    """A picture of soft noise, the same each time."""
    from PIL import Image

    width, height = size
    few = torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.frombytes("RGB", (16, 12), few.numpy().tobytes()).resize((width, height), Image.Resampling.BICUBIC)


def opened(path: Path) -> Any:
    """A picture as RGB.

    Raises:
        ImageError: it is not there, or damaged.
    """
    from adafv.evaluation.questions import FilePicture

    return FilePicture(path, str(path)).load()


def prompt_of(shape: Shape, model: Any, images: dict[str, Any], words: int) -> dict[str, Any]:
    """Inputs of one prompt: the image, with half of the words in front of it and half behind."""
    from adafv.engines.transformers.families import family_of

    config, kinds = model.config, {}
    token = config.image_token_id
    text = torch.randint(3, min(token, 30_000) - 10, (words,), generator=torch.Generator().manual_seed(0))
    [layout] = family_of(model).layouts(model, "image", images, [])
    shown = torch.full((layout.tokens,), token)
    if shape.family == "qwen2.5-vl":
        start, end = torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])
        shown = torch.cat((start, shown, end))
    ids = torch.cat((text[: words // 2], shown, text[words // 2 :])).unsqueeze(0)
    if shape.family == "qwen2.5-vl":
        kinds["mm_token_type_ids"] = (ids == token).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds, **images}

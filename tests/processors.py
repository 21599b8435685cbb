"""Processors made on the spot: a byte-level tokenizer, the chat templates that checkpoints really have, PIL images.

Bytes as tokens keep the vocabulary small and the texts real.
"""

from typing import Any

import numpy
from models import PATCH, SIDE, llava, llava_next
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

TEMPLATES = {
    # SmolLM, Qwen and the like: every turn has an end
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # LLaVA-1.5: roles in capitals, images first, no end of turn
    "vicuna": (
        "{% for m in messages %}{{ m['role'].upper() }}: "
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    # LLaVA-NeXT on Mistral
    "mistral": (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        " [/INST]{% else %} {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
    ),
}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
"""Their ids are 0 to 5."""
VOCABULARY = len(SPECIAL) + 256


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    bytes_as_tokens = Tokenizer(models.BPE(vocabulary, []))
    bytes_as_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_as_tokens.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_as_tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>" if template == "chatml" else "</s>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        padding_side="left",
    )
    made.chat_template = TEMPLATES[template]
    return made


def processor(family: str, template: str = "chatml") -> Any:
    options = {
        "tokenizer": tokenizer(template),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATES[template],
    }
    size = {"height": SIDE, "width": SIDE}
    if family == "llava":
        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size), **options
        )
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]]
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=pinpoints
        ),
        **options,
    )


def speaking_model(family: str, template: str = "chatml", **options: Any) -> Any:
    """A model for `processor(family, template)`."""
    build = {"llava": llava, "llava-next": llava_next}[family]
    end = SPECIAL.index("<|im_end|>" if template == "chatml" else "</s>")
    text = {"vocab_size": VOCABULARY, "eos_token_id": end, **options.pop("text", {})}
    model = build(text=text, image_token_id=SPECIAL.index("<image>"), **options)
    model.generation_config.eos_token_id = end
    return model


def photo(seed: int = 0, width: int = 100, height: int = 90) -> Image.Image:
    noise = numpy.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=numpy.uint8)
    return Image.fromarray(noise).resize((width, height))


def chat(*turns: str, image: bool = True) -> list[dict[str, Any]]:
    """User and assistant in turn; the image stands in the first user turn."""
    roles = ("user", "assistant")
    messages = [
        {"role": roles[number % 2], "content": [{"type": "text", "text": text}]} for number, text in enumerate(turns)
    ]
    if image:
        messages[0]["content"].insert(0, {"type": "image"})  # type: ignore[attr-defined]
    return messages

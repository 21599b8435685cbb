"""A tiny LLaVA checkpoint made on the spot, with all that `from_pretrained` reads, to test the real loading code."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 32, 8
TOKENS = (SIDE // PATCH) ** 2
SPECIAL = ("<pad>", "<start>", "<end>", "<image>")
TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<start>assistant {% endif %}"
)
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: every text can be said, nothing needs training."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        additional_special_tokens=["<image>"],
    )


def save_llava(folder: Path, *, chat_template: bool = True, anyres: bool = False) -> Path:
    """Save a random LLaVA-1.5 (or LLaVA-NeXT) with 16 visual tokens per crop, and its processor; return `folder`."""
    torch.manual_seed(0)
    words = tokenizer()
    image_token = words.convert_tokens_to_ids("<image>")
    shared = {
        "vision_config": CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        "text_config": LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "image_token_index": image_token,
    }
    options = {
        "tokenizer": words,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE if chat_template else None,
    }
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    if anyres:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS))
        processor = LlavaNextProcessor(LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS), **options)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**shared, image_seq_length=TOKENS))
        processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

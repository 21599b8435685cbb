"""The model: stock classes, sizes that two cores can train in under two hours.

One set of weights serves two models: `LlavaForConditionalGeneration`, and its twin with several crops,
`LlavaNextForConditionalGeneration`, which has one vector more (`image_newline`).

`vision_feature_layer` is -1: with six layers there is none to waste on [CLS] alone, and the layer that is tapped for
the saliency is then the one that pools the picture into [CLS].
"""

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from training.vocabulary import CHAT_TEMPLATE, END, IMAGE, PAD, tokenizer, words

SIDE, PATCH = 144, 12
GRID = SIDE // PATCH
VISUAL_TOKENS = GRID**2
WIDTH = 192
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
"""(height, width) that the twin may cut a picture into, in crops of SIDE."""
MEAN, DEVIATION = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu_pytorch_tanh",
    )


def text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(words()),
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )


def llava_config() -> LlavaConfig:
    return LlavaConfig(**_shared(), image_seq_length=VISUAL_TOKENS)


def llava_next_config() -> LlavaNextConfig:
    return LlavaNextConfig(**_shared(), image_seq_length=VISUAL_TOKENS, image_grid_pinpoints=PINPOINTS)


def llava_processor() -> LlavaProcessor:
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=DEVIATION
    )
    return LlavaProcessor(image_processor=images, **_processing())


def llava_next_processor() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=MEAN,
        image_std=DEVIATION,
    )
    return LlavaNextProcessor(image_processor=images, **_processing())


def _shared() -> dict[str, Any]:
    return {
        "vision_config": vision_config(),
        "text_config": text_config(),
        "image_token_id": IMAGE,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": True,
    }


def _processing() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }

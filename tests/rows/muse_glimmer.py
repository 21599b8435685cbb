"""Muse Glimmer: windows, full attention in two layers of four, videos with times between the frames."""

from typing import Any

import torch
from models import BEGIN, END, IMAGE, MARKERS, PAD, PATCH, VIDEO, VOCABULARY, FamilyRow, Visuals, finish, noise, words
from transformers import MuseGlimmerConfig, MuseGlimmerForConditionalGeneration

IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END, FRAME_END = MARKERS[:5]
TEMPORAL, MERGE = 2, 2


def build(seed: int = 0, dtype: torch.dtype = torch.float32, window: int = 512, **options: Any) -> Any:
    """The sliding window is wider than any prompt here, since it is counted in tokens of the prompt that the model sees."""
    config = MuseGlimmerConfig(
        **{
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "patch_size": PATCH,
                "patch_temporal": TEMPORAL,
                "merge_size": MERGE,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "layer_types": ["window_attention", "full_attention", "full_attention", "window_attention"],
            },
            "text_config": {
                "vocab_size": VOCABULARY,
                "hidden_size": 48,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 12,
                "max_position_embeddings": 2048,
                "sliding_window": window,
                "output_multiplier": 1.0,
                "pad_token_id": PAD,
                "bos_token_id": BEGIN,
                "eos_token_id": END,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "out_hidden_size": 32 * MERGE**2,
            "projector_hidden_size": 64,
            **options,
        }
    )
    model = finish(MuseGlimmerForConditionalGeneration(config), seed, dtype)
    with torch.no_grad():
        for module in model.modules():
            # As in Gemma, one is added to the weight: `finish` would make all signals twice as large, layer by layer.
            if type(module).__name__ == "MuseGlimmerTextCenteredRMSNorm":
                module.weight -= 1
    return model


def patches(model: Any, grids: list[list[int]], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = 3 * TEMPORAL * PATCH**2
    rows = [noise(seed + number, frames * down * across, width) for number, (frames, down, across) in enumerate(grids)]
    return torch.cat(rows).to(model.dtype), torch.tensor(grids)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int) -> Visuals:
    grids = [[1, height // PATCH, width // PATCH] for prompt in sizes for height, width in prompt]
    pixels, sizes_in_patches = patches(model, grids, seed)
    tokens = [[IMAGE_START, *[IMAGE] * (down * across // MERGE**2), IMAGE_END] for _, down, across in grids]
    return {"pixel_values": pixels, "image_grid_thw": sizes_in_patches}, tokens


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    """In front of each frame (of two pictures) its time, behind it a separator, or the end of the video."""
    grids = [[count // TEMPORAL, 4, 6] for prompt in frames for count in prompt]
    pixels, sizes = patches(model, grids, seed + 50)
    tokens = []
    for count, down, across in grids:
        shown = [VIDEO] * (down * across // MERGE**2)
        each = [[*words(3, 70 + frame), *shown, FRAME_END] for frame in range(count)]
        tokens.append([VIDEO_START, *[token for frame in each for token in frame][:-1], VIDEO_END])
    return {"pixel_values_videos": pixels, "video_grid_thw": sizes}, tokens


ROW = FamilyRow(
    "muse-glimmer",
    build,
    images,
    [(84, 112), (140, 84), (56, 168), (112, 112)],
    videos,
    clips=(6, 4),
)

"""VideoLLaMA3: images unmerged, videos merged 2 x 2 and without the tokens that did not change, times between frames."""

from typing import Any

import torch
from models import IMAGE, PATCH, TOWER, VIDEO, FamilyRow, Visuals, finish, noise, text_config, words
from transformers import Qwen2Config, VideoLlama3Config, VideoLlama3ForConditionalGeneration

MERGE = 2


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = VideoLlama3Config(
        vision_config={
            **TOWER,
            "patch_size": PATCH,
        },
        text_config=Qwen2Config(**text_config().to_diff_dict()),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **options,
    )
    return finish(VideoLlama3ForConditionalGeneration(config), seed, dtype)


def pixels(model: Any, grids: list[list[int]], seed: int) -> torch.Tensor:
    width = 3 * PATCH**2
    parts = [noise(seed + number, frames * down * across, width) for number, (frames, down, across) in enumerate(grids)]
    return torch.cat(parts).to(model.dtype)


def images(model: Any, sizes: list[list[tuple[int, int]]], seed: int, merge: int = 1) -> Visuals:
    grids = [[1, height // PATCH, width // PATCH] for prompt in sizes for height, width in prompt]
    entries = {
        "pixel_values": pixels(model, grids, seed),
        "image_grid_thw": torch.tensor(grids),
        "image_merge_sizes": torch.full((len(grids),), merge),
    }
    return entries, [[IMAGE] * (down * across // merge**2) for _, down, across in grids]


def videos(model: Any, frames: list[list[int]], seed: int) -> Visuals:
    grids = [[count, 4, 6] for prompt in frames for count in prompt]
    tokens, kept = [], []
    for number, (count, down, across) in enumerate(grids):
        mask = noise(seed + 90 + number, count, down * across // MERGE**2) > 0
        mask[0] = mask[:, :3] = True  # the whole first frame, and three tokens of every other
        kept.append(mask.flatten())
        frames_shown = [[*words(2, 70 + frame), *[VIDEO] * int(row.sum())] for frame, row in enumerate(mask)]
        tokens.append([token for shown in frames_shown for token in shown])
    entries = {
        "pixel_values_videos": pixels(model, grids, seed + 50),
        "video_grid_thw": torch.tensor(grids),
        "video_merge_sizes": torch.full((len(grids),), MERGE),
        "video_compression_mask": torch.cat(kept),
    }
    return entries, tokens


ROW = FamilyRow(
    "video-llama3",
    build,
    images,
    [(42, 56), (70, 42), (28, 84), (56, 56)],
    videos,
    clips=(4, 3),
    mixes_up_images=True,
)

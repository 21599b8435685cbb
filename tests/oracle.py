"""The oracle: pruned == the stock, unpruned model with the dropped placeholders zeroed in the attention mask.

What is dropped before the language model and what it may not look at are the same thing, as long as the positions of
the rest agree. So the oracle needs nothing of adafv but the mask of what was kept.
"""

from typing import Any

import torch
import transformers
from models import IMAGE, VIDEO, FamilyRow
from packaging.version import Version
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

STOCK_MIXES_UP_IMAGES = Version(transformers.__version__) < Version("5.23")
"""Older releases repeat several images of one prompt in the wrong order for beams and return sequences."""


def masked_inputs(
    inputs: dict[str, Any],
    keep_mask: Tensor,
    positions: str = "compact",
    row: FamilyRow | None = None,
    model: Any = None,
    generates: bool = False,
) -> dict[str, Any]:
    """Inputs for the stock model under which it sees exactly the kept tokens.

    With `row` and `model` for any family; without, for those that count positions along the prompt.
    """
    given = inputs.get("attention_mask")
    given = torch.ones_like(keep_mask, dtype=torch.long) if given is None else given
    mask = given * keep_mask
    if row is not None and row.rotary:
        return {
            **inputs,
            "attention_mask": mask,
            "position_ids": rotary_positions(row, model, inputs, given, mask if generates else None),
        }
    counted = mask if positions == "compact" else given
    position_ids = (counted.cumsum(-1) - 1).clamp_min(0)
    return {**inputs, "attention_mask": mask, "position_ids": position_ids}


def rotary_positions(
    row: FamilyRow, model: Any, inputs: dict[str, Any], given: Tensor, counted: Tensor | None
) -> Tensor:
    """Positions in time, height and width as the stock model gives them to the full prompt.

    With `counted`, as `generate` wants them: behind a row that counts along the prompt.
    """
    sizes = {name: inputs[name] for name in inputs if name.endswith(("_grid_thw", "second_per_grid_ts"))}
    if sizes:
        kinds = {name: inputs[name] for name in row.token_types}
        if "video_second_per_grid" in inputs:
            sizes["second_per_grids"] = inputs["video_second_per_grid"]
        positions, _ = model.model.get_rope_index(inputs["input_ids"], attention_mask=given, **kinds, **sizes)
    else:
        positions = (given.cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)
    if counted is None:
        return positions
    return torch.cat(((counted.cumsum(-1) - 1).clamp_min(0)[None], positions))


def kept_logits(logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of the attended tokens of each prompt: [B, S, V], [B, S] -> B times [attended, V]."""
    return [row[attended.bool()] for row, attended in zip(logits, mask, strict=True)]


def equal(one: Tensor, two: Tensor) -> bool:
    """Bit by bit, where NaN at a dropped column equals NaN."""
    return (
        one.shape == two.shape
        and torch.equal(one.isnan(), two.isnan())
        and torch.equal(one.nan_to_num(), two.nan_to_num())
    )


def same_logits(
    pruned: Tensor, expected: Tensor, given: Tensor, keep_mask: Tensor, atol: float = 2e-5, rtol: float = 2e-5
) -> None:
    """Logits in the caller's columns: as the masked stock model's at every kept token, NaN at every dropped one.

    Args:
        given: [B, S], the attention mask of the caller.
    """
    assert pruned.shape == expected.shape
    kept, dropped = given.bool() & keep_mask, given.bool() & ~keep_mask
    assert pruned[dropped].isnan().all()
    assert not pruned[~given.bool()].isnan().any()  # padding means nothing, but sums over it must not become NaN
    if not kept.any():  # asked for columns that were dropped, all of them
        return
    # A small logit is what is left of large sums: its error goes with the largest, where those are large (Gemma).
    scale = max(1.0, float(expected[kept].abs().max()) / 10)
    torch.testing.assert_close(pruned[kept], expected[kept], atol=atol * scale, rtol=rtol)


VISUAL_INPUTS = (
    "pixel_values",
    "high_res_pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
    "pixel_attention_mask",
    "image_position_ids",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "video_second_per_grid",
    "image_merge_sizes",
    "video_merge_sizes",
    "video_compression_mask",
)


def encoded_by_prompt(model: Any, inputs: dict[str, Any], image_token: int = IMAGE) -> dict[str, Any]:
    """`inputs` with all images encoded by the stock model, one entry per prompt: an order that no release mixes up."""
    outputs = {}
    for modality, token, pixels in (
        ("image", image_token, {"pixel_values", "pixel_values_images"}),
        ("video", VIDEO, {"pixel_values_videos"}),
    ):
        if not pixels & inputs.keys():
            continue
        encode = getattr(model.model, f"get_{modality}_features")
        mine = {
            name: inputs[name]
            for name in VISUAL_INPUTS
            if name in inputs and ("video" in name) == (modality == "video")
        }
        mine.pop("image_sizes_videos", None)
        mine.pop("second_per_grid_ts", None)
        mine.pop("video_second_per_grid", None)
        shown = mine.pop("video_compression_mask", None)  # the language model applies it, to all videos at once
        with torch.no_grad():
            encoded = encode(**mine, return_dict=True)
        if not (inputs["input_ids"] == token).any():
            modality, token = "image", image_token  # one placeholder for both
        features = encoded.pooler_output
        is_tensor = isinstance(features, Tensor)
        joined = features.flatten(0, -2) if is_tensor else torch.cat([part.flatten(0, -2) for part in features])
        if shown is not None:
            joined = joined[shown]
        counts = [count for count in (int(row.sum()) for row in inputs["input_ids"] == token) if count]
        parts: Any = list(joined.split(counts))
        if is_tensor:
            if len(set(counts)) > 1:
                raise NotImplementedError("one tensor for prompts with different numbers of visual tokens")
            parts = torch.stack(parts)
        outputs[modality] = BaseModelOutputWithPooling(pooler_output=parts)
        if getattr(encoded, "visual_indicator_features", None) is not None:
            markers = encoded.visual_indicator_features
            outputs[modality] = type(encoded)(pooler_output=parts, visual_indicator_features=markers)
        if getattr(encoded, "deepstack_features", None) is not None:
            outputs[modality] = type(encoded)(
                pooler_output=parts,
                deepstack_features=[list(torch.cat(list(layer)).split(counts)) for layer in encoded.deepstack_features],
            )
    rest = {name: value for name, value in inputs.items() if name not in VISUAL_INPUTS}
    return {**rest, "mm_encoder_outputs": outputs}

"""The method itself: pure tensor functions that depend on torch alone.

    budget.py     how many tokens `keep` means for an image
    layout.py     where the visual tokens of an image come from
    scores.py     the two scores of the paper: text-to-image attention and visual saliency
    received.py   visual saliency of towers without [CLS]
    selection.py  the geometric-mean selection: `joint_search` and those it is compared with

Every engine (transformers, vLLM) calls these functions; none has an implementation of its own.
"""

from adafv.core.budget import tokens_to_keep
from adafv.core.layout import ImageLayout, anyres_layout, anyres_places
from adafv.core.received import patch_saliency
from adafv.core.scores import class_attention, text_to_image_attention
from adafv.core.selection import (
    Selection,
    frank_wolfe_search,
    geometric_mean,
    joint_search,
    published_search,
    published_tokens,
    split_search,
    top_tokens,
)

__all__ = [
    "ImageLayout",
    "Selection",
    "anyres_layout",
    "anyres_places",
    "class_attention",
    "frank_wolfe_search",
    "geometric_mean",
    "joint_search",
    "patch_saliency",
    "published_search",
    "published_tokens",
    "split_search",
    "text_to_image_attention",
    "tokens_to_keep",
    "top_tokens",
]

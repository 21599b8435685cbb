"""The method itself: pure tensor functions that depend on torch alone.

    budget.py     how many tokens stay
    layout.py     where the visual tokens of an image come from
    crops.py      which crops of an image are worth a run of the tower
    tokens.py     what a method sees, plans and returns
    layers.py     which layer of a tower a signal speaks of
    patches.py    from the patches of a tower to the tokens of an image
    merging.py    what methods share that merge tokens, or drop what is alike
    encoded.py    what the tower made of an image, and the store that keeps it
    scores.py     the two scores of the paper: text-to-image attention and visual saliency
    received.py   visual saliency of towers without [CLS]
    select.py     the one preparation in front of every method; what it returns is checked
    selection.py  the geometric-mean selection: `joint_search` and those it is compared with
    likeness.py   how alike tokens are
    greedy.py     greedy searches for sets that are diverse, or that cover
    facets.py     tokens that matter and are unlike each other
    cuts.py       how a budget is shared out over the layers of the language model
    sending.py    small tensors on their way to a device
    stages.py     the stages of a call, for whoever measures one

Every engine (transformers, vLLM) calls these functions; none has an implementation of its own.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adafv.core.budget import Budget
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

# By need: torch takes seconds to import, and a command line that reads a budget shall not wait for it.
_HOMES = {
    "Budget": "budget",
    "ImageLayout": "layout",
    "Selection": "selection",
    "anyres_layout": "layout",
    "anyres_places": "layout",
    "class_attention": "scores",
    "frank_wolfe_search": "selection",
    "geometric_mean": "selection",
    "joint_search": "selection",
    "patch_saliency": "received",
    "published_search": "selection",
    "published_tokens": "selection",
    "split_search": "selection",
    "text_to_image_attention": "scores",
    "top_tokens": "selection",
}

__all__ = [
    "Budget",
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
    "top_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"adafv.core.{_HOMES[name]}"), name)

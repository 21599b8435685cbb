"""Which text counts for an image.

    "turn"      the text of the image's own turn: up to the tokens that end a turn, on both sides of the image, without
                begin / end / padding tokens
    "question"  the user's own words in that turn, without the chat template; needs the processor
    "after"     everything after the image, template and later turns included (the published code)

The default is "question" where a processor is given, and "turn" where none is, or where its chat template does not show
which words are the user's (with a warning that says why); `resolve_scope` decides it for every engine. Both give turn 2
of a chat the same tokens as turn 1, so a cache, or an encoded image, can be kept; "after" does not. Measured on the 938
presence questions of the project's testbed the three differ by less than the noise (see docs/text.md), so stability
decides.

Templates without an end-of-turn token (LLaVA-1.5's) have one long "turn" for the whole chat; there, "question" is the
stable choice.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafv.errors import NoWordsError, OptionError, UnsupportedCallError
from adafv.prompts.prompt import PlacedImage, Prompt
from adafv.prompts.template import ChatTemplate as ChatTemplate
from adafv.prompts.template import image_text as image_text

SCOPES = ("question", "turn", "after")


def text_columns(prompt: Prompt, image: PlacedImage, scope: str, template: ChatTemplate | None) -> Tensor:
    """[T] long, columns of the text that counts for `image`; of its own segment alone, where prompts are packed.

    Raises:
        NoWordsError: there is none.
        UnsupportedCallError: scope "question", of a prompt of which only the embeddings are known.
    """
    row, (first, last) = image.row, image.span
    arrays = prompt.arrays
    column = np.arange(prompt.length)
    own = arrays.segment_of(row, first)
    countable = arrays.attended[row] & ~arrays.is_visual[row] & own
    countable &= (column < first) | (column > last)  # the times between the frames of a video are nobody's words
    if scope == "after":
        counts = countable & (column > last)
    elif scope == "turn":
        ends = np.flatnonzero(arrays.turn_ends[row] & own)
        counts = countable & ~arrays.special[row]
        if (ends < first).any():
            counts &= column > ends[ends < first].max()
        if (ends > last).any():
            counts &= column < ends[ends > last].min()
    else:
        assert template is not None
        if (arrays.tokens[row][countable] < 0).any():
            raise UnsupportedCallError(
                "text='question' finds the user's words by their tokens; with inputs_embeds, pass input_ids too or use "
                "text='turn'"
            )
        members = np.flatnonzero(own)
        start, end = int((members < first).sum()), int((members <= last).sum()) - 1
        nobodys = ~countable | arrays.special[row]
        parts = (arrays.tokens[row], arrays.is_visual[row], nobodys, arrays.turn_ends[row], arrays.attended[row])
        tokens, *marks = (part[members].tolist() for part in parts)
        words = template.words(tokens, (start, end), *marks)
        counts = np.zeros_like(own)
        counts[members[words]] = True
    found = torch.from_numpy(np.flatnonzero(counts))
    if found.numel() == 0:
        where = {
            "after": "after the image",
            "turn": "in the turn of the image",
            "question": "from the user, outside the chat template",
        }
        raise NoWordsError(
            f"there is no text {where[scope]}, so there is nothing to compare the image with; "
            "ask a question, or use a method that does not look at text (saliency, random, uniform)"
        )
    return found


def resolve_scope(scope: str | None, processor: Any) -> tuple[str, ChatTemplate | None]:
    """(scope, template) for the options `text` and `processor`.

    Args:
        scope: None for the default: "question" where the processor's chat template tells the user's words, else "turn".

    Raises:
        OptionError: no such scope, or "question" was asked for and the processor, or its chat template, does not do.
    """
    if scope is None:
        if processor is None:
            return "turn", None
        try:
            return "question", ChatTemplate.of(processor)
        except OptionError as error:
            reason = str(error).partition(";")[0]
            warnings.warn(
                f"which words are the question cannot be seen ({reason}), so all text of the image's turn counts, the "
                "template's own too; text='turn' says so without this warning",
                stacklevel=4,
            )
            return "turn", None
    if scope not in SCOPES:
        raise OptionError(f"text={scope!r}; known are: {', '.join(SCOPES)}")
    if scope != "question":
        return scope, None
    if processor is None:
        raise OptionError(
            "text='question' needs the processor to know the chat template: AdaFV(..., processor=processor)"
        )
    return scope, ChatTemplate.of(processor)

"""Which text counts for an image.

    "turn"      the text of the image's own turn: up to the tokens that end a turn, on both sides of the image, without
                begin / end / padding tokens
    "question"  the user's own words in that turn, without the chat template; needs the processor
    "after"     everything after the image, template and later turns included (the published code)

The default is "question" where a processor is given and "turn" where it is not. Both give turn 2 of a chat the same
tokens as turn 1, so a cache, or an encoded image, can be kept; "after" does not. Measured on the 938 presence questions
of the project's testbed the three differ by less than the noise (see docs/text.md), so stability decides.

Templates without an end-of-turn token (LLaVA-1.5's) have one long "turn" for the whole chat; there, "question" is the
stable choice.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafv.errors import NoWordsError, OptionError, UnsupportedCallError
from adafv.prompts.prompt import PlacedImage, Prompt

SCOPES = ("question", "turn", "after")

_TIME = re.compile(r"<\d+(\.\d+)? ?seconds>")
_TIME_TOKENS = 20
"""Qwen3-VL's processor writes its time, at most so many tokens, in front of every frame of a video: not the user's words."""


@dataclass(frozen=True)
class ChatTemplate:
    """The token sequences that a chat template puts around the user's words, learned by rendering it."""

    before_words: tuple[int, ...]
    """Role tokens right before words that stand in front of an image; empty if the template puts images first."""
    after_image: tuple[int, ...]
    """Tokens between an image and the words after it, such as a newline."""
    after_words: tuple[int, ...]
    """Tokens from the end of the user's words to the start of the answer."""
    decode: Callable[[list[int]], str]
    """Of the tokenizer; tells words from blank tokens and special ones."""

    @classmethod
    def of(cls, processor: Any) -> "ChatTemplate":
        """Learn from a processor with a chat template and a tokenizer.

        Raises:
            OptionError: the processor has no chat template, or not one that shows where the user's words begin.
        """
        if getattr(processor, "chat_template", None) is None:
            raise OptionError("text='question' needs a processor with a chat template; use text='turn' or 'after'")
        image, words = {"type": "image"}, _two_words(processor.tokenizer)
        first, second = (_render(processor, [image, {"type": "text", "text": word}]) for word in words)
        placeholder = processor.tokenizer.convert_tokens_to_ids(_image_token(processor))
        if placeholder not in first:
            raise OptionError("the chat template does not show images; use text='turn' or 'after'")
        behind_first, behind_second = (ids[ids.index(placeholder) + 1 :] for ids in (first, second))
        after_image = _common_start(behind_first, behind_second)
        after_words = _common_start(behind_first[::-1], behind_second[::-1])[::-1]
        if not after_words or len(after_image) + len(after_words) > len(behind_first):
            raise OptionError("the chat template does not show where the user's words end; use text='turn' or 'after'")
        first, second = (_render(processor, [{"type": "text", "text": word}, image]) for word in words)
        front_first, front_second = (ids[: ids.index(placeholder)] for ids in (first, second))
        before_words: tuple[int, ...] = ()
        if front_first != front_second:
            before_words = _common_start(front_first, front_second)[-3:]
        # Special tokens are nobody's words: some processors put markers around an image that the template does not show.
        decode = functools.partial(processor.tokenizer.decode, skip_special_tokens=True)
        return cls(before_words, after_image, after_words, decode)

    def words(self, tokens: list[int], image_start: int, image_end: int, turn: tuple[int, int]) -> list[int]:
        """Columns of the user's words, blanks left out, in the turn of an image at image_start..image_end (exclusive)."""
        end = _find(tokens, self.after_words, image_end, len(tokens))
        end = turn[1] if end is None else end
        start = image_start
        if self.before_words:
            for place in range(image_start - len(self.before_words), -1, -1):
                if tuple(tokens[place : place + len(self.before_words)]) == self.before_words:
                    start = place + len(self.before_words)
                    break
        stop = image_start
        for place in range(max(start, image_start - _TIME_TOKENS), image_start):
            if _TIME.fullmatch(self.decode(tokens[place:image_start]).strip()):
                stop = place
                break
        columns = [*range(start, stop), *range(image_end, end)]
        if tuple(tokens[image_end : image_end + len(self.after_image)]) == self.after_image:
            columns = [column for column in columns if not image_end <= column < image_end + len(self.after_image)]
        return [column for column in columns if tokens[column] >= 0 and self.decode([tokens[column]]).strip()]


def text_columns(prompt: Prompt, image: PlacedImage, scope: str, template: ChatTemplate | None) -> Tensor:
    """[T] long, columns of the text that counts for `image`.

    Raises:
        NoWordsError: there is none.
    """
    row, (first, last) = image.row, image.span
    countable = prompt.attended[row] & ~prompt.is_visual[row]
    column = torch.arange(prompt.length)
    countable &= (column < first) | (column > last)  # the times between the frames of a video are nobody's words
    if scope == "after":
        counts = countable & (column > last)
    else:
        ends = prompt.turn_ends[row].nonzero().flatten()
        turn = (
            int(ends[ends < first].max()) + 1 if (ends < first).any() else 0,
            int(ends[ends > last].min()) if (ends > last).any() else prompt.length,
        )
        counts = countable & ~prompt.special[row] & (column >= turn[0]) & (column < turn[1])
        if scope == "question":
            assert template is not None
            if (prompt.tokens[row][countable] < 0).any():
                raise UnsupportedCallError(
                    "text='question' finds the user's words by their tokens; with inputs_embeds, pass input_ids too or use "
                    "text='turn'"
                )
            words = torch.zeros_like(counts)
            words[template.words(prompt.tokens[row].tolist(), first, last + 1, turn)] = True
            counts &= words
    found = counts.nonzero().flatten()
    if found.numel() == 0:
        where = {
            "after": "after the image",
            "turn": "in the turn of the image",
            "question": "from the user, outside the chat template",
        }
        raise NoWordsError(
            f"prompt {row} has no text {where[scope]}, so there is nothing to compare the image with; "
            "ask a question, or use a method that does not look at text (saliency, random, uniform)"
        )
    return found


def image_text(processor: Any) -> str:
    """What stands for one image in a prompt before the processor sees it.

    Mostly the token that is repeated for every visual token. Gemma writes the one that begins an image, and the processor
    puts the others behind it. Qianfan-OCR writes a word that need not be a token, and the processor replaces it.
    """
    word = getattr(processor, "image_placeholder_token", None)
    if word is not None:
        return str(word)
    template = str(getattr(processor, "chat_template", None) or "")
    begin = getattr(processor, "boi_token", None)
    return str(begin) if begin is not None and str(begin) in template else str(processor.image_token)


def _image_token(processor: Any) -> str:
    """The token by which an image is found in what `_render` gives."""
    written = image_text(processor)
    return written if getattr(processor, "image_placeholder_token", None) is None else str(processor.image_token)


def _render(processor: Any, content: list[dict[str, str]]) -> list[int]:
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return processor.tokenizer(text.replace(image_text(processor), _image_token(processor))).input_ids


def _two_words(tokenizer: Any) -> tuple[str, str]:
    """Two words whose tokens have nothing in common at either end.

    To a closed vocabulary all words that it lacks are the same token, so there the two are taken from it.
    """
    words, unknown = ("alpha", "Query"), getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not any(unknown in _encoded(tokenizer, word) for word in words):
        return words
    vocabulary = sorted(tokenizer.get_vocab().items())
    whole = (token for token, number in vocabulary if token.isalpha() and _encoded(tokenizer, token) == [number])
    return next(whole, words[0]), next(whole, words[1])


def _encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _common_start(first: list[int], second: list[int]) -> tuple[int, ...]:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return tuple(first[:length])


def _find(tokens: list[int], wanted: tuple[int, ...], start: int, stop: int) -> int | None:
    for place in range(start, stop - len(wanted) + 1):
        if tuple(tokens[place : place + len(wanted)]) == wanted:
            return place
    return None


def resolve_scope(text: str | None, processor: Any) -> tuple[str, ChatTemplate | None]:
    """(scope, template) for the options `text` and `processor`.

    Raises:
        OptionError: no such scope, or "question" without a processor.
    """
    if text is None:
        text = "turn" if processor is None else "question"
    if text not in SCOPES:
        raise OptionError(f"text={text!r}; known are: {', '.join(SCOPES)}")
    if text != "question":
        return text, None
    if processor is None:
        raise OptionError(
            "text='question' needs the processor to know the chat template: AdaFV(..., processor=processor)"
        )
    return text, ChatTemplate.of(processor)

"""Which model answers: the one that was named, or the one that comes with adafv; and which words it knows."""

import re
from typing import Any

from adafv.bundled import bundled_model

BUNDLED = {"bundled": "llava", "bundled-next": "llava-next"}
"""What the command line calls the models that come with adafv, and what `bundled_model` calls them. A folder that
happens to have one of these names is ./bundled."""
DEFAULT = "bundled"

_LISTABLE = 200
"""Words; a model that knows no more has them listed to whoever uses another one."""


def checked_model(named: str) -> str:
    """The model to ask: the one that was named, else the one that comes with adafv."""
    return named.strip() or DEFAULT


def folder_or_id(model: str) -> str:
    """What `from_pretrained` takes for a model named on the command line."""
    return str(bundled_model(BUNDLED[model])) if model in BUNDLED else model


def about(model: str, tokenizer: Any) -> str:
    """Who answered, in one line."""
    if model not in BUNDLED:
        return f"answered by {model}"
    known = len(known_words(tokenizer))
    return f"answered by {model}, a small model that knows {known} words: a demo and a test instrument"


def known_words(tokenizer: Any) -> list[str]:
    """The whole words of a vocabulary, in alphabetical order: no special tokens, no signs, no parts of words."""
    return sorted(token for token in tokenizer.get_vocab() if token.isalpha())


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words and signs of `text` that a tokenizer has nothing for but its token for the unknown, each once.

    Always empty for tokenizers without such a token, as those on bytes are.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    words = dict.fromkeys(re.findall(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text))
    return [word for word in words if unknown in tokenizer.encode(word, add_special_tokens=False)]


def unknown_words_warning(tokenizer: Any, words: list[str]) -> str:
    """One sentence that names the words, and those that the model does know where they are few; empty for no words."""
    if not words:
        return ""
    named = ", ".join(f"'{word}'" for word in words)
    one = len(words) == 1
    text = (
        f"the model does not know the {'word' if one else 'words'} {named}; it reads {tokenizer.unk_token} in "
        f"{'its' if one else 'their'} place, so its answer may mean nothing"
    )
    known = known_words(tokenizer)
    return text if len(known) > _LISTABLE else f"{text}. It knows: {', '.join(known)}"

"""Which model answers: the one that was named, or the one that comes with adafv; and which words it knows.

What can be found wrong about a name without torch and without the network is found here, in no time.
"""

import difflib
import os
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from adafv.asking.failures import LoadError
from adafv.bundled import bundled_model
from adafv.printable import shortened

Value = TypeVar("Value")

BUNDLED = {
    "bundled": "llava",
    "bundled-next": "llava-next",
    "bundled-details": "llava-details",
    "bundled-details-next": "llava-details-next",
}
"""What the command line calls the models that come with adafv, and what `bundled_model` calls them. A folder that
happens to have one of these names is ./bundled."""
DEFAULT = "bundled"

HUB_TIMEOUT = 8.0
"""Seconds in which the Hub must say whether it has a model. Its own client tries again and again, for half a minute."""

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
"""Owner and name. Ids without an owner are left from the Hub's first days; none of them is of a vision-language model."""
_EXAMPLE = "llava-hf/llava-1.5-7b-hf"

_LISTABLE = 200
"""Words; a model that knows no more has them listed to whoever uses another one."""


def checked_model(named: str) -> str:
    """The model to ask: the one that was named, else the one that comes with adafv.

    Raises:
        LoadError: it is neither the folder of a checkpoint nor what an id on the Hub looks like.
    """
    model = named.strip() or DEFAULT
    if model in BUNDLED:
        return model
    if model.startswith("~"):
        model = os.path.expanduser(model)
    problem = problem_with(model)
    if problem:
        raise LoadError(f"cannot load the model {shortened(model)}: {problem}")
    return model


def problem_with(model: str) -> str:
    """What is wrong with a folder or id, found without the network; empty where nothing can be seen to be."""
    try:
        folder, there = Path(model).is_dir(), os.path.lexists(model)
    except (OSError, ValueError):  # too long, or a NUL in it
        folder = there = False
    if folder:
        if not os.access(model, os.R_OK | os.X_OK):
            return "the folder may not be read; check its permissions"
        if not (Path(model) / "config.json").is_file():
            return (
                "the folder has no config.json; it must hold what save_pretrained wrote for the model and its processor"
            )
        return ""
    if there:
        return "give the folder of the checkpoint, not a file"
    if _HUB_ID.fullmatch(model) and not model.startswith((".", "-")) and "--" not in model and ".." not in model:
        return ""
    return (
        "there is no such folder, and an id on the Hub looks otherwise: check the folder or Hub id (such as "
        f"{_EXAMPLE}){_meant(model)}"
    )


def _meant(model: str) -> str:
    """The end of a message: a folder beside the one that was named, or a bundled model, whose name is nearly that."""
    path = Path(model)
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        names = []
    own = list(BUNDLED) if len(path.parts) == 1 else []
    close = difflib.get_close_matches(path.name, [*own, *names], n=1)
    if not close:
        return ""
    return f"; did you mean {close[0] if close[0] in own else shortened(path.with_name(close[0]))}?"


@cache
def hub_options(source: str) -> dict[str, Any]:
    """What `from_pretrained` takes beside a folder or id: {"local_files_only": True} where the Hub need not be asked.

    Asks the Hub once whether it has `source`, and looks at what was downloaded before where it does not answer.

    Raises:
        LoadError: it has no such model, or does not let us have it; or does not answer, and there is no copy here.
    """
    if os.path.isdir(source):
        return {}
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    cached = isinstance(try_to_load_from_cache(source, "config.json"), str)
    if constants.HF_HUB_OFFLINE:
        if cached:
            return {"local_files_only": True}
        raise _not_loaded(source, "it was not downloaded before, and HF_HUB_OFFLINE forbids to ask the Hub; unset it")
    try:
        within(HUB_TIMEOUT, lambda: get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=HUB_TIMEOUT / 2))
    except GatedRepoError as error:
        raise _not_loaded(
            source, "its owner grants access on request; ask for it on the Hub, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise _not_loaded(
            source,
            "the Hub has no such model, or it is private; check the folder or Hub id "
            f"(such as {_EXAMPLE}), or run: hf auth login{_meant(source)}",
        ) from error
    except EntryNotFoundError as error:
        raise _not_loaded(source, "it has no config.json on the Hub; name one in the format of transformers") from error
    except HfHubHTTPError as error:
        if not cached:
            raise _not_loaded(source, f"the Hub refused it ({_reason(error)}); try again later") from error
    except Exception as error:  # whatever the client's HTTP library raises
        if not cached:
            raise _not_loaded(
                source,
                f"there is no such folder, and the Hub does not answer ({_reason(error)}); check the folder or Hub id "
                f"(such as {_EXAMPLE}) and the network{_meant(source)}",
            ) from error
    else:
        return {}
    return {"local_files_only": True}


def _not_loaded(source: str, problem: str) -> LoadError:
    return LoadError(f"cannot load the model {shortened(source)}: {problem}")


def _reason(error: Exception) -> str:
    return shortened(" ".join(str(error).split())) or type(error).__name__


def within(seconds: float, function: Callable[[], Value]) -> Value:
    """What `function` returns or raises; TimeoutError where that takes longer. It then goes on in a thread that nobody
    waits for, also not at the end of the program."""
    results: list[Value] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no end after {seconds:g} s")
    return results[0]


def folder_or_id(model: str) -> str:
    """What `from_pretrained` takes for a model named on the command line."""
    return str(bundled_model(BUNDLED[model])) if model in BUNDLED else model


def about(model: str, tokenizer: Any) -> str:
    """Who answered, in one line."""
    if model not in BUNDLED:
        return f"answered by {shortened(model, 1000)}"
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

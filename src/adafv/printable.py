"""Text that came from elsewhere, made fit to be shown: no control characters, and no megabyte of it.

A server's reason phrase, the name of a file, a checkpoint's configuration and a model's answer all reach the terminal,
where an escape sequence could clear the screen, set its title or write a line that looks like one of ours.
"""

import re
import unicodedata

LONGEST_NAME = 200
"""Characters of a file name, an address or another single value in a message."""
_LONGEST_WORD = 300
"""Of one run without spaces in a message; a path may be longer than a name, but not as long as a data: URL."""
_LONGEST_MESSAGE = 4_000

# Cc: controls, ESC among them. Zl, Zp: line breaks that are no line feeds. Cs: halves of surrogate pairs, which stand for
# undecodable bytes in file names.
_HIDDEN = frozenset({"Cc", "Zl", "Zp", "Cs"})
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn the direction in which what follows is shown, so that it reads as something else."""
_LINE_BREAKS = re.compile(r"[ \t]*[\r\n\v\f\x85\u2028\u2029][\s]*")


def printable(text: str, kept: str = "") -> str:
    r"""`text` with every control character written out, as in "\x1b[31m".

    Args:
        kept: control characters that stay as they are, such as line breaks.
    """
    return "".join(
        character
        if character in kept or (character not in _TURNING and unicodedata.category(character) not in _HIDDEN)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shortened(text: object, longest: int = LONGEST_NAME) -> str:
    """`text` on one line, printable, its middle left out where it has more than `longest` characters."""
    return printable(_without_middle(str(text), longest))


def one_line(message: str) -> str:
    """A message, printable, on one line, without the middle of words that are too long to be read."""
    text = _LINE_BREAKS.sub(" ", message.strip())
    text = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda found: _without_middle(found[0], _LONGEST_WORD), text)
    return printable(_without_middle(text, _LONGEST_MESSAGE))


def _without_middle(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    left_out = f"...({len(text):,} characters)..."
    kept = max(longest - len(left_out), 2)
    end = kept // 4
    return text[: kept - end] + left_out + text[-end:]

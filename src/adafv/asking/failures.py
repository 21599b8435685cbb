"""What can go wrong between a user and a model, beside the errors of the library itself."""

from adafv.errors import AdaFVError


class UsageError(Exception):
    """An option or argument is wrong; the message names the mend."""


def check_text(text: str, name: str) -> None:
    """Find out whether `text` is something that a tokenizer takes.

    It is not where it holds half a letter (U+D800 to U+DFFF): Python writes one for every byte of the command line that is
    not UTF-8, and JSON can.

    Raises:
        UsageError: it is none. The message does not repeat the text, which no terminal or log could show.
    """
    lone = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    if lone is not None:
        code = ord(text[lone])
        what = f"the byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"half a letter (U+{code:04X})"
        raise UsageError(
            f"{name} is not text: {what} stands in place {lone + 1}, which is not UTF-8; write it again in UTF-8 (a terminal "
            "with another encoding, or a file in one, may have made it so)"
        )


class LoadError(AdaFVError):
    """The model cannot be loaded."""


def out_of_memory(error: Exception) -> bool:
    """Whether Python, or torch on any device, ran out of memory."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)

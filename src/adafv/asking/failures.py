"""What can go wrong between a user and a model, beside the errors of the library itself."""

from adafv.errors import AdaFVError


class UsageError(Exception):
    """An option or argument is wrong; the message names the mend."""


class LoadError(AdaFVError):
    """The model cannot be loaded."""


def out_of_memory(error: Exception) -> bool:
    """Whether Python, or torch on any device, ran out of memory."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)

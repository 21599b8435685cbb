"""The errors that the library raises on purpose. All derive from `AdaFVError`; each message names the mend.

Those of one program alone (a server that does not start, a page that is busy) stand with it and derive from it too. Each
also derives from the built-in exception a caller would expect (`ValueError`, `TypeError`, ...), so code that
never heard of adafv still catches it sensibly.
"""


class AdaFVError(Exception):
    """Base class of all errors raised by adafv."""


class BudgetError(AdaFVError, ValueError):
    """`keep` is not a usable budget: zero, negative, a share above 1, NaN, or of the wrong type."""


class OptionError(AdaFVError, ValueError):
    """An option has a value that does not exist."""


class MethodError(OptionError):
    """A method that does not fit the model or the engine, or does not keep its contract."""


class PromptError(AdaFVError, ValueError):
    """The prompt does not fit the images, or holds no text where the method needs some."""


class NoWordsError(PromptError):
    """No word of the prompt counts for an image; who catches it goes on with `Method.without_text`."""


class CacheError(AdaFVError, ValueError):
    """The key/value cache does not belong to this prompt."""


class StaleImagesError(AdaFVError, ValueError):
    """Encoded images are not what the model would make of them now."""


class ImageError(AdaFVError, ValueError):
    """A file, URL or stream is not an image that can be read safely."""


class UnsupportedModelError(AdaFVError, TypeError):
    """The model's class, tower or configuration is not supported."""


class UnsupportedCallError(AdaFVError, ValueError):
    """The model is supported, but not this way of calling it."""


class AlreadyEnabledError(AdaFVError, RuntimeError):
    """The model is already wrapped, by this object or by another one."""


class NoRecordError(AdaFVError, RuntimeError):
    """What the last run did was asked for before there was one."""


class VersionError(AdaFVError, ImportError):
    """The installed transformers is older than the oldest supported release."""

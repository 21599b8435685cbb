"""adafv inside stock Hugging Face transformers.

    wrapper.py       `AdaFV` and `Pruner`: around `generate` and `forward` of one model
    generation.py    the arguments of `generate` that speak of the prompt
    compress.py      `compress`: inputs -> inputs with fewer placeholders and already pruned features
    settings.py      the options, checked
    conversation.py  what one call says: new prompt, cached prefix, images
    choice.py        from images to kept tokens
    prompt.py        what is image and what is text in a prompt; taking columns out of it
    packing.py       several prompts in one row
    positions.py     the positions of what is left
    devices.py       the host's copy of a prompt; parts that are sharded or elsewhere
    cache.py         what a pruned key/value cache holds, so that the next turn fits it
    outputs.py       logits, hidden states and attentions, back in the caller's columns
    record.py        `Record`, what one run did
    releases.py      what differs between releases of transformers

All work goes through one public argument of the models, `mm_encoder_outputs`, which exists from transformers 5.18 on.
"""

from importlib.metadata import version

from packaging.version import Version

from adafv.errors import VersionError

OLDEST_TRANSFORMERS = "5.18"


def check_transformers(installed: str) -> None:
    """Raise VersionError where `installed` is older than the oldest release that takes pre-encoded images."""
    if Version(installed) < Version(OLDEST_TRANSFORMERS):
        raise VersionError(
            f"adafv needs transformers {OLDEST_TRANSFORMERS} or newer (its models accept mm_encoder_outputs from there on), "
            f"but {installed} is installed; run: pip install --upgrade transformers"
        )


check_transformers(version("transformers"))

from adafv.engines.transformers.compress import CompressedInputs, compress  # noqa: E402
from adafv.engines.transformers.record import Record  # noqa: E402
from adafv.engines.transformers.wrapper import AdaFV, Pruner  # noqa: E402

__all__ = ["AdaFV", "CompressedInputs", "Pruner", "Record", "compress"]

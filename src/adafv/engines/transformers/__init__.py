"""adafv inside stock Hugging Face transformers.

    wrapper.py       `AdaFV` and `Pruner`: around `generate` and `forward` of one model
    generation.py    the arguments of `generate` that speak of the prompt
    compress.py      `compress`: inputs -> inputs with fewer placeholders and already pruned features, in five steps:
    call.py          1. what one call says: new prompt, cached prefix, images
    plan.py          2. what is to become of every image
    encode.py        3. the tower
    crops.py         on those crops of an image that are worth it
    (compress.py)    4. the method, through `adafv.core.select`; 5. the shorter inputs, by
    compaction.py    taking columns out of a prompt,
    columns.py       out of everything that runs along it,
    positions.py     and out of its positions
    layers.py        tokens that leave inside the language model
    encoded.py       `encode`: images that go through the tower once, for many questions
    remembered.py    `ImageStore`: images that the wrapper keeps by itself
    families/        what differs between models, one file each
    towers.py        how vision towers are read without touching them
    reading.py       what is image and what is text in a prompt
    packing.py       several prompts in one row
    settings.py      the options, checked
    cache.py         what a pruned key/value cache holds, so that the next turn fits it
    outputs.py       logits and hidden states, in the columns of the caller's prompt
    record.py        `Record`, what one run did
    releases.py      what differs between releases of transformers
    devices.py       where a call's own tensors live

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

from adafv.engines.transformers.call import CompressedInputs  # noqa: E402
from adafv.engines.transformers.compress import compress  # noqa: E402
from adafv.engines.transformers.encoded import EncodedImages, encode  # noqa: E402
from adafv.engines.transformers.record import ImageRecord, Record  # noqa: E402
from adafv.engines.transformers.remembered import ImageStore  # noqa: E402
from adafv.engines.transformers.wrapper import AdaFV, Pruner  # noqa: E402

__all__ = [
    "AdaFV",
    "CompressedInputs",
    "EncodedImages",
    "ImageRecord",
    "ImageStore",
    "Pruner",
    "Record",
    "compress",
    "encode",
]

"""The table of families, as `adafv families` prints it and docs/families.md holds it."""

from adafv.engines.transformers.families.base import Family, found_families, known_families
from adafv.printable import one_line

_TESTED = """\
Every row is tested against its stock model with the dropped tokens masked: forward and generate, in float32 and bfloat16;
greedy, sampling, beams, several return sequences, static cache, no cache, chunked prefill; batches padded on both sides,
several images, images of different sizes, videos; a second turn, a new image in the second turn; labels and gradients
(tests/test_oracle.py). With positions in time, height and width, guidance_scale is refused, as stock transformers
fails there."""


def catalogue() -> str:
    """One line per family, then what was tested and what to know."""
    heads = ("family", "images", "videos", "saliency", "positions", "transformers class")
    lines = [heads, *(_line(family) for family in known_families())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    limits = [f"{family.name}: {family.limits}" for family in known_families() if family.limits]
    broken = [f"not loaded: {one_line(str(broken))}" for broken in found_families().broken]
    return "\n".join(
        [
            *table,
            *(["", *broken] if broken else []),
            "",
            _TESTED,
            *(["", "Refused, or different:", *limits] if limits else []),
        ]
    )


def _line(family: Family) -> tuple[str, ...]:
    return (
        family.name,
        "pruned",
        "pruned" if family.videos else "-",
        family.saliency,
        "time, height, width" if family.rotary_axes else "along the prompt",
        ", ".join(family.model_classes),
    )

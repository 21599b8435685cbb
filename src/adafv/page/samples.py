"""The pictures to choose from, each with a question that suits it where one is known."""

import json
from dataclasses import dataclass
from pathlib import Path

from adafv.bundled import sample_pictures
from adafv.errors import AdaFVError

KINDS = (".png", ".jpg", ".jpeg", ".webp")
MOST = 12
"""More would push the page's other parts out of sight."""


class SamplesError(AdaFVError):
    """There are no pictures where they were said to be."""


@dataclass(frozen=True)
class Sample:
    """A picture to choose."""

    path: Path
    question: str = ""
    """Empty where none is known."""


def bundled_samples() -> list[Sample]:
    """The pictures that come with adafv; none where the installation has none."""
    return _with_questions(sample_pictures())


def samples_in(folder: Path) -> list[Sample]:
    """The first pictures of `folder`, by name, with the questions of its samples.json (see `adafv.bundled`), if any.

    Raises:
        SamplesError: there is no such folder, or no picture in it, or its samples.json is not one.
    """
    if not folder.is_dir():
        raise SamplesError(f"there is no folder {folder}; give one with pictures to choose from")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in KINDS and path.is_file())
    if not found:
        raise SamplesError(f"{folder} holds no pictures ({', '.join(KINDS)}); give a folder that does")
    return _with_questions(found)


def _with_questions(paths: list[Path]) -> list[Sample]:
    paths = paths[:MOST]
    catalogue = paths[0].with_name("samples.json") if paths else None
    questions: dict[str, str] = {}
    if catalogue is not None and catalogue.is_file():
        try:
            rows = json.loads(catalogue.read_text(encoding="utf-8"))
            questions = {str(row["picture"]): str(row["question"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise SamplesError(
                f"{catalogue} is not a list of pictures and questions; mend it, or take it away"
            ) from error
    return [Sample(path, questions.get(path.name, "")) for path in paths]

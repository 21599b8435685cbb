"""Draw the sample pictures that come with adafv, and write down what to ask about them.

    python -m training.samples

They are scenes of the test split, so the model has seen none of them in training, nor any two objects of a pair in
`HELD_OUT` together. Their backgrounds are generated, not photographs. Most of the questions ask for a small, faint
object beside large, striking ones: what saliency alone would drop.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from adafv.evaluation.world.questions import QUESTION_KINDS, Question, caption
from adafv.evaluation.world.scenes import Scene, render, sample_scene
from training.export import FOLDER

SPLIT = "test"
SIDE = 432
"""Pixels; three times what the model sees, so that the pictures look sharp on a page."""


@dataclass(frozen=True)
class Sample:
    name: str
    """Of the file, after what one sees in it."""
    scene: int
    """Its number in the split."""
    kind: str
    """Of the question."""
    question: str


SAMPLES = (
    Sample("bird", 59, "colour", "What color is the banana?"),
    Sample("boats", 94, "counting", "How many boats are there?"),
    Sample("cars", 3, "colour", "What color is the house?"),
    Sample("key", 40, "presence", "Is there a pink key?"),
    Sample("mushrooms", 90, "presence", "Is there a red mushroom?"),
    Sample("tree", 107, "relation", "Is the house left of or right of the flower?"),
)


def scene_of(sample: Sample) -> Scene:
    return sample_scene(SPLIT, sample.scene, photos=False)


def answered(sample: Sample, draws: int = 3000) -> Question:
    """The sample's question as the world asks it of that scene, with the right answer.

    Raises:
        LookupError: the world does not ask it there, because the scene does not allow it or it would be ambiguous.
    """
    scene, random = scene_of(sample), Random(sample.name)
    for _ in range(draws):
        question = QUESTION_KINDS[sample.kind](scene, random)
        if question is not None and question.text == sample.question.lower():
            return question
    raise LookupError(f"scene {sample.scene} does not allow the question {sample.question!r}")


def whole_caption(scene: Scene) -> str:
    """A caption that names everything in the scene; most leave out a faint object or two."""
    random = Random(scene.number)
    return max((caption(scene, random) for _ in range(200)), key=len)


def write(folder: Path) -> list[Path]:
    """Draw every sample into `folder`, with `samples.json` beside them. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written, entries = [], []
    for sample in SAMPLES:
        scene, question = scene_of(sample), answered(sample)
        path = folder / f"{sample.name}.png"
        render(scene, SIDE)[0].save(path, optimize=True)
        written.append(path)
        entries.append(
            {
                "picture": path.name,
                "question": sample.question,
                "answer": question.answer,
                "faint": question.faint,
                "caption": whole_caption(scene),
                "split": SPLIT,
                "scene": sample.scene,
            }
        )
    (folder / "samples.json").write_text(json.dumps(entries, indent=1) + "\n")
    return [*written, folder / "samples.json"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the sample pictures that come with adafv.")
    parser.add_argument("--output", type=Path, default=FOLDER / "samples")
    options = parser.parse_args()
    for path in write(options.output):
        print(f"{path.name}  {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()

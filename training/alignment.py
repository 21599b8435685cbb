"""Does the premise of the method hold? Two areas under the curve, after every stage of training.

    python -m training.alignment training/run/tower.pt training/run/projector.pt training/run/together.pt

- word: the similarity of an object's word (its input embedding) with the projected visual tokens, against its box.
- question: the same for the method's own text-to-image attention of a whole question that names the object.
- saliency: the attention of [CLS], against the boxes of large and of small, faint objects; patches of other objects
  are left out.

0.5 is chance, 1 is perfect. Scenes are those of validation, with objects that are the only ones of their kind. Intervals
count scenes.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from adafv.core import text_to_image_attention
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.families.llava import Llava
from adafv.evaluation.statistics import interval
from adafv.evaluation.world.scenes import sample_scene
from training.architecture import SIDE
from training.batches import normalised, patches_in, pixels
from training.conversations import encode
from training.stages import Pupil


def area(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores above a negative; ties count half."""
    above = (positive[:, None] > negative[None]).double() + 0.5 * (positive[:, None] == negative[None]).double()
    return above.mean().item()


@torch.no_grad()
def areas(pupil: Pupil, scenes: int) -> dict[str, list[tuple[int, float]]]:
    """Of every measure: (scene, area) for each object measured."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    embed, family = pupil.words.weight, Llava()
    for number in range(scenes):
        scene = sample_scene("validation", number)
        images, [boxes] = pixels([scene], Random(number))
        visuals = {"pixel_values": normalised(images)}
        layouts = family.layouts(pupil.llava, "image", visuals, [])
        encoded = family.encode(pupil.llava, "image", visuals, layouts, frozenset({SALIENCY}))
        assert encoded.saliency is not None
        visual, saliency = encoded.features[0], encoded.saliency[0]
        inside = [patches_in(box, SIDE) for box in boxes]
        nothing = ~torch.stack(inside).any(0)
        for thing, there in zip(scene.things, inside, strict=True):
            size = "faint" if thing.faint else "large"
            found[f"saliency, {size}"].append((number, area(saliency[there], saliency[nothing])))
            if len(scene.of(thing.kind)) > 1:
                continue
            word = embed[encode(thing.kind)]
            similarity = (normalize(visual, dim=-1) @ normalize(word, dim=-1).T)[:, 0]
            found[f"word, {size}"].append((number, area(similarity[there], similarity[~there])))
            text = embed[encode(f"what colour is the {thing.kind}?")]
            attention = text_to_image_attention(text, visual)
            found[f"question, {size}"].append((number, area(attention[there], attention[~there])))
    for measure in ("word", "question"):
        found[measure] = found[f"{measure}, large"] + found[f"{measure}, faint"]
    return found


def summary(values: list[tuple[int, float]]) -> str:
    """Mean with its 95 % interval, scenes as what is independent."""
    mean, half = interval([value for _, value in values], [scene for scene, _ in values])
    return f"{mean:.3f} ± {half:.3f}"


MEASURES = ("word", "word, large", "word, faint", "question", "saliency, large", "saliency, faint")


def main() -> None:
    parser = argparse.ArgumentParser(description="Alignment of words with patches, and of saliency with objects.")
    parser.add_argument("weights", type=Path, nargs="*", help="weights after a stage; none: before training")
    parser.add_argument("--scenes", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"AUC on {options.scenes} validation scenes, with 95 % intervals")
    for heading in ("after", *MEASURES):
        table.add_column(heading)
    for path in (None, *options.weights):
        pupil = Pupil()
        pupil.llava.set_attn_implementation("sdpa")
        if path is not None:
            pupil.load_state_dict(torch.load(path, weights_only=True), strict=False)
        found = areas(pupil.eval(), options.scenes)
        table.add_row("nothing" if path is None else path.stem, *(summary(found[measure]) for measure in MEASURES))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

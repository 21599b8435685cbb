"""Do the scores of a model know where things are? What the paper's figures 2 to 4 ask, of any model and any boxes.

Every object of a picture is asked for by name, and every visual token gets these scores:

    word        cosine of the object's word with the token, the largest of the word's tokens: what text-image alignment is
    question    AdaFV's text-to-image attention t of the whole question, as the method computes it
    saliency    AdaFV's saliency s, as the method computes it
    middle      distance to the picture's border: looks at nothing, and says what the photographer's habit is worth

The scores are the method's own: `compress` is called, and its record read. Where a token lies is read off the processor
itself (`adafv.evaluation.places`), so crops and packed grids are counted as they are: all tokens that show a part of the
picture are asked, those of a thumbnail and those of its crops.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adafv.core import joint_search
from adafv.engines.transformers import compress
from adafv.errors import NoWordsError
from adafv.evaluation.boxes import Boxed, BoxedPicture, article
from adafv.evaluation.places import Places, places_of
from adafv.images import check_shape

if TYPE_CHECKING:
    from adafv.asking.session import Session

WORD, QUESTION, SALIENCY, MIDDLE = "word", "question", "saliency", "middle"
SCORES = (WORD, QUESTION, SALIENCY, MIDDLE)
ADAFV, RANDOM = "adafv", "random"
"""Ways to choose tokens that are no score of single tokens."""
WAYS = (WORD, QUESTION, SALIENCY, ADAFV)
"""What the fewest tokens are counted of."""
ALL_COUNTED = 64
"""Up to so many tokens `adafv` is asked for every number; above, for numbers 5 % apart."""
MASS_OF = 0.1
"""Share of the tokens, the highest, whose share of a score says how peaked it is."""
BINS = torch.linspace(-1, 1, 101)
"""Edges of the histograms of similarities."""


@dataclass(frozen=True)
class Measured:
    """What was found about one object, or several of one class, in one picture."""

    data: str
    picture: str
    object: str
    size: float
    """Share of the picture that its boxes cover."""
    tokens: int
    """N: those that show a patch."""
    on: int
    """M: those of them on the object."""
    areas: dict[str, float]
    """Per score: how often a token on the object scores higher than one that is not; ties count half. Empty where all are."""
    fewest: dict[str, int]
    """Per way: the fewest tokens of which one is on the object."""
    similarity: tuple[float, float]
    """Mean cosine of the object's word with tokens on the object, and with the others (NaN where there are none)."""
    histograms: tuple[Tensor, Tensor]
    """[100] shares of tokens per bin of `BINS`, on the object and elsewhere."""
    peaks: dict[str, float]
    """Of `question` and `saliency`: the share of their sum in the highest tenth of the tokens."""


@dataclass(frozen=True)
class Left:
    """Why objects were left out, and how many."""

    cropped: int = 0
    """Not in what the tower sees of the picture."""
    wordless: int = 0
    """No word of the question counts."""

    def __add__(self, other: "Left") -> "Left":
        return Left(self.cropped + other.cropped, self.wordless + other.wordless)


def asked_for(name: str, template: str) -> str:
    """The question about objects of a class: "{}" stands for its name, "{a}" for the name with its article."""
    return template.replace("{a}", article(name)).replace("{}", name)


def measure(
    session: "Session",
    data: Boxed,
    template: str,
    *,
    scope: str | None = None,
    progress: Callable[[int], None] = lambda pictures: None,
) -> tuple[list[Measured], Left]:
    """Measure every class of every picture.

    Args:
        template: of the questions, see `asked_for`.
        scope: which text counts, see `adafv.prompts.text`.
        progress: called after every picture with how many there were.

    Raises:
        PlacesError: the model does not let itself be read.
    """
    found: list[Measured] = []
    left = Left()
    places: dict[Any, Places] = {}
    for number, boxed in enumerate(data.pictures, 1):
        of_picture, lacking = _of_picture(session, data.name, boxed, template, scope, places)
        found += of_picture
        left += lacking
        progress(number)
    return found, left


@torch.no_grad()
def _of_picture(
    session: "Session", data: str, boxed: BoxedPicture, template: str, scope: str | None, known: dict[Any, Places]
) -> tuple[list[Measured], Left]:
    image = boxed.load()
    check_shape(image.size, boxed.picture.name, session.processor.image_processor)
    encoded, found, left = None, [], Left()
    for name, boxes in boxed.boxes.items():
        question = asked_for(name, template)
        inputs = session.inputs(image, question)
        if encoded is None:
            encoded = session.encoded(inputs)
            layout = encoded.images["image"][0].layout
            if image.size not in known:
                known[image.size] = places_of(session, layout, image.size, question)
            places = known[image.size]
        candidates = layout.shows_patch
        on = places.on(boxes)[candidates]
        if not bool(on.any()):
            left += Left(cropped=1)
            continue
        try:
            given = {key: value for key, value in inputs.items() if key not in encoded.pixels}
            result = compress(
                session.model, {**given, "images": encoded}, 1, processor=session.processor, text=scope, method="adafv"
            )
        except NoWordsError:
            left += Left(wordless=1)
            continue
        record = result.record
        assert record is not None
        text, saliency = record.text_attention[0], record.saliency[0]
        if text is None or saliency is None:  # another method chose, as no word counts
            left += Left(wordless=1)
            continue
        features = encoded.images["image"][0].features[candidates.to(encoded.images["image"][0].features.device)]
        scores = {
            WORD: similarity_of(session, question, name, features),
            QUESTION: text.float().cpu()[candidates],
            SALIENCY: saliency.float().cpu()[candidates],
            MIDDLE: places.border[candidates],
        }
        found.append(measured(data, boxed.picture.name, name, covered(boxes), scores, on))
    return found, left


def measured(data: str, picture: str, name: str, size: float, scores: dict[str, Tensor], on: Tensor) -> Measured:
    """What the scores ([N] each) say about the tokens on an object ([N] bool, at least one)."""
    word = scores[WORD]
    fewest = {way: fewest_by_rank(scores[way], on) for way in (WORD, QUESTION, SALIENCY)}
    fewest[ADAFV] = fewest_by_search(scores[QUESTION], scores[SALIENCY], on)
    there, elsewhere = word[on], word[~on]
    return Measured(
        data=data,
        picture=picture,
        object=name,
        size=size,
        tokens=len(on),
        on=int(on.sum()),
        areas={} if bool(on.all()) else {key: area(values[on], values[~on]) for key, values in scores.items()},
        fewest=fewest,
        similarity=(float(there.mean()), float(elsewhere.mean())),
        histograms=(_histogram(there), _histogram(elsewhere)),
        peaks={key: peak(scores[key]) for key in (QUESTION, SALIENCY)},
    )


def similarity_of(session: "Session", question: str, name: str, features: Tensor) -> Tensor:
    """[N] float32 on the CPU: the largest cosine of a token of the object's name, as it stands in the question.

    Args:
        features: [N, D], visual tokens as the language model reads them.
    """
    ids = torch.tensor(word_ids(session.processor.tokenizer, question, name), device=session.device)
    words = normalize(session.model.get_input_embeddings()(ids).float(), dim=-1)
    return (normalize(features.float(), dim=-1) @ words.T).amax(-1).cpu()


def word_ids(tokenizer: Any, question: str, name: str) -> list[int]:
    """The tokens of a name, where it stands in a question. Alone, many tokenizers write it otherwise."""
    start = question.find(name)
    if start >= 0 and getattr(tokenizer, "is_fast", False):
        made = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
        found = [
            token
            for token, (first, last) in zip(made["input_ids"], made["offset_mapping"], strict=True)
            if first < start + len(name) and last > start and question[first:last].strip()
        ]
        if found:
            return found
    return list(tokenizer.encode(name, add_special_tokens=False))


def covered(boxes: Sequence[Sequence[float]]) -> float:
    """The share of the picture that boxes cover; what several cover counts once."""
    across = sorted({side for box in boxes for side in (box[0], box[2])})
    total = 0.0
    for left, right in pairwise(across):
        spans = sorted((box[1], box[3]) for box in boxes if box[0] <= left and box[2] >= right)
        end = 0.0
        for top, bottom in spans:
            total += max(0.0, bottom - max(top, end)) * (right - left)
            end = max(end, bottom)
    return total


def area(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores above a negative; ties count half."""
    below = torch.searchsorted(negative.sort().values, positive)
    through = torch.searchsorted(negative.sort().values, positive, right=True)
    return float((below + through).double().mean() / 2 / len(negative))


def fewest_by_rank(scores: Tensor, on: Tensor) -> int:
    """The fewest of the highest-scored tokens of which one is on the object; equal scores in the tokens' order."""
    order = scores.argsort(descending=True, stable=True)
    return int(on[order].int().argmax()) + 1


def fewest_by_search(text: Tensor, saliency: Tensor, on: Tensor) -> int:
    """The fewest tokens that AdaFV keeps of which one is on the object. Above `ALL_COUNTED`, to within 5 %."""
    for keep in _numbers(len(on)):
        if bool(on[joint_search(text, saliency, keep).indices].any()):
            return keep
    return len(on)


def _numbers(tokens: int) -> Iterator[int]:
    keep = 1
    while keep < tokens:
        yield keep
        keep = keep + 1 if keep < ALL_COUNTED else round(keep * 1.05)


def reached_by_chance(tokens: int, on: int, keep: int) -> float:
    """How likely `keep` of N tokens, drawn at random, hold one of the M on the object."""
    missed = 1.0
    for drawn in range(min(keep, tokens)):
        missed *= max(0, tokens - on - drawn) / (tokens - drawn)
    return 1.0 - missed


def peak(scores: Tensor) -> float:
    """The share of a score's sum in its highest tenth (one token at least)."""
    count = max(1, round(MASS_OF * len(scores)))
    return float(scores.topk(count).values.sum() / scores.sum().clamp_min(1e-30))


def _histogram(values: Tensor) -> Tensor:
    """[100] shares; all 0 where there is nothing."""
    counts = torch.histogram(values.clamp(-1, 1).double(), BINS.double()).hist
    return counts / counts.sum().clamp_min(1)

"""Every method of the catalogue in every kind of model: what it chooses by hand is what a pruned model reads.

Nothing here names a method, so a new one is covered by being there. By hand means: the signals of one image, read off the
tower, go through `Method.select` alone; the stock model's own features are taken, or mixed, as it says, and put back into
the full prompt, whose dropped placeholders are masked (oracle.py). What a method chooses is held to plain loops elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import FAMILIES, IMAGE, FamilyRow, make_inputs
from oracle import masked_inputs, same_logits
from sharing import shared_model
from test_contract import DECODED, Letters, same_generation, stock_features, without_visuals
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adafv import Pruner
from adafv.core import Budget
from adafv.core.encoded import EncodedImage
from adafv.core.select import Wanted, plan_of, take, visual_tokens
from adafv.core.tokens import STRINGS, Kept
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.errors import AdaFVError
from adafv.methods import Method, known_methods, method_named
from adafv.methods.base import LAYERS, TOKENS, TOWER
from adafv.methods.options import method_from_text
from adafv.prompts.prompt import place_images
from adafv.prompts.text import text_columns

ROWS = {row.name: row for row in FAMILIES}
PLACES = {
    "llava": "one crop",
    "llava-next": "crops and newlines",
    "qwen2.5-vl": "positions in three axes, a tower that looks through windows",
    "qwen3-vl": "rows that go to later layers",
}
SELECTING = [name for name, method in known_methods().items() if method.stages == {TOKENS}]
CHOSEN = [
    "adafv:objective=split",
    "cdpruner:words=mean:sign=-1:views=together",
    "cenprune:on=cdpruner",
    "mmtok:words=content",
    "scope:alpha=0.5:views=together",
]
"""Options that make a method read something else, or choose in another way."""
SHARE = 0.4


@dataclass
class ByHand:
    """What a method chooses for the images of a call, one at a time."""

    kept: list[Kept]
    stock: dict[str, Any]
    """Inputs of the stock model: the full prompt, with what is kept in its place."""
    keep_mask: Tensor
    of_tokens: bool
    """Whether what is mixed are the visual tokens; else, what the projector reads of them, which is not redone here."""

    def forward(self, row: FamilyRow, model: Any, generates: bool = False) -> dict[str, Any]:
        where = {"row": row, "model": model} if row.rotary else {}
        return without_visuals(masked_inputs(self.stock, self.keep_mask, "compact", generates=generates, **where))


def by_hand(model: Any, inputs: dict[str, Any], method: Method, keep: float) -> ByHand:
    """Raises what the method refuses."""
    family = family_of(model)
    prompt = read_prompt(model, family, inputs)
    visuals = {part: inputs[part] for part in family.inputs("image") if part in inputs}
    layouts = family.layouts(model, "image", visuals, prompt.runs("image"))
    with torch.no_grad():
        signals = family.encode(model, "image", visuals, layouts, method.of_tower).signals
    joined, layers, one = stock_features(model, inputs, "image")
    columns = (inputs["input_ids"] == IMAGE).nonzero()
    places = {(int(row), int(column)): number for number, (row, column) in enumerate(columns)}
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    written, stacked = joined.clone(), [layer.clone() for layer in layers]
    found = []
    for image in place_images("image", prompt.placeholders["image"], layouts):
        at = [places[image.row, int(column)] for column in image.columns]
        budget = Budget.of(keep).tokens(image.layout.tokens)
        ids = inputs["input_ids"][image.row, text_columns(prompt, image, "turn", None)]
        encoded = EncodedImage(
            joined[at].detach(), {signal: values[image.number] for signal, values in signals.items()}, image.layout
        )
        plan = plan_of(method, image.layout, budget)
        words = model.get_input_embeddings()(ids).detach() if method.needs_words else None
        strings = Letters().convert_ids_to_tokens(ids.tolist()) if STRINGS in method.needs else None
        tokens = visual_tokens([Wanted(encoded, method, plan, budget, words, ids, strings)])
        count = plan.keep
        if count is None:
            [count] = method.count(tokens, min(budget, plan.allowed(image.layout))).tolist()
        kept = method.select(tokens, count)
        chosen = kept.indices[0]
        assert len(chosen) <= budget
        mask[image.row, image.columns] = False
        mask[image.row, image.columns[chosen]] = True
        into = torch.tensor(at)[chosen]
        for own, target in zip((joined, *layers), (written, *stacked), strict=True):
            target[into] = take(kept, own[at].unsqueeze(0))[0]
        found.append(kept)
    counts = [count for count in (int(row.sum()) for row in inputs["input_ids"] == IMAGE) if count]
    parts: Any = list(written.split(counts))
    made = BaseModelOutputWithPooling(pooler_output=torch.stack(parts) if one and len(set(counts)) == 1 else parts)
    if layers:
        made.deepstack_features = [list(layer.split(counts)) for layer in stacked]
    of_tokens = all(kept.weights is None for kept in found) or getattr(method, "mixes", TOKENS) == TOKENS
    return ByHand(found, {**inputs, "mm_encoder_outputs": {"image": made}}, mask, of_tokens)


@pytest.fixture(params=[name for name in PLACES if name in ROWS])
def place(request: pytest.FixtureRequest) -> Iterator[tuple[FamilyRow, Any]]:
    row = ROWS[request.param]
    with shared_model(row) as model:
        yield row, model


def pruned(method: Method) -> Pruner:
    return Pruner(method, keep=SHARE, text="turn", processor=Letters() if STRINGS in method.needs else None)


@pytest.mark.parametrize("name", SELECTING + CHOSEN)
def test_two_different_images(place: tuple[FamilyRow, Any], name: str) -> None:
    row, model = place
    method, _ = method_from_text(name)
    inputs = make_inputs(row, model, [1, 1], seed=11)
    try:
        expected = by_hand(model, inputs, method, SHARE)
    except AdaFVError as refused:
        with pytest.raises(type(refused)), pruned(method)(model):
            model(**inputs)
        return
    with torch.no_grad(), pruned(method)(model) as pruner:
        found = model(**inputs).logits
    for image, kept in zip(pruner.last.images, expected.kept, strict=True):
        assert image.kept.tolist() == kept.indices[0].tolist()
        assert image.merged == (kept.weights is not None)
        if kept.weights is not None:
            torch.testing.assert_close(image.weights, kept.weights[0])
    if not expected.of_tokens:
        return
    with torch.no_grad():
        logits = model(**expected.forward(row, model)).logits
    same_logits(found, logits, inputs["attention_mask"], expected.keep_mask, 2e-5, 2e-5)


@pytest.mark.each  # every pair: test_two_different_images
@pytest.mark.parametrize("name", SELECTING)
def test_generate(place: tuple[FamilyRow, Any], name: str) -> None:
    row, model = place
    method = method_named(name)
    inputs = make_inputs(row, model, [1, 1], seed=12)
    try:
        expected = by_hand(model, inputs, method, SHARE)
    except AdaFVError as refused:
        with pytest.raises(type(refused)), pruned(method)(model):
            model.generate(**inputs, **DECODED)
        return
    if not expected.of_tokens:
        pytest.skip("its weights mix what the projector reads: test_two_different_images looks at them")
    with pruned(method)(model):
        found = model.generate(**inputs, **DECODED)
    same_generation(found, model.generate(**expected.forward(row, model, generates=True), **DECODED))


def test_a_method_that_chose_otherwise_would_be_noticed() -> None:
    """The first tokens in place of the chosen ones: other logits."""
    row = ROWS["llava"]
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1, 1], seed=11)
        expected = by_hand(model, inputs, method_named("saliency"), SHARE)
        with torch.no_grad(), Pruner("random", keep=SHARE)(model) as pruner:
            found = model(**inputs).logits[:, -1]
        assert [image.kept.tolist() for image in pruner.last.images] != [
            kept.indices[0].tolist() for kept in expected.kept
        ]
        with torch.no_grad():
            other = model(**expected.forward(row, model)).logits[:, -1]
    assert not torch.allclose(found, other, atol=1e-3)


def test_what_is_not_covered_here_acts_elsewhere() -> None:
    """In front of the tower, or inside tower or language model; those have tests of their own."""
    others = {name for name in known_methods() if name not in SELECTING}
    assert "downsample" in others
    for name in others:
        assert known_methods()[name].stages - {TOKENS} <= {"image", TOWER, LAYERS}

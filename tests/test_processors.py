"""Stock processors, photos and videos, the real command line: from a picture to an answer, for families of all kinds.

The test table makes its inputs by hand; here the stock processors make them. `make processors` runs this file with those
that need torchvision too.
"""

import json
import os
from copy import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import FAMILIES, FamilyRow
from oracle import masked_inputs
from processors import photo
from stock_processors import HAVE_TORCHVISION, NEED_TORCHVISION, PROCESSORS
from typer.testing import CliRunner

from adafv import AdaFV
from adafv.asking.session import Session
from adafv.cli import app
from adafv.engines.transformers.families import family_of
from adafv.engines.transformers.reading import read_prompt
from adafv.evaluation.batched import BatchedModel, Chat
from adafv.prompts.prompt import place_images
from adafv.prompts.text import resolve_scope, text_columns

QUESTION = "what is the cat holding?"
ROWS = {row.name: row for row in FAMILIES}


HERE = NEED_TORCHVISION if HAVE_TORCHVISION and not os.environ.get("ADAFV_WHOLE") else PROCESSORS
"""With torchvision, before a release alone those, too, that `make test` runs without."""


@pytest.fixture(scope="module", params=HERE)
def trio(request: pytest.FixtureRequest) -> tuple[FamilyRow, Any, Any]:
    row = ROWS[request.param]
    model = row.build()
    return row, model, PROCESSORS[request.param](model)


def inputs_for(processor: Any, kinds: list[str], **visuals: Any) -> Any:
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=[prompt], return_tensors="pt", **visuals))


def check(row: FamilyRow, model: Any, processor: Any, inputs: Any, modality: str, count: int) -> None:
    """Layouts fit the prompt, the question is found, and the pruned model agrees with the oracle."""
    family = family_of(model)
    read = read_prompt(model, family, inputs)
    visuals = {family.named(name): value for name, value in inputs.items()}
    layouts = family.layouts(model, modality, visuals, read.runs(modality))
    assert len(layouts) == count
    placed = place_images(modality, read.placeholders[modality], layouts)
    scope, learned = resolve_scope("question", processor)
    for image in placed:
        words = read.tokens[0, text_columns(read, image, scope, learned)].tolist()
        assert processor.tokenizer.decode(words) == QUESTION.replace(" ", "")  # blanks are no words
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        stock = model.generate(**inputs, **options)
        with AdaFV(keep=1.0, processor=processor)(model):
            assert torch.equal(model.generate(**inputs, **options).sequences, stock.sequences)
        with AdaFV(keep=0.4, processor=processor)(model) as adafv:
            pruned = model.generate(**inputs, **options)
        oracle = masked_inputs(inputs, adafv.last.keep_mask, row=row, model=model, generates=True)
        expected = model.generate(**oracle, **options)
    assert adafv.last.tokens_before == [layout.tokens for layout in layouts]
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(expected.logits), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(pruned.logits[0], stock.logits[0], atol=1e-3)


@pytest.mark.parametrize(
    ("images", "size"),
    [
        pytest.param(images, size, id=f"{images}-{size}", marks=marks)
        for images in (1, 2)
        for size, often in {(100, 90): 0, (90, 200): 1, (300, 80): 2, (40, 40): 0}.items()
        for marks in ([] if images == often else [pytest.mark.release],)
    ],
)
def test_photos(trio: tuple[FamilyRow, Any, Any], size: tuple[int, int], images: int) -> None:
    row, model, processor = trio
    photos = [photo(number, *size) for number in range(images)]
    inputs = inputs_for(processor, ["image"] * images, images=[photos])
    check(row, model, processor, inputs, "image", images)


@pytest.mark.parametrize("frames", [4, pytest.param(6, marks=pytest.mark.release)])
def test_videos(trio: tuple[FamilyRow, Any, Any], frames: int) -> None:
    row, model, processor = trio
    if row.videos is None:
        pytest.skip("no videos")
    video = numpy.random.default_rng(0).integers(0, 256, (frames, 90, 120, 3), dtype=numpy.uint8)
    inputs = inputs_for(processor, ["video"], videos=[video])
    check(row, model, processor, inputs, "video", 1)


def test_batches(trio: tuple[FamilyRow, Any, Any]) -> None:
    """Of the evaluation: photos of several shapes, two of them, none."""
    _, model, processor = trio
    session = Session(model, processor)
    questions = [
        Chat.of(QUESTION, [photo(1)]),
        Chat.of("and here, is there a red key?", [photo(2)]),
        Chat.of("hello there"),
        Chat.of("two: which is it?", [photo(3, 60, 130), photo(4, 140, 70)]),
        Chat.of("a wide one?", [photo(5, 200, 60)]),
    ]
    found = []
    for size in (1, 4):
        asked = BatchedModel(session, session.pruner("adafv", 3), size)
        answers = dict(asked.answers(questions, max_new_tokens=4))
        weighed = dict(asked.likelihoods((chat, ["yes", " no"]) for chat in questions))
        totals = [each.total for number in sorted(weighed) for each in weighed[number]]
        found.append(([answers[number].text for number in sorted(answers)], totals))
    (alone, totals), (together, others) = found
    assert together == alone
    assert others == pytest.approx(totals, abs=1e-4)


class Counted:
    """An image processor, and how often it was asked."""

    def __init__(self, stock: Any) -> None:
        self.stock, self.calls = stock, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.stock(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stock"], name)


def test_padding(trio: tuple[FamilyRow, Any, Any]) -> None:
    """Prompts that were read one by one stand in a batch as the processor would have put them, pictures of several sizes
    included; and questions that are asked together are answered as they are alone. Every picture is prepared once."""
    _, model, stock = trio
    processor = copy(stock)
    processor.image_processor = counted = Counted(stock.image_processor)
    session = Session(model.eval(), processor)
    photos, questions = [photo(1), photo(5, 200, 60)], ["is there a red key?", "what is it, and where?", "why?"]
    shown = [*photos, photos[0]]
    prompts = [session.prompt(question) for question in questions]
    written = prompts[0].startswith(processor.tokenizer.bos_token)
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": not written}
    expected = stock(images=[[each] for each in shown], text=prompts, **options)
    found = session.batch(shown, questions)
    assert counted.calls == 2
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], torch.as_tensor(value)), name
    pruner = session.pruner("adafv", 3, remember="100MB")
    together = session.ask_together(photos[0], questions, pruner, 4)
    assert counted.calls == 3
    alone = [session.ask(session.inputs(photos[0], question), session.pruner("adafv", 3), 4) for question in questions]
    assert [each.answer for each in together] == [each.answer for each in alone]
    assert [each.kv_mib for each in together] == [each.kv_mib for each in alone]
    assert pruner.settings.store.misses == 1
    for mine, theirs in zip(together, alone, strict=True):
        assert [image.kept.tolist() for image in mine.images] == theirs.record.kept[0].unsqueeze(0).tolist()


def test_the_command_line(trio: tuple[FamilyRow, Any, Any], tmp_path: Path) -> None:
    _, model, processor = trio
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    photo(3, 200, 150).save(tmp_path / "photo.png")
    asked = ["ask", str(tmp_path / "photo.png"), QUESTION, "--model", str(tmp_path / "model"), "--keep", "0.5"]
    result = CliRunner().invoke(
        app, [*asked, "--json", "--compare", "--repeats", "1", "--picture", str(tmp_path / "kept.png")]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    assert (tmp_path / "kept.png").stat().st_size > 1000


@pytest.mark.skipif("ADAFV_TORCHVISION" not in os.environ, reason="run by `make processors`")
def test_all_processors_are_here() -> None:
    assert HAVE_TORCHVISION
    assert NEED_TORCHVISION.keys() <= PROCESSORS.keys()

"""Crops that are chosen by the scores of the thumbnail: what was encoded, what stays, and that the answer is right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, FamilyRow, make_inputs, words
from oracle import masked_inputs, same_logits
from PIL import Image
from sharing import shared_model
from transformers import DynamicCache

import adafv
from adafv import AdaFV, Pruner, bundled, compress
from adafv.core.crops import (
    AUTO,
    THUMBNAIL,
    Crops,
    check_thumbnails,
    chosen_crops,
    enlarged_in,
    mixes_crops,
    tokens_of_crops,
)
from adafv.core.layout import ImageLayout, anyres_layout, anyres_places
from adafv.engines.transformers.families import family_of
from adafv.errors import MethodError, OptionError, UnsupportedCallError, UnsupportedModelError
from adafv.methods import known_methods, method_named
from adafv.methods.base import TOKENS

SAMPLES = Path(bundled.__file__).parent / "samples"
KEEP = 0.2
ROWS = {row.name: row for row in FAMILIES}
CHOOSING = [
    row for row in FAMILIES if row.name in ("llava-next", "llava-next-video", "llava-onevision", "idefics3", "smolvlm")
]


@pytest.fixture(params=CHOOSING, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> FamilyRow:
    return request.param


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, ...]]]:
    """The crops of every run of a tower, image by image; whole images are no run here."""
    runs: list[list[tuple[int, ...]]] = []
    for found in CHOOSING:
        with shared_model(found) as model:
            kind = type(family_of(model))
        stock = kind.encode_crops

        def noted(
            self: Any, model: Any, visuals: Any, layouts: Any, wanted: Any, signals: Any, stock: Any = stock
        ) -> Any:
            runs.append(list(wanted))
            return stock(self, model, visuals, layouts, wanted, signals)

        if "encode_crops" in vars(kind):
            monkeypatch.setattr(kind, "encode_crops", noted)
    return runs


@pytest.mark.parametrize("batch", [[1], [2, 0, 1]], ids=["one", "several"])
@pytest.mark.parametrize("crops", [THUMBNAIL, 1])
def test_is_the_stock_model_that_sees_what_was_kept(
    row: FamilyRow, batch: list[int], crops: str | int, seen: list[list[tuple[int, ...]]]
) -> None:
    with shared_model(row) as model:
        inputs = make_inputs(row, model, batch)
        with torch.no_grad(), AdaFV(keep=KEEP, crops=crops)(model) as pruned:
            logits = model(**inputs).logits
        record = pruned.last
        with torch.no_grad():
            expected = model(**masked_inputs(inputs, record.keep_mask, row=row, model=model)).logits
        same_logits(logits, expected, inputs["attention_mask"], record.keep_mask)
    assert len(seen) <= 2
    assert all(crop == (0,) for crop in seen[0])
    cut = [image for image in record.images if image.layout.crops > 1]
    assert len(cut) == len(seen[0])
    for place, image in enumerate(cut):
        rest = seen[1][place] if len(seen) == 2 else ()
        assert image.crops == (0, *rest)
        assert set(image.crop.tolist()) <= set(image.crops)
        assert len(rest) == (crops if isinstance(crops, int) else 0)
        assert image.tokens_after == len(image.kept) == len(set(image.kept.tolist()))
        assert image.saliency is not None
        there = ~image.saliency.isnan()
        assert torch.equal(there, image.layout.of_crops(image.crops))  # what was not encoded has no score


def test_second_turn(row: FamilyRow) -> None:
    """What was chosen for the first picture is in the cache; the second one is chosen for anew."""
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        with AdaFV(keep=KEEP, crops=1)(model) as pruned:
            first = model.generate(**inputs, **options)
            mask = pruned.last.keep_mask
            more = torch.cat((first.sequences, torch.tensor([words(5, seed=4)])), dim=1)
            again = {"input_ids": more, "attention_mask": torch.ones_like(more)}
            later = model.generate(**again, past_key_values=first.past_key_values, **options)
        dropped = torch.nn.functional.pad(mask, (0, more.shape[1] - mask.shape[1]), value=True)
        stock = masked_inputs({**inputs, **again}, dropped, row=row, model=model, generates=True)
        for name, value in inputs.items():
            if name in row.token_types:
                stock[name] = torch.nn.functional.pad(value, (0, more.shape[1] - value.shape[1]))
        expected = model.generate(**stock, **options)
    assert later.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(later.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("crops", [THUMBNAIL, 1])
def test_encoded_images_are_chosen_from_alike(row: FamilyRow, crops: str | int, seen: list[Any]) -> None:
    """They hold all crops, and no tower runs; the answer is the one that the pixels would give."""
    with shared_model(row) as model:
        inputs = make_inputs(
            row, model, [1] if row.name == "llava-onevision" else [1, 1]
        )  # its second one is too large
        by_pixels = compress(model, inputs, KEEP, crops=crops)
        runs = len(seen)
        held = {name: value for name, value in inputs.items() if name not in family_of(model).images}
        by_held = compress(model, {**held, "images": adafv.encode(model, inputs)}, KEEP, crops=crops)
    assert runs > 0
    assert len(seen) == runs
    for one, two in zip(by_pixels.record.images, by_held.record.images, strict=True):
        assert one.crops == two.crops
        assert one.kept.tolist() == two.kept.tolist()


def test_crops_are_remembered(row: FamilyRow, seen: list[list[tuple[int, ...]]]) -> None:
    """One by one: a question that wants others finds those that are there, and the whole picture serves every question."""
    with shared_model(row) as model:
        one, two = (make_inputs(row, model, [1], seed=seed) for seed in (0, 1))
        two = {**one, "input_ids": two["input_ids"]} if two["input_ids"].shape == one["input_ids"].shape else one
        ways = [(one, THUMBNAIL), (two, 1), (one, 1), (two, 2), (one, "all"), (two, 2), (two, 99)]
        alone = [compress(model, inputs, KEEP, crops=crops) for inputs, crops in ways]
        del seen[:]
        store, ran = adafv.ImageStore("100MB"), []
        for (inputs, crops), expected in zip(ways, alone, strict=True):
            before = len(seen)
            found = compress(model, inputs, KEEP, crops=crops, remember=store)
            ran.append([crop for run in seen[before:] for crops in run for crop in crops])
            [image], [wanted] = found.record.images, expected.record.images
            assert image.crops == wanted.crops
            assert image.kept.tolist() == wanted.kept.tolist()
            assert image.remembered == (crops != "all" and not ran[-1])
            for name, value in expected["mm_encoder_outputs"].items():
                for mine, theirs in zip(
                    found["mm_encoder_outputs"][name].pooler_output, value.pooler_output, strict=True
                ):
                    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
        assert ran[0] == [0]
        everything = [crop for crops in ran for crop in crops]
        assert len(everything) == len(set(everything))
        assert ran[5] == ran[6] == []


def test_remembered_crops_are_those_of_the_weights(seen: list[Any]) -> None:
    model, store = ROWS["llava-next"].build(), adafv.ImageStore("100MB")
    inputs = make_inputs(ROWS["llava-next"], model, [1, 1])
    for runs in (1, 2):
        for _ in range(2):
            found = compress(model, inputs, KEEP, crops=THUMBNAIL, remember=store).record
            assert len(seen) == runs
        expected = compress(model, inputs, KEEP, crops=THUMBNAIL).record
        assert [kept.tolist() for kept in found.kept] == [kept.tolist() for kept in expected.kept]
        del seen[-1]
        with torch.no_grad():
            model.model.vision_tower.get_input_embeddings().weight.mul_(-2)
    assert (store.hits, store.misses) == (4, 4)


def test_all_crops_are_what_it_was(row: FamilyRow, seen: list[Any]) -> None:
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        record = compress(model, inputs, KEEP, crops="all").record
        everything = compress(model, inputs, "all", crops=99).record
    assert not seen
    assert record.images[0].crops is None
    assert everything.images[0].tokens_after == everything.images[0].tokens_before
    assert everything.images[0].crops is None


def test_a_budget_that_the_crops_do_not_have(row: FamilyRow) -> None:
    """K is what it would be, or all the tokens there can be; known before the tower runs, whichever crops are chosen."""
    with shared_model(row) as model:
        inputs = make_inputs(row, model, [1])
        image = compress(model, inputs, KEEP).record.images[0]
        thumbnail, *others = tokens_of_crops(image.layout)
        for crops, most in ((THUMBNAIL, thumbnail), (1, thumbnail + min(others)), (99, image.tokens_before)):
            for keep in (1, thumbnail, thumbnail + 1, image.tokens_before - 1, "all"):
                asked = image.tokens_before if keep == "all" else keep
                short = compress(model, inputs, keep, crops=crops).record.images[0]
                assert short.tokens_after == min(asked, most), (crops, keep)
                assert len(set(short.kept.tolist())) == short.tokens_after


@pytest.mark.parametrize("sure", [(), (0,), (0, 1)], ids=["none", "one", "both"])
def test_asks_again_where_the_answer_is_not_certain(
    sure: tuple[int, ...], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are sure keep their thumbnail, the others get all crops; what comes out is what either gives alone."""
    options = {"max_new_tokens": 3, "do_sample": False}
    with shared_model(ROWS["llava-next"]) as model:
        inputs = make_inputs(ROWS["llava-next"], model, [1, 1])
        with AdaFV(keep=KEEP, crops=THUMBNAIL)(model) as pruned:
            by_thumbnail = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
            kept = pruned.last.kept
        with AdaFV(keep=KEEP)(model) as pruned:
            by_all, all_kept = model.generate(**inputs, **options), pruned.last.kept
        first = by_thumbnail.logits[0].softmax(-1).amax(-1)
        assert first[0] != first[1]
        logits = torch.stack([first.new_full((3,), 0.0), first.new_full((3,), 0.0)])
        for row in sure:
            logits[row, 0] = 9.0
        stock = adafv.engines.transformers.wrapper.unsure_rows
        told = []

        def judged(crops: Crops, given: torch.Tensor, images: Any, rows: int) -> Any:
            told.append(stock(crops, given, images, rows)[0])
            return stock(crops, logits, images, rows)

        monkeypatch.setattr(adafv.engines.transformers.wrapper, "unsure_rows", judged)
        del seen[:]
        forwards: list[int] = []
        hook = model.model.language_model.register_forward_hook(lambda *call: forwards.append(1))
        processors, criteria = Counted(), Counted(torch.zeros(2, dtype=torch.bool))
        with AdaFV(keep=KEEP, crops=AUTO)(model) as pruned:
            answers = model.generate(**inputs, **options, logits_processor=[processors], stopping_criteria=[criteria])
        hook.remove()
        record = pruned.last
    assert isinstance(answers, torch.Tensor)
    assert len(forwards) == 3 + (len(sure) < 2)  # the first call ends at its first token
    assert processors.calls == criteria.calls == 3  # and nobody hears of it
    assert told == [pytest.approx(first.tolist())]
    assert record.certainty == pytest.approx([0.9998 if row in sure else 1 / 3 for row in (0, 1)], abs=1e-3)
    for row, image in enumerate(record.images):
        assert image.crops == ((0,) if row in sure else None)
        assert image.kept.tolist() == (kept if row in sure else all_kept)[row].tolist()
        expected = by_thumbnail.sequences if row in sure else by_all
        assert answers[row].tolist() == expected[row].tolist()
    assert seen == [[(0,), (0,)], *([[(0,)]] if len(sure) == 1 else [])]


class Counted:
    """A logits processor, or with an answer a stopping criterion, that is counted."""

    def __init__(self, answer: torch.Tensor | None = None) -> None:
        self.calls, self._answer = 0, answer

    def __call__(self, tokens: torch.Tensor, scores: Any) -> Any:
        self.calls += 1
        return scores if self._answer is None else self._answer


@pytest.mark.parametrize(
    "options", [{"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_beams_and_draws_begin_anew(options: dict[str, Any]) -> None:
    """What was asked again is what all crops give at once: nothing was drawn before."""
    with shared_model(ROWS["llava-next"]) as model:
        inputs = make_inputs(ROWS["llava-next"], model, [1, 1])
        given = []
        for crops in ("all", AUTO):
            torch.manual_seed(0)
            with AdaFV(keep=KEEP, crops=crops)(model) as pruned:
                given.append(model.generate(**inputs, max_new_tokens=4, **options))
        assert max(pruned.last.certainty) < 0.9
    assert torch.equal(*given)


def test_gives_back_what_was_asked_for() -> None:
    with shared_model(ROWS["llava-next"]) as model:
        inputs = make_inputs(ROWS["llava-next"], model, [1])
        with AdaFV(keep=KEEP, crops=AUTO)(model) as pruned:
            output = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
            assert output.logits is None
            assert len(output.scores) == 2
            assert pruned.last.certainty is not None
            model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=2)
            assert len(pruned.last.certainty) == 1
            for name, value in (("streamer", 1), ("assistant_model", 1), ("past_key_values", DynamicCache())):
                with pytest.raises(UnsupportedCallError, match="generate an answer twice"):
                    model.generate(**inputs, **{name: value})
            with pytest.raises(UnsupportedCallError, match="how certain the first token"):
                model(**inputs)
            ids = inputs["input_ids"][:, -3:]
            model(input_ids=ids)  # text alone
        with pytest.raises(UnsupportedCallError, match="how certain the first token"):
            compress(model, inputs, KEEP, crops=AUTO)


def test_every_method_knows_nothing_of_other_crops() -> None:
    """Its weights, too, are of tokens that are there."""
    left_out = []
    with shared_model(ROWS["llava-next"]) as model:
        inputs = make_inputs(ROWS["llava-next"], model, [1])
        for name in known_methods():
            method = method_named(name)
            if method.stages != {TOKENS}:
                left_out.append(name)
                with pytest.raises(MethodError, match="leave crops='1' out"):
                    Pruner(method, 8, crops=1)
                continue
            if name == "published" or (method.mixes != TOKENS and not family_of(model).projects(model)):
                continue
            if name == "evs":  # of videos alone
                continue
            image = compress(model, inputs, 12, method=method, crops=1).record.images[0]
            there = set(image.layout.of_crops(image.crops).nonzero().squeeze(-1).tolist())
            assert set(image.kept.tolist()) <= there, name
            if image.weights is not None:
                assert set((image.weights != 0).any(0).nonzero().squeeze(-1).tolist()) <= there, name
    assert "downsample" in left_out


def test_the_method_of_the_thumbnail(seen: list[list[tuple[int, ...]]]) -> None:
    """Its own plan leaves crops out; with the option the tower does, too, and what stays is the same."""
    with shared_model(ROWS["llava-next"]) as model:
        inputs = make_inputs(ROWS["llava-next"], model, [1, 1])
        whole = compress(model, inputs, 5, method="thumbnail").record.kept
        assert not seen
        few = compress(model, inputs, 5, method="thumbnail", crops=1).record
    assert seen == [[(0,), (0,)]]
    assert [image.crops for image in few.images] == [(0,), (0,)]
    assert [kept.tolist() for kept in few.kept] == [kept.tolist() for kept in whole]


def test_where_the_scores_are() -> None:
    """The crop that holds what the question asks for is the one that is chosen."""
    assert chosen_crops([0.1, 0.1, 0.7, 0.1], 1) == (3,)
    assert chosen_crops([0.1, 0.3, 0.25, 0.35], 2) == (2, 4)
    assert chosen_crops([0.25] * 4, 2) == (1, 2)  # of equals the first
    assert chosen_crops([0.1, 0.1, 0.7, 0.1], 0) == ()
    assert chosen_crops([0.4, 0.6], 9) == (1, 2)


def test_what_a_crop_enlarges() -> None:
    """A wide picture over 2 x 2 crops: above and below it is padding, and the border between the crops is in its middle."""
    places = anyres_places((2, 2), 4, 4)
    raster = places[1:].flatten(0, 1)
    shown = raster[(raster[:, 1] >= 2) & (raster[:, 1] < 6)]
    layout = anyres_layout(torch.cat((places[0], shown)), (2, 2), 4, 4)
    assert enlarged_in(layout).view(4, 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    # Without the upper crops the thumbnail shows what is in the lower ones alone.
    lower = anyres_layout(torch.cat((places[0], raster[raster[:, 1] >= 4])), (2, 2), 4, 4)
    assert enlarged_in(lower).view(4, 4).tolist() == [[3, 3, 4, 4]] * 4
    assert tokens_of_crops(lower) == [16, 0, 0, 16, 16]
    assert Crops.of(1).tokens(lower) == 16  # a crop of which nothing is left may be chosen
    assert Crops.of(3).tokens(lower) == 32
    # Of a picture of 1 x 900 pixels nothing is left but the thumbnail.
    line = anyres_layout(places[0], (2, 2), 4, 4)
    assert enlarged_in(line).view(4, 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_tokens_that_are_mixed_of_crops() -> None:
    """A raster that a model scales down: half of the places are left."""
    places = anyres_places((2, 2), 4, 4)
    raster = places[1:].unflatten(0, (2, 2)).unflatten(2, (4, 4)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    assert not mixes_crops(anyres_layout(torch.cat((places[0], raster.flatten(0, 1))), (2, 2), 4, 4))
    assert not mixes_crops(anyres_layout(torch.cat((places[0], raster[1:6].flatten(0, 1))), (2, 2), 4, 4))
    assert mixes_crops(anyres_layout(torch.cat((places[0], raster[::2, ::2].flatten(0, 1))), (2, 2), 4, 4))


@pytest.mark.parametrize("given", ["some", "-1", -1, 1.5, True, None, "1" * 12, [1], ""])
def test_no_number_of_crops(given: Any) -> None:
    with pytest.raises(OptionError, match="crops="):
        AdaFV(keep=8, crops=given)


def test_reads_what_it_writes() -> None:
    for given in ("all", "auto", "thumbnail", 1, "2", 0):
        assert Crops.of(str(Crops.of(given))) == Crops.of(given)
    assert Crops.of(0) == Crops.of("thumbnail")
    assert Crops.of("3") == Crops.of(3) != Crops.of("auto")
    assert Crops.of("all").tokens(ImageLayout(torch.arange(12), 3, 2, 2, (1, 2))) == 12


def with_thumbnails(row: FamilyRow, inputs: dict[str, Any], counts: list[int]) -> dict[str, Any]:
    """The same inputs, whose thumbnails show what the tiles show, as stock processors make them."""
    first, parts = row.name == "ovis2", []
    for tiles in inputs["pixel_values"].split(counts):
        if len(tiles) > 1:
            others = tiles[1:] if first else tiles[:-1]
            columns = 2 if len(others) % 2 == 0 else len(others)
            raster = others.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            whole = torch.nn.functional.interpolate(raster[None], tiles.shape[-2:], mode="bicubic", antialias=True)
            tiles = torch.cat((whole, others) if first else (others, whole))
        parts.append(tiles)
    return {**inputs, "pixel_values": torch.cat(parts)}


@pytest.mark.parametrize("name", ["internvl", "aya-vision", "cohere2-vision", "qianfan-ocr", "ovis2"])
def test_the_thumbnail_where_nothing_says_how_crops_lie(name: str) -> None:
    """By the pixels it is known that it is one; which crops it would ask for is not."""
    row = ROWS[name]
    with shared_model(row) as model, torch.no_grad():
        inputs = make_inputs(row, model, [2, 0, 1])
        with AdaFV(keep=KEEP)(model) as pruned:
            model(**inputs)
        counts = [image.layout.crops for image in pruned.last.images]
        assert max(counts) > 1
        shown = with_thumbnails(row, inputs, counts)
        with AdaFV(keep=KEEP, crops=THUMBNAIL)(model) as pruned:
            logits, record = model(**shown).logits, pruned.last
            with pytest.raises(UnsupportedCallError, match="does not show what the others show together"):
                model(**inputs)
            with pytest.raises(UnsupportedCallError, match="encoded already"):
                model(**{n: v for n, v in shown.items() if n != "pixel_values"}, images=adafv.encode(model, shown))
        expected = model(**masked_inputs(shown, record.keep_mask, row=row, model=model)).logits
        same_logits(logits, expected, shown["attention_mask"], record.keep_mask)
        with pytest.raises(UnsupportedModelError, match="which crop lies where"):
            AdaFV(keep=KEEP, crops=1)(model)
        with AdaFV(keep=KEEP, crops=AUTO)(model) as pruned:
            model.generate(**shown, max_new_tokens=1, do_sample=False)
        assert len(pruned.last.certainty) == 3
    assert [image.crops for image in record.images] == [(0,) if count > 1 else None for count in counts]


@pytest.mark.parametrize("tiling", [(1, 2), (3, 4), (2, 6)])
def test_what_is_a_thumbnail(tiling: tuple[int, int]) -> None:
    """Of photographs, drawings and blank pictures, as a stock processor cuts them; no crop passes for one."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    rows, columns = tiling
    cut = GotOcr2ImageProcessorPil(size={"height": 112, "width": 112}, crop_to_patches=True, max_patches=12)
    for name in ("bird", "cars", "key"):
        picture = Image.open(SAMPLES / f"{name}.png").convert("RGB").resize((112 * columns, 112 * rows))
        tiles = cut(picture, return_tensors="pt")["pixel_values"]
        assert len(tiles) == rows * columns + 1
        check_thumbnails([tiles.roll(1, dims=0)])
        for crop in range(rows * columns - 1):
            with pytest.raises(UnsupportedCallError, match="does not show"):
                check_thumbnails([tiles[:-1].roll(-crop, dims=0)])
    check_thumbnails([torch.full((5, 3, 112, 112), 1.7)])


def test_refused() -> None:
    with shared_model(ROWS["llava"]) as model, pytest.raises(UnsupportedModelError, match="not cut into a thumbnail"):
        AdaFV(keep=8, crops="auto")(model)
    with pytest.raises(MethodError, match="repeats them"):
        AdaFV(keep=8, crops=1, variant="published")
    with shared_model(ROWS["llava-onevision"]) as model:
        inputs = make_inputs(ROWS["llava-onevision"], model, [1, 1])
        with pytest.raises(UnsupportedCallError, match="scales their tokens down"):
            compress(model, inputs, KEEP, crops=1)
        assert {image.crops for image in compress(model, inputs, KEEP, crops=THUMBNAIL).record.images} == {(0,)}
    model = ROWS["llava-next"].build()
    inputs = make_inputs(ROWS["llava-next"], model, [1])
    model.train()
    with AdaFV(keep=8, crops=1)(model), pytest.raises(UnsupportedCallError, match="to train, leave crops out"):
        model(**inputs)


@pytest.mark.parametrize("how", ["FSDPModule", "FullyShardedDataParallel", "ds_id"])
def test_a_sharded_model_is_refused(how: str) -> None:
    """Processes would wait for each other: one runs the tower once, another twice."""
    model = ROWS["llava-next"].build()
    inputs = make_inputs(ROWS["llava-next"], model, [1])
    tower = model.model.vision_tower
    if how == "ds_id":  # as ZeRO-3 marks a weight whose parts lie elsewhere
        next(tower.parameters()).ds_id = 0
    else:
        tower.__class__ = type(how, (type(tower),), {})
    with (
        torch.no_grad(),
        AdaFV(keep=4, crops=1)(model),
        pytest.raises(UnsupportedCallError, match="wait for each other"),
    ):
        model(**inputs)

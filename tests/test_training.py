"""Training: every stage learns and touches only what it names, stopping costs nothing, and the export is the pupil."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from facts import right_answer
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import training.batches
import training.train
from adafv.evaluation.world.details import DETAIL_KINDS, PATTERNS, with_tags
from adafv.evaluation.world.details import render as render_details
from adafv.evaluation.world.scenes import Scene, render, sample_scene
from training.architecture import SIDE, VISUAL_TOKENS, llava_next_processor
from training.batches import moved, normalised, patches_in, pixels
from training.conversations import IGNORED, converse
from training.export import export
from training.language import scene_grid
from training.losses import quarters
from training.optimiser import Optimiser, StackedMuon
from training.stages import NEXT_EVERY, NEXT_TOKENS, STAGES, Outcome, Pupil, Stage
from training.train import train_stage
from training.vocabulary import ASSISTANT, END, IDS, IMAGE, PAD, USER, tokenizer

ALONE = [stage for stage in STAGES.values() if not stage.needs]
"""Stages that start from nothing."""
OFTEN = ("projector",)
"""Stages of which every run of the tests asks whether they learn: one with several kinds of batches. "together" has
them, too, and takes half a minute; it goes one step in `test_all_stages_in_order`."""


def scenes(count: int, split: str = "train") -> list[Scene]:
    return [sample_scene(split, number, photos=False) for number in range(count)]


@pytest.fixture
def no_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need an extra package. The process that draws the batches is forked, so it draws none either."""
    monkeypatch.setattr(training.batches, "sample_scene", partial(sample_scene, photos=False))


def minimal_batches(stage: Stage) -> list[Any]:
    """Of every kind that the stage may be given: pictures in one piece, and in several crops."""
    found: dict[tuple[int, ...], Any] = {}
    for seed in range(40):
        several = Random(seed).random() < 1 / NEXT_EVERY  # these get a sixth of the scenes
        batch = stage.make(scenes(6 if several else 2), Random(seed))
        images = getattr(batch, "images", None)
        found.setdefault(() if images is None else tuple(images.shape[1:]), batch)
        if stage.name not in ("projector", "together") or len(found) == 2:
            break
    return list(found.values())


class TestStages:
    @pytest.mark.parametrize(
        "stage",
        [pytest.param(stage, marks=[] if name in OFTEN else pytest.mark.release) for name, stage in STAGES.items()],
        ids=STAGES,
    )
    def test_learns_and_changes_only_what_it_names(self, stage: Stage) -> None:
        pupil = Pupil()
        before = {name: value.clone() for name, value in pupil.state_dict().items()}
        named = {name for name, _ in pupil.named_parameters() if name.startswith(stage.trained)}
        assert all(any(name.startswith(prefix) for name in named) for prefix in stage.trained)
        optimiser = Optimiser(
            stage.parameters(pupil), steps=100, matrix_rate=stage.rate, other_rate=stage.rate, warmup=1
        )
        given = minimal_batches(stage)
        losses, reached = [], set()
        for step in range(3):
            outcomes = []
            for batch in given:
                outcomes.append(stage.learn(pupil, batch))  # in float32; `test_ends_in_time` takes a step in bfloat16
                outcomes[-1].loss.backward()
            losses.append(sum(outcome.loss.item() for outcome in outcomes))
            reached |= {
                name for name, value in pupil.named_parameters() if value.grad is not None and bool(value.grad.any())
            }
            optimiser.step(step)
        assert torch.tensor(losses).isfinite().all()
        assert losses[-1] < losses[0]
        assert reached == named
        after = pupil.state_dict()
        tied = {"words.weight", "llava.lm_head.weight"}  # other names of the word embeddings
        assert {name for name, value in after.items() if not torch.equal(value, before[name])} - tied == named - tied

    def test_figures_are_shares(self) -> None:
        stage = STAGES["together"]
        [batch, *_] = minimal_batches(stage)
        figures = stage.learn(Pupil(), batch).figures
        assert figures
        shares = {
            name: figure for name, figure in figures.items() if name.split()[-1] in ("presence", "colour", "size")
        }
        assert all(0 <= figure <= 1 for figure in shares.values())


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is seven times slower on a CPU that has no instructions for it."""
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())


class Stop(Exception):
    pass


def stopped_at(stage: Stage, step: int) -> Stage:
    """The stage, stopped by an error when it begins that step."""
    begun = []

    def learn(pupil: Pupil, batch: Any) -> Outcome:
        begun.append(1)
        if len(begun) > step:
            raise Stop
        return stage.learn(pupil, batch)

    return dataclasses.replace(stage, learn=learn)


@pytest.mark.usefixtures("no_photographs")
class TestGoingOn:
    @pytest.mark.parametrize(
        "stage",
        [pytest.param(stage, marks=[] if stage is ALONE[0] else pytest.mark.release) for stage in ALONE],
        ids=[stage.name for stage in ALONE],
    )
    def test_stopping_changes_nothing(self, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stage, steps = (
            dataclasses.replace(stage, size=2, steps=2),
            2,
        )  # the second needs what the first one's optimiser left
        in_float32(monkeypatch)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        whole.mkdir()
        parts.mkdir()
        train_stage(stage, whole, steps)
        monkeypatch.setattr(training.train, "CHECKPOINT_SECONDS", -1)  # after every step
        with pytest.raises(Stop):
            train_stage(stopped_at(stage, 1), parts, steps)
        assert not (parts / f"{stage.name}.pt").exists()
        train_stage(stage, parts, steps)
        one, two = (torch.load(folder / f"{stage.name}.pt", weights_only=True) for folder in (whole, parts))
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
        assert {path.name for path in parts.iterdir()} == {f"{stage.name}.pt", f"log-{stage.name}.jsonl"}

    def test_ends_in_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """After the first step where there is no time for two; a copy of the weights lies where it was wanted."""
        monkeypatch.setattr(training.train, "CHECKPOINT_SECONDS", -1)
        stage = dataclasses.replace(ALONE[-1], size=2)
        train_stage(stage, tmp_path, 500, seconds=0.01, copies=tmp_path / "copies")
        logged = [json.loads(line) for line in (tmp_path / f"log-{stage.name}.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in logged] == [1]
        [copy] = (tmp_path / "copies").iterdir()
        halves, weights = (
            torch.load(folder / f"{stage.name}.pt", weights_only=True) for folder in (copy.parent, tmp_path)
        )
        assert halves.keys() == weights.keys()
        assert all(torch.equal(halves[name], value.half()) for name, value in weights.items())

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "size"), [("float32", 2), pytest.param("bfloat16", 6, marks=pytest.mark.release)], ids=str
    )
    def test_all_stages_in_order(
        self,
        dtype: str,
        size: int,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if dtype == "float32":
            in_float32(monkeypatch)
        rows = [row for side_by_side in training.train.SIDE_BY_SIDE for row in side_by_side]
        assert sorted(name for row in rows for name in row) == sorted(STAGES)
        for name in (name for row in rows for name in row):
            train_stage(dataclasses.replace(STAGES[name], size=size), tmp_path, 1)
        saved = torch.load(tmp_path / "together.pt", weights_only=True)
        pupil = Pupil()
        found = pupil.load_state_dict(saved, strict=False)
        assert found.unexpected_keys == []
        assert [name for name in found.missing_keys if name.startswith(STAGES["together"].trained)] == []
        capsys.readouterr()
        train_stage(STAGES["together"], tmp_path, 1)
        assert "done before" in capsys.readouterr().out


class TestConversations:
    @pytest.mark.parametrize("visual_tokens", [VISUAL_TOKENS, NEXT_TOKENS])
    def test_labels_are_exactly_the_answers(self, visual_tokens: int) -> None:
        given = scenes(40)
        talk = converse(given, Random(0), visual_tokens)
        captions = 0
        for row, scene in enumerate(given):
            ids, labels = talk.ids[row].tolist(), talk.labels[row].tolist()
            assert ids.count(IMAGE) == visual_tokens
            said: dict[int, int] = {}
            asked = []
            for place, (question, answer, first) in enumerate(turns(ids)):
                said |= {first + offset: token for offset, token in enumerate([*encoded(answer), END])}
                if question.startswith(("describe", "what is in")):
                    captions += 1
                    assert bool(talk.captions[row, first])
                    assert answer.endswith(f"on {scene.background}")
                else:
                    assert answer == right_answer(scene, question), place
                    asked.append(first)
            assert {place: label for place, label in enumerate(labels) if label != IGNORED} == said
            assert [place for place, _ in talk.kinds[row]] == asked
        assert captions
        assert not talk.captions[talk.labels == IGNORED].any()

    def test_early_labels_are_the_answer_too(self) -> None:
        """From the word that names the object on; nothing else changes."""
        late, early = (converse(scenes(10), Random(0), early=early) for early in (False, True))
        assert torch.equal(late.ids, early.ids)
        places = (early.labels != IGNORED) & (late.labels == IGNORED)
        assert torch.equal(early.labels[~places], late.labels[~places])
        for row, ids in enumerate(late.ids.tolist()):
            for question, answer, first in turns(ids):
                if question.startswith(("describe", "what is in")):
                    continue
                # "?" and <end>, which stand before <assistant> in every question, know all of it.
                assert places[row, first - 2 : first].all()
                assert set(early.labels[row, first - 2 : first].tolist()) == {encoded(answer)[0]}

    def test_details_are_asked_where_scenes_have_them(self) -> None:
        plain = scenes(20)
        for given in (plain, [with_tags(scene) for scene in plain]):
            talk = converse(given, Random(0), NEXT_TOKENS)
            kinds = {kind for row in talk.kinds for _, kind in row}
            assert (kinds >= set(DETAIL_KINDS)) == (given is not plain)
            assert (kinds & set(DETAIL_KINDS) == set()) == (given is plain)
            for row, scene in enumerate(given):
                for question, answer, _ in turns(talk.ids[row].tolist()):
                    if not question.startswith(("describe", "what is in")):
                        assert answer == right_answer(scene, question)

    def test_padding_is_on_the_right(self) -> None:
        for row in converse(scenes(10), Random(0)).ids.tolist():
            spoken = [token for token in row if token != PAD]
            assert row == spoken + [PAD] * (len(row) - len(spoken))
            assert spoken[-1] == END


def turns(ids: list[int]) -> list[tuple[str, str, int]]:
    """(question, answer, place of the token before the answer) of every turn, from the token ids alone."""
    words, found, place = tokenizer(), [], 0
    while place < len(ids) and ids[place] != PAD:
        assert ids[place] == USER
        question_ends = ids.index(END, place)
        assert ids[question_ends + 1] == ASSISTANT
        answer_ends = ids.index(END, question_ends + 1)
        question = words.decode([token for token in ids[place + 1 : question_ends] if token != IMAGE])
        found.append((question, words.decode(ids[question_ends + 2 : answer_ends]), question_ends + 1))
        place = answer_ends + 1
    return found


def encoded(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


class TestBatches:
    def test_patches_of_a_box(self) -> None:
        patch = SIDE // 12
        inside = patches_in((patch, 2 * patch, 3 * patch, 3 * patch)).view(12, 12)
        assert inside.nonzero().tolist() == [[2, 1], [2, 2]]
        assert int(patches_in((1, 1, 3, 3)).sum()) == 1  # smaller than a patch

    @pytest.mark.usefixtures("no_photographs")
    def test_a_number_is_a_batch(self) -> None:
        """Whether the batches before it were drawn or not."""
        make = STAGES["tower"].make
        later = [batch.images for batch in training.batches.batches(make, size=2, count=3)][1:]
        again = [batch.images for batch in training.batches.batches(make, size=2, count=3, first=1)]
        assert len(later) == len(again) == 2
        assert all(torch.equal(one, two) for one, two in zip(later, again, strict=True))

    @pytest.mark.usefixtures("no_photographs")
    def test_several_processes_draw_the_same_in_the_same_order(self) -> None:
        make = STAGES["list"].make
        one, two = (
            [batch.conversations.ids for batch in training.batches.batches(make, size=2, count=4, workers=workers)]
            for workers in (1, 2)
        )
        assert len(one) == len(two) == 4
        assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))

    def test_every_tensor_moves(self) -> None:
        """The device "meta" stands in for one that this machine may not have."""
        for batch in minimal_batches(STAGES["together"]):
            there = moved(batch, torch.device("meta"))
            assert {value.device.type for value in tensors(there)} == {"meta"}
            assert len([*tensors(there)]) == len([*tensors(batch)]) > 6


def tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors(getattr(batch, field.name))


class TestDetails:
    def test_scene_text_says_what_tags_say(self) -> None:
        [scene] = [with_tags(scene) for scene in scenes(1)]
        text = scene_grid([scene], Random(0))
        for thing, tag in zip(scene.things, scene.tags, strict=True):
            place = int(thing.y * 12) * 12 + int(thing.x * 12)
            assert text.marks[0, place] == IDS[tag.mark]
            assert text.kinds[0, place] == IDS[thing.kind]
        assert int((text.marks != PAD).sum()) == len(scene.tags)
        assert bool((scene_grid(scenes(1), Random(0)).marks == PAD).all())

    def test_the_processor_s_thumbnail_shows_no_pattern(self) -> None:
        """It is made with another filter than that of training; the crops beside it do show them."""
        scene, processor = with_tags(scenes(1)[0]), llava_next_processor()
        thumbnails, crops = set(), set()
        for mark in PATTERNS:
            tags = tuple(dataclasses.replace(tag, mark=mark, left=61, top=60) for tag in scene.tags)
            picture, _ = render_details(dataclasses.replace(scene, tags=tags), 2 * SIDE)
            views = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
            thumbnails.add(tuple(views[0, :, 32:34, 32:34].flatten().tolist()))
            crops.add(tuple(views[1, :, 64:68, 64:68].flatten().tolist()))
        assert len(thumbnails) == 1
        assert len(crops) == len(PATTERNS)

    def test_quarters_show_each_tag_once(self) -> None:
        """At the patch in whose middle, give or take two pixels, it was drawn."""
        given = [with_tags(scene) for scene in scenes(10)]
        for scene in given:
            _, boxes = pixels([scene], Random(0), 2 * SIDE)
            views = quarters(scene, boxes[0])
            found = [
                (mark, quarter % 2 * SIDE + patch % 12 * 12 + 6, quarter // 2 * SIDE + patch // 12 * 12 + 6)
                for quarter, view in enumerate(views)
                for patch, mark in view.marks
            ]
            assert len(found) == len(scene.tags)
            for tag in scene.tags:
                x, y = tag.middle
                assert any(mark == tag.mark and abs(x - u) <= 2 and abs(y - v) <= 2 for mark, u, v in found)

    def test_quarters_hold_what_lies_in_them(self) -> None:
        for scene in scenes(10):
            _, [boxes] = pixels([scene], Random(0), 2 * SIDE)
            views = quarters(scene, boxes)
            for thing, box in zip(scene.things, boxes, strict=True):
                parts = [part for view in views for other, part in view.things if other is thing]
                covered = sum((right - left) * (bottom - top) for left, top, right, bottom in parts)
                whole_area = (box[2] - box[0]) * (box[3] - box[1])
                assert 0.8 * whole_area <= covered <= whole_area
                assert all(0 <= edge <= SIDE for part in parts for edge in part)


class TestOptimiser:
    def test_stacked_muon_is_muon(self) -> None:
        torch.manual_seed(0)
        shapes = [(24, 24), (24, 24), (16, 24), (24, 16), (16, 24)]
        start = [torch.randn(shape) * 0.1 for shape in shapes]
        ours, stock = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
        options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        optimisers = StackedMuon(ours, **options), torch.optim.Muon(stock, **options)
        for step in range(4):
            for place, pair in enumerate(zip(ours, stock, strict=True)):
                gradient = torch.randn(shapes[place])
                for parameter in pair:
                    parameter.grad = None if (step, place) == (1, 2) else gradient.clone()
            for optimiser in optimisers:
                optimiser.step()
        for one, two, before in zip(ours, stock, start, strict=True):
            assert (one - before).norm() > 0.1
            assert (one - two).norm() < 0.03 * (two - before).norm()  # products in bfloat16, in another order

    def test_rates_go_to_zero_with_the_time(self) -> None:
        pupil = nn.Linear(4, 4)
        optimiser = Optimiser(pupil.named_parameters(), steps=1000, warmup=1)
        for left, share in ((1.0, 1.0), (0.4, 1.0), (0.1, 0.25), (0.0, 0.0), (-0.1, 0.0)):
            for parameter in pupil.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimiser.step(0, left)
            for part, peak in zip(optimiser.parts, optimiser.peaks, strict=True):
                assert part.param_groups[0]["lr"] == pytest.approx(peak * share)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pupil, Path]:
    """A pupil, and its checkpoints. Its weights are numbers that half precision holds, as those on disk are."""
    folder, pupil = tmp_path_factory.mktemp("exported"), Pupil().eval()
    with torch.no_grad():
        for parameter in pupil.parameters():
            parameter.copy_(parameter.half().float())
    export(pupil, folder)
    return pupil, folder


class TestExport:
    def logits(self, pupil: Pupil, visual: Tensor, ids: Tensor) -> Tensor:
        embedded = pupil.words(ids).masked_scatter((ids == IMAGE).unsqueeze(-1), visual)
        states = pupil.llava.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return states @ pupil.words.weight.T

    def both(
        self, exported: tuple[Pupil, Path], name: str, visual: Callable[[Pupil], Tensor], **images: Tensor
    ) -> tuple[Tensor, Tensor]:
        pupil, folder = exported
        model, found = AutoModelForImageTextToText.from_pretrained(folder / name, output_loading_info=True)
        assert not any(found.values()), found
        assert model.dtype == torch.float32
        ids = converse(scenes(1), Random(1), VISUAL_TOKENS if name == "llava-details" else NEXT_TOKENS).ids
        with torch.no_grad():
            return model.eval()(input_ids=ids, **images).logits, self.logits(pupil, visual(pupil), ids)

    def test_llava(self, exported: tuple[Pupil, Path]) -> None:
        images, _ = pixels(scenes(1), Random(1))
        stock, ours = self.both(
            exported, "llava-details", lambda pupil: pupil.see(images)[0], pixel_values=normalised(images)
        )
        torch.testing.assert_close(stock, ours, atol=1e-4, rtol=1e-4)

    def test_llava_next(self, exported: tuple[Pupil, Path]) -> None:
        crops, _ = pixels(scenes(5), Random(1))
        stock, ours = self.both(
            exported,
            "llava-details-next",
            lambda pupil: pupil.pack(pupil.see(crops)[0][None]),
            pixel_values=normalised(crops)[None],
            image_sizes=torch.tensor([[2 * SIDE, 2 * SIDE]]),
        )
        torch.testing.assert_close(stock, ours, atol=1e-4, rtol=1e-4)

    def test_processor_shows_what_training_showed(self, exported: tuple[Pupil, Path]) -> None:
        processor = AutoProcessor.from_pretrained(exported[1] / "llava-details")
        picture, _ = render(scenes(1)[0], SIDE)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the background?"}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        shown = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE, 3)
        torch.testing.assert_close(inputs["pixel_values"], normalised(shown.permute(0, 3, 1, 2)))
        begin = [USER, *[IMAGE] * VISUAL_TOKENS, *encoded("what is the background?"), END, ASSISTANT]
        assert inputs["input_ids"].tolist() == [begin]

    def test_large_pictures_are_cut_into_crops(self, exported: tuple[Pupil, Path]) -> None:
        processor = AutoProcessor.from_pretrained(exported[1] / "llava-details-next")
        inputs = processor(images=Image.new("RGB", (432, 432)), text="<image>", return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 5, 3, SIDE, SIDE)
        assert int((inputs["input_ids"] == IMAGE).sum()) == NEXT_TOKENS

"""Asking: every picture through the tower once, the same answers as one by one, and a store that loses nothing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES
from PIL import Image
from processors import photo
from stock_processors import PROCESSORS

import adafv.bundled
from adafv.asking.session import Session
from adafv.core import Budget
from adafv.evaluation.answers import BLANK, UNPRUNED, Asker, Configuration, Progress, configurations, weights_hash
from adafv.evaluation.questions import Question, Questions, QuestionsError, read_questions
from adafv.evaluation.store import Given, Store, StoreError, mask_of, tokens_of

SAMPLES = Path(adafv.bundled.__file__).parent / "samples"
BUDGETS = ["50%", "10%", 6]


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.load("bundled", "float32", torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures: one with three questions, one with two, one with one; one is there under two names."""
    made = tmp_path_factory.mktemp("questions")
    for name in ("bird", "boats", "key"):
        shutil.copy(SAMPLES / f"{name}.png", made)
    shutil.copy(SAMPLES / "bird.png", made / "again.png")
    records = [
        ("bird", "What color is the banana?", "green"),
        ("boats", "How many boats are there?", "three"),
        ("bird", "Is there a bird?", "yes"),
        ("key", "Is there a pink key?", "yes"),
        ("again", "What color is the bird?", "orange"),
        ("boats", "Is there a bell?", "yes"),
    ]
    lines = [json.dumps({"image": f"{name}.png", "question": text, "answer": answer}) for name, text, answer in records]
    (made / "questions.jsonl").write_text("\n".join(lines))
    return made


@pytest.fixture(scope="module")
def questions(folder: Path) -> Questions:
    return read_questions(folder / "questions.jsonl").checked("refuse")


@contextmanager
def tower_runs(session: Session) -> Iterator[list[int]]:
    """Pictures that went through the tower."""
    runs: list[int] = []
    handle = session.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        yield runs
    finally:
        handle.remove()


def store_of(asker: Asker, path: Path) -> Store:
    return Store(path / "answers.jsonl", asker.fingerprint())


@dataclass(frozen=True)
class Drawn:
    """A picture that is in no file."""

    number: int
    size: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.number} {self.size}"

    def load(self) -> Image.Image:
        return photo(self.number, *self.size)

    def digest(self) -> str:
        return self.name


class TestOnce:
    def test_every_picture_goes_through_the_tower_once(
        self, session: Session, questions: Questions, tmp_path: Path
    ) -> None:
        """Three methods at three budgets, and batches of two that part the questions of a picture."""
        ways = configurations(["adafv", "random", "scope"], BUDGETS, blank=False)
        asker = Asker(session, max_new_tokens=4)
        with tower_runs(session) as runs, store_of(asker, tmp_path) as store:
            grouped, _ = asker.run(questions, ways, store, batch=2)
            assert len(store) == 6 * len(ways) == 60
        assert sum(runs) == 3 == asker.encoded
        assert len({each.cluster for each in grouped.questions}) == 3

    def test_blanked_pictures_of_one_size_are_one(self, session: Session, questions: Questions, tmp_path: Path) -> None:
        asker = Asker(session, max_new_tokens=4)
        sizes = {each.picture.load().size for each in questions.questions}
        with tower_runs(session) as runs, store_of(asker, tmp_path) as store:
            asker.run(questions, configurations(["adafv"], ["10%"]), store, batch=2)
        assert sum(runs) == 3 + len(sizes)

    def test_methods_that_need_pixels_get_them(self, session: Session, questions: Questions, tmp_path: Path) -> None:
        ways = configurations(["downsample"], ["25%"], blank=False)
        asker = Asker(session, max_new_tokens=4)
        with tower_runs(session) as runs, store_of(asker, tmp_path) as store:
            _, keys = asker.run(questions, ways, store, batch=3)
            given = store.get(keys["line 1"], ways[1].way)
        assert given is not None
        assert given.kept < given.tokens == 144
        assert sum(runs) == 3 + 6


class TestAnswers:
    def test_are_those_of_a_session(self, session: Session, questions: Questions, tmp_path: Path) -> None:
        """In batches and from encoded pictures as one by one; unpruned as the stock model."""
        ways = configurations(["adafv", "fastv"], ["10%"], blank=False)
        asker = Asker(session, max_new_tokens=4)
        with store_of(asker, tmp_path) as store:
            _, keys = asker.run(questions, ways, store, batch=4)
            for question in questions.questions:
                inputs = session.inputs(question.picture.load(), question.text)
                for way in ways:
                    pruner = None if way.method is None else session.pruner(way.method, way.budget)
                    alone = session.ask(inputs, pruner, 4)
                    given = store.get(keys[question.name], way.way)
                    assert given is not None
                    assert given.answer == alone.answer, (question.text, way)
                    if alone.record is not None:
                        assert (given.tokens, given.kept) == (144, 14)
                        assert store.kept(keys[question.name], way.way) == sorted(alone.record.kept[0].tolist())
                    else:
                        assert given.kept == 144
                        assert store.kept(keys[question.name], way.way) is None

    @pytest.mark.parametrize(
        "name",
        [
            *("paddleocr-vl", "gemma3"),
            *(
                pytest.param(name, marks=pytest.mark.release)
                for name in PROCESSORS
                if name not in ("paddleocr-vl", "gemma3")
            ),
        ],
    )
    def test_of_any_family(self, name: str, tmp_path: Path) -> None:
        """Stock processors; pictures of several sizes and questions of several lengths in one batch."""
        model = next(row for row in FAMILIES if row.name == name).build()
        session = Session(model, PROCESSORS[name](model))
        drawn = [Drawn(0, (100, 90)), Drawn(1, (90, 200)), Drawn(2, (300, 80))]
        asked = [
            (0, "what is the cat holding?"),
            (0, "is it a dog here?"),
            (1, "where?"),
            (2, "a cat or a dog?"),
            (1, "who?"),
        ]
        questions = [Question(str(number), drawn[of], text) for number, (of, text) in enumerate(asked)]
        asker, ways = Asker(session, max_new_tokens=4), configurations(["adafv", "random"], ["40%"], blank=False)
        with store_of(asker, tmp_path) as store:
            _, keys = asker.run(Questions(questions, []), ways, store, batch=3)
            for question in questions:
                inputs = session.inputs(question.picture.load(), question.text)
                for way in ways:
                    pruner = None if way.method is None else session.pruner(way.method, way.budget)
                    given = store.get(keys[question.name], way.way)
                    assert given is not None
                    assert given.answer == session.ask(inputs, pruner, 4).answer, (question.text, way)
        assert asker.encoded == 3

    def test_blank_is_another_picture(self, session: Session, questions: Questions, tmp_path: Path) -> None:
        asker = Asker(session, max_new_tokens=4)
        with store_of(asker, tmp_path) as store:
            ways = configurations([], [])
            _, keys = asker.run(questions, ways, store)
            unpruned, blank = ([store.get(key, way.way) for key in keys.values()] for way in ways)
        assert [way.name for way in ways] == [UNPRUNED, BLANK]
        assert unpruned != blank

    def test_the_suffix_is_asked(self, session: Session) -> None:
        one, other = Asker(session), Asker(session, suffix=" yes or no?")
        assert one.fingerprint()["prompt"] != other.fingerprint()["prompt"]
        assert one.fingerprint()["model"] == other.fingerprint()["model"]

    def test_configurations(self) -> None:
        ways = configurations(["adafv", "random:seed=1", "adafv"], ["10%", 0.1, 64])
        assert [way.way for way in ways[2:]] == [
            ("adafv", "0.1"),
            ("adafv", "64"),
            ("random:seed=1", "0.1"),
            ("random:seed=1", "64"),
        ]
        assert str(ways[2]) == "adafv at 10 %"


WAYS = configurations(["adafv"], ["50%", "10%"], blank=False)


@pytest.fixture(scope="module")
def finished(session: Session, questions: Questions, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The store of a run to the end."""
    path = tmp_path_factory.mktemp("finished")
    asker = Asker(session, max_new_tokens=4)
    with store_of(asker, path) as store:
        asker.run(questions, WAYS, store, batch=2)
    return (path / "answers.jsonl").read_bytes()


class TestResuming:
    def test_nothing_is_asked_twice(
        self, session: Session, questions: Questions, finished: bytes, tmp_path: Path
    ) -> None:
        (tmp_path / "answers.jsonl").write_bytes(finished)
        again = Asker(session, max_new_tokens=4)
        told: list[Progress] = []
        with tower_runs(session) as runs, store_of(again, tmp_path) as store:
            again.run(questions, WAYS, store, batch=2, progress=told.append)
        assert (runs, told) == ([], [Progress(18, 18, 0)])
        assert (tmp_path / "answers.jsonl").read_bytes() == finished

    @pytest.mark.parametrize("left", [7, 0.3, 0.999])
    def test_killed_in_the_middle_of_a_line(
        self, session: Session, questions: Questions, finished: bytes, tmp_path: Path, left: float
    ) -> None:
        """What was half written is asked again, and nothing else; the file ends up with the same lines."""
        path = tmp_path / "answers.jsonl"
        path.write_bytes(finished[: int(left if left > 1 else left * len(finished))])
        there = max(0, path.read_bytes().count(b"\n") - 1)
        asker = Asker(session, max_new_tokens=4)
        told: list[Progress] = []
        with store_of(asker, tmp_path) as store:
            asker.run(questions, WAYS, store, batch=2, progress=told.append)
        assert (told[0].done, told[-1].asked) == (there, 18 - there)
        assert sorted(path.read_bytes().splitlines()) == sorted(finished.splitlines())

    def test_ids_and_paths_may_change(self, session: Session, finished: bytes, tmp_path: Path, folder: Path) -> None:
        (tmp_path / "answers.jsonl").write_bytes(finished)
        asker = Asker(session, max_new_tokens=4)
        with store_of(asker, tmp_path) as store:
            shutil.copy(folder / "key.png", tmp_path / "renamed.png")
            line = {"image": "renamed.png", "question": "Is there a pink key?", "id": "new"}
            (tmp_path / "others.jsonl").write_text(json.dumps(line))
            told: list[Progress] = []
            asker.run(read_questions(tmp_path / "others.jsonl"), WAYS, store, progress=told.append)
        assert told == [Progress(3, 3, 0)]

    def test_another_question_is_another(
        self, session: Session, questions: Questions, finished: bytes, tmp_path: Path
    ) -> None:
        (tmp_path / "answers.jsonl").write_bytes(finished)
        asker = Asker(session, max_new_tokens=4)
        with store_of(asker, tmp_path) as store:
            changed = [replace(questions.questions[0], choices=("green", "red")), *questions.questions[1:]]
            told: list[Progress] = []
            asker.run(Questions(changed, []), WAYS, store, progress=told.append)
        assert told[0].done == 15


class TestBrokenPictures:
    def broken(self, folder: Path, tmp_path: Path) -> Questions:
        whole = (folder / "key.png").read_bytes()
        (tmp_path / "key.png").write_bytes(whole[: len(whole) // 2])
        shutil.copy(folder / "bird.png", tmp_path)
        records = [{"image": f"{name}.png", "question": "Is there a bird?"} for name in ("bird", "key")]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)))
        return read_questions(tmp_path / "q.jsonl")

    def test_are_refused_by_line(self, session: Session, folder: Path, tmp_path: Path) -> None:
        asker = Asker(session, max_new_tokens=4)
        with (
            store_of(asker, tmp_path) as store,
            pytest.raises(QuestionsError, match=r"q\.jsonl line 2: key\.png is damaged"),
        ):
            asker.run(self.broken(folder, tmp_path), configurations([], []), store)

    def test_or_skipped(self, session: Session, folder: Path, tmp_path: Path) -> None:
        asker = Asker(session, max_new_tokens=4)
        told: list[Progress] = []
        with store_of(asker, tmp_path) as store:
            left, keys = asker.run(
                self.broken(folder, tmp_path), configurations([], []), store, policy="skip", progress=told.append
            )
            assert len(store) == 2
        assert [each.name for each in left.questions] == ["line 1"] == list(keys)
        assert [each.where for each in left.bad] == ["q.jsonl line 2"]
        assert told[-1] == Progress(2, 2, 2)


class TestStore:
    WHO = {"model": "a", "precision": "float32"}

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        Store(path, self.WHO).close()
        with pytest.raises(StoreError, match="holds answers with another model"):
            Store(path, {**self.WHO, "model": "b"})
        with pytest.raises(StoreError, match="another precision"):
            Store(path, {**self.WHO, "precision": "bfloat16"})

    @pytest.mark.parametrize("content", [b"hello\n", b"hello", b'{"a": 1}\n', b"[]\n", b"\xff\xfe\n"])
    def test_what_is_none_is_left_alone(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "answers.jsonl"
        path.write_bytes(content)
        with pytest.raises(StoreError, match="no store of answers"):
            Store(path, self.WHO)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("line", [b"{\n", b"[1]\n", b"null\n"])
    def test_damage_in_the_middle_is_named(self, tmp_path: Path, line: bytes) -> None:
        path = tmp_path / "answers.jsonl"
        with Store(path, self.WHO) as store:
            store.add(("adafv", "0.1"), [(str(number), Given("x", 4, 2), [0, 3]) for number in range(3)])
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], line, *lines[3:]]))
        with pytest.raises(StoreError, match="damaged in line 3"):
            Store(path, self.WHO)

    def test_one_writer(self, tmp_path: Path) -> None:
        with (
            Store(tmp_path / "answers.jsonl", self.WHO),
            pytest.raises(StoreError, match="written by another process"),
        ):
            Store(tmp_path / "answers.jsonl", self.WHO)

    def test_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="cannot be written"):
            Store(tmp_path / "nowhere" / "answers.jsonl", self.WHO)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "answers.jsonl"
        with Store(path, self.WHO) as store:
            store.add(("adafv", "0.1"), [("a", Given("x", 4, 2), None)])
            before = path.read_bytes()
            whole = store._file

            class Full:
                def __getattr__(self, name: str) -> Any:
                    return getattr(whole, name)

                def flush(self) -> None:
                    raise OSError(28, "No space left on device")

            store._file = Full()  # type: ignore[assignment]
            with pytest.raises(StoreError, match=r"No space left on device.*run the command again"):
                store.add(("adafv", "0.1"), [("b", Given("x", 4, 2), None)])
            store._file = whole
            assert store.get("b", ("adafv", "0.1")) is None
        assert path.read_bytes() == before

    def test_kept_tokens(self, tmp_path: Path) -> None:
        with Store(tmp_path / "answers.jsonl", self.WHO) as store:
            store.add(("adafv", "0.1"), [("a", Given("x", 300, 3), [2, 0, 299]), ("b", Given("y", 4, 4), None)])
            store.add(("adafv", "0.2"), [("a", Given("z", 300, 1), [7])])
            assert store.kept("a", ("adafv", "0.1")) == [0, 2, 299]
            assert store.kept("b", ("adafv", "0.1")) is None
            assert store.kept("a", ("adafv", "0.2")) == [7]
            store.add(("adafv", "0.3"), [("a", Given("z", 300, 1), [8])])
        with Store(tmp_path / "answers.jsonl", self.WHO) as store:
            assert store.kept("a", ("adafv", "0.2")) == [7]
            assert store.kept("a", ("adafv", "0.3")) == [8]

    @pytest.mark.parametrize("kept", [[], [0], [3, 1, 64], [-1, 5, 5]])
    def test_masks(self, kept: list[int]) -> None:
        assert tokens_of(mask_of(kept)) == sorted({token for token in kept if token >= 0})


def test_weights_hash_tells_models_apart(session: Session) -> None:
    before = weights_hash(session.model)
    weight = session.model.model.language_model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.001)
    assert weights_hash(session.model) != before
    with torch.no_grad():
        weight.copy_(kept)
    assert weights_hash(session.model) == before


def test_budget_keys() -> None:
    assert Configuration("adafv", Budget.of("10%")).way == ("adafv", "0.1")

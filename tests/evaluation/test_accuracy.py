"""`adafv bench accuracy`: what is asked, how it is counted, and that a run goes on where it was."""

import csv
import json
import pickle
from collections import Counter
from dataclasses import replace
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from PIL import Image

from adafv.asking.session import Session
from adafv.errors import OptionError, UnsupportedCallError
from adafv.evaluation import accuracy
from adafv.evaluation.accuracy import (
    CHOOSE,
    CONFIRM,
    FAINT,
    Data,
    absorb,
    belongs,
    file_data,
    make_asker,
    mixed,
    share_of,
    ways_of,
    world_data,
)
from adafv.evaluation.accuracy_report import GUESS, SURE, AccuracyReport, Scores
from adafv.evaluation.answers import BLANK, UNPRUNED, Asker, configurations
from adafv.evaluation.drawn import drawn_questions, held_out, held_out_details
from adafv.evaluation.first_token import FirstTokenAsker, chance_of_right, one_token_each
from adafv.evaluation.questions import FilePicture, Question, Questions
from adafv.evaluation.store import Given, Store, StoreError
from adafv.evaluation.world.details import DETAIL_KINDS, render, sample_detailed_scene
from adafv.evaluation.world.questions import QUESTION_KINDS

SETTINGS = {"answers": "first-token", "choices": None, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.load("bundled", "float32", torch.device("cpu"))


def question(name: str, answer: str, picture: str = "a.png", kind: str | None = None, **more: Any) -> Question:
    return Question(name, FilePicture(Path(picture), picture), "is there a key?", (answer,), kind, picture, **more)


class TestQuestions:
    def test_all_kinds_alike_and_always_the_same(self) -> None:
        asked = [each for _, each in held_out(70, photos=False)]
        assert asked == [each for _, each in held_out(70, photos=False)]
        assert Counter(each.kind for each in asked) == dict.fromkeys(QUESTION_KINDS, 10)

    def test_drawn_ones_have_what_the_scene_says(self) -> None:
        for made, (scene, asked) in zip(drawn_questions(12, 96, photos=False), held_out(12, photos=False), strict=True):
            assert (made.text, made.answers, made.kind) == (asked.text, (asked.answer,), asked.kind)
            assert made.group == str(scene.number)
            assert made.picture.load().size == (96, 96)

    def test_details_are_asked_for_among_the_others(self) -> None:
        asked = [each for _, each in held_out_details(50, photos=False)]
        counts = Counter(each.kind for each in asked)
        assert set(counts) == {*QUESTION_KINDS, *DETAIL_KINDS}
        assert set(counts.values()) == {5}
        data = world_data(20, 144, photos=False, detailed=True)
        assert [(each.text, each.answers) for each in data.questions] == [
            (each.text, (each.answer,)) for each in asked[:20]
        ]
        picture = data.questions[0].picture
        plain = sample_detailed_scene("test", int(data.questions[0].group), photos=False)
        assert picture.load().tobytes() == render(plain, 144)[0].tobytes()

    def test_halves_are_all_and_share_no_scene(self) -> None:
        parts = [world_data(60, 48, part, photos=False) for part in (CHOOSE, CONFIRM)]
        names = [{each.name for each in part.questions} for part in parts]
        groups = [{each.group for each in part.questions} for part in parts]
        assert not groups[0] & groups[1]
        assert len(names[0] | names[1]) == 60
        assert min(map(len, groups)) > 5
        assert belongs("anything", "all")

    @pytest.mark.parametrize("detailed", [False, True])
    def test_fresh_ones_are_those_behind_the_first(self, detailed: bool) -> None:
        fresh = drawn_questions(6, 144, photos=False, detailed=detailed, skip=5)
        assert fresh == drawn_questions(11, 144, photos=False, detailed=detailed)[5:]
        [faint] = world_data(30, 48, photos=False, skip=200).marks.values()
        assert faint & {each.name for each in drawn_questions(30, 48, photos=False, skip=200)}

    def test_answers_by_turns(self) -> None:
        asked = [question(str(n), "yes" if n < 3 else "no") for n in range(5)]
        assert [each.name for each in mixed(asked)] == ["0", "3", "1", "4", "2"]

    def test_a_share_of_every_picture(self, tmp_path: Path) -> None:
        folder = photos(tmp_path, [("a.png", "yes"), ("a.png", "yes"), ("a.png", "no"), ("b.png", "no")])
        assert len(file_data([folder]).questions) == 4
        some = file_data([folder], most=4).questions
        assert [(each.picture.name, each.answers) for each in some] == [
            ("a.png", ("yes",)),
            ("a.png", ("no",)),
            ("b.png", ("no",)),
        ]
        assert file_data([folder]).name == "photos"

    def test_shares_are_cut_into_the_same_batches(self, tmp_path: Path) -> None:
        folder = photos(tmp_path, [(f"{'abc'[n // 3]}.png", "yes") for n in range(8)])
        asked = file_data([folder]).questions
        whole = [[each.name for each in asked[first : first + 3]] for first in range(0, 8, 3)]
        for shares in (1, 2, 3):
            found = []
            for number in range(shares):
                own = [each.name for each in share_of(asked, number, shares, 3)]
                found += [own[first : first + 3] for first in range(0, len(own), 3)]
            assert sorted(found) == sorted(whole)


def photos(tmp_path: Path, asked: list[tuple[str, str]]) -> Path:
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    for name in {name for name, _ in asked}:
        colour = {"a": "red", "b": "blue", "c": "green"}[name[0]]
        Image.new("RGB", (60, 50), colour).save(folder / "images" / name)
    lines = [
        {"image": name, "text": f"is there {'a' if answer == 'yes' else 'no'} key? {'and ' * n}", "label": answer}
        for n, (name, answer) in enumerate(asked)
    ]
    (folder / "presence.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


class TestWays:
    def test_unpruned_blanked_and_random_are_always_there(self) -> None:
        names = [way.name for way in ways_of(["adafv"], ["0.5", "10"])]
        assert names == [UNPRUNED, BLANK, "random", "random", "adafv", "adafv"]
        assert len(ways_of(["all"], [0.5])) > 20

    def test_scope_and_positions_of_one_way(self, session: Session) -> None:
        _, _, one, other = configurations(["adafv:text=turn", "adafv:positions=original:objective=split"], [0.5])
        assert (one.name, other.name) == ("adafv:text=turn", "adafv:objective=split:positions=original")
        asker = Asker(session)
        assert asker._pruner(one).settings.scope == "turn"
        assert asker._pruner(other).settings.positions == "original"
        with pytest.raises(OptionError, match="text=page; known are"):
            configurations(["adafv:text=page"], [0.5])
        with pytest.raises(OptionError, match="'some' is no number of crops"):
            configurations(["adafv:crops=some"], [0.5])


def test_crops_of_one_way(tmp_path: Path) -> None:
    """Encoded once and whole; the thumbnail alone leaves fewer tokens than half of all of them."""
    session = Session.load("bundled-next", "float32", torch.device("cpu"))
    ways = configurations(["adafv:crops=thumbnail", "adafv:crops=auto"], [0.5])
    data, asker = world_data(4, 288, photos=False), Asker(session, max_new_tokens=2)
    for way in ways:
        asker.record(data.questions[0], way)
    with pytest.raises(UnsupportedCallError, match="which `generate` of a wrapped model alone"):
        FirstTokenAsker(session).record(data.questions[0], ways[-1])
    with Store(tmp_path / "answers.jsonl", asker.fingerprint()) as store:
        _, keys = asker.run(Questions(data.questions, []), ways, store)
        kept = {way.name: {store.get(key, way.way).kept for key in keys.values()} for way in ways}
    assert kept["adafv:crops=thumbnail"] == {144}
    assert kept["unpruned"] == {744}
    assert kept["adafv:crops=auto"] <= {144, 372}


class TestFirstToken:
    asked = world_data(6, 144, photos=False).questions

    def test_the_likeliest_token_and_how_likely_what_is_right_is(self, session: Session, tmp_path: Path) -> None:
        """Against the stock model, question by question."""
        asker = FirstTokenAsker(session)
        [unpruned, _] = configurations([], [])
        with Store(tmp_path / "store", asker.fingerprint()) as store:
            _, keys = asker.run(Questions(self.asked, []), [unpruned], store, batch=4)
            for each in self.asked:
                given = store.get(keys[each.name], unpruned.way)
                assert given is not None
                with torch.no_grad():
                    logits = session.model(**session.inputs(each.picture.load(), each.text)).logits[0, -1]
                assert given.answer == session.processor.decode([int(logits.argmax())])
                assert each.answers is not None
                token = session.processor.tokenizer.encode(each.answers[0], add_special_tokens=False)[0]
                expected = float(logits.double().softmax(-1)[token])
                assert chance_of_right(given.chances, each, "first") == pytest.approx(expected, abs=2e-5)
        with Store(tmp_path / "store", asker.fingerprint()) as store:  # the same, from the disk
            assert store.get(keys[each.name], unpruned.way) == given

    def test_among_choices(self, session: Session) -> None:
        asker = FirstTokenAsker(session, choices=("red", "blue"))
        logits = torch.zeros(session.model.config.text_config.vocab_size)
        red, blue, yes = (session.processor.tokenizer.encode(word)[-1] for word in ("red", "blue", "yes"))
        logits[[red, blue, yes]] = torch.tensor([1.0, 2.0, 9.0])
        answer, chances = asker._read(logits, question("1", "red"))
        assert answer == "blue"
        odds = 1 / (1 + torch.tensor(1.0).exp().item())
        assert dict(chances) == pytest.approx({"red": odds, "blue": 1 - odds}, abs=1e-5)
        assert chance_of_right(chances, question("1", "red"), "auto") == pytest.approx(odds, abs=1e-5)
        assert chance_of_right(chances, question("1", "green"), "auto") is None

    def test_choices_of_one_token_are_refused(self, session: Session) -> None:
        with pytest.raises(OptionError, match="same token"):
            FirstTokenAsker(session, choices=("red", "red"))

    def test_answers_of_one_token(self, session: Session) -> None:
        assert one_token_each(session, ["red", "two"])
        assert not one_token_each(session, ["red", "red key"])

    def test_other_choices_are_another_store(self, session: Session) -> None:
        prints = [FirstTokenAsker(session, choices=choices).fingerprint() for choices in (None, ("red", "blue"))]
        assert prints[0] != prints[1]
        assert Asker(session, max_new_tokens=1).fingerprint() not in prints


def filled(tmp_path: Path, data: Data, ways: list[Any], right: dict[str, list[bool]]) -> tuple[Store, dict[str, str]]:
    """A store in which each way answers rightly or not, in the order of the questions."""
    store = Store(tmp_path / "answers", {})
    keys = {each.name: f"key {each.name}" for each in data.questions}
    for way in ways:
        for each, good in zip(data.questions, right[str(way)], strict=True):
            [answer] = each.answers or ()
            said = answer if good else "no idea"
            chosen_by = "saliency" if way.name == "adafv" and each.name == "0" else ""
            given = Given(said, 100, 100 if way.budget.keeps_all else 10, chosen_by, ((answer, 0.75 if good else 0.1),))
            store.add(way.way, [(keys[each.name], given, None)])
    return store, keys


class TestReport:
    asked = [
        question(str(n), answer, f"{n // 2}.png", kind)
        for n, (answer, kind) in enumerate(
            [("red", "colour")] * 3 + [("two", "count"), ("one", "count"), ("two", "count")]
        )
    ]
    data = Data("toys", asked, bad=1, marks={FAINT: frozenset({"0", "5"})})
    ways = ways_of(["adafv"], [0.1])
    right = {
        UNPRUNED: [True] * 6,
        BLANK: [False] * 6,
        "random at 10 %": [True, True, False, False, False, False],
        "adafv at 10 %": [True, True, True, True, False, False],
    }

    def made(self, tmp_path: Path, **options: Any) -> AccuracyReport:
        store, keys = filled(tmp_path, self.data, self.ways, self.right)
        with store:
            scores = Scores(self.data, self.ways, store, keys, rule="exact", **options)
        return AccuracyReport("m<b>", [scores], ["adafv", "random"], "all", True, {"fastv at 10 %": "too | few"}, {})

    def test_means_and_paired_differences(self, tmp_path: Path) -> None:
        [scores] = self.made(tmp_path).scores
        adafv, chance = ("adafv", "0.1"), ("random", "0.1")
        assert scores.mean(adafv).mean == pytest.approx(4 / 6)  # type: ignore[union-attr]
        paired = scores.mean(chance, adafv)
        assert paired is not None
        assert paired.mean == pytest.approx(-2 / 6)
        # Pictures 0, 1, 2 differ by 0, -2, 0 questions: deviations 2/3, -4/3, 2/3; times 3 / 2, over six questions.
        assert paired.half == pytest.approx(1.96 * ((4 + 16 + 4) / 9 * 1.5) ** 0.5 / 6)
        # "red" for colours; "two" for counts, right two times of three.
        assert scores.mean((GUESS, "1.0")).mean == pytest.approx(5 / 6)  # type: ignore[union-attr]
        assert scores.mean(adafv, column="count").mean == pytest.approx(1 / 3)  # type: ignore[union-attr]
        assert scores.mean(adafv, column=FAINT).count == 2  # type: ignore[union-attr]

    def test_how_sure(self, tmp_path: Path) -> None:
        [scores] = self.made(tmp_path, what=SURE).scores
        assert scores.mean(("adafv", "0.1")).mean == pytest.approx((4 * 0.75 + 2 * 0.1) / 6)  # type: ignore[union-attr]
        assert (GUESS, "1.0") not in scores.values

    def test_tables(self, tmp_path: Path) -> None:
        report = self.made(tmp_path)
        (title, references), (_, methods) = report.tables(report.scores[0])
        assert title == "toys: 6 questions on 3 pictures"
        assert [row[0] for row in references] == ["", "unpruned", "picture blanked", "most frequent answer"]
        assert methods[0] == [
            "method",
            "percent right",
            "- unpruned",
            "- adafv",
            "- random",
            "tokens",
            "colour",
            "count",
            FAINT,
        ]
        assert [row[0] for row in methods[1:]] == ["adafv", "random"]
        assert methods[1][3] == ""
        assert methods[1][4].startswith("+33.3 ± ")
        assert methods[1][5] == "10"
        assert methods[2][3].startswith("-33.3 ± ")
        text = report.markdown()
        assert "adafv at 10 %: no word counted for 1 of 6 questions" in text
        assert "1 records of toys could not be used" in text
        assert "Not run: fastv at 10 %: too \\| few" in text

    def test_csv_and_json_say_the_same(self, tmp_path: Path) -> None:
        report = self.made(tmp_path)
        written = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert written["bench"] == 1
        rows = {(row["method"], row["keep"]): row for row in written["rows"]}
        assert rows["random", "0.1"]["minus"]["adafv"]["mean"] == pytest.approx(-0.333333)
        assert rows["random", "0.1"]["share"] == 0.1
        # All right, on three pictures: the rule of three.
        assert rows[UNPRUNED, None]["right"] == {"mean": 1.0, "half_of_95": 1.0, "questions": 6}
        listed = list(csv.DictReader(report.csv().splitlines()))
        [same] = [row for row in listed if row["method"] == "random" and row["kind"] == "all"]
        assert float(same["minus adafv"]) == rows["random", "0.1"]["minus"]["adafv"]["mean"]
        assert {row["kind"] for row in listed} == {"all", "colour", "count", FAINT}

    def test_one_picture_is_no_certainty(self, tmp_path: Path) -> None:
        """Nothing can vary between pictures, whatever the answers to its questions."""
        report = self.made(tmp_path)
        [scores] = report.scores
        scores.questions = {name: replace(each, group="one") for name, each in scores.questions.items()}
        for row in report.rows():
            assert row["right"]["half_of_95"] == 1.0
            assert all(minus["half_of_95"] == 1.0 for minus in row.get("minus", {}).values())

    def test_two_stars_count_all_rows(self, tmp_path: Path) -> None:
        """Three differences of 4 in 40 have 0.034 each, below 0.05 and above a third of it; one of 20 in 40 has far less."""
        data = Data("toys", [question(str(n), "red", f"{n}.png") for n in range(40)])
        ways = ways_of(["adafv", "text", "uniform", "saliency"], [0.1])
        wrong = {"random at 10 %": 20, "text at 10 %": 4, "uniform at 10 %": 4, "saliency at 10 %": 4}
        right = {str(way): [n >= wrong.get(str(way), 0) for n in range(40)] for way in ways}
        store, keys = filled(tmp_path, data, ways, right)
        with store:
            report = AccuracyReport("m", [Scores(data, ways, store, keys)], ["adafv"], "all", False, {}, {})
        _, (_, rows) = report.tables(report.scores[0])
        assert [row[3] for row in rows if row[0] == "random"] == ["-50.0 ± 15.7**"]
        assert {row[3] for row in rows if row[0] in ("text", "uniform", "saliency")} == {"-10.0 ± 9.4*"}
        said = {
            row["method"]: row["minus"]["adafv"]["among_all"]
            for row in report.rows()
            if "adafv" in row.get("minus", {})
        }
        assert said == {"random": True, "text": False, "uniform": False, "saliency": False}

    def test_figure(self, tmp_path: Path) -> None:
        report = self.made(tmp_path)
        figure = report.figure(report.scores[0])
        for name in ("adafv", "random", "unpruned", "picture blanked", "10 %", "m&lt;b&gt;"):
            assert f">{name}</text>" in figure or name in figure
        assert figure.count("<polygon") == 2  # the bands of what the others are held against


def test_answers_of_another_store_are_taken_over(tmp_path: Path) -> None:
    with Store(tmp_path / "one", {"model": 1}) as one, Store(tmp_path / "two", {"model": 1}) as two:
        one.add(("adafv", "0.1"), [("a", Given("red", 9, 3), [1, 4, 7])])
        two.add(("adafv", "0.1"), [("a", Given("blue", 9, 3), [0, 1, 2]), ("b", Given("two", 9, 3), [2, 5, 8])])
        two.close()
        assert absorb(one, [tmp_path / "two"]) == 1
        assert one.get("a", ("adafv", "0.1")) == Given("red", 9, 3)
        assert one.get("b", ("adafv", "0.1")) == Given("two", 9, 3)
        assert one.kept("b", ("adafv", "0.1")) == [2, 5, 8]


class ForkedAsSpawned(ForkContext):
    """As the processes that are spawned, of which each imports torch first: what they are given is pickled on the way."""

    def Process(self, target: Any, args: tuple[Any, ...]) -> Any:
        job, sender = args
        target, job = pickle.loads(pickle.dumps((target, job)))
        return super().Process(target=target, args=(job, sender))


def broken_process(job: Any, failed: Any) -> None:
    failed.send(StoreError("the disk is full; make room"))
    raise SystemExit(1)


WORLD = ["bench", "accuracy", "--world", "--no-photos", "--questions", 14, "--keep", "0.1", "--methods", "adafv"]


class TestCommand:
    def test_goes_on_and_says_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = run(*WORLD, "--output", tmp_path)
        assert first.exit_code == 0, first.output
        written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert set(written) == {"accuracy.md", "accuracy.csv", "accuracy.json", "accuracy.svg", "answers.jsonl"}
        rows = {row["method"]: row for row in json.loads(written["accuracy.json"])["rows"]}
        assert rows[UNPRUNED]["right"]["mean"] > rows[BLANK]["right"]["mean"] + 0.2
        # Half of the answers are there, and the last one was being written: nothing of these is asked again.
        lines = written["answers.jsonl"].splitlines(keepends=True)
        (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:30]) + lines[30][:-9])
        asked: list[int] = []
        answers = Asker._answers
        monkeypatch.setattr(
            Asker, "_answers", lambda self, some, *rest: asked.append(len(some)) or answers(self, some, *rest)
        )
        again = run(*WORLD, "--output", tmp_path)
        assert again.stdout == first.stdout
        assert sum(asked) == len(lines) - 30
        assert json.loads((tmp_path / "accuracy.json").read_bytes()) == json.loads(written["accuracy.json"])

    def test_choices_on_a_folder(self, tmp_path: Path) -> None:
        folder = photos(tmp_path, [("a.png", "yes"), ("a.png", "no"), ("b.png", "no")])
        options = ["--choices", "yes,no", "--keep", "50%", "--methods", "adafv,adafv:text=turn", "--json"]
        result = run("bench", "accuracy", folder, *options)
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["rows"]
        assert {row["method"] for row in rows} == {UNPRUNED, BLANK, GUESS, "random", "adafv", "adafv:text=turn"}
        sure = run("bench", "accuracy", folder, *options, "--sure")
        assert all(0 < row["sure"]["mean"] < 1 for row in json.loads(sure.stdout)["rows"])

    def test_files_of_one_name_and_copies_of_one_picture(self, tmp_path: Path) -> None:
        """Each question on its own picture; a picture under two names is one, and what is broken is counted."""
        one = photos(tmp_path / "one", [("a.png", "yes"), ("b.png", "no")])
        other = photos(tmp_path / "other", [("b.png", "no"), ("c.png", "no")])
        (other / "images" / "b.png").write_bytes((one / "images" / "a.png").read_bytes())
        (other / "images" / "c.png").write_bytes(b"broken")
        options = ["--keep", "50%", "--methods", "random", "--against", "random", "--bad-records", "skip", "--json"]
        result = run("bench", "accuracy", one, other, *options, "--store", tmp_path / "store")
        assert result.exit_code == 0, result.output
        [data] = json.loads(result.stdout)["data"]
        assert (data["questions"], data["pictures"], data["bad"]) == (3, 2, 1)

    @pytest.mark.slow
    @pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.release)])
    def test_processes_and_shares_answer_as_one_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
    ) -> None:
        if start == "fork":
            monkeypatch.setattr(accuracy, "get_context", lambda _: ForkedAsSpawned())
        results = [run(*WORLD, "--batch", 4, "--json", *more) for more in ([], ["--jobs", 2])]
        assert [result.exit_code for result in results] == [0, 0], results[1].output
        assert results[0].stdout == results[1].stdout
        stores = [tmp_path / f"{number}.jsonl" for number in (1, 2)]
        for number, store in enumerate(stores, 1):
            assert run(*WORLD, "--batch", 4, "--share", f"{number}/2", "--store", store).exit_code == 0
        merged = run(*WORLD, "--batch", 4, "--json", *(part for store in stores for part in ("--merge", store)))
        assert merged.stdout == results[0].stdout

    @pytest.mark.slow
    def test_what_ends_a_process_ends_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its own message; what was answered stays for the next run."""
        monkeypatch.setattr(accuracy, "_process", broken_process)
        monkeypatch.setattr(accuracy, "get_context", lambda _: ForkedAsSpawned())
        result = run(*WORLD, "--jobs", 2, "--output", tmp_path)
        refused(result, 1, "the disk is full; make room")

    def test_all_leaves_out_what_the_model_does_not_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        why = "too few layers"
        monkeypatch.setattr(
            accuracy, "refused", lambda asker, ways, question, store: {way: why for way in ways if way.name == "adafv"}
        )
        monkeypatch.setattr(accuracy, "known_methods", lambda: {"adafv": None, "random": None, "uniform": None})
        all_of_them = [word if word != "adafv" else "all" for word in WORLD]
        result = run(*all_of_them, "--against", "random")
        assert result.exit_code == 0, result.output
        assert f"Not run: adafv at 10 %: {why}" in result.stdout
        refused(run(*WORLD, "--against", "random"), 2, "adafv at 10 %", why, "leave it out of --methods")

    @pytest.mark.parametrize(
        ("arguments", "code", "parts"),
        [
            (["--keep", "0"], 2, ["--keep"]),
            (["--methods", "adavf"], 2, ["did you mean adafv"]),
            (["--methods", "uniform", "--against", "adafv"], 2, ["--against", "adafv"]),
            (["--against", "mmtok"], 2, ["--against", "mmtok"]),
            (["--part", "third"], 2, ["--part"]),
            (["--share", "3/2"], 2, ["--share", "I/N"]),
            (["--share", "1/2"], 2, ["--store"]),
            (["--skip", "9", "nowhere.jsonl"], 2, ["--skip", "--world"]),
            (["--choices", "yes"], 2, ["--choices"]),
            (["--answers", "generate", "--sure"], 2, ["--answers generate"]),
            (["nowhere.jsonl"], 1, ["there is no file nowhere.jsonl"]),
        ],
    )
    def test_refused(self, arguments: list[str], code: int, parts: list[str]) -> None:
        refused(run("bench", "accuracy", *arguments, "--no-photos"), code, *parts)

    def test_questions_without_answers_are_sent_to_check(self, tmp_path: Path) -> None:
        Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
        (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.png", "question": "what is it?"}))
        refused(run("bench", "accuracy", tmp_path / "q.jsonl"), 1, "has no answer", "adafv check")

    def test_a_budget_that_prunes_nothing_is_named(self) -> None:
        options = ("--questions", 2, "--methods", "adafv", "--against", "adafv", "--keep", "5000,10")
        result = run("bench", "accuracy", "--world", "--no-photos", *options)
        assert result.exit_code == 0, result.output
        assert "warning: --keep 5000 prunes nothing of drawn scenes" in result.stderr
        assert "--keep 10 prunes nothing" not in result.stderr

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        refused(run(*WORLD, "--output", tmp_path / "file"), 2, "--output", "is a file")


def test_the_asker_is_what_the_settings_say(session: Session) -> None:
    assert isinstance(make_asker(session, SETTINGS), FirstTokenAsker)
    assert not isinstance(make_asker(session, {**SETTINGS, "answers": "generate"}), FirstTokenAsker)
    assert isinstance(
        make_asker(session, {**SETTINGS, "answers": "generate", "choices": ["yes", "no"]}), FirstTokenAsker
    )

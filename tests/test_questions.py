"""Questions from files: what is read, what is wrong with a record and on which line, and when an answer is right."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adafv.errors import ImageError
from adafv.evaluation.matching import agree, normalised, score
from adafv.evaluation.questions import FilePicture, Question, Questions, QuestionsError, read_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("cat.png", "dog.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / "images" / name)
    return tmp_path


def written(folder: Path, *records: Any, name: str = "questions.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


CAT = {"image": "cat.png", "question": "what is it?"}


class TestReading:
    def test_json_lines(self, folder: Path) -> None:
        boxes = [[1, 2, 3, 4.5]]
        path = written(
            folder,
            {**CAT, "answer": "cat", "id": 7, "kind": "name", "boxes": boxes, "group": 3},
            "",
            {**CAT, "image": "images/dog.png", "answers": ["dog", "a dog"], "choices": ["cat", "dog"]},
        )
        one, other = read_questions(path).checked("refuse").questions
        assert (one.name, one.text, one.answers, one.kind) == ("7", "what is it?", ("cat",), "name")
        assert one.boxes == ((1.0, 2.0, 3.0, 4.5),)
        assert (other.name, other.answers, other.where) == ("line 3", ("dog", "a dog"), "questions.jsonl line 3")
        assert other.asked == "what is it?\nA. cat\nB. dog"
        assert one.picture.load().size == (8, 6)
        assert (one.cluster, other.cluster) == ("group 3", "images/dog.png")

    def test_the_testbeds_form(self, folder: Path) -> None:
        """A folder; text and label for question and answer."""
        written(folder, {"image": "cat.png", "text": "Is it?", "label": "yes"}, name="presence.jsonl")
        written(folder, {"image": "cat.png", "text": "Is it?", "label": "no"}, name="another.jsonl")
        [question] = read_questions(folder).questions
        assert question.answers == ("yes",)

    def test_csv(self, folder: Path) -> None:
        path = folder / "table.csv"
        path.write_text(
            '\ufeffimage,question,answers,id\ncat.png,"what, then?",cat|a cat,q1\n\ndog.png,"two\nlines",,q2\n', "utf-8"
        )
        one, other = read_questions(path).checked("refuse").questions
        assert (one.text, one.answers, one.name) == ("what, then?", ("cat", "a cat"), "q1")
        assert (other.text, other.answers) == ("two\nlines", None)

    @pytest.mark.parametrize(
        "text",
        [
            "image;question;answer\r\ncat.png;what, then?;cat|a cat\r\n",
            "image\tquestion\tlabel\ncat.png\twhat, then?\tcat|a cat\n",
            'Image, Question, Answer\ncat.png, "what, then?", cat|a cat\n',
        ],
    )
    def test_csv_as_spreadsheets_write_it(self, folder: Path, text: str) -> None:
        path = folder / "table.csv"
        path.write_text(text, "utf-8-sig", newline="")
        [one] = read_questions(path).checked("refuse").questions
        assert (one.picture.name, one.text, one.answers) == ("cat.png", "what, then?", ("cat", "a cat"))

    @pytest.mark.parametrize(
        ("first", "said"),
        [
            ("cat.png,what?,cat", "has no column image; its first line names cat.png, what?, cat"),
            ("image,answer", "has no column question"),
            ("image,question,answer,Answer", "has the column answer twice"),
        ],
    )
    def test_csv_without_names_of_columns(self, folder: Path, first: str, said: str) -> None:
        (folder / "table.csv").write_text(f"{first}\ncat.png,what?,cat\n")
        with pytest.raises(QuestionsError, match=re.escape(said)):
            read_questions(folder / "table.csv")

    def test_vqas_annotations_and_truth_values(self, folder: Path) -> None:
        path = written(folder, {**CAT, "answers": [{"answer": "red"}, {"answer": "blue"}]}, {**CAT, "answer": True})
        assert [each.answers for each in read_questions(path).questions] == [("red", "blue"), ("yes",)]

    def test_same_picture_same_digest(self, folder: Path) -> None:
        one, other = (FilePicture(folder / "images" / name, name) for name in ("cat.png", "dog.png"))
        assert one.digest() == other.digest()
        Image.new("RGB", (8, 6), "blue").save(folder / "images" / "dog.png")
        assert one.digest() != other.digest()


class TestBadRecords:
    @pytest.mark.parametrize(
        ("record", "problem"),
        [
            ("{", "is not JSON"),
            ("[1]", "is no object"),
            ({"question": "what?"}, "has no picture"),
            ({"image": 3, "question": "what?"}, "has no picture"),
            ({"image": "bird.png", "question": "what?"}, "there is no picture bird.png"),
            ({"image": "a\0b", "question": "what?"}, "there is no picture"),
            ({"image": "images", "question": "what?"}, "there is no picture"),
            ({"image": "https://example.org/a.png", "question": "what?"}, "save it to a file"),
            ({"image": "cat.png"}, "has no question"),
            ({"image": "cat.png", "question": " "}, "has no question"),
            ('{"image": "cat.png", "question": "\\ud800"}', "half a letter"),
            ({**CAT, "answer": {}}, "has answers that are no text"),
            ({**CAT, "answer": [" "]}, "has answers that are no text"),
            ('{"image": "cat.png", "question": "what?", "answer": NaN}', "has answers that are no number"),
            ({**CAT, "boxes": [0, 0, 10**400, 5]}, "has boxes that are none"),
            ({**CAT, "answer": 1, "choices": ["a dog", "a bird"]}, "none of its choices"),
            ({**CAT, "choices": ["one"]}, "give 2 to 26"),
            ({**CAT, "choices": ["one", "two", "one "]}, "has a choice twice"),
            ({**CAT, "answer": "A", "choices": ["B", "C", "A"]}, "the letter of another"),
            ({**CAT, "boxes": [3, 2, 1, 4]}, "has boxes that are none"),
            ({**CAT, "boxes": "left"}, "has boxes that are none"),
            ({**CAT, "id": []}, "has an id"),
            ({**CAT, "group": []}, "has a group"),
            ({**CAT, "id": "first"}, "has the id first of line 1"),
        ],
    )
    def test_are_named_by_line(self, folder: Path, record: Any, problem: str) -> None:
        path = written(folder, {**CAT, "id": "first"}, record, {**CAT, "id": "last"})
        found = read_questions(path)
        assert [each.name for each in found.questions] == ["first", "last"]
        [bad] = found.bad
        assert bad.where == "questions.jsonl line 2"
        assert problem in bad.problem
        assert found.checked("skip") is found
        with pytest.raises(QuestionsError, match=r"questions\.jsonl line 2.*--bad-records skip"):
            found.checked("refuse")

    def test_many_are_counted(self, folder: Path) -> None:
        with pytest.raises(QuestionsError, match=r"line 3.*and 7 more"):
            read_questions(written(folder, *["{"] * 10)).checked("refuse")

    def test_none_is_left(self, folder: Path) -> None:
        with pytest.raises(QuestionsError, match="no question is left"):
            read_questions(written(folder, "{")).checked("skip")
        with pytest.raises(QuestionsError, match="no question"):
            Questions([], []).checked("skip")


class TestFiles:
    def test_that_are_none(self, folder: Path) -> None:
        for name, content, problem in (
            ("empty.jsonl", b"", "is empty"),
            ("blank.jsonl", b"\n\n", "is empty"),
            ("head.csv", b"image,question\n", "is empty"),
            ("latin.jsonl", b'{"image": "\xe9"}', "is not UTF-8"),
            ("quotes.csv", b'image,question\ncat.png,"what', "is not CSV"),
            ("a.txt", b"x", "none of what is read"),
        ):
            (folder / name).write_bytes(content)
            with pytest.raises(QuestionsError, match=problem):
                read_questions(folder / name)
        with pytest.raises(QuestionsError, match="there is no file"):
            read_questions(folder / "nowhere.jsonl")
        with pytest.raises(QuestionsError, match=r"no \.jsonl file"):
            read_questions(folder / "images")

    def test_that_are_too_large(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("adafv.evaluation.questions.MAX_FILE", 10)
        with pytest.raises(QuestionsError, match="has more than"):
            read_questions(written(folder, CAT))
        monkeypatch.undo()
        monkeypatch.setattr("adafv.evaluation.questions.MAX_LINE", 10)
        [bad] = read_questions(written(folder, CAT)).bad
        assert "has more than" in bad.problem

    def test_a_folder_with_several(self, folder: Path) -> None:
        for name in ("a.jsonl", "b.jsonl"):
            written(folder, CAT, name=name)
        with pytest.raises(QuestionsError, match=r"several \.jsonl files \(a\.jsonl, b\.jsonl\); name one"):
            read_questions(folder)

    def test_a_data_set_needs_its_package(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "dataset_info.json").write_text("{}")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(QuestionsError, match="pip install datasets"):
            read_questions(folder)

    def test_a_data_set_with_splits(self, folder: Path) -> None:
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        (folder / "images").rename(folder / "test")
        with pytest.raises(QuestionsError, match=r"name one, such as .*/test"):
            read_questions(folder)

    def test_a_picture_that_went_away(self, folder: Path) -> None:
        [question] = read_questions(written(folder, CAT)).questions
        (folder / "images" / "cat.png").unlink()
        with pytest.raises(ImageError, match=r"there is no file cat\.png"):
            question.picture.digest()


def question(*answers: str, choices: tuple[str, ...] | None = None) -> Question:
    return Question("q", FilePicture(Path("x"), "x"), "what?", answers or None, choices=choices)


class TestMatching:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("A cat.", "cat"),
            ("  The Cat's  toy! ", "cats toy"),
            ("two", "2"),
            ("1,000", "1000"),
            ("3.5 m", "3.5 m"),
            ("left-hand", "left-hand"),
            ("A.", ""),
            ("10:30", "10:30"),
            ("none", "0"),
        ],
    )
    def test_normalised(self, text: str, expected: str) -> None:
        assert normalised(text) == expected

    @pytest.mark.parametrize(
        ("answer", "right", "rule", "expected"),
        [
            ("Green.", ["green"], "auto", 1),
            ("green and blue", ["green"], "auto", 0),
            ("green and blue", ["green"], "first", 1),
            ("greenish", ["green"], "first", 0),
            ("Yes, there is.", ["yes"], "auto", 1),
            ("yesterday", ["yes"], "auto", 0),
            ("no", ["yes"], "auto", 0),
            ("", ["yes"], "auto", 0),
            ("two dogs", ["2"], "first", 1),
            ("a dog", ["cat", "dog"], "auto", 1),
            ("red", ["red"] * 2 + ["blue"] * 8, "auto", 2 / 3),
            ("blue", ["red"] * 2 + ["blue"] * 8, "auto", 1),
            ("red", ["red", "blue", "green"], "auto", 1),
            ("red", ["red", "blue", "green"], "vqa", 1 / 3),
        ],
    )
    def test_score(self, answer: str, right: list[str], rule: str, expected: float) -> None:
        assert score(answer, question(*right), rule) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [("B", 1), ("b", 1), ("(B)", 1), ("B. a dog", 1), ("a dog", 1), ("A", 0), ("bird", 0), ("Z", 0), ("", 0)],
    )
    @pytest.mark.parametrize("right", ["B", "dog"])
    def test_choices(self, answer: str, expected: float, right: str) -> None:
        assert score(answer, question(right, choices=("a cat", "a dog"))) == expected

    @pytest.mark.parametrize(
        ("choices", "right", "answer", "expected"),
        [
            (("+", "-"), "-", "-", 1),
            (("+", "-"), "-", "+", 0),
            (("+", "-"), "-", "B", 1),
            (("+", "-"), "-", "A", 0),
            (("It's", "Its"), "Its", "Its", 1),
            (("It's", "Its"), "Its", "It's", 0),
            (("the", "a"), "A", "A", 1),
            (("the", "a"), "A", "a", 0),
        ],
    )
    def test_choices_that_normalising_would_make_the_same(
        self, choices: tuple[str, ...], right: str, answer: str, expected: float
    ) -> None:
        assert score(answer, question(right, choices=choices)) == expected

    def test_nobody_said_what_is_right(self) -> None:
        assert score("x", question()) is None

    def test_agree(self) -> None:
        assert agree("A cat.", "cat")
        assert not agree("cat", "dog")
        assert not agree("?", "!")
        assert agree("", "")

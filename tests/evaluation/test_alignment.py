"""Areas, fewest tokens and similarities, against plain loops; and what is said of them."""

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import refused, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adafv import compress
from adafv.asking.session import Session
from adafv.core import joint_search
from adafv.evaluation.alignment import (
    ADAFV,
    MIDDLE,
    QUESTION,
    RANDOM,
    SALIENCY,
    WORD,
    Left,
    Measured,
    area,
    asked_for,
    covered,
    fewest_by_rank,
    fewest_by_search,
    measure,
    measured,
    peak,
    reached_by_chance,
    word_ids,
)
from adafv.evaluation.analysis import Analysis
from adafv.evaluation.boxes import BoxesError, drawn_boxes, read_boxes
from adafv.evaluation.drawn import side_for

numbers = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.load("bundled", "float32", torch.device("cpu"))


@given(numbers, numbers)
def test_area_counts_pairs(positive: list[float], negative: list[float]) -> None:
    won = sum((one > two) + 0.5 * (one == two) for one in positive for two in negative)
    assert area(torch.tensor(positive), torch.tensor(negative)) == pytest.approx(won / (len(positive) * len(negative)))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9))
def test_fewest_by_rank(tokens: list[tuple[int, bool]]) -> None:
    """As many as rank before the best token on the object, and it; the first of equal ones counts."""
    if not any(on for _, on in tokens):
        tokens.append((0, True))
    ranks = sorted(range(len(tokens)), key=lambda place: (-tokens[place][0], place))
    expected = next(count for count, place in enumerate(ranks, 1) if tokens[place][1])
    scores, on = (torch.tensor(values) for values in zip(*tokens, strict=True))
    assert fewest_by_rank(scores.float(), on) == expected


def test_fewest_by_search_is_the_first_budget_that_reaches_the_object() -> None:
    text, saliency = torch.rand(2, 30, generator=torch.Generator().manual_seed(3)).square()
    on = torch.zeros(30, dtype=torch.bool)
    on[[4, 21]] = True
    found = fewest_by_search(text, saliency, on)
    reached = [bool(on[joint_search(text, saliency, keep).indices].any()) for keep in range(1, 30)]
    assert found == reached.index(True) + 1
    assert found > 1


@pytest.mark.parametrize(("tokens", "on", "keep"), [(5, 2, 1), (5, 2, 2), (5, 2, 4), (6, 1, 6), (4, 4, 1)])
def test_reached_by_chance(tokens: int, on: int, keep: int) -> None:
    missed = math.comb(tokens - on, keep) / math.comb(tokens, keep)
    assert reached_by_chance(tokens, on, keep) == pytest.approx(1 - missed)


def test_covered_counts_what_overlaps_once() -> None:
    assert covered([(0.0, 0.0, 0.5, 0.5)]) == pytest.approx(0.25)
    assert covered([(0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75)]) == pytest.approx(0.25 + 0.25 - 0.0625)
    assert covered([(0.0, 0.0, 0.2, 1.0), (0.1, 0.2, 0.2, 0.4), (0.8, 0.0, 1.0, 0.5)]) == pytest.approx(0.3)


def test_peak() -> None:
    assert peak(torch.tensor([4.0, *[1.0] * 6])) == pytest.approx(0.4)
    assert peak(torch.tensor([*[5.0] * 2, *[0.5] * 20])) == pytest.approx(0.5)


def test_scores_of_one_object_by_hand() -> None:
    """Four tokens, the second of them on the object."""
    scores = {
        WORD: torch.tensor([0.11, 0.91, 0.21, 0.31]),
        QUESTION: torch.tensor([0.4, 0.3, 0.2, 0.1]),
        SALIENCY: torch.tensor([0.4, 0.1, 0.3, 0.2]),
        MIDDLE: torch.tensor([0.0, 0.0, 0.5, 0.0]),
    }
    found = measured("data", "a.png", "key", 0.2, scores, torch.tensor([False, True, False, False]))
    assert found.areas == pytest.approx({WORD: 1.0, QUESTION: 2 / 3, SALIENCY: 0.0, MIDDLE: (0.5 + 0 + 0.5) / 3})
    # By adafv: {0} alone is best; of two, {0, 2} has 0.6 * 0.7, and {0, 1} 0.7 * 0.5; of three {0, 1, 2} has the most.
    assert found.fewest == {WORD: 1, QUESTION: 2, SALIENCY: 4, ADAFV: 3}
    assert found.similarity == pytest.approx((0.91, 0.21))
    assert [int(shares.argmax()) for shares in found.histograms] == [95, 55]  # bins of 0.02 from -1
    assert [float(shares.sum()) for shares in found.histograms] == pytest.approx([1.0, 1.0])


def test_the_word_is_found_in_the_question(session: Session) -> None:
    tokenizer = session.processor.tokenizer
    assert asked_for("apple", "is there {a}? {}") == "is there an apple? apple"
    ids = word_ids(tokenizer, "is there an apple?", "apple")
    assert tokenizer.decode(ids) == "apple"
    assert word_ids(tokenizer, "what is it?", "apple") == ids  # not in the question: as it is written alone


def test_the_scores_are_those_of_the_method(session: Session) -> None:
    """What is measured of a drawn picture, from what `compress` records of the pixels, with a plain loop over pairs."""
    data = drawn_boxes(2, side_for(session.model), photos=False)
    found, left = measure(session, data, "is there {a}?")
    assert left == Left()
    assert len(found) == sum(len(each.boxes) for each in data.pictures)
    boxed, one = data.pictures[0], found[0]
    inputs = session.inputs(boxed.load(), asked_for(one.object, "is there {a}?"))
    record = compress(session.model, inputs, 1, processor=session.processor).record
    assert record is not None
    on = []
    for token in range(144):
        x, y = (token % 12 + 0.5) / 12, (token // 12 + 0.5) / 12
        on.append(any(left <= x < right and top <= y < bottom for left, top, right, bottom in boxed.boxes[one.object]))
    assert one.on == sum(on)
    for name, scores in ((QUESTION, record.text_attention[0]), (SALIENCY, record.saliency[0])):
        assert scores is not None
        values = scores.tolist()
        inside = [value for value, there in zip(values, on, strict=True) if there]
        outside = [value for value, there in zip(values, on, strict=True) if not there]
        won = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside) / (len(inside) * len(outside))
        assert one.areas[name] == pytest.approx(won, abs=1e-3)  # the tower rounds otherwise in another batch
    # The bundled model was trained so that words lie near what they name.
    assert sum(each.areas[WORD] for each in found) / len(found) > 0.9


def some(data: str, count: int, word: float, saliency: float) -> list[Measured]:
    shares = torch.zeros(100)
    shares[50] = 1.0
    return [
        Measured(
            data=data,
            picture=f"{number}.png",
            object="key",
            size=0.005 if number % 2 else 0.2,
            tokens=100,
            on=4,
            areas={WORD: word, QUESTION: 0.6, SALIENCY: saliency, MIDDLE: 0.5},
            fewest={WORD: 1, QUESTION: 3, SALIENCY: 9, ADAFV: 2 + number % 2},
            similarity=(0.1, 0.1 if number % 3 else 0.3),
            histograms=(shares, shares),
            peaks={QUESTION: 0.8, SALIENCY: 0.4},
        )
        for number in range(count)
    ]


class TestAnalysis:
    made = Analysis("a|model<b>", "Is there {a}?", some("one", 30, 0.9, 0.7) + some("two", 4, 0.2, 0.7), {
        "one": Left(), "two": Left(cropped=2)
    })  # fmt: skip

    def test_groups_are_data_sets_and_sizes_with_enough_pictures(self) -> None:
        assert [(name, len(own)) for name, own in self.made.groups()] == [
            ("one", 30),
            ("one: small, below 1 %", 15),
            ("one: large, from 10 %", 15),
            ("two", 4),
        ]

    def test_what_is_said(self) -> None:
        assert (
            "one: the word finds the object better than chance (90.0 ± 0.0); the word is better than saliency by 20.0"
            in (self.made.areas_text())
        )
        assert "two: the word finds the object worse than chance" in self.made.areas_text()
        assert "2 are not in what the tower sees" in self.made.markdown({})

    def test_medians_and_reached(self) -> None:
        own = self.made.of("one")
        assert self.made.median(own, ADAFV)[0] == 2.5
        assert self.made.median(own, RANDOM)[0] == pytest.approx(101 / 5)
        assert self.made.reached(own, ADAFV, 0.02).mean == pytest.approx(0.5)
        assert self.made.reached(own, SALIENCY, 0.09).mean == 1.0
        assert self.made.reached(own, SALIENCY, 0.09).half > 0  # which is no certainty
        assert self.made.reached(own, SALIENCY, 1.0).half == 0  # all are kept
        assert self.made.reached(own, RANDOM, 0.01).mean == pytest.approx(0.04)

    def test_json_and_tables(self) -> None:
        written = json.loads(json.dumps(self.made.as_dict(), allow_nan=False))
        assert written["analysis"] == 1
        assert len(written["measured"]) == 34
        assert written["areas"][0]["scores"][WORD] == {"mean": 0.9, "half_of_95": pytest.approx(0, abs=1e-9)}
        assert "a\\|model&lt;b>" in self.made.markdown({})
        for figure in (
            self.made.areas_figure(),
            self.made.similarities_figure(),
            *dict(self.made.fewest_figures()).values(),
        ):
            assert "a|model&lt;b&gt;" in figure


def boxes_file(folder: Path, about: object, name: str = "boxes.json") -> Path:
    Image.new("RGB", (40, 20), "red").save(folder / "a.png")
    (folder / name).write_text(json.dumps({"a.png": about}))
    return folder / name


class TestBoxes:
    def test_shares_of_the_picture(self, tmp_path: Path) -> None:
        boxes = [["key", 10, 5, 20, 10], ["key", -4, 0, 10, 20], ["cup", 0, 0, 40, 99]]
        read = read_boxes(boxes_file(tmp_path, {"width": 40, "height": 20, "boxes": boxes, "captions": ["a"]}))
        [picture] = read.pictures
        assert read.name == "boxes"
        assert picture.boxes == {
            "key": ((0.25, 0.25, 0.5, 0.5), (0.0, 0.0, 0.25, 1.0)),
            "cup": ((0.0, 0.0, 1.0, 1.0),),
        }
        assert picture.load().size == (40, 20)

    @pytest.mark.parametrize(
        ("about", "problem"),
        [
            ([], "is no object"),
            ({"width": 0, "height": 20, "boxes": []}, "width and height"),
            ({"width": 10**400, "height": 20, "boxes": []}, "that no picture has"),
            ({"width": 40, "height": 20}, "no list of boxes"),
            ({"width": 40, "height": 20, "boxes": [["key", 1, 2, 10**400, 4]]}, "not numbers"),
            ({"width": 40, "height": 20, "boxes": [["key", 1, 2, 3]]}, "class, x0, y0, x1, y1"),
            ({"width": 40, "height": 20, "boxes": [["key", 1, 2, "x", 4]]}, "not numbers"),
            ({"width": 40, "height": 20, "boxes": [["key", 9, 2, 9, 4]]}, "holds nothing"),
            ({"width": 40, "height": 20, "boxes": [["key", 50, 2, 60, 4]]}, "holds nothing"),
        ],
    )
    def test_what_is_none_is_named(self, tmp_path: Path, about: object, problem: str) -> None:
        with pytest.raises(BoxesError, match=problem):
            read_boxes(boxes_file(tmp_path, about))

    def test_pictures_must_be_there(self, tmp_path: Path) -> None:
        path = boxes_file(tmp_path, {"width": 40, "height": 20, "boxes": []})
        (tmp_path / "a.png").unlink()
        with pytest.raises(BoxesError, match="--images"):
            read_boxes(path)

    def test_a_name_that_no_file_can_have(self, tmp_path: Path) -> None:
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps({"x" * 5000: {"width": 40, "height": 20, "boxes": []}}))
        with pytest.raises(BoxesError, match="--images"):
            read_boxes(path)


class TestCommand:
    def test_the_limit_holds_for_the_last_file(self, tmp_path: Path) -> None:
        about = {"width": 40, "height": 20, "boxes": [["key", 0, 0, 20, 20]]}
        for name in ("a.png", "b.png"):
            Image.new("RGB", (40, 20)).save(tmp_path / name)
        (tmp_path / "boxes.json").write_text(json.dumps({"a.png": about, "b.png": about}))
        result = run("analyze", tmp_path / "boxes.json", "--limit", 1, "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "boxes: 1 of 1 pictures" in result.stderr

    def test_world(self, tmp_path: Path) -> None:
        result = run("analyze", "--world", "--scenes", 4, "--no-photos", "--output", tmp_path / "new")
        assert result.exit_code == 0, result.output
        assert "the word finds the object better than chance" in " ".join(result.stdout.split())
        written = {path.name for path in (tmp_path / "new").iterdir()}
        assert written == {"areas.svg", "similarities.svg", "fewest-tokens-1.svg", "analysis.md", "analysis.json"}
        assert json.loads((tmp_path / "new" / "analysis.json").read_text())["model"] == "bundled"

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["--ask", "where is it?", "--world"], ["--ask", "{a}"]),
            (["nowhere.json"], ["there is no file nowhere.json"]),
            (["--world", "--dtype", "float8"], ["--dtype"]),
            (["--world", "--images", "nowhere"], ["--images nowhere is no folder"]),
        ],
    )
    def test_refused(self, arguments: list[str], parts: list[str]) -> None:
        result = run("analyze", *arguments, "--no-photos")
        refused(result, 1 if arguments == ["nowhere.json"] else 2, *parts)

    def test_photographs_that_are_missing_are_named_with_the_mend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("adafv.evaluation.world.backgrounds.photographs_installed", lambda: False)
        refused(run("analyze", "--world"), 1, "scikit-image", "pip install", "--no-photos")

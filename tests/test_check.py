"""`adafv check`: the command as people run it, its three results, and how mistakes end."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run
from PIL import Image

import adafv.bundled
from adafv.evaluation import words
from adafv.evaluation.check import CASES, SCHEMA, schema
from adafv.evaluation.page import page

SAMPLES = Path(adafv.bundled.__file__).parent / "samples"
FAST = ("--device", "cpu", "--max-new-tokens", "4")


def problems(value: Any, rule: dict[str, Any], root: dict[str, Any], place: str = "result") -> Iterator[str]:
    """What is wrong with a value by a JSON Schema, as far as ours go; a word that is not known here fails."""
    known = {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "minimum"}
    assert rule.keys() <= known | {"$ref", "$defs", "$schema", "$id", "title", "description"}, place
    if "$ref" in rule:
        yield from problems(value, root["$defs"][rule["$ref"].removeprefix("#/$defs/")], root, place)
        return
    if "anyOf" in rule:
        if all(list(problems(value, each, root, place)) for each in rule["anyOf"]):
            yield f"{place} is none of what it may be: {value!r}"
        return
    if ("const" in rule and value != rule["const"]) or ("enum" in rule and value not in rule["enum"]):
        yield f"{place} is {value!r}"
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}
    wanted = rule.get("type")
    if wanted and (
        not isinstance(value, kinds[wanted]) or (wanted in ("integer", "number") and isinstance(value, bool))
    ):
        yield f"{place} is no {wanted}: {value!r}"
    elif wanted == "object":
        named, others = rule.get("properties", {}), rule.get("additionalProperties", True)
        yield from (f"{place} lacks {name}" for name in rule.get("required", []) if name not in value)
        for name, part in value.items():
            if name in named or isinstance(others, dict):
                yield from problems(part, named.get(name, others), root, f"{place}.{name}")
            elif others is False:
                yield f"{place} has {name}"
    elif wanted == "array":
        for number, part in enumerate(value):
            yield from problems(part, rule["items"], root, f"{place}[{number}]")
    elif "minimum" in rule and value < rule["minimum"]:
        yield f"{place} is {value}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples, in two questions each; some are asked wrongly on purpose, so that something changes."""
    made = tmp_path_factory.mktemp("task")
    (made / "images").mkdir()
    records = []
    for sample in json.loads((SAMPLES / "samples.json").read_text()):
        shutil.copy(SAMPLES / sample["picture"], made / "images")
        first = {
            "image": sample["picture"],
            "question": sample["question"],
            "answer": sample["answer"],
            "kind": "sample",
        }
        records += [first, {"image": sample["picture"], "question": "Is there a bell?", "answer": "no", "kind": "bell"}]
    write(made, records)
    return made


def write(folder: Path, records: list[dict[str, Any]], name: str = "questions.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / name


@pytest.fixture(scope="module")
def outcome(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(the folder of results, what the command said): two methods, one budget so small that answers change."""
    output = tmp_path_factory.mktemp("out") / "made"
    result = run("check", folder, *FAST, "--keep", "50%,1", "--method", "adafv,random", "--output", output)
    assert result.exit_code == 0, result.stderr
    return output, result


@pytest.fixture(scope="module")
def found(outcome: tuple[Path, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((outcome[0] / "result.json").read_text())
    return loaded


class TestCautions:
    """What the verdicts leave out: of such questions nothing can be lost."""

    @pytest.mark.parametrize(
        ("counted", "unpruned", "blank", "agreement", "part"),
        [
            ("accuracy", 0.0, 0.0, 0.2, "gets no question right"),
            ("accuracy", 0.6, 0.58, 0.2, "hardly need the picture"),
            ("accuracy", 0.6, 0.5, 0.95, None),
            ("agreement", None, None, 0.95, "hardly need the picture"),
            ("agreement", None, None, 0.5, None),
        ],
    )
    def test_cautions(self, counted: str, unpruned: Any, blank: Any, agreement: float, part: str | None) -> None:
        result = {
            "settings": {"counted": counted},
            "unpruned": {"accuracy": {"mean": unpruned}},
            "blank": {"accuracy": {"mean": blank}, "agreement": {"mean": agreement}},
        }
        said = words.cautions(result)
        assert len(said) == (part is not None)
        assert part is None or part in said[0]

    def test_are_on_the_terminal(self, folder: Path, tmp_path: Path) -> None:
        record = {
            "image": str(folder / "images" / json.loads((SAMPLES / "samples.json").read_text())[0]["picture"]),
            "question": "Is there a bell?",
            "answer": "zorglub",
        }
        result = run("check", write(tmp_path, [record]), *FAST, "--keep", "50%", "--output", tmp_path / "out")
        assert result.exit_code == 0, result.stderr
        assert "warning: The unpruned model gets no question right" in result.stderr


class TestResult:
    def test_follows_its_schema(self, found: dict[str, Any]) -> None:
        assert list(problems(found, schema(), schema())) == []
        assert found["schema"] == SCHEMA == schema()["properties"]["schema"]["const"]

    def test_a_wrong_one_would_not(self, found: dict[str, Any]) -> None:
        wrong = json.loads(json.dumps(found))
        wrong["rows"][0]["loss"]["mean"] = "0.1"
        wrong["rows"][1]["test"] = {"p": 0.1}
        wrong["more"] = None
        said = list(problems(wrong, schema(), schema()))
        assert len(said) == 3, said

    def test_says_what_was_asked(self, found: dict[str, Any]) -> None:
        asked, settings = found["questions"], found["settings"]
        assert (asked["count"], asked["pictures"], asked["with_answers"], asked["left_out"]) == (12, 6, True, [])
        assert (settings["counted"], settings["max_loss"], settings["confidence"]) == ("accuracy", 0.01, 0.95)
        assert [(row["method"], row["keep"], row["tokens"]) for row in found["rows"]] == [
            ("adafv", "50 %", 72),
            ("adafv", "1", 1),
            ("random", "50 %", 72),
            ("random", "1", 1),
        ]
        assert found["rows"][1]["changed"]["lost"] > 0
        assert found["blank"]["accuracy"]["mean"] < found["unpruned"]["accuracy"]["mean"]

    def test_counts_add_up(self, found: dict[str, Any]) -> None:
        full = found["unpruned"]["accuracy"]["mean"]
        for row in found["rows"]:
            changed = row["changed"]
            assert row["loss"]["mean"] == pytest.approx(full - row["accuracy"]["mean"], abs=2e-6)
            assert row["loss"]["mean"] == pytest.approx((changed["lost"] - changed["gained"]) / 12, abs=1e-6)
            assert row["loss"]["low"] <= row["loss"]["mean"] <= row["loss"]["high"]
            assert sum(kind["questions"] for kind in row["kinds"].values()) == 12

    def test_six_pictures_prove_nothing(self, found: dict[str, Any]) -> None:
        """However few answers change; with two methods each is tested at half the level."""
        for verdict in found["verdicts"]:
            assert verdict["safe"] is None
            assert verdict["first_not_shown"] == "50 %"
        tests = [row["test"] for row in found["rows"] if row["keep"] == "50 %"]
        assert [test["level"] for test in tests] == [0.025, 0.025]
        assert not any(test["passed"] for test in tests)
        assert all(row["test"] is None for row in found["rows"] if row["keep"] == "1")

    def test_nothing_of_this_machine(self, found: dict[str, Any], folder: Path, outcome: tuple[Path, Any]) -> None:
        text = (outcome[0] / "result.json").read_text() + (outcome[0] / "report.html").read_text()
        assert str(folder) not in text
        assert str(outcome[0]) not in text
        assert found["model"]["name"] == "bundled"
        assert found["questions"]["source"] == folder.name

    def test_same_bytes_again(self, folder: Path, outcome: tuple[Path, Any], tmp_path: Path) -> None:
        """From a second run with a store of its own."""
        arguments = ("--keep", "50%,1", "--method", "adafv,random", "--output", tmp_path)
        again = run("check", folder, *FAST, *arguments, "--json")
        assert again.exit_code == 0, again.stderr
        for name in ("result.json", "report.html"):
            assert (tmp_path / name).read_bytes() == (outcome[0] / name).read_bytes()
        assert again.stdout == (tmp_path / "result.json").read_text()

    def test_goes_on_where_it_was(self, folder: Path, outcome: tuple[Path, Any], tmp_path: Path) -> None:
        """Another budget is asked, and what there is stays."""
        shutil.copy(outcome[0] / "answers.jsonl", tmp_path)
        more = run("check", folder, *FAST, "--keep", "50%,25%,1", "--method", "adafv", "--output", tmp_path)
        assert more.exit_code == 0, more.stderr
        assert "60 answers to give, 48 of them from the last run" in more.stderr


class TestTable:
    def test_on_the_terminal(self, outcome: tuple[Path, Any]) -> None:
        _, result = outcome
        for part in ("unpruned", "blanked", "random", "72", "not tested", "no budget is shown to be safe yet"):
            assert part in result.stdout
        assert "72 answers to give" in result.stderr
        assert "report.html" in result.stderr

    def test_agreement_without_answers(self, folder: Path, tmp_path: Path) -> None:
        records = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
        shutil.copytree(folder / "images", tmp_path / "images")
        path = write(tmp_path, [{"image": each["image"], "question": each["question"]} for each in records[:2]])
        result = run("check", path, *FAST, "--keep", "50%", "--output", tmp_path / "out", "--max-loss", "60")
        assert result.exit_code == 0, result.stderr
        found = json.loads((tmp_path / "out" / "result.json").read_text())
        assert list(problems(found, schema(), schema())) == []
        assert found["settings"]["counted"] == "agreement"
        assert found["unpruned"]["accuracy"] is None
        assert "right" not in result.stdout


class Page(HTMLParser):
    """What a page would fetch or run, and whether its elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")
        ]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag


class TestPage:
    def test_fetches_and_runs_nothing(self, outcome: tuple[Path, Any]) -> None:
        text = (outcome[0] / "report.html").read_text()
        read = Page(text)
        assert read.open == []
        assert not {"script", "link", "iframe", "object", "base", "form"} & set(read.seen)
        assert read.addresses
        assert all(address.startswith("data:image/jpeg;base64,") for address in read.addresses)
        assert read.handlers == []
        assert not re.search(r"@import|url\(", text)
        assert "default-src 'none'" in text
        assert "prefers-color-scheme: dark" in text
        assert 'name="viewport"' in text

    def test_shows_what_changed(self, outcome: tuple[Path, Any], found: dict[str, Any]) -> None:
        text = (outcome[0] / "report.html").read_text()
        assert 0 < len(found["cases"]) <= CASES
        assert text.count("<img ") == len(found["cases"])
        assert text.count("<svg ") == 2
        assert "not drawn" not in text

    def test_escapes_everything(self, found: dict[str, Any]) -> None:
        """In the place of every text of the result."""
        evil = "<img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"

        def spoilt(value: Any, name: str = "") -> Any:
            if isinstance(value, dict):
                return {
                    (evil if name in ("kinds", "versions") else key): spoilt(part, key) for key, part in value.items()
                }
            if isinstance(value, list):
                return [spoilt(part, name) for part in value]
            fixed = ("counted", "change", "schema", "method", "keep", "safe", "first_not_shown")
            return evil if isinstance(value, str) and name not in fixed else value

        made = spoilt(found)
        for part in (*made["rows"], *made["verdicts"], *made["cases"]):
            part["method"] = evil
        text = page(made, [Image.new("RGB", (4, 4)) for _ in made["cases"]])
        read = Page(text)
        assert read.open == []
        assert read.handlers == []
        assert all(address.startswith("data:") for address in read.addresses)
        assert "<img src=x" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text

    def test_is_bounded(self, found: dict[str, Any]) -> None:
        """Long texts are cut, and pictures that hardly compress are compressed more."""
        noise = Image.effect_noise((300, 300), 255).convert("RGB")
        made = json.loads(json.dumps(found))
        case = made["cases"][0]
        case["text"] = case["pruned"]["answer"] = "x" * 1_000_000
        made["cases"] = [case] * CASES
        assert len(page(made, [noise] * CASES)) < 3_000_000

    def test_a_picture_that_is_gone(self, found: dict[str, Any]) -> None:
        assert page(found, [None] * len(found["cases"])).count("not drawn") == len(found["cases"])

    def test_nothing_changed(self, found: dict[str, Any]) -> None:
        assert "No answer changed" in page({**found, "cases": []}, [])


class TestWords:
    def verdict(self, found: dict[str, Any], loss: float = 0.0, **parts: Any) -> str:
        made = json.loads(json.dumps(found))
        row = made["rows"][0]
        row["loss"]["mean"] = loss
        plain = {"method": "adafv", "safe": None, "safe_tokens": None, "first_not_shown": row["keep"]}
        made["verdicts"] = [{**plain, "shown_unsafe": False, "more_questions": None, **parts}]
        return words.verdicts(made)[0]

    def test_every_outcome(self, found: dict[str, Any]) -> None:
        safe = {"safe": "25 %", "safe_tokens": 36.0}
        assert self.verdict(found, **safe, first_not_shown=None) == (
            "adafv: keep 25 % (36 of 144 tokens). It loses less than 1 point of accuracy, with 95 % confidence."
        )
        assert "50 % lost nothing here, on too few questions to be sure: about 300 more" in self.verdict(
            found, 0.0, more_questions=300
        )
        assert (
            "50 % lost 2 points here, which may be chance: about 900 more like these would tell, if they go as these did."
        ) in self.verdict(found, 0.02, more_questions=900)
        assert "50 % lost 9 points here: it is not safe" in self.verdict(found, 0.09, shown_unsafe=True)
        assert "50 % gained 1 point here" in self.verdict(found, -0.01, more_questions=10)


class TestMistakes:
    """One line on standard error, an exit code, no traceback; what can be found without torch is found before it."""

    def check(self, *arguments: Any, **options: Any) -> Any:
        return run("check", *FAST, *arguments, **options)

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (("--keep", "1.5"), 2, "--keep='1.5'"),
            (("--keep", "10%,all"), 2, "--keep all prunes nothing"),
            (("--keep", ""), 2, "not a budget"),
            (("--method", "adavf"), 2, "did you mean adafv?"),
            (("--method", "adafv:objectiv=split"), 2, "has no option"),
            (("--max-loss", "0"), 2, "give points between 0 and 100"),
            (("--max-loss", "nan"), 2, "give points between 0 and 100"),
            (("--bad-records", "ignore"), 2, "known are: refuse, skip"),
            (("--by", "acuracy"), 2, "did you mean accuracy?"),
            (("--matching", "fuzzy"), 2, "known are: auto, exact, first, vqa"),
            (("--dtype", "float"), 2, "--dtype"),
            (("--device", "abacus"), 2, "--device"),
            (("--model", "nowhere/at/all"), 1, "cannot load the model"),
            (("--text", "all"), 2, "--text"),
            (("--positions", "old"), 2, "--positions"),
            (("--kep", "10%"), 2, "No such option"),
        ],
    )
    def test_in_options(self, folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
        refused(self.check(folder, "--output", tmp_path / "out", *arguments), code, said)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "there is no file"),
            ("", "is empty"),
            ("{\n", "line 1: is not JSON"),
            ('{"question": "what?"}', "line 1: has no picture"),
            ('{"image": "bird.png", "question": "a <image> b"}', "line 1: the question holds <image>"),
            (
                '{"image": "bird.png", "question": "a", "id": 1}\n{"image": "bird.png", "question": "b", "id": 1}',
                "the id 1 of",
            ),
            (
                '{"image": "bird.png", "question": "a", "answer": "b"}\n{"image": "bird.png", "question": "c"}',
                "1 of 2 questions have no answer, the first of them q.jsonl line 2",
            ),
            ('{"image": "half.png", "question": "what?"}', "line 1: half.png is damaged"),
        ],
    )
    def test_in_files(self, tmp_path: Path, content: str | None, said: str) -> None:
        shutil.copy(SAMPLES / "bird.png", tmp_path)
        (tmp_path / "half.png").write_bytes((SAMPLES / "bird.png").read_bytes()[:5000])
        if content is not None:
            (tmp_path / "q.jsonl").write_text(content)
        refused(self.check(tmp_path / "q.jsonl", "--output", tmp_path / "out"), 1, said)

    def test_bad_records_may_be_skipped(self, folder: Path, tmp_path: Path) -> None:
        shutil.copy(SAMPLES / "bird.png", tmp_path)
        (tmp_path / "half.png").write_bytes((SAMPLES / "bird.png").read_bytes()[:5000])
        lines = [
            {"image": "bird.png", "question": "Is there a bird?", "answer": "yes"},
            {"image": "half.png", "question": "Is there a bird?", "answer": "yes"},
            {"image": "bird.png", "question": "Is there a bell?"},
            {"image": "bird.png", "question": "a <image> b", "answer": "yes"},
        ]
        path = write(tmp_path, lines, "q.jsonl")
        result = self.check(path, "--bad-records", "skip", "--keep", "50%", "--output", tmp_path / "out", "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["questions"]["count"] == 1
        assert sorted(each["where"] for each in found["questions"]["left_out"]) == [
            f"q.jsonl line {number}" for number in (2, 3, 4)
        ]

    def test_more_tokens_than_there_are(self, folder: Path, tmp_path: Path) -> None:
        refused(
            self.check(folder, "--keep", "1000", "--output", tmp_path), 2, "--keep 1000 prunes nothing", "at most 144"
        )

    def test_a_store_of_another_model(self, folder: Path, outcome: tuple[Path, Any], tmp_path: Path) -> None:
        shutil.copy(outcome[0] / "answers.jsonl", tmp_path)
        result = run("check", folder, "--device", "cpu", "--max-new-tokens", "5", "--output", tmp_path)
        refused(result, 1, "holds answers with another longest answer (4, now 5)")

    def test_a_place_that_cannot_be_written(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        refused(self.check(folder, "--output", tmp_path / "file"), 2, "is a file; name a folder")

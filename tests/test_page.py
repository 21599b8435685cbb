"""The page: answers as they would be given alone, messages instead of crashes, and all of it in a real browser."""

import html
import importlib.util
import json
import logging
import re
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from cli_checkpoint import TOKENS
from page_server import QUESTION, SAMPLE_QUESTION, Server, free_port, has_ipv6, needs, serving, started_browser
from PIL import Image
from processors import photo, processor, speaking_model
from sharing import logged
from typer.testing import CliRunner

from adafv import defaults
from adafv.asking.failures import UsageError
from adafv.asking.session import Answer, Session, Timing
from adafv.cli import app
from adafv.core import Budget, ImageLayout
from adafv.engines.transformers.encoded import Fingerprint, digest_of
from adafv.errors import AdaFVError, BudgetError, ImageError
from adafv.evaluation.answers import weights_hash
from adafv.evaluation.questions import BadRecord, Questions
from adafv.methods import known_methods, method_named
from adafv.methods.options import method_from_text
from adafv.page import render, render_check
from adafv.page.answers import (
    MAX_ANSWER,
    MAX_METHOD,
    MAX_QUESTION,
    MAX_WAYS,
    METHODS,
    ROUNDS,
    UNPRUNED,
    Answers,
    Result,
    message,
)
from adafv.page.checks import Check, Settings
from adafv.page.render import problem_as_html, results_as_html
from adafv.page.samples import MOST, Sample, SamplesError, bundled_samples, samples_in
from adafv.page.uploads import MAX_BYTES, Uploads

OF_IMAGES = sorted(known_methods().keys() - {"evs"})
LONGEST = 32
"""Tokens of an answer, as the page has it when it opens."""


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(speaking_model("llava"), processor("llava"))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    """Every folder of these tests is inside."""
    return Uploads(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def answers(session: Session, uploads: Uploads) -> Answers:
    return Answers(session, uploads)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    photo(1).save(path)
    return path


def claims(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one pixel."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(4))) + chunk(b"IEND", b"")


def truncated(picture: Path) -> bytes:
    return picture.read_bytes()[: picture.stat().st_size // 2]


def alone(session: Session, path: Path, question: str, keep: str, method: str | None, longest: int) -> Answer:
    """What one user gets with nobody else about, without any code of the page."""
    pruner = None if method is None else session.pruner(method_from_text(method)[0], keep)
    return session.ask(session.inputs(Image.open(path).convert("RGB"), question), pruner, longest)


def refusal(keep: Any) -> BudgetError:
    """What the library says to such a budget."""
    try:
        Budget.of(keep)
    except BudgetError as error:
        return error
    raise AssertionError(f"{keep!r} is a budget")


def some_questions(folder: Path, count: int, *more: dict[str, Any]) -> tuple[Path, Path]:
    """A file of questions and a zip of their pictures."""
    records = [{"image": f"{number % 8}.png", "question": f"Number {number}?"} for number in range(count)]
    path = folder / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, [*records, *more])))
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for number in range(8):
            photo(number).save(folder / "one.png")
            archive.write(folder / "one.png", f"folder/{number}.png")
    return path, folder / "pictures.zip"


many_users = pytest.mark.parametrize("users", [5, pytest.param(20, marks=pytest.mark.release)])
"""All at once; methods and budgets differ from one to the next."""


class TestAnswers:
    def test_unpruned_and_both_methods(self, answers: Answers, session: Session, picture: Path) -> None:
        results = answers.compare(str(picture), QUESTION, "25%", ("adafv", "saliency"), 6).results
        assert [result.timing.name for result in results] == [UNPRUNED, "adafv", "saliency"]
        for result, method in zip(results, (None, "adafv", "saliency"), strict=True):
            expected = alone(session, picture, QUESTION, "25%", method, 6)
            assert result.timing.answer == expected.answer
            assert result.timing.kv_mib == pytest.approx(expected.kv_mib)
            assert result.timing.tokens == (TOKENS if method is None else TOKENS // 4)
            assert result.tokens_before == TOKENS
            assert result.timing.median > 0

    def test_what_is_drawn(self, answers: Answers, picture: Path) -> None:
        unpruned, both, random = answers.compare(str(picture), QUESTION, "25%", ("adafv", "random"), 2).results
        assert unpruned.panels == []
        assert [panel.title for panel in both.panels] == ["kept 4 of 16", "saliency", "text attention", "both"]
        assert [panel.title for panel in random.panels] == ["kept 4 of 16"]
        assert all(image.width <= 448 for panel in both.panels for image, _ in panel.drawings)

    def test_images_in_crops_are_drawn_twice(self, picture: Path, uploads: Uploads) -> None:
        next_answers = Answers(Session(speaking_model("llava-next"), processor("llava-next")), uploads)
        _, result = next_answers.compare(str(picture), QUESTION, "10%", ("adafv",), 2).results
        assert [len(panel.drawings) for panel in result.panels] == [2] * 4

    @pytest.mark.parametrize("method", OF_IMAGES)
    def test_every_method(self, answers: Answers, picture: Path, method: str) -> None:
        _, result = answers.compare(str(picture), QUESTION, "25%", (method, method), 2).results
        counts = method_named(method).plan(ImageLayout(torch.arange(TOKENS), 1, 4, 4), 4).keep is None
        assert 1 <= result.timing.tokens <= 4 if counts else result.timing.tokens == 4
        assert result.panels

    def test_a_method_of_videos(self, answers: Answers, picture: Path) -> None:
        with pytest.raises(AdaFVError, match="evs compares the frames of a video"):
            answers.compare(str(picture), QUESTION, "25%", ("evs",), 2)

    def test_keeping_all_is_the_unpruned_answer(self, answers: Answers, picture: Path) -> None:
        unpruned, kept = answers.compare(str(picture), QUESTION, "100%", ("adafv",), 6).results
        assert kept.timing.answer == unpruned.timing.answer
        assert kept.timing.tokens == TOKENS

    def test_without_a_chat_template(self, picture: Path, uploads: Uploads) -> None:
        made = processor("llava")
        made.chat_template = made.tokenizer.chat_template = None
        plain = Answers(Session(speaking_model("llava"), made), uploads)
        compared = plain.compare(str(picture), QUESTION, "25%", ("adafv",), 2)
        assert compared.results[1].timing.tokens == 4

    def test_words_that_the_model_does_not_know(self, picture: Path, uploads: Uploads) -> None:
        bundled = Answers(Session.load("bundled", "auto", torch.device("cpu")), uploads)
        known, unknown = (
            bundled.compare(str(picture), f"Is there a {word}?", "25%", ("adafv",), 2) for word in ("bird", "zebra")
        )
        assert known.warning == ""
        assert "'zebra'" in unknown.warning

    def test_no_word_that_counts(self, picture: Path, uploads: Uploads) -> None:
        bundled = Answers(Session.load("bundled", "auto", torch.device("cpu")), uploads)
        compared = bundled.compare(str(picture), "hello", "10%", ("adafv", "saliency"), 2)
        assert "saliency alone chose" in compared.warning
        assert compared.results[1].timing.answer == compared.results[2].timing.answer

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"path": None}, "choose or upload a picture"),
            ({"question": "  "}, "type a question"),
            ({"question": None}, "type a question"),
            ({"question": "x" * (MAX_QUESTION + 1)}, f"shorten it to {MAX_QUESTION}"),
            ({"question": "What is <image>?"}, "<image>"),
            ({"question": "What is \udcff?"}, "the byte 0xFF stands in place 9"),
            ({"question": "What is \ud83d?"}, "half a letter (U+D83D)"),
            ({"keep": 0}, str(refusal(0))),
            ({"keep": "101%"}, str(refusal("101%"))),
            ({"keep": float("nan")}, "keep=nan: a share lies above 0"),
            ({"keep": "many"}, str(refusal("many"))),
            ({"keep": None}, "keep=None is not a budget"),
            ({"methods": ("adafv:objective=best",)}, "known are: joint, split"),
            ({"methods": ("saliency:seed=1",)}, "no option 'seed'; it has none"),
            ({"methods": ("random:seed=x",)}, "give a whole number"),
            ({"methods": ("random:" + "x" * MAX_METHOD,)}, f"{MAX_METHOD} at most"),
            ({"longest": MAX_ANSWER + 1}, f"1 to {MAX_ANSWER}"),
            ({"longest": None}, f"1 to {MAX_ANSWER}"),
            ({"methods": ("adafv", "guess")}, "guess"),
            ({"methods": ("adafv", None)}, "None"),
            ({"methods": ()}, "choose a method first"),
            ({"methods": [f"random:seed={seed}" for seed in range(MAX_WAYS + 1)]}, f"choose {MAX_WAYS} at most"),
            ({"keep": "10%,,5%"}, "is not a budget"),
            ({"keep": ",".join("12345678")}, "6 at most"),
            ({"keep": "1,2,3,4,5", "methods": ("adafv", "text", "uniform")}, f"15 answers; {MAX_WAYS} at most"),
        ],
    )
    def test_refused(self, answers: Answers, picture: Path, changes: dict[str, Any], said: str) -> None:
        wish = {"path": str(picture), "question": QUESTION, "keep": "10%", "methods": ("adafv",), "longest": 2}
        with pytest.raises((UsageError, AdaFVError), match=re.escape(said)):
            answers.compare(**{**wish, **changes})

    @pytest.mark.parametrize(("keep", "tokens"), [("25%", 4), ("0.25", 4), ("3", 3), ("all", TOKENS), ("64", TOKENS)])
    def test_every_way_to_write_a_budget(self, answers: Answers, picture: Path, keep: str, tokens: int) -> None:
        _, result = answers.compare(str(picture), QUESTION, keep, ("saliency",), 2).results
        assert result.timing.tokens == tokens

    def test_one_method_with_two_options(self, answers: Answers, session: Session, picture: Path) -> None:
        pair = ("random:seed=0", "random:seed=1")
        _, *results = answers.compare(str(picture), QUESTION, "25%", pair, 6).results
        assert [result.timing.name for result in results] == list(pair)
        for result, name in zip(results, pair, strict=True):
            assert result.timing.answer == alone(session, picture, QUESTION, "25%", name, 6).answer

    def test_several_budgets(self, answers: Answers, session: Session, picture: Path) -> None:
        unpruned, *results = answers.compare(str(picture), QUESTION, "50%, 3", ["adafv", "uniform", "adafv"], 4).results
        expected = {
            f"{method}, {Budget.of(keep)}": alone(session, picture, QUESTION, keep, method, 4).answer
            for method in ("adafv", "uniform")
            for keep in ("50%", "3")
        }
        assert {result.timing.name: result.timing.answer for result in results} == expected
        assert [result.timing.tokens for result in results] == [8, 3, 8, 3]
        assert unpruned.timing.name == UNPRUNED

    def test_the_tower_runs_once_a_picture(self, session: Session, uploads: Uploads, tmp_path: Path) -> None:
        """Another budget or method needs it no more, but where a method needs the pixels; nor does the unpruned model."""
        runs: list[Any] = []
        hook = session.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
        fresh = Answers(session, uploads)
        paths = [tmp_path / f"{number}.png" for number in range(2)]
        for number, path in enumerate(paths):
            photo(number + 20).save(path)

        def more(path: Path, keep: str, *methods: str, question: str = QUESTION) -> int:
            before = len(runs)
            results = fresh.compare(str(path), question, keep, methods, 2).results
            ran = len(runs) - before
            expected = [alone(session, path, question, keep, method, 2).answer for method in methods]
            assert [result.timing.answer for result in results[1:]] == expected
            return ran

        try:
            assert more(paths[0], "25%", "adafv") > 0
            assert more(paths[0], "50%", "adafv", "saliency") == 0
            assert more(paths[0], "3", "text", "divprune") == 0
            assert more(paths[1], "25%", "adafv") > 0
            assert more(paths[0], "25%", "uniform") == 0
            # The stock model reads pixels: once with every new question, to answer and to be timed.
            asked = more(paths[0], "25%", "adafv", question="What else?")
            assert asked == 1 + ROUNDS
            assert more(paths[0], "10%", "saliency", question="What else?") == 0
            # What other methods need is read off the tower when they are first asked for.
            assert more(paths[0], "25%", "visionzip", "hired") == ROUNDS
            assert more(paths[0], "50%", "tome", "hired", "visionzip") == 0
            assert more(paths[0], "25%", "prumerge", "fastv:layer=1") == 0
        finally:
            hook.remove()

    def test_threads_of_one_session(self, session: Session, picture: Path) -> None:
        """The unpruned model is asked while another thread prunes it: it is not pruned as well."""
        inputs = session.inputs(Image.open(picture), QUESTION)
        stock = session.ask(inputs, None, 4)
        found: list[Answer] = []
        other = Thread(target=lambda: found.append(session.ask(inputs, None, 4)))

        def meanwhile(*_: Any) -> None:
            hook.remove()
            other.start()
            other.join(0.3)

        hook = session.model.model.vision_tower.register_forward_pre_hook(meanwhile)
        pruned = session.ask(inputs, session.pruner("adafv", 2), 4)
        other.join()
        assert found == [stock]
        assert pruned.kv_mib < stock.kv_mib

    def test_a_held_picture_is_compared_once(
        self, session: Session, picture: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the model and the pixels of a question, for all methods that it is held for."""
        inputs = session.inputs(Image.open(picture), QUESTION)
        held = session.encoded(inputs)
        looks: list[Any] = []
        stock = Fingerprint.of
        monkeypatch.setattr(Fingerprint, "of", lambda *args, **names: looks.append("model") or stock(*args, **names))
        monkeypatch.setattr(
            "adafv.engines.transformers.encoded.digest_of", lambda value: looks.append("pixels") or digest_of(value)
        )
        assert session.encoded(inputs, held) is held
        assert sorted(looks) == ["model", *["pixels"] * len(held.pixels)]
        others = session.inputs(Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT), QUESTION)
        assert session.encoded(others, held) is not held

    def test_pictures_are_not_held_for_ever(
        self, session: Session, uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fresh = Answers(session, uploads)
        for number in range(3):
            photo(number + 30).save(tmp_path / f"{number}.png")
            fresh.compare(str(tmp_path / f"{number}.png"), QUESTION, "25%", ["adafv"], 1)
        (size,) = {seen.encoded.bytes for seen in fresh._seen.values()}
        assert len(fresh._seen) == 3
        monkeypatch.setattr("adafv.page.answers.MAX_HELD", 2 * size)
        fresh.compare(str(tmp_path / "0.png"), QUESTION, "25%", ["adafv"], 1)
        first = sha256((tmp_path / "0.png").read_bytes()).digest()
        assert len(fresh._seen) == 2
        assert first in fresh._seen
        monkeypatch.setattr("adafv.page.answers.MAX_HELD", size - 1)
        fresh.compare(str(tmp_path / "0.png"), QUESTION, "25%", ["adafv"], 1)
        assert len(fresh._seen) == 0

    @many_users
    def test_many_threads(self, answers: Answers, session: Session, tmp_path: Path, users: int) -> None:
        wishes = twenty_wishes(tmp_path)[:users]
        expected = [wish.alone(session) for wish in wishes]
        assert len({tuple(answer.values()) for answer in expected}) > users * 0.75
        with ThreadPoolExecutor(users) as threads:
            given = list(threads.map(lambda wish: wish.of(answers), wishes))
        assert given == expected


class TestPictures:
    def broken(self, picture: Path) -> dict[str, bytes]:
        return {
            "empty": b"",
            "no image": b"I am a text.",
            "truncated": truncated(picture),
            "bomb": claims(60_000, 60_000),
            "large": claims(9_000, 9_000),
            "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        }

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("empty", "is empty"),
            ("no image", "not an image"),
            ("truncated", "cut short"),
            ("bomb", "far more pixels"),
            ("large", "9000 x 9000 pixels"),
            ("svg", "export it as PNG"),
        ],
    )
    def test_broken(self, answers: Answers, picture: Path, tmp_path: Path, kind: str, said: str) -> None:
        path = tmp_path / "broken.png"
        path.write_bytes(self.broken(picture)[kind])
        with pytest.raises(ImageError, match=f"the picture .*{said}"):
            answers.check_picture(str(path))
        with pytest.raises(ImageError, match=f"the picture .*{said}"):
            answers.compare(str(path), QUESTION, "10%", ("adafv",), 2)

    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
    def test_kinds(self, answers: Answers, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"picture.{kind}"
        photo(1).save(path)
        answers.check_picture(str(path))

    def test_kinds_that_browsers_do_not_show(self, answers: Answers, tmp_path: Path) -> None:
        path = tmp_path / "picture.tiff"
        photo(1).save(path)
        with pytest.raises(ImageError, match="give a JPEG, PNG, WebP, GIF or BMP image"):
            answers.check_picture(str(path))

    def test_too_large(self, answers: Answers, tmp_path: Path) -> None:
        path = tmp_path / "large.png"
        path.write_bytes(bytes(MAX_BYTES + 1))
        with pytest.raises(ImageError, match="larger than 10 MB"):
            answers.check_picture(str(path))

    def test_gone(self, answers: Answers, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="no longer there"):
            answers.check_picture(str(tmp_path / "gone.png"))

    def test_bundled_samples(self, session: Session) -> None:
        for sample in bundled_samples():
            Answers(session, Uploads(sample.path.parent)).check_picture(str(sample.path))
            assert sample.question

    def test_samples_of_a_folder(self, tmp_path: Path) -> None:
        for number in range(MOST + 2):
            photo(number).save(tmp_path / f"{number:02}.png")
        (tmp_path / "notes.txt").write_text("no picture")
        assert samples_in(tmp_path) == [Sample(tmp_path / f"{number:02}.png") for number in range(MOST)]
        (tmp_path / "samples.json").write_text(json.dumps([{"picture": "01.png", "question": QUESTION}]))
        assert [sample.question for sample in samples_in(tmp_path)[:3]] == ["", QUESTION, ""]

    @pytest.mark.parametrize("content", ["no JSON", "7", "[7]", '[{"picture": "01.png"}]'])
    def test_broken_questions(self, tmp_path: Path, content: str) -> None:
        photo().save(tmp_path / "01.png")
        (tmp_path / "samples.json").write_text(content)
        with pytest.raises(SamplesError, match="mend it"):
            samples_in(tmp_path)

    def test_no_samples(self, tmp_path: Path) -> None:
        with pytest.raises(SamplesError, match="holds no pictures"):
            samples_in(tmp_path)
        with pytest.raises(SamplesError, match="no folder"):
            samples_in(tmp_path / "missing")


class TestMessages:
    def test_ours_are_shown(self) -> None:
        assert message(UsageError("type a question first")) == "Type a question first."
        assert message(ImageError("is it an image?")) == "Is it an image?"

    def test_memory(self) -> None:
        assert "out of memory" in message(MemoryError())
        assert "out of memory" in message(torch.OutOfMemoryError("CUDA"))

    def test_what_nobody_foresaw_is_logged(self) -> None:
        with logged() as records:
            said = message(KeyError("secret"))
        assert "KeyError" in said
        assert "secret" not in said
        assert any("secret" in logging.Formatter().format(record) for record in records)

    def test_everything_is_escaped(self) -> None:
        nasty = "<script>alert(1)</script>"
        timing = Timing(nasty, nasty, 4, [0.1], 1.0)
        said = results_as_html([Result(timing, 16, [])]) + problem_as_html(nasty)
        assert "<script" not in said
        assert said.count(html.escape(nasty)) == 4

    def test_savings(self) -> None:
        before, after = Timing(UNPRUNED, "yes", 16, [2.0], 4.0), Timing("adafv", "", 4, [1.0], 5.0)
        said = results_as_html([Result(before, 16, []), Result(after, 16, [])])
        assert re.findall(r'class="adafv-change">(.*?)<', said) == ["&minus;75 %", "&minus;50 %", "+25 %"]
        assert "no words" in said


class TestCommand:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("ADAFV_MODEL", raising=False)
        monkeypatch.delenv("ADAFV_TRACEBACK", raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def refused(self, code: int, said: str, *options: object) -> None:
        result = CliRunner().invoke(app, ["page", *map(str, options)])
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert said in result.stderr

    def test_without_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        self.refused(1, "pip install 'gradio>=6.31'", "--model", "m")

    def test_port_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.refused(1, "is taken", "--model", "m", "--port", taken.getsockname()[1])

    @pytest.mark.parametrize("host", ["::1", "[::1]", "localhost", "0.0.0.0"])
    def test_port_taken_where_gradio_looks(self, host: str) -> None:
        if ":" in host and not has_ipv6():
            pytest.skip("no IPv6 here")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.refused(1, "is taken on", "--model", "m", "--host", host, "--port", taken.getsockname()[1])

    @pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
    def test_port_taken_in_the_other_family(self, host: str) -> None:
        if not has_ipv6():
            pytest.skip("no IPv6 here")
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
            self.refused(1, "is taken on :", "--model", "m", "--host", host, "--port", taken.getsockname()[1])

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4.5", "::zz", "\u00e9" * 70, "a..b"])
    def test_hosts_that_are_none(self, host: str) -> None:
        self.refused(1, "cannot listen", "--model", "m", "--host", host, "--port", 7999)

    @pytest.mark.parametrize("host", ["", " ", "[]"])
    def test_no_host(self, host: str) -> None:
        self.refused(2, "--host is empty", "--model", "m", "--host", host)

    def test_passwords_that_are_too_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused(2, "0 letters", "--model", "m", "--password", "--port", free_port(), "--host", "0.0.0.0")
        monkeypatch.setenv("ADAFV_PAGE_PASSWORD", "guess")
        self.refused(2, "at least 8", "--model", "m", "--port", free_port())

    def test_no_such_address(self) -> None:
        self.refused(1, "cannot listen", "--model", "m", "--host", "192.0.2.1", "--port", 7999)

    def test_no_pictures(self, tmp_path: Path) -> None:
        self.refused(1, "holds no pictures", "--model", "m", "--examples", tmp_path)

    def test_wrong_options(self) -> None:
        self.refused(2, "no option 'objectve'", "--model", "m", "--port", free_port(), "--option", "objectve=split")

    def test_wrong_dtype(self) -> None:
        self.refused(2, "did you mean float16", "--model", "m", "--dtype", "float61")


@dataclass(frozen=True)
class Wish:
    """What one of twenty users wants."""

    picture: Path
    question: str
    keep: str
    methods: tuple[str, str]
    longest: int = 8

    def alone(self, session: Session) -> dict[str, str]:
        return {
            method or UNPRUNED: alone(session, self.picture, self.question, self.keep, method, self.longest).answer
            for method in (None, *self.methods)
        }

    def of(self, answers: Answers) -> dict[str, str]:
        compared = answers.compare(str(self.picture), self.question, self.keep, self.methods, self.longest)
        return {result.timing.name: result.timing.answer for result in compared.results}


def twenty_wishes(folder: Path) -> list[Wish]:
    names = [name for name in OF_IMAGES if name != "fastv"]  # which needs three layers, and here are two
    wishes = []
    for number in range(20):
        path = folder / f"user{number}.png"
        photo(number).save(path)
        methods = (names[number % len(names)], names[(number + 1 + number // len(names)) % len(names)])
        wishes.append(Wish(path, f"Question number {number}?", f"{10 + 4 * number}%", methods))
    return wishes


# From here on: the real command, over HTTP and in a real browser.

in_browser = needs("gradio", "playwright", browser=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page")) as served:
        yield served


@pytest.fixture(scope="module")
def served_session(server: Server) -> Session:
    """The same model, to ask it without the page."""
    return Session.load(str(server.checkpoint), "auto", torch.device("cpu"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_browser() as started:
        yield started


@dataclass(frozen=True)
class Visitor:
    """Someone in front of the page."""

    tab: Any

    def upload(self, path: Path) -> None:
        self.tab.locator("#picture input[type=file]").set_input_files(path)

    def type(self, question: str) -> None:
        self.tab.get_by_label("Question").fill(question)

    def keep(self, budget: str) -> None:
        self.tab.get_by_label("Visual tokens to keep").fill(budget)

    def choose(self, *methods: str) -> None:
        """From the catalogue, or typed where they have options."""
        part = self.tab.locator("#methods")
        part.get_by_title("Clear").click()
        box = part.get_by_role("combobox")
        for method in methods:
            if ":" in method:
                box.fill(method)
                box.press("Enter")
            else:
                box.click()
                options = self.tab.locator(f"[id='{box.get_attribute('aria-controls')}']")
                options.get_by_role("option", name=method, exact=True).click()
        box.press("Escape")

    def ask(self) -> None:
        self.tab.get_by_role("button", name="Ask", exact=True).click()

    def wait_for_picture(self) -> None:
        self.tab.get_by_alt_text("The picture that is asked about").wait_for()

    def answers(self) -> dict[str, str]:
        """Wait for the answers and read them."""
        self.tab.locator("#results article").first.wait_for()
        return {
            card.get_attribute("data-name"): card.locator(".adafv-answer").text_content()
            for card in self.tab.locator("#results article").all()
        }

    def problem(self) -> str:
        alert = self.tab.locator("#notice [role=alert]")
        alert.wait_for()
        return alert.inner_text()


@pytest.fixture(scope="module")
def window(browser: Any) -> Any:
    """Its tabs load Gradio's scripts once, and compile them once; each tab is a visitor of its own to the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)  # the machine may be busy
    return context


@pytest.fixture
def visitor(server: Server, window: Any) -> Iterator[Visitor]:
    """A fresh tab; afterwards nothing may have gone wrong in it, or been asked of anyone but the page's own server."""
    tab = window.new_page()
    asked, failures = set(), []
    tab.on("request", lambda request: asked.add(request.url))
    tab.on("pageerror", lambda error: failures.append(str(error)))
    tab.goto(server.url)
    yield Visitor(tab)
    tab.close()
    assert failures == []
    assert "Traceback" not in server.log.read_text()
    assert {url for url in asked if not url.startswith((server.url, "data:", "blob:"))} == set()


def as_shown(answers: dict[str, str]) -> dict[str, str]:
    """Answers as a browser shows them: random models write control characters, which HTML does not have."""
    return {
        name: re.sub(r"\r\n?", "\n", answer).replace("\0", "\N{REPLACEMENT CHARACTER}") or "no words"
        for name, answer in answers.items()
    }


@in_browser
@pytest.mark.slow
class TestInBrowser:
    def test_upload_type_click_read(self, visitor: Visitor, served_session: Session, picture: Path) -> None:
        visitor.upload(picture)
        visitor.wait_for_picture()
        visitor.type(QUESTION)
        visitor.ask()
        expected = Wish(picture, QUESTION, "10%", METHODS, LONGEST).alone(served_session)
        assert visitor.answers() == as_shown(expected)
        assert visitor.tab.locator("#results figure img").count() == 6
        for drawing in visitor.tab.locator("#results figure img").all():
            assert drawing.evaluate("image => image.complete && image.naturalWidth > 100")
            assert drawing.get_attribute("alt")
        assert "2 of 16" in visitor.tab.locator("#results article").nth(1).inner_text()

    def test_choose_a_sample_and_compare_two_methods(
        self, visitor: Visitor, server: Server, served_session: Session
    ) -> None:
        visitor.tab.get_by_role("button", name="Thumbnail 2 of 2").click()
        visitor.wait_for_picture()
        visitor.keep("50%")
        visitor.choose("uniform", "text")
        visitor.tab.get_by_label("Question").press("Enter")
        wish = Wish(server.samples / "sample2.png", SAMPLE_QUESTION, "50%", ("uniform", "text"), LONGEST)
        assert visitor.answers() == as_shown(wish.alone(served_session))
        headings = visitor.tab.locator("#results section h3").all_inner_texts()
        assert [heading.split(":")[0] for heading in headings] == ["uniform", "text"]
        assert visitor.tab.get_by_text("kept 8 of 16").count() == 2

    def test_budget_and_options_of_a_method(self, visitor: Visitor, served_session: Session, picture: Path) -> None:
        """In the words of the command line, and refused in them, too."""
        visitor.upload(picture)
        visitor.wait_for_picture()
        visitor.type(QUESTION)
        visitor.keep("1.5")
        visitor.ask()
        said = str(refusal("1.5"))
        assert visitor.problem() == f"K{said[1:]}."
        visitor.keep("3")
        visitor.choose("random", "random:seed=1")
        visitor.ask()
        wish = Wish(picture, QUESTION, "3", ("random", "random:seed=1"), LONGEST)
        assert visitor.answers() == as_shown(wish.alone(served_session))
        assert visitor.tab.get_by_text("kept 3 of 16").count() == 2

    def test_a_late_look_at_the_picture_takes_no_message_away(self, visitor: Visitor, picture: Path) -> None:
        held: list[Any] = []
        visitor.tab.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
        visitor.upload(picture)
        visitor.wait_for_picture()
        visitor.type(QUESTION)
        visitor.keep("1.5")
        visitor.ask()
        said = visitor.problem()
        with visitor.tab.expect_response("**/queue/join*"):
            held[0].continue_()
        visitor.tab.wait_for_timeout(500)
        assert visitor.problem() == said
        # And what was said of the last picture goes.
        visitor.tab.unroute("**/queue/join*")
        visitor.upload(picture)
        visitor.tab.locator("#notice [role=alert]").wait_for(state="detached")

    @pytest.mark.parametrize(
        "kind",
        [
            pytest.param("no image", marks=pytest.mark.release),
            "truncated",
            pytest.param("bomb", marks=pytest.mark.release),
        ],
    )
    def test_broken_upload(self, visitor: Visitor, server: Server, picture: Path, tmp_path: Path, kind: str) -> None:
        contents = {"no image": b"I am a text.", "truncated": truncated(picture), "bomb": claims(60_000, 60_000)}
        broken = tmp_path / "broken.png"
        broken.write_bytes(contents[kind])
        visitor.upload(broken)
        said = {"no image": "not an image", "truncated": "damaged or cut short", "bomb": "pixels"}
        assert said[kind] in visitor.problem()
        assert "Traceback" not in visitor.tab.content()
        visitor.upload(picture)  # the page goes on
        visitor.wait_for_picture()
        visitor.type(QUESTION)
        visitor.ask()
        assert set(visitor.answers()) == {UNPRUNED, *METHODS}
        assert visitor.tab.locator("#notice [role=alert]").count() == 0

    @pytest.mark.release
    def test_too_large_upload(self, visitor: Visitor, tmp_path: Path) -> None:
        large = tmp_path / "large.png"
        large.write_bytes(bytes(MAX_BYTES + 1))
        visitor.upload(large)
        assert "larger than 10 MB" in visitor.problem()

    def test_nothing_to_ask(self, visitor: Visitor, picture: Path) -> None:
        visitor.ask()
        assert "upload a picture first" in visitor.problem()
        visitor.upload(picture)
        visitor.wait_for_picture()
        visitor.ask()
        visitor.tab.get_by_text("Type a question first").first.wait_for()
        visitor.type("x" * (MAX_QUESTION + 1))
        visitor.ask()
        visitor.tab.get_by_text("shorten it").first.wait_for()

    def test_everything_has_a_name(self, visitor: Visitor) -> None:
        visitor.tab.get_by_role("button", name="Ask", exact=True).wait_for()
        unnamed = visitor.tab.evaluate(
            """() => [...document.querySelectorAll("button, input:not([type=file]), textarea, img")].filter(
                   e => e.checkVisibility() && !(e.ariaLabel || e.innerText || e.alt || e.title || e.labels?.length)
               ).map(e => e.outerHTML)"""
        )
        assert unnamed == []

    @pytest.mark.each
    @pytest.mark.parametrize("way", ["click", "key"])
    @pytest.mark.parametrize("motion", ["no-preference", "reduce"])
    def test_phone(self, visitor: Visitor, picture: Path, way: str, motion: str) -> None:
        """The results stand below the form, so the view and the focus go there."""
        tab = visitor.tab
        tab.set_viewport_size({"width": 390, "height": 844})
        tab.emulate_media(reduced_motion=motion)
        tab.evaluate(
            """() => { window.scrolled = []; const original = Element.prototype.scrollIntoView;
                Element.prototype.scrollIntoView = function (options) {
                    window.scrolled.push([this.id, options.behavior]); original.call(this, options);
                } }"""
        )
        visitor.upload(picture)
        visitor.wait_for_picture()
        visitor.type(QUESTION)
        tab.evaluate("scrollTo(0, 0)")
        if way == "click":
            visitor.ask()
        else:
            tab.get_by_label("Question").press("Enter")
        visitor.answers()
        tab.wait_for_function(
            """() => { const top = document.querySelector("#results article").getBoundingClientRect().top;
                return top >= 0 && top < innerHeight / 3; }"""
        )
        behaviour = {"no-preference": "smooth", "reduce": "instant"}[motion]
        assert ["results", behaviour] in tab.evaluate("scrolled")
        assert tab.evaluate("document.activeElement.id") == "results"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390

    def test_phone_with_nothing_to_show(self, visitor: Visitor) -> None:
        visitor.tab.set_viewport_size({"width": 390, "height": 844})
        visitor.ask()
        visitor.problem()
        visitor.tab.wait_for_function(
            """() => { const box = document.querySelector("#notice [role=alert]").getBoundingClientRect();
                return box.top >= 0 && box.bottom <= innerHeight; }"""
        )

    @pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.release), 2200])
    def test_wide(self, visitor: Visitor, picture: Path, width: int) -> None:
        """Form and results are seen at once, in the middle of the screen, and nothing moves."""
        tab = visitor.tab
        tab.set_viewport_size({"width": width, "height": 1000})
        visitor.upload(picture)
        visitor.wait_for_picture()
        visitor.type(QUESTION)
        visitor.ask()
        visitor.answers()
        tab.wait_for_timeout(500)
        assert tab.evaluate("scrollY") == 0
        assert tab.evaluate("document.activeElement.id") == "ask"
        left, right = tab.evaluate(
            """() => { const box = document.querySelector(".gradio-container").getBoundingClientRect();
                return [box.left, document.documentElement.clientWidth - box.right]; }"""
        )
        assert abs(left - right) <= 1

    @pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.release), "dark"])
    def test_messages_of_gradio_are_not_ours_to_style(self, visitor: Visitor, scheme: str) -> None:
        """Every class that we style is ours alone."""
        tab = visitor.tab
        tab.emulate_media(color_scheme=scheme)
        tab.reload()
        visitor.ask()
        tab.locator(".toast-body").first.wait_for()
        styled = tab.evaluate(
            """() => [...document.querySelectorAll(".toast-body, .toast-body *")].filter(e => {
                const style = getComputedStyle(e);
                const ours = ["rgb(255, 251, 235)", "rgb(51, 35, 10)"].includes(style.backgroundColor);
                return ours || style.borderLeftWidth === "4px";
            }).map(e => e.className.toString())"""
        )
        assert styled == []

    def test_classes_are_ours(self) -> None:
        style = (Path(render.__file__).with_name("style.css")).read_text()
        style = re.sub(r"/\*.*?\*/", "", style, flags=re.S)
        of_gradio = {
            "wrap",
            "secondary-wrap",
            "icon-wrap",
            "gradio-container",
            "dark",
            "grid-wrap",
            "grid-container",
            "thumbnail-item",
            "caption-label",
        }
        styled = set(re.findall(r"\.(-?[a-zA-Z_][\w-]*)", style))
        assert {name for name in styled - of_gradio if not name.startswith("adafv-")} == set()
        timing = Timing("x", "", 4, [0.1], 1.0)
        bad = [BadRecord("line 1", "is none")]
        check = Check(
            "me", Path("x"), Questions([], []), Settings.of("10%", ["adafv"], 1, "skip", "auto", "", 8), "", "q"
        )
        said = (
            results_as_html([Result(timing, 16, [])])
            + problem_as_html("x")
            + render.warning_as_html("x")
            + render.NOTHING_YET
            + render_check.NO_CHECK_YET
            + render_check.bad_records_as_html(bad)
            + render_check.progress_as_html(replace(check, phase="asking"), 0)
        )
        names = {name for names in re.findall(r'class="(.*?)"', said) for name in names.split()}
        assert names
        assert {name for name in names if not name.startswith("adafv-")} == set()

    def test_check(self, visitor: Visitor, server: Server, served_session: Session, tmp_path: Path) -> None:
        """Both files up, bad records named, the rest checked while a question is asked, and what comes down."""
        tab = visitor.tab
        tab.get_by_role("tab", name="Check").click()
        check = tab.get_by_role("button", name="Check", exact=True)
        check.click()
        notice = tab.locator("#check-notice")
        notice.get_by_text("Choose a file of questions first.").wait_for()
        questions, pictures = some_questions(tmp_path, 6, {"image": "/etc/passwd", "question": "Who?"})
        tab.locator("#check-questions input[type=file]").set_input_files(questions)
        tab.locator("#check-pictures input[type=file]").set_input_files(pictures)
        tab.locator("#check-pictures .file-preview").wait_for()
        tab.locator("#check-questions .file-preview").wait_for()
        check.click()
        notice.get_by_text("q.jsonl line 7: names /etc/passwd, which leads out").wait_for()
        tab.get_by_label("are left out").click()
        tab.get_by_label("Budgets to try").fill("50%, 25%")
        check.click()
        results = tab.locator("#check-results")
        results.locator("tbody tr").first.wait_for()
        rows = [row.inner_text().split("\t")[:3] for row in results.locator("tbody tr").all()]
        assert rows[0] == ["unpruned", "all", "16"]
        assert rows[2:] == [[defaults.METHOD, "50 %", "8"], [defaults.METHOD, "25 %", "4"]]
        assert results.locator("article").get_attribute("data-name") == defaults.METHOD
        assert "q.jsonl line 7" in results.inner_text()
        with tab.expect_download() as report:
            results.get_by_role("link", name="Report").click()
        assert "Is it safe to prune?" in report.value.path().read_text()
        with tab.expect_download() as file:
            results.get_by_role("link", name="JSON").click()
        found = json.loads(file.value.path().read_text())
        assert found["questions"]["count"] == 6
        assert found["model"]["model"] == weights_hash(served_session.model)
        assert not list(server.uploads.glob("check-*"))
        tab.set_viewport_size({"width": 390, "height": 844})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390

    def test_a_check_is_stopped(self, visitor: Visitor, server: Server, picture: Path, tmp_path: Path) -> None:
        """While it works, the other tab answers; afterwards nothing of it is left. It ends with its visitor, too."""
        tab = visitor.tab
        visitor.upload(picture)
        visitor.wait_for_picture()
        visitor.type(QUESTION)
        tab.get_by_role("tab", name="Check").click()
        questions, pictures = some_questions(tmp_path, 600)
        tab.locator("#check-questions input[type=file]").set_input_files(questions)
        tab.locator("#check-pictures input[type=file]").set_input_files(pictures)
        tab.locator("#check-pictures .file-preview").wait_for()
        tab.locator("#check-questions .file-preview").wait_for()
        tab.get_by_role("button", name="Check", exact=True).click()
        tab.get_by_role("progressbar", name="Answers").wait_for()
        tab.get_by_role("tab", name="Compare").click()
        visitor.ask()
        assert set(visitor.answers()) == {UNPRUNED, *METHODS}
        tab.get_by_role("tab", name="Check").click()
        tab.get_by_text(re.compile(r"of 3,600 answers, about .* left")).wait_for()
        tab.get_by_role("button", name="Stop").click()
        tab.get_by_text("Stopped. What was answered is deleted.").wait_for()
        assert not list(server.uploads.glob("check-*"))
        tab.get_by_role("button", name="Check", exact=True).click()
        tab.get_by_role("progressbar", name="Answers").wait_for()
        assert list(server.uploads.glob("check-*"))
        tab.close()
        until = time.monotonic() + 60
        while list(server.uploads.glob("check-*")):
            assert time.monotonic() < until
            time.sleep(0.1)

    def test_dark(self, server: Server, browser: Any) -> None:
        colours = []
        for scheme in ("light", "dark"):
            tab = browser.new_page(color_scheme=scheme)
            tab.goto(server.url)
            tab.locator(".adafv-nothing-yet").wait_for()
            colours.append(tab.evaluate("getComputedStyle(document.querySelector('.adafv-nothing-yet')).color"))
            tab.close()
        assert colours[0] != colours[1]


@pytest.fixture(scope="module")
def connect(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Another user, without a browser."""
    from gradio_client import Client

    downloads = str(tmp_path_factory.mktemp("downloads"))
    return lambda: Client(server.url, verbose=False, download_files=downloads)


@pytest.fixture(scope="module")
def client(connect: Callable[[], Any]) -> Any:
    return connect()


@in_browser
@pytest.mark.slow
class TestOverHttp:
    @many_users
    def test_many_users_at_once(
        self, served_session: Session, connect: Callable[[], Any], tmp_path: Path, users: int
    ) -> None:
        from gradio_client import handle_file

        wishes = twenty_wishes(tmp_path)[:users]
        expected = [wish.alone(served_session) for wish in wishes]
        assert len({tuple(answer.values()) for answer in expected}) > users * 0.75

        def ask(wish: Wish) -> dict[str, str]:
            results, notice = connect().predict(
                handle_file(wish.picture), wish.question, wish.keep, list(wish.methods), wish.longest, api_name="/ask"
            )
            assert notice == ""
            cards = re.findall(
                r'<article class="adafv-card" data-name="(.*?)".*?<p class="adafv-answer">(.*?)</p>', results, re.S
            )
            return {name: html.unescape(answer.replace("<em>no words</em>", "")) for name, answer in cards}

        with ThreadPoolExecutor(users) as threads:
            assert list(threads.map(ask, wishes)) == expected

    @pytest.mark.parametrize("elsewhere", ["/etc/hostname", "http://127.0.0.1:9/picture.png", "../../etc/hostname"])
    def test_files_of_the_server_cannot_be_asked_about(self, client: Any, elsewhere: str) -> None:
        payload = {"path": elsewhere, "meta": {"_type": "gradio.FileData"}}
        said = ""
        try:
            results, said = client.predict(payload, QUESTION, "10%", ["adafv", "text"], 2, api_name="/ask")
            assert "<article" not in results
        except Exception as error:  # Gradio's own refusal
            said = str(error)
        assert said

    @pytest.mark.parametrize(
        "wrong", [(None, "adafv", 4), ("much", "adafv", 4), ("10%", "guess", 4), ("10%", "adafv", 9999)]
    )
    def test_values_that_the_page_does_not_offer(self, client: Any, picture: Path, wrong: tuple[Any, str, int]) -> None:
        from gradio_client import handle_file

        keep, method, longest = wrong
        results, said = client.predict(handle_file(picture), QUESTION, keep, [method, "text"], longest, api_name="/ask")
        assert "<article" not in results
        assert 'role="alert"' in said
        assert "not foresee" not in said

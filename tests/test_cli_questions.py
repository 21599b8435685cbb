"""`adafv ask` with several questions: in one batch, or one a line; each is answered as it is by itself."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_checkpoint import save_llava
from command_line import refused, run
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from typer.testing import Result

import adafv.cli.ask  # noqa: F401
from adafv import AdaFV
from adafv.asking.failures import UsageError
from adafv.asking.session import Session
from adafv.engines.transformers import ImageStore
from adafv.printable import printable

QUESTIONS = ["What is in the picture?", "is there a key?", "how many cups are on the small table, and what colour?"]
Ask = Callable[..., Result]
Place = tuple[Path, Path]
"""A checkpoint, and a picture."""
SOMETIMES = {"seconds", "together", "objective"}
"""Of the JSON: what is not the same, or not to the last bit, in a batch."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("several")
    checkpoint = save_llava(folder)
    photo = folder / "photo.png"
    image = Image.linear_gradient("L").convert("RGB").resize((60, 40))
    image.paste((220, 40, 30), (10, 10, 30, 25))
    image.save(photo)
    return checkpoint, photo


@pytest.fixture(scope="module")
def ask(place: Place) -> Ask:
    checkpoint, photo = place

    def ask(*asked: object, image: object = photo, **more: object) -> Result:
        settings = ("--model", checkpoint, "--max-new-tokens", 4, "--device", "cpu", "--keep", 4)
        return run("ask", image, "--method", "adafv", *asked, *settings, **more)

    return ask


@pytest.fixture(scope="module")
def alone(ask: Ask) -> list[dict[str, Any]]:
    """What the questions get by themselves."""
    return [json.loads(ask(question, "--json").stdout) for question in QUESTIONS]


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ImageStore]]:
    """Those that are made meanwhile."""
    made: list[ImageStore] = []
    stock = Session.pruner

    def pruner(*args: Any, **options: Any) -> Any:
        found = stock(*args, **options)
        made.extend([] if found.settings.store is None else [found.settings.store])
        return found

    monkeypatch.setattr(Session, "pruner", pruner)
    return made


def same(result: Result, alone: list[dict[str, Any]], together: int) -> None:
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(alone)
    for one, other in zip(found, alone, strict=True):
        assert one.keys() - other.keys() == {"together"}
        assert one["together"] == together
        assert {name: one[name] for name in other.keys() - SOMETIMES} == {
            name: other[name] for name in other.keys() - SOMETIMES
        }
        assert one["objective"] == pytest.approx(other["objective"], rel=1e-5)


def test_in_one_batch(ask: Ask, alone: list[dict[str, Any]], stores: list[ImageStore]) -> None:
    result = ask(QUESTIONS[0], "--also", QUESTIONS[1], "-a", QUESTIONS[2], "--json")
    same(result, alone, 3)
    [store] = stores
    assert (store.misses, store.hits) == (1, 2)


def test_in_several_batches(
    ask: Ask, alone: list[dict[str, Any]], stores: list[ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adafv.asking.session.TOKENS_TOGETHER", 4)  # room for the tokens of one
    same(ask(QUESTIONS[0], "--also", QUESTIONS[1], "-a", QUESTIONS[2], "--json"), alone, 1)
    assert (stores[0].misses, stores[0].hits) == (1, 2)


def test_one_a_line(ask: Ask, alone: list[dict[str, Any]], stores: list[ImageStore]) -> None:
    lines = f"{QUESTIONS[0]}\r\n\n  \n{QUESTIONS[1]}\n{QUESTIONS[2]}"
    same(ask("-", "--json", input=b"\xef\xbb\xbf" + lines.encode()), alone, 1)
    assert (stores[0].misses, stores[0].hits) == (1, 2)


def test_certainty_and_crops_are_those_of_the_question(place: Place, tmp_path: Path) -> None:
    """Not those of the first one in its batch."""
    checkpoint = save_llava(tmp_path, anyres=True)

    def found(question: str, *more: object) -> tuple[list[float], list[list[int]]]:
        options = ("--model", checkpoint, "--max-new-tokens", 1, "--device", "cpu", "--keep", 4, "--crops", "auto")
        lines = run("ask", place[1], question, "--json", *options, *more).stdout.splitlines()
        return [json.loads(line)["certainty"] for line in lines], [json.loads(line)["crops_seen"] for line in lines]

    certain, crops = found(QUESTIONS[0], "--also", QUESTIONS[1], "--also", QUESTIONS[2])
    alone = [found(question) for question in QUESTIONS]
    assert len(set(certain)) == 3
    assert certain == pytest.approx([value for [value], _ in alone], rel=1e-3)
    assert crops == [seen for _, [seen] in alone]


class TestChat:
    def in_turns(self, checkpoint: Path, photo: Path, **options: Any) -> list[tuple[str, list[list[int]]]]:
        """What the library makes of the same chat, written by hand."""
        session = Session.load(str(checkpoint), "auto", torch.device("cpu"))
        chat: list[dict[str, Any]] = []
        found = []
        for question in QUESTIONS:
            chat.append({"role": "user", "content": [{"type": "text", "text": question}]})
            if len(chat) == 1:
                chat[0]["content"].insert(0, {"type": "image"})
            text = session.processor.apply_chat_template(chat, add_generation_prompt=True)
            start = session.processor.tokenizer.bos_token
            inputs = session.processor(
                images=Image.open(photo), text=text, return_tensors="pt", add_special_tokens=not text.startswith(start)
            )
            with AdaFV(4, processor=session.processor, **options)(session.model) as adafv:
                output = session.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            tokens = output[0, inputs["input_ids"].shape[1] :]
            answer = session.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            found.append((answer, [kept.tolist() for kept in adafv.last.kept]))
        return found

    @pytest.mark.parametrize("scope", [None, "question"])
    def test_every_turn_sees_those_before(
        self, ask: Ask, place: Place, stores: list[ImageStore], monkeypatch: pytest.MonkeyPatch, scope: str | None
    ) -> None:
        """What is kept is chosen anew, by all that was said, or once for all turns; picture and tower are looked at once."""
        prepared: list[Any] = []
        stock = BaseImageProcessor.__call__
        monkeypatch.setattr(
            BaseImageProcessor, "__call__", lambda *args, **options: prepared.append(1) or stock(*args, **options)
        )
        lines = "\n".join(QUESTIONS)
        result = ask(
            "-", "--chat", "--json", *(() if scope is None else ("--text", scope)), input=f"{lines}\n/quit\nwhat?"
        )
        assert result.exit_code == 0, result.output
        assert len(prepared) == 1
        assert (stores[0].misses, stores[0].hits) == (1, 2)
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(each["answer"], each["kept"]) for each in found] == self.in_turns(*place, text=scope or "after")
        assert [each["turn"] for each in found] == [1, 2, 3]
        assert (len({str(each["kept"]) for each in found}) == 1) == (scope == "question")

    def test_given_as_a_list(self, ask: Ask, place: Place) -> None:
        result = ask(QUESTIONS[0], "--chat", "--also", QUESTIONS[1], "--also", QUESTIONS[2])
        assert result.stdout == "".join(f"{printable(answer)}\n" for answer, _ in self.in_turns(*place, text="after"))
        said = [line.removeprefix("question: ") for line in result.stderr.splitlines() if "question: " in line]
        assert said == QUESTIONS
        assert result.stderr.count("kept 4 of 16 visual tokens") == 3

    def test_methods_inside_the_language_model(self, ask: Ask) -> None:
        result = ask("-", "--chat", "--json", "--method", "fastv", "--option", "layer=1", input="\n".join(QUESTIONS))
        assert [json.loads(line)["turn"] for line in result.stdout.splitlines()] == [1, 2, 3]

    def test_ends(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a word, the end of the input, or an interrupt where somebody types; elsewhere that is a failure."""
        assert ask("-", "--chat", input=" /quit \nwhat?\n").exit_code == 0
        assert ask("-", "--chat", input="").exit_code == 2

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(Session, "ask", interrupted)
        assert ask("-", "--chat", input="what?\n").exit_code == 130
        monkeypatch.setattr(sys.modules["adafv.cli.ask"], "_at_a_terminal", lambda: True)
        for lines in ("what?\nwhere?\n", "", "/quit\n"):
            result = ask("-", "--chat", input=lines)
            assert (result.exit_code, result.stdout) == (0, "")
            assert "/quit or Ctrl-D ends" in " ".join(result.stderr.split())
            assert "error" not in result.stderr

    def test_refused(self, ask: Ask, place: Place, tmp_path: Path) -> None:
        refused(ask(QUESTIONS[0], "--chat", "--compare"), 2, "--compare shows what becomes of one question")
        checkpoint, photo = place
        other = shutil.copytree(checkpoint, tmp_path / "other")
        session = Session.load(str(other), "auto", torch.device("cpu"))
        for template, message in [
            (None, "this model has no chat template, so it cannot be shown earlier questions; leave --chat out"),
            ("{{ messages[-1]['content'][-1]['text'] }}", "leaves earlier questions or answers out; leave --chat out"),
            ("{{ raise_exception('one') if messages[1:] }}", "takes one question alone (one); leave --chat out"),
        ]:
            session.processor.chat_template = template
            with pytest.raises(UsageError, match=re.escape(message)):
                session.check_chat()
        config = json.loads((other / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = 100
        (other / "config.json").write_text(json.dumps(config))
        lines = f"{QUESTIONS[0]}\n{'why? ' * 9}\n"
        result = run("ask", photo, "-", "--chat", "--model", other, "--keep", 4, "--max-new-tokens", 4, input=lines)
        assert result.exit_code == 2
        assert len(result.stdout.splitlines()) == 1
        assert "line 2 of standard input: the chat has" in " ".join(result.stderr.split())


def test_answers_alone_are_on_standard_output(ask: Ask, alone: list[dict[str, Any]]) -> None:
    answers = "".join(f"{each['answer']}\n" for each in alone)
    batch = ask(QUESTIONS[0], "--also", QUESTIONS[1], "--also", QUESTIONS[2])
    assert batch.stdout == answers
    assert [line.removeprefix("question: ") for line in batch.stderr.splitlines() if "question: " in line] == QUESTIONS
    assert "3 questions together" in batch.stderr
    lines = ask("-", input="\n".join(QUESTIONS))
    assert lines.stdout == answers
    assert "question>" not in lines.stderr
    assert lines.stderr.count("answered by") == batch.stderr.count("answered by") == 1


def test_methods_inside_the_language_model(ask: Ask) -> None:
    """They take one prompt at a time."""
    result = ask(QUESTIONS[0], "--also", QUESTIONS[1], "--json", "--method", "fastv", "--option", "layer=1")
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["together"] for line in result.stdout.splitlines()] == [1, 1]


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--also", " "], "the question is empty"),
            (["--also", "what \udcff"], "the question is not text"),
            (["--also", "where?", "--compare"], "--compare shows what becomes of one question"),
            (["--also", "where?", "--compare-with", "random"], "--compare shows what becomes of one question"),
            (["--also", "where?", "--picture", "kept.png"], "--picture shows what becomes of one question"),
        ],
    )
    def test_options(self, ask: Ask, options: list[str], message: str) -> None:
        refused(ask(QUESTIONS[0], *options), 2, message)

    def test_words_without_quotes(self, ask: Ask) -> None:
        """They are no questions: each would be answered, and none of them was meant."""
        refused(ask("what", "is", "this?"), 2, "unexpected extra argument")

    def test_before_the_first_answer(self, ask: Ask) -> None:
        refused(ask(QUESTIONS[0], "--also", "What is <image>?"), 2, "stands for an image")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--compare"], "--compare shows what becomes of one question"),
            (["--also", "where?"], "questions come from standard input, or as --also, not both"),
        ],
    )
    def test_beside_standard_input(self, ask: Ask, options: list[str], message: str) -> None:
        refused(ask("-", *options, input="what?\n"), 2, message)

    def test_standard_input_for_two_things(self, ask: Ask) -> None:
        refused(ask("-", image="-", input=b""), 2, "standard input is the image or the questions, not both")

    @pytest.mark.parametrize("lines", ["", "\n \n"])
    def test_no_question(self, ask: Ask, lines: str) -> None:
        refused(ask("-", input=lines), 2, "no question came from standard input")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"what is <image>?", "line 3 of standard input: the question holds <image>"),
            (b"what \xff", "line 3 of standard input: the question is not text: the byte 0xFF"),
            (b"x" * 2**20, "line 3 of standard input has more than 1048575 bytes"),
        ],
    )
    def test_a_line_that_is_no_question(self, ask: Ask, line: bytes, message: str) -> None:
        """It ends the run, so that answers stand in the places of their questions."""
        result = ask("-", input=b"is there a key?\n\n" + line + b"\nwhere?\n")
        assert result.exit_code == 2
        assert len(result.stdout.splitlines()) == 1
        assert message in " ".join(result.stderr.split())


class TestAtATerminal:
    @pytest.fixture(autouse=True)
    def terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["adafv.cli.ask"], "_at_a_terminal", lambda: True)

    def test_a_mistake_ends_nothing(self, ask: Ask, alone: list[dict[str, Any]]) -> None:
        result = ask("-", input=f"{QUESTIONS[0]}\n\nwhat is <image>?\n{QUESTIONS[1]}\n")
        assert result.exit_code == 0
        assert result.stdout == "".join(f"{each['answer']}\n" for each in alone[:2])
        assert result.stderr.count("question> ") == 5
        assert "error: the question holds <image>" in result.stderr
        assert "every question is one by itself; Ctrl-D ends" in " ".join(result.stderr.split())

    def test_no_question_at_all(self, ask: Ask) -> None:
        result = ask("-", input="")
        assert (result.exit_code, result.stdout) == (0, "")

    def test_an_interrupt(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(Session, "ask_together", interrupted)
        result = ask("-", input="what?\nwhere?\n")
        assert (result.exit_code, result.stdout) == (130, "")
        assert result.stderr.endswith("error: interrupted\n")

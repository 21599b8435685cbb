"""The command line: real loading code on a tiny checkpoint, what goes where, and how mistakes end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_checkpoint import TOKENS, save_llava
from command_line import refused, run
from PIL import Image
from typer.testing import Result

import adafv.asking.session
from adafv.asking.failures import UsageError
from adafv.cli.ask import parse_keep

QUESTION = "What is in the picture?"
Ask = Callable[..., Result]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    image = Image.linear_gradient("L").convert("RGB").resize((60, 40))
    image.paste((220, 40, 30), (10, 10, 30, 25))
    image.save(path)
    return path


@pytest.fixture(autouse=True)
def no_model_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAFV_MODEL", raising=False)
    monkeypatch.delenv("ADAFV_TRACEBACK", raising=False)


@pytest.fixture
def ask(checkpoint: Path, photo: Path) -> Ask:
    def ask(*options: object, image: object = photo, question: str = QUESTION, **more: object) -> Result:
        return run(
            "ask", image, question, "--model", checkpoint, "--max-new-tokens", 4, "--device", "cpu", *options, **more
        )

    return ask


class TestAnswer:
    def test_answer_alone_is_on_standard_output(self, ask: Ask) -> None:
        plain, as_json = ask("--keep", "4"), json.loads(ask("--keep", "4", "--json").stdout)
        assert plain.exit_code == 0
        assert plain.stdout == as_json["answer"] + "\n"
        assert f"kept 4 of {TOKENS} visual tokens (25 %)" in plain.stderr

    def test_json(self, ask: Ask, checkpoint: Path) -> None:
        result = ask("--keep", "4", "--json")
        assert result.exit_code == 0
        assert result.stdout.count("\n") == 1
        said = json.loads(result.stdout)
        assert (said["tokens_before"], said["tokens_after"]) == (TOKENS, 4)
        assert [len(kept) for kept in said["kept"]] == [4]
        assert said["objective"] > 0
        assert 0 <= said["certificate"] < 1
        assert (said["method"], said["keep"], said["question"]) == ("adafv", 4, QUESTION)
        assert said["model"] == str(checkpoint)
        assert {"load", "tower", "selection", "compaction", "model"} <= said["seconds"].keys()
        assert said["kv_mib"] > 0
        assert "compare" not in said

    def test_kv_mib_is_what_the_cache_holds(self, ask: Ask) -> None:
        all_of_it = json.loads(ask("--keep", "all", "--json").stdout)["kv_mib"]
        few = json.loads(ask("--keep", "4", "--json").stdout)["kv_mib"]
        per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
        assert (all_of_it - few) * 2**20 == pytest.approx((TOKENS - 4) * per_token)

    def test_keeping_all_is_the_stock_answer(self, ask: Ask, checkpoint: Path, photo: Path) -> None:
        said = json.loads(ask("--keep", "all", "--json", "--compare", "--repeats", "1").stdout)
        assert said["answer"] == said["compare"][0]["answer"]
        assert said["objective"] is None
        assert said["certificate"] is None
        assert said["kept"] == [list(range(TOKENS))]

    def test_compare_in_json(self, ask: Ask) -> None:
        said = json.loads(ask("--keep", "25%", "--json", "--compare", "--repeats", "2").stdout)
        unpruned, ours, saliency = said["compare"]
        assert [mode["method"] for mode in said["compare"]] == ["unpruned", "adafv", "saliency"]
        assert [mode["tokens"] for mode in said["compare"]] == [TOKENS, 4, 4]
        assert unpruned["kv_mib"] > ours["kv_mib"] == saliency["kv_mib"] == said["kv_mib"]
        assert ours["answer"] == said["answer"]
        for mode in said["compare"]:
            seconds = mode["seconds_to_first_token"]
            assert len(seconds["rounds"]) == 2
            assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]

    def test_compare_as_a_table(self, ask: Ask) -> None:
        result = ask("--compare", "--repeats", "1", "--method", "saliency")
        assert result.exit_code == 0
        assert "unpruned" in result.stdout
        assert result.stdout.count("saliency") == 1

    @pytest.mark.parametrize("method", ["downsample", "random", "saliency", "text", "uniform"])
    def test_every_method(self, ask: Ask, method: str) -> None:
        said = json.loads(ask("--method", method, "--keep", "4", "--json").stdout)
        assert said["tokens_after"] == 4
        assert said["objective"] is None

    @pytest.mark.parametrize(
        "options",
        [
            ["--objective", "split"],
            ["--variant", "published"],
            ["--text", "turn"],
            ["--text", "question"],
            ["--positions", "original"],
            ["--dtype", "bfloat16"],
        ],
    )
    def test_options(self, ask: Ask, options: list[str]) -> None:
        result = ask("--keep", "4", *options)
        assert result.exit_code == 0, result.stderr

    def test_only_the_question_counts(self, ask: Ask) -> None:
        """The template's own tokens are left out unless the user asks for them."""
        default, question, after = (
            json.loads(ask("--keep", "4", "--json", *text, question="x").stdout)["objective"]
            for text in ([], ["--text", "question"], ["--text", "after"])
        )
        assert default == question != after

    def test_model_from_the_environment(self, checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ADAFV_MODEL", str(checkpoint))
        assert run("ask", photo, QUESTION, "--max-new-tokens", 2).exit_code == 0

    def test_image_from_standard_input(self, ask: Ask, photo: Path) -> None:
        piped = ask("--json", image="-", input=photo.read_bytes())
        assert json.loads(piped.stdout)["kept"] == json.loads(ask("--json").stdout)["kept"]

    def test_without_a_chat_template(self, photo: Path, tmp_path: Path) -> None:
        model = save_llava(tmp_path, chat_template=False)
        result = run("ask", photo, QUESTION, "--model", model, "--max-new-tokens", 2)
        assert result.exit_code == 0, result.stderr
        refused(run("ask", photo, QUESTION, "--model", model, "--text", "question"), 2, "needs a processor with a chat")

    def test_llava_next(self, photo: Path, tmp_path: Path) -> None:
        picture = tmp_path / "kept.png"
        model = save_llava(tmp_path / "model", anyres=True)
        result = run("ask", photo, QUESTION, "--model", model, "--max-new-tokens", 2, "--json", "--picture", picture)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["tokens_before"] > TOKENS
        assert Image.open(picture).width > 1000


class TestModel:
    """Which one answers, and what it knows."""

    @pytest.mark.parametrize("named", [[], ["--model", ""], ["--model", "bundled"], ["--model", "bundled-next"]])
    def test_bundled(self, photo: Path, named: list[str]) -> None:
        plain = run("ask", photo, "what is the background?", *named, "--max-new-tokens", 2, "--device", "cpu")
        assert plain.exit_code == 0, plain.stderr
        name = named[1] if named and named[1] else "bundled"
        assert f"answered by {name}, a small model that knows 80 words" in plain.stderr
        assert "warning" not in plain.stderr

    def test_another_model_is_named(self, ask: Ask, checkpoint: Path) -> None:
        said = ask().stderr
        assert f"answered by {checkpoint}\n" in said
        assert "small model" not in said

    def test_the_environment_comes_before_the_bundled_model(
        self, checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ADAFV_MODEL", str(checkpoint))
        assert f"answered by {checkpoint}" in run("ask", photo, QUESTION, "--max-new-tokens", 2).stderr

    def test_unknown_words_are_named(self, photo: Path) -> None:
        question = "Is there a zebra, or a zebra's key?"
        result = run("ask", photo, question, "--json", "--max-new-tokens", 2, "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        said = json.loads(result.stdout)
        assert (said["model"], said["unknown_words"]) == ("bundled", ["zebra", "zebra's"])
        assert "does not know the words 'zebra', 'zebra's'; it reads <unk> in their place" in result.stderr
        assert "It knows: a, above," in result.stderr

    def test_known_words_are_not(self, photo: Path) -> None:
        result = run("ask", photo, "How many Bananas are there?", "--json", "--max-new-tokens", 2, "--device", "cpu")
        assert json.loads(result.stdout)["unknown_words"] == []
        assert result.stderr == ""

    def test_bytes_know_every_word(self, ask: Ask) -> None:
        assert json.loads(ask("--json", question="Zebra\u00e9 \u732b?").stdout)["unknown_words"] == []


class TestPicture:
    @pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
    def test_drawn(self, ask: Ask, tmp_path: Path, kind: str) -> None:
        result = ask("--picture", tmp_path / f"kept.{kind}")
        assert result.exit_code == 0
        assert "drew" in result.stderr
        with Image.open(tmp_path / f"kept.{kind}") as drawn:
            assert drawn.width > 1000

    def test_refused_before_the_model_is_loaded(self, photo: Path, tmp_path: Path) -> None:
        for path, message in (
            (tmp_path / "kept.gif", "must end in one of .png"),
            (tmp_path / "kept", "must end in one of"),
            (tmp_path / "nowhere" / "kept.png", "create it first"),
        ):
            refused(run("ask", photo, QUESTION, "--model", "no/such", "--picture", path), 2, message)
        (tmp_path / "folder.png").mkdir()
        refused(
            run("ask", photo, QUESTION, "--model", "no/such", "--picture", tmp_path / "folder.png"), 2, "is a folder"
        )


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--keep", "0"], "at least one visual token must stay"),
            (["--keep", "-3"], "at least one visual token must stay"),
            (["--keep", "lots"], "is not a budget"),
            (["--keep", "nan"], "a share lies above 0"),
            (["--keep", "64.0"], "leave the point out"),
            (["--keep", "17"], "only 16 visual tokens"),
            (["--method", "adfv"], "did you mean adafv?"),
            (["--method", "saliency", "--objective", "split"], "does not apply to --method saliency"),
            (["--objective", "best"], "known are: joint, split"),
            (["--variant", "best"], "known are: corrected, published"),
            (["--text", "all"], "known are: question, turn, after"),
            (["--positions", "orignal"], "did you mean original?"),
            (["--dtype", "float23"], "did you mean float"),
            (["--device", "banana"], "try cpu"),
            (["--device", "meta"], "try cpu"),
            (["--max-new-tokens", "0"], "max-new-tokens"),
            (["--repeats", "0"], "repeats"),
            (["--kep", "4"], "No such option"),
        ],
    )
    def test_options(self, ask: Ask, options: list[str], message: str) -> None:
        refused(ask(*options), 2, message)

    @pytest.mark.parametrize("question", ["", "  \n "])
    def test_empty_question(self, ask: Ask, question: str) -> None:
        refused(ask(question=question), 2, "the question is empty")

    @pytest.mark.parametrize(
        ("question", "said"),
        [
            ("\udcff\udcfe", "the byte 0xFF stands in place 1"),
            ("what \ud83d", "half a letter (U+D83D) stands in place 6"),
        ],
    )
    def test_a_question_that_is_not_text(self, photo: Path, question: str, said: str) -> None:
        """As a shell gives one that holds bytes of another encoding; found before a model is looked for."""
        refused(run("ask", photo, question, "--model", "no/such"), 2, "the question is not text", said, "UTF-8")

    def test_placeholder_in_the_question(self, ask: Ask) -> None:
        refused(ask(question="What is <image>?"), 2, "stands for an image")

    def test_no_image(self, ask: Ask, tmp_path: Path) -> None:
        refused(ask(image=tmp_path / "nowhere.png"), 1, "error: there is no file")
        (tmp_path / "text.png").write_text("hello")
        refused(ask(image=tmp_path / "text.png"), 1, "is not an image")
        refused(ask(image="-", input=b""), 1, "standard input is empty")

    def test_json_leaves_standard_output_empty(self, ask: Ask, tmp_path: Path) -> None:
        refused(ask("--json", image=tmp_path / "nowhere.png"), 1, "there is no file")

    def test_no_such_model(self, photo: Path, tmp_path: Path) -> None:
        refused(run("ask", photo, QUESTION, "--model", tmp_path), 1, "cannot load the model", "save_pretrained")
        refused(run("ask", photo, QUESTION, "--model", photo), 1, "give the folder")
        refused(run("ask", photo, QUESTION, "--model", tmp_path / "nowhere"), 1, "check the folder or Hub id")

    def test_damaged_model(self, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "model.safetensors").write_bytes(b"not weights")
        refused(run("ask", photo, QUESTION, "--model", tmp_path), 1, "cannot load the model")

    def test_unsupported_model_is_found_before_its_weights(self, photo: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
        refused(
            run("ask", photo, QUESTION, "--model", tmp_path), 1, "GPT2LMHeadModel is not a supported model", "LlavaFor"
        )

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (KeyboardInterrupt(), 130, "interrupted"),
            (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory; try"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory; try"),
            (RuntimeError("surprise"), 1, "RuntimeError: surprise (not foreseen"),
        ],
    )
    def test_what_goes_wrong_while_running(
        self, ask: Ask, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
    ) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(adafv.asking.session.Session, "ask", fail)
        refused(ask(), code, message)

    def test_traceback_on_request(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ADAFV_TRACEBACK", "1")
        assert isinstance(ask(image="nowhere.png").exception, adafv.AdaFVError)


class TestKeep:
    @pytest.mark.parametrize(
        ("text", "keep"),
        [
            ("64", 64),
            ("1", 1),
            ("0.1", 0.1),
            ("10%", 0.1),
            ("100%", 1.0),
            ("1.0", 1.0),
            ("all", 1.0),
            (" 12.5 % ", 0.125),
        ],
    )
    def test_understood(self, text: str, keep: float) -> None:
        parsed = parse_keep(text)
        assert parsed == keep
        assert type(parsed) is type(keep)

    @pytest.mark.parametrize("text", ["", "0", "-1", "0.0", "1.5", "0%", "101%", "%", "inf", "nan", "ten", "1e400"])
    def test_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="--keep"):
            parse_keep(text)


class TestCatalogue:
    def test_methods(self) -> None:
        result = run("methods")
        assert result.exit_code == 0
        assert [line.split()[0] for line in result.stdout.splitlines()][:2] == ["adafv", "downsample"]

    def test_families(self) -> None:
        result = run("families")
        assert result.exit_code == 0
        assert "LlavaNextForConditionalGeneration" in result.stdout

    def test_version(self) -> None:
        assert run("--version").stdout == f"adafv {adafv.__version__}\n"

    def test_help(self) -> None:
        assert "ask" in run("--help").stdout
        assert "--picture" in run("ask", "--help").stdout


class TestProcess:
    """As a user starts it, in a process of its own."""

    @staticmethod
    def start(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
        source = str(Path(adafv.__file__).parents[1])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "adafv", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            **options,  # type: ignore[call-overload]
        )

    def test_answer_is_all_there_is(self, checkpoint: Path, photo: Path) -> None:
        done = self.start("ask", photo, QUESTION, "--model", checkpoint, "--max-new-tokens", 2, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tokens_after"] == 2
        assert done.stderr == ""

    def test_mistake(self, photo: Path) -> None:
        done = self.start("ask", photo, "")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: the question is empty")


@pytest.mark.skipif(
    not Path(os.environ.get("ADAFV_TESTBED", ""), "config.json").is_file(), reason="ADAFV_TESTBED names no checkpoint"
)
def test_a_model_that_has_learned_something(tmp_path: Path) -> None:
    """A plain red picture must not change what colour it is when most of its tokens go."""
    Image.new("RGB", (320, 240), (210, 20, 20)).save(tmp_path / "red.png")
    result = run(
        *("ask", tmp_path / "red.png", "What color is this?", "--model", os.environ["ADAFV_TESTBED"]),
        *("--keep", "10%", "--max-new-tokens", 12, "--dtype", "float32"),
    )
    assert result.exit_code == 0, result.stderr
    assert "red" in result.stdout.lower()

"""The command line: real loading code on a tiny checkpoint, what goes where, and how mistakes end."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from cli_checkpoint import TOKENS, save_llava
from command_line import refused, run
from PIL import Image
from typer.main import get_command
from typer.testing import Result

import adafv.asking.session
from adafv.cli import app
from adafv.core import Budget
from adafv.errors import BudgetError
from adafv.methods import known_methods
from adafv.printable import printable

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
        assert plain.stdout == printable(as_json["answer"], kept="\n\t") + "\n"
        assert f"kept 4 of {TOKENS} visual tokens (25 %)" in plain.stderr

    def test_json(self, ask: Ask, checkpoint: Path) -> None:
        result = ask("--keep", "4", "--json", "--method", "adafv")
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
        assert [mode["method"] for mode in said["compare"]] == ["unpruned", "facet", "saliency"]
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

    def test_compare_with_other_methods(self, ask: Ask) -> None:
        rivals = "uniform,adafv:objective=split,random:seed=1,facet"
        said = json.loads(ask("--keep", "25%", "--json", "--compare-with", rivals, "--repeats", "1").stdout)
        names = ["unpruned", "facet", "uniform", "adafv:objective=split", "random:seed=1"]
        assert [mode["method"] for mode in said["compare"]] == names
        assert [mode["tokens"] for mode in said["compare"]] == [TOKENS, 4, 4, 4, 4]
        alone = json.loads(ask("--keep", "25%", "--method", "random", "--option", "seed=1", "--json").stdout)
        assert alone["answer"] == said["compare"][-1]["answer"]

    def test_options_of_the_method(self, ask: Ask) -> None:
        kept = {}
        for seed in (0, 1):
            said = json.loads(ask("--method", "random", "--option", f"seed={seed}", "--keep", "4", "--json").stdout)
            assert said["parameters"] == {"seed": seed}
            kept[seed] = said["kept"]
        assert kept[0] != kept[1]
        assert kept[0] == json.loads(ask("--method", "random", "--keep", "4", "--json").stdout)["kept"]

    @pytest.mark.parametrize("method", ["downsample", "random", "saliency", "text", "uniform"])
    def test_every_method(self, ask: Ask, method: str) -> None:
        said = json.loads(ask("--method", method, "--keep", "4", "--json").stdout)
        assert said["tokens_after"] == 4
        assert said["objective"] is None

    @pytest.mark.parametrize(
        "options",
        [
            ["--objective", "split"],
            ["--option", "blocks=2"],
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
            json.loads(ask("--keep", "4", "--json", "--method", "adafv", *text, question="x").stdout)["objective"]
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
        assert "warning: which words are the question cannot be seen" in result.stderr
        assert "UserWarning" not in result.stderr
        turn = run("ask", photo, QUESTION, "--model", model, "--max-new-tokens", 2, "--text", "turn")
        assert turn.stdout == result.stdout
        assert "warning" not in turn.stderr
        refused(run("ask", photo, QUESTION, "--model", model, "--text", "question"), 2, "needs a processor with a chat")

    def test_llava_next(self, photo: Path, tmp_path: Path) -> None:
        picture = tmp_path / "kept.png"
        model = save_llava(tmp_path / "model", anyres=True)
        result = run("ask", photo, QUESTION, "--model", model, "--max-new-tokens", 2, "--json", "--picture", picture)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["tokens_before"] > TOKENS
        assert Image.open(picture).width > 1000
        few = run(
            "ask",
            photo,
            QUESTION,
            "--model",
            model,
            "--max-new-tokens",
            2,
            "--crops",
            "thumbnail",
            "--picture",
            picture,
        )
        assert few.exit_code == 0, few.stderr
        assert f"1 of {json.loads(result.stdout)['crops_seen'][-1] + 1} crops seen" in few.stderr
        auto = run("ask", photo, QUESTION, "--model", model, "--max-new-tokens", 2, "--crops", "auto", "--json")
        said = json.loads(auto.stdout)
        assert said["certainty"] < 0.9  # random weights know nothing
        assert said["crops_seen"] == json.loads(result.stdout)["crops_seen"]
        refused(run("ask", photo, QUESTION, "--model", model, "--crops", "few"), 2, "crops='few' is no number of crops")


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

    def test_no_word_that_counts(self, photo: Path) -> None:
        """ "hello" is no word of the bundled model: saliency chooses, and the answer is given all the same."""
        result = run("ask", photo, "hello", "--keep", "10%", "--max-new-tokens", 2, "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.strip()
        assert "note: no word of the question counts for the picture, so saliency alone chose" in result.stderr

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

    def test_never_over_the_image(self, ask: Ask, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By whatever way the same file is reached."""
        image = tmp_path / "image.png"
        image.write_bytes(photo.read_bytes())
        (tmp_path / "link.png").symlink_to(image)
        (tmp_path / "hard.png").hardlink_to(image)
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path)
        for picture in (image, "image.png", "folder/../image.png", "link.png", "hard.png"):
            for source in (image, "link.png"):
                refused(ask("--picture", picture, image=source), 2, "is the image that the question is about")
        assert image.read_bytes() == photo.read_bytes()

    def test_never_over_what_standard_input_comes_from(self, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
        image = tmp_path / "image.png"
        image.write_bytes(photo.read_bytes())
        with image.open("rb") as opened:
            done = TestProcess.start("ask", "-", QUESTION, "--model", checkpoint, "--picture", image, stdin=opened)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is the image that the question is about" in done.stderr
        assert image.read_bytes() == photo.read_bytes()

    @pytest.mark.parametrize("as_json", [False, True])
    def test_a_full_disk_does_not_cost_the_answer(
        self, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
    ) -> None:
        picture = tmp_path / "kept.png"
        picture.write_bytes(b"an older picture")
        answer = ask("--json").stdout
        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(Image.Image, "save", lambda image, file, *_, **__: file.write(b"new") or full())
        result = ask("--picture", picture, *(["--json"] if as_json else []))
        assert result.exit_code == 1
        said = json.loads(result.stdout)["answer"] if as_json else None
        assert said is None or said == json.loads(answer)["answer"]
        assert result.stdout.strip()
        assert "the answer is complete, but --picture" in result.stderr
        assert "No space left on device" in result.stderr
        assert picture.read_bytes() == b"an older picture"
        assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]

    def test_written_whole_or_not_at_all(self, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The disk is full once the picture is drawn and nearly written."""
        picture = tmp_path / "kept.png"
        picture.write_bytes(b"an older picture")
        monkeypatch.setattr(os, "fsync", full)
        result = ask("--picture", picture)
        assert result.exit_code == 1
        assert "No space left on device" in result.stderr
        assert picture.read_bytes() == b"an older picture"
        assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]

    def test_folder_that_is_gone_meanwhile(self, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "folder").mkdir()
        real = adafv.asking.session.Session.ask

        def removing(*args: object, **kwargs: object) -> object:
            (tmp_path / "folder").rmdir()
            return real(*args, **kwargs)

        monkeypatch.setattr(adafv.asking.session.Session, "ask", removing)
        result = ask("--picture", tmp_path / "folder" / "kept.png")
        assert result.exit_code == 1
        assert result.stdout.endswith("\n")
        assert "the answer is complete, but --picture" in result.stderr

    def test_through_a_link_and_with_the_old_permissions(self, ask: Ask, tmp_path: Path) -> None:
        target = tmp_path / "target.png"
        target.touch()
        target.chmod(0o640)
        (tmp_path / "link.png").symlink_to(target)
        assert ask("--picture", tmp_path / "link.png").exit_code == 0
        assert (tmp_path / "link.png").is_symlink()
        assert target.stat().st_mode & 0o777 == 0o640
        with Image.open(target) as drawn:
            assert drawn.width > 1000

    def test_places_where_nothing_can_be_written(self, photo: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "file").touch()
        for path, message in (
            (tmp_path / "pipe.png", "is not a regular file"),
            (tmp_path / f"{'x' * 300}.png", "File name too long"),
            (tmp_path / "file" / "kept.png", "cannot be written"),
            (Path("/proc/kept.png"), "cannot be written"),
        ):
            refused(run("ask", photo, QUESTION, "--model", "no/such", "--picture", path), 2, message)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--keep", "0"], "at least one visual token per image must stay"),
            (["--keep", "-3"], "at least one visual token per image must stay"),
            (["--keep", "lots"], "is not a budget"),
            (["--keep", "nan"], "is not a budget"),
            (["--keep", "64.0"], "written without a point"),
            (["--method", "adfv"], "did you mean adafv?"),
            (["--method", "saliency", "--objective", "split"], "'saliency' has no option 'objective'; it has none"),
            (["--method", "adafv", "--option", "objective"], "not of the form name=value; such as objective=joint"),
            (
                ["--method", "adafv", "--option", "objectve=split"],
                "no option 'objectve'; it has objective (text, such as joint), variant",
            ),
            (["--option", "objective=split"], "'facet' has no option 'objective'"),
            (["--option", "objective=split", "--objective", "joint"], "objective is given twice"),
            (["--method", "adafv", "--option", "objective=best"], "known are: joint, split"),
            (["--method", "random", "--option", "seed=one"], "seed=one; give a whole number, such as 0"),
            (["--compare-with", "uniform,adfv"], "did you mean adafv?"),
            (["--compare-with", "random:seed=x"], "give a whole number"),
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

    @pytest.mark.parametrize("keep", ["0", "1.5", "lots", " 10%"])
    def test_a_budget_is_refused_in_the_librarys_words(self, photo: Path, keep: str) -> None:
        """And before a model is looked for."""
        with pytest.raises(BudgetError) as error:
            Budget.of(keep)
        refused(
            run("ask", photo, QUESTION, "--model", "no/such", "--keep", keep), 2, " ".join(str(error.value).split())
        )

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
        refused(ask(question="what " * 5000), 2, "positions; shorten it")

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


class TestCatalogue:
    def test_methods(self) -> None:
        result = run("methods")
        assert result.exit_code == 0
        named = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith(" ")]
        assert named == sorted(known_methods())
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        own = lines[lines.index(next(line for line in lines if line.startswith("adafv "))) + 1 :][:3]
        assert own[0] == "AdaFV, arXiv 2501.09532; reads saliency, words; stage tokens; cost sort"
        assert own[1].startswith('objective=joint: "joint" (the best set')
        assert own[2].startswith('variant=corrected: "corrected", or')
        assert "seed=0: of the draw." in lines

    def test_families(self) -> None:
        result = run("families")
        assert result.exit_code == 0
        assert "LlavaNextForConditionalGeneration" in result.stdout

    def test_version(self) -> None:
        assert run("--version").stdout == f"adafv {adafv.__version__}\n"

    @pytest.mark.parametrize("command", [[], ["ask"], ["page"], ["serve"], ["methods"], ["families"]])
    def test_short_help(self, command: list[str]) -> None:
        assert run(*command, "-h").exit_code == 0
        assert run(*command, "-h").stdout == run(*command, "--help").stdout

    def test_names_of_the_package_are_listed(self) -> None:
        assert set(adafv.__all__) | {"__version__"} <= set(dir(adafv))

    def test_help(self) -> None:
        assert "ask" in run("--help").stdout
        assert "--picture" in run("ask", "--help").stdout


class TestProcess:
    """As a user starts it, in a process of its own."""

    @staticmethod
    def start(*arguments: object, environment: dict[str, str] | None = None, **options: Any) -> Any:
        return forking.ran(["-m", "adafv", *arguments], env={**os.environ, **(environment or {})}, **options)

    @staticmethod
    def by_python(*arguments: object, environment: dict[str, str] | None = None) -> Any:
        """With all that is imported, and what is read then."""
        source = str(Path(adafv.__file__).parents[1])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def test_answer_is_all_there_is(self, checkpoint: Path, photo: Path) -> None:
        done = self.start("ask", photo, QUESTION, "--model", checkpoint, "--max-new-tokens", 2, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tokens_after"] == 2
        assert done.stderr == ""

    def test_mistakes_are_found_without_torch(self, photo: Path, tmp_path: Path) -> None:
        Image.new("RGB", (2, 40_000)).save(tmp_path / "narrow.png")
        (tmp_path / "text.png").write_text("hello")
        (tmp_path / "llava").mkdir()
        (tmp_path / "llava" / "config.json").write_text("{}")
        nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
        mistakes = (
            ((tmp_path / "nowhere.png", QUESTION), "there is no file"),
            ((tmp_path / "narrow.png", QUESTION), "20,000 times as long as it is wide"),
            ((tmp_path / "text.png", QUESTION), "is not an image"),
            ((tmp_path, QUESTION), "is a directory"),
            (("data:image/png;base64,AAAA", QUESTION), "is the picture itself"),
            ((photo, QUESTION, "--model", "./llava"), "there is no such folder"),
            ((photo, QUESTION, "--model", "/no/such/folder"), "there is no such folder"),
            ((photo, QUESTION, "--model", tmp_path / "llavq"), f"did you mean {tmp_path / 'llava'}?"),
            ((photo, QUESTION, "--model", "bundeld"), "did you mean bundled?"),
            ((photo, QUESTION, "--model", "some-model"), "there is no such folder"),
            ((photo, QUESTION, "--model", photo), "not a file"),
            ((photo, QUESTION, "--model", tmp_path), "the folder has no config.json"),
            ((photo, QUESTION, "--model", "llava-hf/llava-1.5-7b-hf"), "the Hub does not answer"),
        )
        program = """if True:
            import json, sys
            from adafv.cli import main
            for arguments in json.loads(sys.argv[1]):
                sys.argv = ["adafv", "ask", *arguments]
                try:
                    main()
                except SystemExit as error:
                    assert error.code == 1, error.code
                assert "torch" not in sys.modules
        """
        given = json.dumps([list(map(str, arguments)) for arguments, _ in mistakes])
        done = self.by_python("-c", program, given, environment=nowhere)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        for said, (_, message) in zip(done.stderr.splitlines(), mistakes, strict=True):
            assert said.startswith("error: "), said
            assert message in said

    def test_downloaded_before_and_no_network(self, photo: Path, tmp_path: Path) -> None:
        """Nothing is asked of a Hub that does not answer: neither again and again, nor for every file.

        By Python itself, so also: whatever is imported, the answer is all that is printed.
        """
        folder = tmp_path / "hub" / "models--own--tiny"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a" * 40)
        save_llava(folder / "snapshots" / ("a" * 40))
        nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        arguments = ("-m", "adafv", "ask", photo, QUESTION, "--model", "own/tiny", "--max-new-tokens", 2, "--json")
        done = self.by_python(*arguments, environment=nowhere)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert json.loads(done.stdout)["tokens_after"] == 2
        assert json.loads(done.stdout)["model"] == "own/tiny"
        assert json.loads(done.stdout)["seconds"]["load"] < 15

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    @pytest.mark.parametrize("command", [["families"], ["methods"], ["--help"], ["ask"]])
    def test_full_disk_for_standard_output(self, command: list[str], checkpoint: Path, photo: Path) -> None:
        if command == ["ask"]:
            command = ["ask", str(photo), QUESTION, "--model", str(checkpoint), "--max-new-tokens", "2"]
        with open("/dev/full", "w") as nowhere:
            done = self.start(*command, stdout=nowhere)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert "not foreseen" not in done.stderr
        assert done.stderr.count("\n") == 1

    def test_completion_leaves_the_start_up_files_alone(self, tmp_path: Path) -> None:
        (tmp_path / ".bashrc").write_text("# mine\n")
        home = {"HOME": str(tmp_path), "SHELL": "/bin/bash", "XDG_CONFIG_HOME": str(tmp_path)}
        assert "--show-completion" in self.start("--help", environment=home).stdout
        asking = {"COMP_WORDS": "adafv ser", "COMP_CWORD": "1", "_ADAFV_COMPLETE": "complete_bash"}
        program = "import sys; sys.argv[0] = 'adafv'; from adafv.cli import main; main()"
        done = self.by_python("-c", program, environment={**home, **asking})
        assert done.stdout.split() == ["serve"]
        assert [path.name for path in tmp_path.iterdir()] == [".bashrc"]
        assert (tmp_path / ".bashrc").read_text() == "# mine\n"

    @pytest.mark.parametrize(
        ("stream", "image", "question", "code", "message"),
        [
            ("stdin", None, "-", 2, "error: no question came from standard input"),
            ("stdin", "-", QUESTION, 1, "error: standard input is empty"),
            ("stderr", None, QUESTION, 0, ""),
            ("stdout", None, QUESTION, 1, "error: standard output cannot be written (it is closed)"),
        ],
    )
    def test_a_stream_that_is_closed(
        self,
        stream: str,
        image: str,
        question: str,
        code: int,
        message: str,
        checkpoint: Path,
        photo: Path,
        tmp_path: Path,
    ) -> None:
        """As by `<&-`: Python then has None for it."""
        program = tmp_path / "closed.py"
        program.write_text(f"import sys\nfrom adafv.cli import main\nsys.{stream} = None\nmain()\n")
        options = ("--model", checkpoint, "--max-new-tokens", 2, "--json")
        done = forking.ran([program, "ask", image or photo, question, *options])
        assert done.returncode == code
        assert done.stderr.startswith(message)
        assert bool(done.stdout) == (code == 0)

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


def test_commands_name_alike_what_is_alike() -> None:
    """What several commands have has one name, and each takes the other one that somebody may remember."""
    names = [{"--output", "--to"}, {"--matching", "--rule"}, {"--batch", "--batch-size"}, {"--methods", "--method"}]
    commands = {
        ("check",): names,
        ("bench", "accuracy"): names,
        ("analyze",): names[:1],
        ("eval",): [names[0], names[2]],
    }
    for path, expected in commands.items():
        command: Any = get_command(app)
        for name in path:
            command = command.commands[name]
        for each in expected:
            assert any(each <= set(option.opts) for option in command.params), (path, each)

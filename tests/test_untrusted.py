"""Checkpoints from strangers: nothing that they bring is run, whoever says yes, and each ends in one clear line."""

import json
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils
from cli_checkpoint import save_llava
from command_line import refused, run
from PIL import Image
from typer.testing import Result

import adafv
import adafv.asking.session

QUESTION = "What is in the picture?"

EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers import PreTrainedTokenizerFast
class Config(LlavaConfig):
    model_type = "evil"
class Model(LlavaForConditionalGeneration):
    config_class = Config
class Processor(LlavaProcessor):
    pass
class Tokenizer(PreTrainedTokenizerFast):
    pass
class Images(CLIPImageProcessor):
    pass
def generate(model, *args, **kwargs):
    pathlib.Path({marker!r}).touch()
"""


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (200, 40, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there once foreign code has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound checkpoint with a module beside it, for a test to name somewhere."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(sound, tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return tmp_path / "model"


def changed(folder: Path, name: str, **values: Any) -> None:
    """Set values in a JSON file; None takes them out."""
    path = folder / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    found.update(values)
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def asked(photo: Path, checkpoint: Path, *options: object) -> Result:
    """As `yes | adafv ask` would."""
    command = ("ask", photo, QUESTION, "--model", checkpoint, "--max-new-tokens", 2, "--device", "cpu", "--json")
    return run(*command, *options, input="y\n" * 50)


def unknown_model_type(folder: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    changed(folder, "config.json", model_type="evil", auto_map=auto_map)


def unknown_processor(folder: Path) -> None:
    auto_map = {"AutoProcessor": "evil.Processor"}
    changed(folder, "processor_config.json", processor_class="EvilProcessor", auto_map=auto_map)
    changed(folder, "tokenizer_config.json", processor_class="EvilProcessor", auto_map=auto_map)


def unknown_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    changed(folder, "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)


def unknown_tokenizer_of_a_processor_found_by_the_model(folder: Path) -> None:
    """There transformers forgets what it was told about foreign code."""
    unknown_tokenizer(folder)
    changed(folder, "processor_config.json", processor_class=None)
    changed(folder, "tokenizer_config.json", processor_class=None)


def unknown_image_processor(folder: Path) -> None:
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    images |= {"image_processor_type": "EvilImages", "auto_map": {"AutoImageProcessor": "evil.Images"}}
    changed(folder, "processor_config.json", image_processor=images)


def unknown_image_processor_in_a_file_of_its_own(folder: Path) -> None:
    found = json.loads((folder / "processor_config.json").read_text())
    images = found.pop("image_processor")
    (folder / "processor_config.json").write_text(json.dumps(found))
    images |= {"image_processor_type": "EvilImages", "auto_map": {"AutoImageProcessor": "evil.Images"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def unknown_part(folder: Path) -> None:
    """A part of the model that transformers knows the configuration of, but no model for."""
    known = transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES
    part = {"model_type": "clip_vision_model_", "auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": str(folder)}
    part["model_type"] = next(
        name for name in ("encoder-decoder", "vision-encoder-decoder", "rag", "mllama") if name not in known
    )
    changed(folder, "config.json", vision_config=part)


def code_for_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


class TestCode:
    @pytest.mark.parametrize(
        "attack",
        [
            unknown_model_type,
            unknown_processor,
            unknown_tokenizer,
            unknown_tokenizer_of_a_processor_found_by_the_model,
            unknown_image_processor,
            unknown_image_processor_in_a_file_of_its_own,
            unknown_part,
            code_for_generate,
        ],
    )
    def test_is_never_run(
        self, attack: Callable[[Path], None], checkpoint: Path, photo: Path, marker: Path, capfd: Any
    ) -> None:
        attack(checkpoint)
        result = asked(photo, checkpoint)
        assert not marker.exists()
        assert "Do you wish to run" not in result.output + capfd.readouterr().out
        if result.exit_code == 0:  # what transformers can do without the code, it may
            assert json.loads(result.stdout)["tokens_after"] == 2
        else:
            refused(result, 1, "cannot load the model")
            assert result.stderr.count("\n") == 1

    def test_says_so(self, checkpoint: Path, photo: Path) -> None:
        unknown_model_type(checkpoint)
        refused(asked(photo, checkpoint), 1, "Python code that comes with the checkpoint, which adafv never runs")

    def test_kernels_are_code(self, checkpoint: Path, photo: Path) -> None:
        changed(checkpoint, "config.json", attn_implementation="evil/kernel")
        refused(asked(photo, checkpoint), 1, "names the kernel evil/kernel", "take attn_implementation")

    def test_kernels_of_a_part(self, checkpoint: Path, photo: Path) -> None:
        changed(checkpoint, "config.json", attn_implementation={"text_config": "evil/kernel@main:function"})
        refused(asked(photo, checkpoint), 1, "names the kernel evil/kernel@main:function")

    def test_pickles_are_not_read(self, checkpoint: Path, photo: Path, marker: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Touch(str(marker))}))
        refused(asked(photo, checkpoint), 1, "its weights are not safetensors", "convert them with save_pretrained")
        assert not marker.exists()

    def test_every_way_to_load_says_no(self) -> None:
        """In the repository's own programs, too: `from_pretrained` without a word on foreign code asks for it."""
        root = Path(__file__).parents[1]
        found = [*root.glob("src/**/*.py"), *root.glob("benchmarks/**/*.py"), *root.glob("training/**/*.py")]
        calls = [
            (path.name, call)
            for path in found
            for call in re.findall(r"\bAuto\w+\.from_pretrained\((?:[^()]|\([^()]*\))*\)", path.read_text())
            if path.name != "__init__.py"  # docstrings of the package
        ]
        assert len(calls) >= 9
        silent = [call for call in calls if "trust_remote_code=False" not in call[1] and "**options" not in call[1]]
        assert silent == []


class TestTemplates:
    def test_endless(self, checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chat template is a program; its loops are bounded, but not loops in loops."""
        monkeypatch.setattr(adafv.asking.session, "TEMPLATE_TIMEOUT", 0.05)
        # The loop goes on in its thread until the process ends: one that is short enough ends with the test.
        (checkpoint / "chat_template.jinja").write_text(
            "{% for i in range(3000) %}{% for i in range(2000) %}{% endfor %}{% endfor %}"
        )
        start = time.perf_counter()
        refused(asked(photo, checkpoint), 1, "its chat template writes a prompt for more than 0.05 s")
        assert time.perf_counter() - start < 30

    def test_unsafe(self, checkpoint: Path, photo: Path) -> None:
        (checkpoint / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
        refused(asked(photo, checkpoint), 1, "its chat template cannot write a prompt", "SecurityError")


class TestMessages:
    """What a checkpoint, a file name or a model says reaches the terminal without its escape sequences."""

    ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"

    def test_of_a_checkpoint(self, checkpoint: Path, photo: Path) -> None:
        changed(checkpoint, "config.json", architectures=[f"{self.ESCAPE}Model"])
        result = asked(photo, checkpoint)
        refused(result, 1, r"\x1b]0;owned\x07\x1b[2J\u202eModel is not a supported model")
        assert not set(self.ESCAPE[:1] + "\x07\u202e") & set(result.stderr)

    def test_of_a_path(self, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
        for result in (
            run("ask", tmp_path / f"{self.ESCAPE}.png", QUESTION),
            run("ask", photo, QUESTION, "--model", tmp_path / self.ESCAPE),
            run("ask", photo, QUESTION, "--picture", tmp_path / self.ESCAPE / "kept.png"),
            run("ask", photo, QUESTION, "--keep", self.ESCAPE),
            run("serve", tmp_path / self.ESCAPE, "--keep", "8", "--print-command"),
        ):
            assert result.exit_code in (1, 2)
            assert result.stderr.startswith("error: ")
            assert "owned" in result.stderr
            assert not set("\x1b\x07\u202e") & set(result.stderr)

    def test_of_a_model(self, checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = adafv.asking.session.Session.ask

        def escaping(*args: Any, **kwargs: Any) -> Any:
            answer = real(*args, **kwargs)
            return type(answer)(f"first\nsecond{self.ESCAPE}", answer.kv_mib, answer.record)

        monkeypatch.setattr(adafv.asking.session.Session, "ask", escaping)
        command = ("ask", photo, QUESTION, "--model", checkpoint, "--max-new-tokens", 2, "--device", "cpu")
        assert run(*command).stdout == "first\nsecond\\x1b]0;owned\\x07\\x1b[2J\\u202e\n"
        assert json.loads(run(*command, "--json").stdout)["answer"] == f"first\nsecond{self.ESCAPE}"
        assert not set("\x1b\x07\u202e") & set(run(*command, "--compare", "--repeats", 1).stdout)

    @pytest.mark.parametrize("long", ["data:image/png;base64," + "A" * 100_000, "x" * 100_000, "DATA:," + "%41" * 9999])
    def test_are_short(self, long: str, photo: Path, tmp_path: Path) -> None:
        for arguments in (
            ("ask", long, QUESTION),
            ("ask", photo, QUESTION, "--model", long),
            ("ask", photo, QUESTION, "--keep", long),
            ("ask", photo, QUESTION, "--dtype", long),
            ("ask", photo, QUESTION, "--method", long),
            ("ask", photo, QUESTION, "--device", long),
            ("ask", photo, QUESTION, "--picture", long),
            ("ask", photo, QUESTION, "--picture", f"{long}.png"),
            ("serve", long, "--keep", "8", "--print-command"),
        ):
            result = run(*arguments)
            assert result.exit_code in (1, 2)
            assert len(result.stderr) < 1500, arguments[:-1]
            assert "; " in result.stderr or ": " in result.stderr[7:]


def test_loading_is_quiet(checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a library prints meanwhile is not the answer."""
    real = transformers.AutoProcessor.from_pretrained

    def noisy(*args: Any, **kwargs: Any) -> Any:
        print("loading with pleasure")
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", noisy)
    assert json.loads(asked(photo, checkpoint).stdout)["tokens_after"] == 2

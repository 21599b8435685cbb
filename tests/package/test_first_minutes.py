"""What a new user types in the first ten minutes: the commands of README and docs, and the usual mistakes."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from environments import ROOT, Environment
from packaging.requirements import Requirement
from snippets import Snippet, snippets

COMMANDS = [found for found in snippets(ROOT) if found.language == "bash" and found.document != "docs/serving.md"]
"""Those of docs/serving.md: test_snippets.py."""
NO_NETWORK = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    "no_proxy": "",
    "NO_PROXY": "",
    "HF_HUB_OFFLINE": "0",
}
"""A machine that reaches nothing: what would go out goes to a port where nobody listens."""


def as_written(command: str, address: str) -> str:
    """The command, with something in the place of what the documentation leaves to the reader (...)."""
    return command.replace("--model ...", "--model bundled").replace("https://...", address)


def no_traceback(done: "subprocess.CompletedProcess[str]") -> None:
    assert "Traceback" not in done.stderr + done.stdout


class TestDocuments:
    @pytest.mark.release
    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
    def test_command(self, environment: Environment, photo: Path, address: str, command: Snippet) -> None:
        """Each command runs as it is written.

        In a clone that has a photo.jpg, questions.txt and questions.jsonl. The checkpoint that it names is on disk, see
        hub_checkpoint.py. pip only says what it would do, so that the next test finds the environment as it was.
        """
        if command.not_run:
            pytest.skip(f"{command.text}: {command.not_run}")
        (photo.parent / "chelsea.png").write_bytes(photo.read_bytes())
        (photo.parent / "questions.txt").write_text("what is in the picture?\n")
        asked = {"image": photo.name, "question": "what is in the picture?", "answer": "a banana"}
        (photo.parent / "questions.jsonl").write_text(json.dumps(asked) + "\n")
        if command.text.startswith("adafv page"):
            pytest.skip("adafv page: see TestPage")
        if command.text.startswith("adafv serve"):
            printed = environment.run(f"{command.text.partition('#')[0]} --print-command")
            assert printed.returncode == 0, printed.stderr
            assert shlex.split(printed.stdout)[:2] == ["vllm", "serve"]
            refused = environment.run(command.text)
            assert refused.returncode == 1
            assert "needs vLLM, which is not installed" in refused.stderr
            return
        if command.text.startswith("pip "):
            # An option and no variable, which would reach the pip that gets ready for building, too.
            line = f"{command.text.partition('#')[0]} --dry-run"
            constraints = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "HOME": str(Path.home())}
            done = environment.run(line, variables=constraints)
        else:
            done = environment.run(as_written(command.text, address), entered="what is in the picture?\n")
        assert done.returncode == 0, done.stderr
        no_traceback(done)
        assert done.stdout
        if command.text.startswith("adafv check"):  # whose answers another model must not go on with
            shutil.rmtree(environment.clone / "adafv-check", ignore_errors=True)
        for name in re.findall(r"--picture (\S+)", command.text):
            assert (environment.clone / name).read_bytes().startswith(b"\x89PNG")
            (environment.clone / name).unlink()

    def test_the_first_answer_is_right(self, environment: Environment) -> None:
        """The bundled model knows this one, pruned too: the package brought the weights, not just files."""
        samples = json.loads((ROOT / "src/adafv/bundled/samples/samples.json").read_text())
        (bird,) = [sample for sample in samples if sample["picture"] == "bird.png"]
        done = environment.run(f'adafv ask src/adafv/bundled/samples/bird.png "{bird["question"]}"')
        assert done.stdout == f"{bird['answer']}\n"

    @pytest.mark.release
    def test_far_from_the_clone(self, environment: Environment, photo: Path, tmp_path: Path) -> None:
        done = environment.run(f"adafv ask {photo} 'what is in the picture?'", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.iterdir()) == []


class TestHelp:
    def test_every_command(self, environment: Environment) -> None:
        overview = environment.run("adafv --help")
        assert overview.returncode == 0
        listing = overview.stdout[overview.stdout.index("Commands") :]
        commands = re.findall(r"^\W*([a-z]+) {2,}\S", listing, re.MULTILINE)
        assert {"ask", "page", "serve", "methods", "families", "env"} <= set(commands)
        for command in commands:
            shown = environment.run(f"adafv {command} --help")
            assert shown.returncode == 0
            assert "Usage" in shown.stdout
            assert shown.stderr == ""

    def test_as_a_module(self, environment: Environment) -> None:
        assert environment.run("python -m adafv --version").stdout == environment.run("adafv --version").stdout

    def test_help_does_not_wait_for_torch(self, environment: Environment) -> None:
        done = environment.run("python -X importtime -m adafv ask --help")
        assert done.returncode == 0
        assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.MULTILINE)


class TestMistakes:
    @pytest.mark.parametrize(
        ("command", "code", "said"),
        [
            ("adafv aks photo.jpg 'What is it?'", 2, "ask"),
            ("adafv ask photo.jpg 'What is it?' --keeep 8", 2, "--keep"),
            ("adafv ask photo.jpg 'What is it?' --method adavf", 2, "adafv"),
            ("adafv ask photo.jpg 'What is it?' --keep 0", 2, "at least one visual token"),
            ("adafv ask photo.jpg", 2, "Missing argument 'question'"),
            ("adafv ask photo.jpg '  '", 2, "question is empty"),
            ("adafv ask no.jpg 'What is it?'", 1, "there is no file no.jpg"),
            ("adafv ask broken.jpg 'What is it?'", 1, "broken.jpg is damaged or cut short"),
            ("adafv ask README.md 'What is it?'", 1, "README.md is not an image that can be read"),
            ("adafv ask src 'What is it?'", 1, "src is a directory"),
            ("adafv ask photo.jpg 'What is it?' --model ./no-such-folder", 1, "no-such-folder"),
        ],
    )
    @pytest.mark.release  # tests/test_cli.py has them all, of the sources
    def test_a_message(self, environment: Environment, photo: Path, command: str, code: int, said: str) -> None:
        photo.with_name("broken.jpg").write_bytes(photo.read_bytes()[:1000])
        done = environment.run(command)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        assert said in " ".join(done.stderr.split())
        no_traceback(done)


@pytest.mark.release
class TestNoNetwork:
    def test_bundled(self, environment: Environment, photo: Path) -> None:
        done = environment.run("adafv ask photo.jpg 'what is in the picture?'", variables=NO_NETWORK)
        assert done.returncode == 0, done.stderr

    def test_picture(self, environment: Environment) -> None:
        done = environment.run("adafv ask https://example.com/a.jpg 'What is it?'", variables=NO_NETWORK)
        assert done.returncode == 1
        assert "https://example.com/a.jpg cannot be reached" in done.stderr
        assert "download the image yourself" in done.stderr
        no_traceback(done)

    def test_model(self, environment: Environment, photo: Path) -> None:
        command = "adafv ask photo.jpg 'What is it?' --model llava-hf/llava-1.5-13b-hf"
        done = environment.run(command, variables=NO_NETWORK, timeout=300)
        assert done.returncode == 1
        assert "llava-hf/llava-1.5-13b-hf" in done.stderr
        assert "network" in done.stderr
        no_traceback(done)


class TestJson:
    @pytest.mark.release
    @pytest.mark.parametrize("options", ["", "--compare --repeats 1"])
    def test_ask(self, environment: Environment, photo: Path, options: str) -> None:
        command = f"adafv ask photo.jpg 'what is in the picture?' {options} --json | python -m json.tool"
        done = environment.run(command)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tokens_before"] == 144

    def test_env(self, environment: Environment) -> None:
        done = environment.run("adafv env --json | python -m json.tool")
        assert done.returncode == 0, done.stderr
        facts, found = json.loads(done.stdout), environment.installed()
        assert facts["adafv"] == found["adafv"]
        assert facts["python"]["version"].startswith(environment.release)
        assert facts["torch"]["version"].partition("+")[0] == found["torch"].partition("+")[0]
        assert facts["transformers"]["version"] == found["transformers"]
        assert facts["transformers"]["in_tested_range"] is True
        assert facts["packages"]["accelerate"] is None
        assert str(environment.home) not in done.stdout
        assert str(environment.folder) not in done.stdout


@pytest.mark.release
class TestPage:
    """Last in this file: from here on the environment has Gradio."""

    def test_message_says_how_to_get_it_and_that_works(self, environment: Environment) -> None:
        before = environment.run("adafv page")
        assert before.returncode == 1
        assert before.stdout == ""
        (command,) = re.findall(r"run: pip install '(.+?)'", before.stderr)
        assert Requirement(command).name == "gradio"
        environment.install("--no-compile", command)
        assert environment.run("python -m pip check").returncode == 0

    def test_it_opens(self, environment: Environment, free_port: int) -> None:
        if "gradio" not in environment.installed():
            pytest.fail("the test before this one installs Gradio")
        command = [str(environment.folder / "bin" / "adafv"), "page", "--port", str(free_port)]
        variables = environment.variables(NO_NETWORK)
        with subprocess.Popen(
            command,
            cwd=environment.clone,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Who runs tests in the background of a shell has it ignored, and so would this process.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as server:
            try:
                assert server.stdout is not None
                address = server.stdout.readline().strip()
                assert address == f"http://127.0.0.1:{free_port}"
                direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with direct.open(address, timeout=30) as answer:
                    assert answer.status == 200
                    assert b"adafv" in answer.read()
                server.send_signal(signal.SIGINT)
                assert server.wait(timeout=30) in (0, 130)
            finally:
                server.kill()
            assert server.stderr is not None
            assert "Traceback" not in server.stderr.read()


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

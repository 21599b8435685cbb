"""`adafv serve`: the real server over HTTP. Its answers, its counts, and how it refuses what it cannot do."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from engines import SAMPLES, picture
from PIL import Image
from servers import (
    SMALL,
    Server,
    body,
    budget,
    environment_of_a_user,
    image,
    image_at,
    running,
    served,
    text,
)

from adafv.asking.session import Session
from adafv.engines.vllm import cpu_torchvision

QUESTIONS = [
    ("bird", "What color is the banana?"),
    ("boats", "How many boats are there?"),
    ("cars", "What color is the house?"),
    ("key", "Is there a key?"),
]
TOKENS = 144
"""Of an image, unpruned."""
MOST = 200
"""Of the server's --max-keep: more than an image has, so that both limits can be met."""
BIRD, BANANA = QUESTIONS[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = served("--keep", "16", "--request-budgets", "--max-keep", str(MOST))
    with running(tmp_path_factory.mktemp("server"), command) as server:
        yield server


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.load("bundled", "float32", torch.device("cpu"))


@pytest.fixture
def asks_still(server: Server) -> Iterator[None]:
    """The server must answer, and rightly, after whatever a test did to it."""
    yield
    assert server.ask(picture(BIRD), BANANA) == ("green", 25)


class TestAnswers:
    @pytest.mark.parametrize("keep", [None, 8, 36, TOKENS])
    def test_as_in_transformers(self, server: Server, session: Session, keep: int | None) -> None:
        for name, question in QUESTIONS:
            inputs = session.inputs(picture(name), question)
            alone = session.ask(inputs, session.pruner("adafv", keep or 16), 8)
            assert alone.record is not None
            options = {} if keep is None else budget(keep)
            given, prompt = server.ask(picture(name), question, **options)
            assert given == alone.answer
            assert prompt == alone.record.prompt_length_after == inputs["input_ids"].shape[1] - TOKENS + (keep or 16)

    def test_a_number_of_tokens_is_an_upper_bound(self, server: Server) -> None:
        """Also a request's, so that one number fits pictures of different sizes; as in transformers."""
        whole = server.ask(picture(BIRD), BANANA, **budget(TOKENS))
        assert server.ask(picture(BIRD), BANANA, **budget(TOKENS + 1)) == whole
        assert server.ask(picture(BIRD), BANANA, **budget(MOST)) == whole
        two = server.ask(picture(BIRD), picture("key"), BANANA, **budget(MOST))
        assert two[1] == 9 + 2 * TOKENS

    def test_a_budget_may_be_text(self, server: Server) -> None:
        """As on the command line."""
        assert server.ask(picture(BIRD), BANANA, **budget("36")) == server.ask(picture(BIRD), BANANA, **budget(36))

    def test_without_image(self, server: Server) -> None:
        assert server.ask(BANANA)[1] == 9

    def test_two_images(self, server: Server) -> None:
        assert server.ask(picture("bird"), picture("key"), BANANA)[1] == 9 + 2 * 16

    def test_streamed(self, server: Server) -> None:
        wish = body(picture(BIRD), BANANA, stream=True, stream_options={"include_usage": True}, **budget(32))
        with server.client.stream("POST", "/v1/chat/completions", json=wish) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        *events, done = lines
        assert done == "[DONE]"
        parts = [json.loads(event) for event in events]
        said = "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])
        assert said.strip() == "green"
        assert parts[-1]["usage"]["prompt_tokens"] == 9 + 32


class TestRefusals:
    @pytest.mark.usefixtures("asks_still")
    @pytest.mark.parametrize(
        ("keep", "reason"),
        [
            (0, "at least one visual token"),
            (-3, "at least one visual token"),
            (1.5, "a share lies above 0"),
            (0.1, "do not compare"),
            ("x", "'x' is not a budget"),
            ("10%", "do not compare"),
            (None, "None is not a budget"),
            (True, "is a truth value"),
            ([8], "[8] is not a budget"),
            (MOST + 1, "this server keeps at most max_keep=200"),
            (10**30, "no image has so many visual tokens"),
        ],
    )
    def test_budget(self, server: Server, keep: Any, reason: str) -> None:
        response = server.post(body(picture(BIRD), BANANA, **budget(keep)))
        assert response.status_code == 400
        assert reason in response.json()["error"]["message"]

    @pytest.mark.usefixtures("asks_still")
    def test_budget_of_a_stream(self, server: Server) -> None:
        """Before the stream begins: not as an event of status 200."""
        response = server.post(body(picture(BIRD), BANANA, stream=True, **budget(0)))
        assert response.status_code == 400

    @pytest.mark.usefixtures("asks_still")
    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"kep": 8}, "have no 'kep'"), ({"method": "random"}, "have no 'method'"), (8, "give {"), ([], "give {")],
    )
    def test_options(self, server: Server, options: Any, reason: str) -> None:
        response = server.post(body(picture(BIRD), BANANA, mm_processor_kwargs={"adafv": options}))
        assert response.status_code == 400
        assert reason in response.json()["error"]["message"]

    @pytest.mark.usefixtures("asks_still")
    @pytest.mark.parametrize("options", [{"size": {"height": 96, "width": 96}}, {"do_resize": False}])
    def test_other_options_of_the_processor(self, server: Server, options: Any) -> None:
        """The tower takes one size only; in the worker that would be found out too late."""
        response = server.post(body(picture(BIRD), BANANA, mm_processor_kwargs=options))
        assert response.status_code == 400
        assert "can set 'adafv' alone" in response.json()["error"]["message"]

    @pytest.mark.usefixtures("asks_still")
    def test_placeholder_where_all_is_kept(self, server: Server) -> None:
        """No text is looked for then, but the placeholder that someone typed would be taken for the image's."""
        response = server.post(body("<image> " + BANANA, picture(BIRD), **budget(TOKENS)))
        assert response.status_code == 400
        assert "2 image placeholders for 1 image(s)" in response.json()["error"]["message"]

    @pytest.mark.usefixtures("asks_still")
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ([picture(BIRD), "<image> " + BANANA], "2 image placeholders for 1 image(s)"),
            (["<image> " + BANANA, picture(BIRD)], "2 image placeholders for 1 image(s)"),
            ([image(b"no picture"), BANANA], "cannot identify image"),
            ([image((SAMPLES / "bird.png").read_bytes()[:3000]), BANANA], "truncated"),
            ([image(b"some words", "text/plain"), BANANA], "cannot identify image"),
            ([image(Image.new("RGB", (2, 40_000))), BANANA], "2 x 40000 pixels, 20,000 times as long as it is wide"),
            ([picture(BIRD), image(Image.new("RGB", (40_000, 2))), BANANA], "image 2 of the request is 40000 x 2"),
            ([image_at("data:image/png;base64,%%%"), BANANA], ""),
            ([image_at("data:"), BANANA], ""),
            ([image_at("ftp://example.org/a.png"), BANANA], ""),
            ([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, BANANA], "video"),
            ([{"type": "image_embeds", "image_embeds": "AAAA"}, BANANA], "embeds"),
        ],
    )
    def test_content(self, server: Server, content: list[Any], reason: str) -> None:
        response = server.post(body(*content))
        assert response.status_code == 400
        assert reason in response.json()["error"]["message"]

    @pytest.mark.usefixtures("asks_still")
    def test_data_url_that_vllm_does_not_read(self, server: Server) -> None:
        assert server.post(body(image_at("data:image/png,abc"), BANANA)).status_code == 501

    @pytest.mark.usefixtures("asks_still")
    def test_placeholder_without_image_is_a_word(self, server: Server) -> None:
        """As in vLLM without adafv."""
        assert server.ask("<image> " + BANANA)[1] == 10

    @pytest.mark.usefixtures("asks_still")
    def test_too_long(self, server: Server) -> None:
        response = server.post(body(*[picture(BIRD)] * 15, BANANA, **budget(TOKENS)))
        assert response.status_code == 400
        assert "2048" in response.json()["error"]["message"]

    def test_unknown_model(self, server: Server) -> None:
        assert server.post(body(BANANA, model="another")).status_code == 404


class TestOnCpus:
    """Nothing but the documented command was given, not what conftest.py sets for engines in this process."""

    def test_what_was_set_is_said(self, server: Server) -> None:
        assert "note: --kv-cache-memory-bytes 1G is set" in server.log
        if cpu_torchvision.FOLDER.as_posix() in os.environ.get("PYTHONPATH", ""):  # conftest.py needed it
            assert "note: torchvision " in server.log

    def test_memory_is_bounded(self, server: Server) -> None:
        """2.5 GiB; vLLM itself would take 92 % of the machine's."""
        server.ask(picture(BIRD), BANANA)
        leader = psutil.Process(server.process.pid)
        processes = [leader, *leader.children(recursive=True)]
        assert sum(process.memory_full_info().pss for process in processes) < 3.5 * 2**30


class TestNoWords:
    @pytest.mark.parametrize(
        ("name", "words"), [("bird", []), ("boats", [text("")]), ("cars", [text("  ")]), ("key", [text("hello")])]
    )
    def test_saliency_chooses(self, server: Server, session: Session, name: str, words: list[Any]) -> None:
        """ "hello" is no word of the bundled model."""
        inputs = session.inputs(picture(name), words[0]["text"] if words else "")
        alone = session.ask(inputs, session.pruner("saliency", 16), 8)
        assert alone.record is not None
        before = server.metrics()["adafv:images_without_words_total"]
        assert server.ask(picture(name), *words) == (alone.answer, alone.record.prompt_length_after)
        server.wait_for({"adafv:images_without_words_total": before + 1})

    def test_is_said_once(self, server: Server) -> None:
        for name in ("mushrooms", "tree"):
            server.ask(picture(name))
        assert server.log.count("no word of a prompt counts for its image, so saliency alone chooses") == 1

    def test_is_not_counted_where_nothing_is_chosen(self, server: Server) -> None:
        before = server.metrics()["adafv:images_without_words_total"]
        server.ask(picture("bird").rotate(180), **budget(TOKENS))
        server.ask(picture("bird").rotate(180), BANANA)
        assert server.metrics()["adafv:images_without_words_total"] == before


class TestMetrics:
    def test_counters_agree_with_what_was_asked(self, server: Server) -> None:
        """Every step on a picture that the server has not seen before."""
        upside_down = picture("tree").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        steps: list[tuple[list[Any], dict[str, Any], dict[str, int]]] = [
            ([upside_down, "What color is the tree?"], {}, {"images": 1, "tower_runs": 1, "visual_tokens_kept": 16}),
            ([upside_down, "What color is the tree?"], {}, {"images": 0}),  # vLLM's own cache of encoded images has it
            ([upside_down, "Is there a tree?"], {}, {"images": 1, "tower_cache_hits": 1, "visual_tokens_kept": 16}),
            (
                [upside_down, "Is there a tree?"],
                budget(8),
                {"images": 1, "tower_cache_hits": 1, "visual_tokens_kept": 8},
            ),
            (
                [upside_down, "Is there a tree?"],
                budget(TOKENS),
                {"images": 1, "tower_cache_hits": 1, "visual_tokens_kept": TOKENS},
            ),
            (["Is there a tree?"], {}, {"images": 0}),
            (
                [upside_down, "Is there a car?", picture("tree").rotate(90), "How many?"],
                {},
                {"images": 2, "tower_cache_hits": 1, "tower_runs": 1, "visual_tokens_kept": 32},
            ),
        ]
        for content, options, counted in steps:
            before = server.metrics()
            _, prompt = server.ask(*content, **options)
            counted = {"tower_runs": 0, "tower_cache_hits": 0, "visual_tokens_kept": 0} | counted
            counted["visual_tokens_before"] = TOKENS * counted["images"]
            expected = {f"adafv:{name}_total": number for name, number in counted.items()}
            expected |= {"vllm:request_success_total": 1, "vllm:prompt_tokens_total": prompt}
            server.wait_for({name: before[name] + number for name, number in expected.items()})

    def test_refused_requests_are_not_counted(self, server: Server) -> None:
        before = server.metrics()
        server.post(body(picture(BIRD), BANANA, **budget(0)))
        after = server.metrics()
        assert {name: after[name] for name in before if name.startswith("adafv:")} == {
            name: number for name, number in before.items() if name.startswith("adafv:")
        }

    def test_size_of_the_cache(self, server: Server) -> None:
        assert 0 < server.metrics()["adafv:tower_cache_bytes"] <= 256 * 2**20

    def test_line_in_the_log(self, server: Server) -> None:
        server.ask(picture(BIRD), BANANA)
        assert "adafv: 1 images, " in server.log
        assert "visual tokens kept; encoded before: " in server.log


def test_signal_ends_it_and_leaves_nothing(server: Server) -> None:
    """The last one that needs this server."""
    assert any(path.name.startswith("adafv-metrics-") for path in server.temporary.iterdir())
    assert server.stop() == 0
    assert not [path for path in server.temporary.iterdir() if path.name.startswith("adafv-")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Plain vLLM, started by what `adafv serve` prints, without budgets of requests, on a machine where it never ran."""
    command = [sys.executable, "-m", "adafv", "serve", "bundled", "--keep", "0.25", "--method", "saliency"]
    printed = subprocess.run(
        [*command, "--print-command", "--", *SMALL],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment_of_a_user(),
    )
    words = shlex.split(printed.stdout)
    program = words.index("python")
    variables = dict(word.split("=", 1) for word in words[:program])
    command = [sys.executable, *words[program + 1 :]]
    variables["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
    with running(tmp_path_factory.mktemp("plain"), command, **variables) as server:
        yield server


@pytest.mark.release
class TestPrintedCommand:
    def test_answers(self, plain: Server, session: Session) -> None:
        inputs = session.inputs(picture(BIRD), BANANA)
        alone = session.ask(inputs, session.pruner("saliency", 0.25), 8)
        assert plain.ask(picture(BIRD), BANANA) == (alone.answer, 9 + TOKENS // 4)

    def test_budget_of_a_request_is_refused(self, plain: Server) -> None:
        response = plain.post(body(picture(BIRD), BANANA, **budget(8)))
        assert response.status_code == 400
        assert "--trust-request-mm-kwargs" in response.json()["error"]["message"]

    def test_methods_that_do_not_read_need_no_text(self, plain: Server) -> None:
        assert plain.ask(picture(BIRD))[1] == 9 - 6 + TOKENS // 4

    def test_is_in_the_log_without_counters(self, plain: Server) -> None:
        plain.ask(picture(BIRD), BANANA)
        assert "adafv: 1 images, 36 of 144 visual tokens kept" in plain.log
        assert not [name for name in plain.metrics() if name.startswith("adafv:")]

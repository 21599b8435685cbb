"""200 mixed requests at concurrency 32 through the real server: each is answered as if it were alone, and nothing is left."""

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
import torch
from engines import picture
from PIL import Image, ImageChops
from servers import Server, answer, body, budget, image, running, served

from adafv.asking.session import Session

pytestmark = pytest.mark.release
REQUESTS = 200
CONCURRENCY = 32
SECONDS = 120.0
"""Longest that a wave may take; it takes about ten on two quiet cores."""
CACHE_MB = 2
KEYS_AND_VALUES = ("--block-size", "32", "--num-gpu-blocks-override", "512")
"""150 MiB, so that the first wave fills them: memory that was never written does not show."""
MARGIN_MB = 100
"""By which a second, identical wave may raise the memory of all of the server's processes together; it was 53."""
NEW_IMAGES = 120
WORKER_MARGIN_MB = 8
"""By which so many new images, one after the other, may raise the worker's memory; their features alone hold 13 MiB."""
LONG = 1800
"""Tokens of an answer that is cancelled."""

NAMES = ("bird", "boats", "cars", "key", "mushrooms", "tree")
QUESTIONS = (
    "What color is the banana?",
    "How many boats are there?",
    "What color is the house?",
    "Is there a key?",
    "What is in the picture?",
    "What color is the background?",
    "Is the tree left of the bird?",
)
BUDGETS = (None, None, 4, 8, 24, 64, 144, 1000, 0.1, 0.5)


@dataclass(frozen=True)
class Wish:
    """One request."""

    kind: str
    """"answered", "malformed" or "cancelled"."""
    body: dict[str, Any] = field(hash=False)
    words: tuple[Any, ...] = ()
    """(picture's number, question, budget) of a request with one image."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = served("--keep", "16", "--request-budgets", "--tower-cache-mb", str(CACHE_MB), further=KEYS_AND_VALUES)
    # In the first mode vLLM can be told to forget its caches. torch on a CPU keeps code for every new shape of a batch, up
    # to a thousand; a hundred MiB of that would hide what is looked for here.
    variables = {"VLLM_SERVER_DEV_MODE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
    with running(tmp_path_factory.mktemp("load"), command, **variables) as server:
        yield server


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Thirty: more than the cache of encoded images holds."""
    chance = random.Random(0)
    varied = []
    for name in NAMES:
        original = picture(name)
        noise = Image.frombytes("RGB", original.size, chance.randbytes(3 * original.width * original.height))
        varied += [
            original,
            original.resize((301, 517)),
            original.rotate(90),
            original.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
            Image.blend(original, ImageChops.invert(noise), 0.15),
        ]
    return varied


@pytest.fixture(scope="module")
def wishes(pictures: list[Image.Image]) -> list[Wish]:
    chance = random.Random(1)
    parts = [image(each) for each in pictures]

    def answered(content: list[Any], **more: Any) -> dict[str, Any]:
        keep = chance.choice(BUDGETS)
        return body(*content, **({} if keep is None else budget(keep)), **more)

    def one(kind: str) -> Wish:
        number, question, keep = chance.randrange(len(parts)), chance.choice(QUESTIONS), chance.choice(BUDGETS)
        shown = parts[number]
        if kind == "one":
            options = {} if keep is None else budget(keep)
            return Wish("answered", body(shown, question, **options), (number, question, keep))
        if kind == "two":
            content = [shown, question, chance.choice(parts), chance.choice(QUESTIONS)]
            return Wish("answered", answered(content if chance.random() < 0.5 else [shown, content[2], question]))
        if kind == "none":
            return Wish("answered", body(question))
        if kind == "no words":
            return Wish("answered", answered([shown]))
        if kind == "malformed":
            bodies = [
                body(shown, question, **budget(chance.choice([0, -3, 1.5, "x", None, 2**31]))),
                body(image(b"no picture"), question),
                body(shown, f"<image> {question}"),
            ]
            return Wish("malformed", chance.choice(bodies))
        return Wish("cancelled", answered([shown, question], stream=True, ignore_eos=True) | {"max_tokens": LONG})

    weights = {"one": 56, "two": 15, "none": 10, "no words": 4, "malformed": 8, "cancelled": 7}
    kinds = chance.choices(list(weights), weights=list(weights.values()), k=REQUESTS)
    return [one(kind) for kind in kinds]


async def wave(server: Server, wishes: list[Wish]) -> list[tuple[int, Any]]:
    """(status, answer) of each request; a cancelled one ends after its first token, or even before it begins."""
    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=0)
    turn = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS, limits=limits) as client:

        async def send(number: int, wish: Wish) -> tuple[int, Any]:
            async with turn:
                if wish.kind == "cancelled":
                    return await cancel(number, wish)
                response = await client.post("/v1/chat/completions", json=wish.body)
                return response.status_code, answer(response.json()) if response.status_code == 200 else None

        async def cancel(number: int, wish: Wish) -> tuple[int, Any]:
            events = 0
            try:
                async with (
                    asyncio.timeout(0.02 if number % 3 == 0 else SECONDS),
                    client.stream("POST", "/v1/chat/completions", json=wish.body) as response,
                ):
                    async for line in response.aiter_lines():
                        events += line.startswith("data: ")
                        if events == 5:
                            return response.status_code, None
            except TimeoutError:
                return 200, None
            raise AssertionError("a stream to be cancelled ended by itself")

        async with asyncio.timeout(SECONDS):
            return await asyncio.gather(*(send(number, wish) for number, wish in enumerate(wishes)))


def resident_mb(server: Server, name: str = "") -> float:
    """Memory of the server's processes together, or of those with such a name."""
    leader = psutil.Process(server.process.pid)
    processes = [each for each in [leader, *leader.children(recursive=True)] if name in each.name()]
    assert processes
    return sum(process.memory_info().rss for process in processes) / 2**20


def nothing_is_left(server: Server) -> None:
    assert server.client.get("/health").status_code == 200
    server.wait_for({"vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0})
    assert 0 < server.metrics()["adafv:tower_cache_bytes"] <= CACHE_MB * 2**20


@pytest.fixture(scope="module")
def waves(server: Server, wishes: list[Wish]) -> list[tuple[list[tuple[int, Any]], float]]:
    """Two, one after the other: (what came back, memory afterwards)."""
    found = []
    for _ in range(2):
        start = time.monotonic()
        results = asyncio.run(wave(server, wishes))
        print(f"{len(results)} requests in {time.monotonic() - start:.1f} s")
        nothing_is_left(server)
        found.append((results, resident_mb(server)))
        print(f"{found[-1][1]:.0f} MiB")
    return found


def test_status(waves: Any, wishes: list[Wish]) -> None:
    expected = {"answered": 200, "malformed": 400, "cancelled": 200}
    assert {wish.kind for wish in wishes} == set(expected)
    for results, _ in waves:
        assert [status for status, _ in results] == [expected[wish.kind] for wish in wishes]


def test_every_answer_is_that_of_the_request_alone(server: Server, waves: Any, wishes: list[Wish]) -> None:
    """Alone on the same server, with all of vLLM's caches empty."""
    for number, wish in enumerate(wishes):
        if wish.kind == "answered":
            for cache in ("prefix", "mm", "encoder"):
                assert server.client.post(f"/reset_{cache}_cache").status_code == 200
            response = server.post(wish.body)
            assert response.status_code == 200
            alone = answer(response.json())
            assert [results[number][1] for results, _ in waves] == [alone, alone], wish.words


def test_answers_are_those_of_transformers(waves: Any, wishes: list[Wish], pictures: list[Image.Image]) -> None:
    session = Session.load("bundled", "float32", torch.device("cpu"))
    compared = [(number, wish) for number, wish in enumerate(wishes) if wish.words][:24]
    for number, wish in compared:
        picture_number, question, keep = wish.words
        inputs = session.inputs(pictures[picture_number], question)
        alone = session.ask(inputs, session.pruner("adafv", keep or 16), 8)
        assert alone.record is not None
        assert waves[0][0][number][1] == (alone.answer, alone.record.prompt_length_after), wish.words


def test_cancelled_requests_end(server: Server, waves: Any, wishes: list[Wish]) -> None:
    cancelled = sum(wish.kind == "cancelled" for wish in wishes)
    assert server.metrics()["vllm:generation_tokens_total"] < len(waves) * cancelled * LONG / 2


def test_memory_is_bounded(waves: Any) -> None:
    (_, first), (_, second) = waves
    assert second <= first + MARGIN_MB


def test_memory_of_the_worker_is_bounded(server: Server, waves: Any) -> None:
    """Batches of one shape, so that nothing but images could pile up."""
    shown = picture("bird")

    def ask(count: int) -> float:
        for _ in range(count):
            shown.putpixel((chance.randrange(432), chance.randrange(432)), tuple(chance.randbytes(3)))
            server.ask(shown, QUESTIONS[0])
        return resident_mb(server, "Worker")

    chance = random.Random(2)
    before = ask(30)
    after = ask(NEW_IMAGES)
    print(f"worker: {before:.0f} MiB, then {after:.0f} MiB")
    assert after <= before + WORKER_MARGIN_MB


def test_tower_cache_was_too_small_for_all(server: Server, waves: Any) -> None:
    """Or the waves would not have tried what happens when it forgets."""
    metrics = server.metrics()
    assert metrics["adafv:tower_runs_total"] > 30
    assert metrics["adafv:tower_cache_hits_total"] > 0

"""The benchmark of serving, without vLLM: what it sends, in which order, and what it makes of what comes back."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adafv.evaluation.speed.shapes import SHAPES
from benchmarks.serving import (
    PRUNED,
    SIDES,
    UNPRUNED,
    WORDS,
    Answer,
    Block,
    Load,
    Options,
    Step,
    arguments_of,
    ask,
    body,
    check_lengths,
    command,
    loads,
    order,
    percentile,
    picture,
    ratios,
    run_block,
    steps_in,
    summary,
    write_checkpoint,
)

TINY = SHAPES["llava-tiny"]


def block(first: float, count: int = 4, prompt_tokens: int = 124, tokens: int = 3) -> Block:
    """Requests sent together, whose first tokens come after 1, 2, ... times `first` seconds, the others 0.5 s apart."""
    answers = []
    for number in range(1, count + 1):
        arrivals = tuple(10.0 + number * first + 0.5 * token for token in range(tokens))
        answers.append(Answer(10.0, arrivals, prompt_tokens))
    return Block(tuple(answers))


# Statistics -----------------------------------------------------------------------------------------------------------


def test_each_pair_has_both_sides_and_neither_always_comes_first() -> None:
    blocks = order(4)
    assert [side for _, side in blocks] == [*SIDES, *SIDES[::-1]] * 2
    assert [pair for pair, _ in blocks] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("percent", [0, 25, 50, 95, 100])
def test_percentile(percent: float) -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100)
    assert percentile(values, percent) == pytest.approx(float(expected))
    assert percentile([7.0], percent) == 7.0


def test_times_of_a_block() -> None:
    one = block(first=2.0)
    assert [answer.first_token for answer in one.answers] == [2.0, 4.0, 6.0, 8.0]
    assert {answer.per_token for answer in one.answers} == {0.5}
    assert one.seconds == 9.0  # from the first that is sent to the last token
    assert one.throughput == pytest.approx(4 / 9)


def test_a_ratio_is_taken_pair_by_pair() -> None:
    """The machine is slow during the second pair; the ratio of the medians would be another one."""
    pairs = [
        {UNPRUNED: block(unpruned), PRUNED: block(pruned)} for unpruned, pruned in ((1.0, 0.5), (8.0, 2.0), (2.0, 0.2))
    ]
    found = {row.metric: row for row in ratios(8, pairs)}
    first = found["first token, mean s"]
    assert (first.concurrency, first.pairs, first.ratio, first.lowest, first.highest) == (8, 3, 0.25, 0.1, 0.5)
    assert (first.unpruned, first.pruned) == (5.0, 1.25)
    assert found["requests per second"].lowest > 1  # more of them is better, less of all the others
    assert found["time per further token, mean s"].ratio == 1.0


LOG = """\
INFO [loggers.py:199] Engine 000: Iteration(164): 1 context requests, 124 context tokens, 0 generation requests, \
0 generation tokens, iteration elapsed time: 1628.43 ms, CPU KV cache usage: 0.1%, encoder inputs: 1, encoder output \
embeddings: 64
INFO 127.0.0.1:55 - "POST /v1/chat/completions HTTP/1.1" 200 OK
INFO [loggers.py:199] Engine 000: Iteration(165): 3 context requests, 372 context tokens, 2 generation requests, \
2 generation tokens, iteration elapsed time: 2777.00 ms, CPU KV cache usage: 0.6%, encoder inputs: 3, encoder output \
embeddings: 192
INFO [loggers.py:199] Engine 000: Iteration(166): 0 context requests, 0 context tokens, 5 generation requests, \
5 generation tokens, iteration elapsed time: 200.00 ms, CPU KV cache usage: 0.6%
"""


def test_steps_are_read_from_the_log() -> None:
    steps = steps_in(LOG)
    assert steps == (Step(1, 124, 0, 1.62843, 1), Step(3, 372, 2, 2.777, 3), Step(0, 0, 5, 0.2, 0))
    found = summary(32, PRUNED, steps)
    assert (found.steps, found.images, found.most_images, found.longest) == (3, 2.0, 3, 2.777)
    assert summary(1, PRUNED, steps[:1]).longest == 0.0  # nobody waited for a further token


@pytest.mark.parametrize(
    ("unpruned", "pruned", "tokens", "wrong"),
    [
        (636, 124, 3, None),
        (636, 636, 3, "the same words"),  # nothing pruned
        (124, 124, 3, "the same words"),  # everything pruned
        (636, 123, 3, "the same words"),
        (636, 124, 4, "answers have"),
    ],
)
def test_what_was_not_to_be_measured_is_refused(unpruned: int, pruned: int, tokens: int, wrong: str | None) -> None:
    pair = {UNPRUNED: block(1.0, prompt_tokens=unpruned), PRUNED: block(1.0, prompt_tokens=pruned)}
    if wrong is None:
        check_lengths(pair, Options(tokens=tokens))
    else:
        with pytest.raises(RuntimeError, match=wrong):
            check_lengths(pair, Options(tokens=tokens))


# Requests -------------------------------------------------------------------------------------------------------------


def test_both_sides_send_the_same_but_the_budget() -> None:
    image = picture(5, 56)
    unpruned, pruned = (json.loads(body(image, keep, 16)) for keep in (1.0, 64))
    assert unpruned.pop("mm_processor_kwargs") == {"adafv": {"keep": 1.0}}
    assert pruned.pop("mm_processor_kwargs") == {"adafv": {"keep": 64}}
    assert unpruned == pruned
    assert (pruned["max_tokens"], pruned["ignore_eos"], pruned["stream"]) == (16, True, True)


def test_every_request_has_a_picture_of_its_own() -> None:
    pictures = [picture(seed, 56) for seed in range(8)]
    assert len(set(pictures)) == 8
    assert picture(3, 56) == pictures[3]
    shown = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert shown.size == (56, 56)


def test_loads_of_the_command_line() -> None:
    assert [load.concurrency for load in loads(arguments_of([]))] == [1, 8, 32]
    assert loads(arguments_of(["--concurrency", "32", "--pairs", "2", "--requests", "40"])) == [Load(32, 40, 2)]
    assert max(load.requests for load in loads(arguments_of(["--quick"]))) <= 4
    for wrong in (
        "--keep 576",
        "--keep 0",
        "--tokens 1",
        "--concurrency 7",
        "--requests 31",  # never 32 at a time
        "--pairs 0",
        "--quick --concurrency 8",
    ):
        with pytest.raises(SystemExit):
            arguments_of(wrong.split())


def test_the_server_helps_neither_side_by_a_cache() -> None:
    parts = command(Path("model"), 80, Options(keep=58, server=("--max-num-batched-tokens", "512")))
    shown = " ".join(parts)
    for option in (
        "--keep 58",
        "--request-budgets",
        "--tower-cache-mb 0",
        "--no-enable-prefix-caching",
        "--mm-processor-cache-gb 0",
    ):
        assert option in shown
    assert parts[-2:] == ["--max-num-batched-tokens", "512"]


def test_the_checkpoint_is_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Options(layers=1, tower_layers=2, shape=TINY, dtype="float32"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WORDS}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    image = Image.open(io.BytesIO(base64.b64decode(picture(0, 56).partition(",")[2])))
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = inputs["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == 16
    assert processor.tokenizer.unk_token_id not in ids
    assert 55 <= ids.shape[1] - 16 <= 65
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


# Over HTTP ------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers like vLLM, slowly: a role, then tokens; the request says how many, and how it goes wrong."""

    delay = 0.05
    at_once = most_at_once = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        with self.lock:
            type(self).at_once += 1
            type(self).most_at_once = max(self.most_at_once, self.at_once)
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(wish.get("status", 200))
        self.end_headers()
        for event in wish["events"]:
            time.sleep(self.delay)
            self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
        with self.lock:
            type(self).at_once -= 1

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
ONE, TWO = {"choices": [{"delta": {}, "token_ids": [7]}]}, {"choices": [{"delta": {}, "token_ids": [7, 8]}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 124}}


def request(*events: object, status: int = 200) -> bytes:
    return json.dumps({"events": events, "status": status}).encode()


def test_tokens_are_timed_as_they_arrive() -> None:
    with serving() as port:
        answer = ask(port, request(ROLE, ONE, ONE, TWO, USAGE, "[DONE]"))
    assert len(answer.arrivals) == 4
    assert answer.prompt_tokens == 124
    assert answer.first_token >= 2 * Handler.delay  # the role is no token
    assert answer.arrivals[2] - answer.arrivals[0] >= 1.5 * Handler.delay
    assert answer.arrivals[3] == answer.arrivals[2]  # both came in one piece


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request("no", status=400), "answered 400"),
        (request(ROLE, ONE, {"error": {"message": "out of memory"}}), "out of memory"),
        (request(ROLE, ONE), "ended early"),
        (request(ROLE, USAGE, "[DONE]"), "ended early"),
    ],
)
def test_a_failed_request_fails_the_benchmark(wrong: bytes, message: str) -> None:
    with serving() as port, pytest.raises(RuntimeError, match=message):
        ask(port, wrong)


def test_so_many_clients_and_no_more() -> None:
    Handler.most_at_once = 0
    with serving() as port:
        found = run_block(port, [request(ONE, ONE, USAGE)] * 9, concurrency=3)
    assert len(found.answers) == 9
    assert Handler.most_at_once == 3

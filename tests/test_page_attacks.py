"""The page in front of strangers: requests that no browser would send, over real HTTP to the real command."""

import html
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from page_server import QUESTION, Server, by_python, has_ipv6, needs, serving, started_browser
from PIL import Image
from processors import photo, processor, speaking_model

from adafv.asking.session import Session
from adafv.errors import AdaFVError, ImageError
from adafv.page import turns as turns_module
from adafv.page import uploads as uploads_module
from adafv.page.answers import Answers, message
from adafv.page.uploads import MAX_ARCHIVE, MAX_BYTES, Uploads

httpx = pytest.importorskip("httpx")
pytestmark = [needs("gradio"), pytest.mark.slow]

FILE = {"_type": "gradio.FileData"}
CHOOSE, CLEAR, CHECK, ASK, SHOW = range(5)
"""Numbers of the page's first functions."""
IN_THE_BROWSER = (CLEAR, SHOW)
"""Those that need no server, and so have nothing there."""
SETTINGS = [QUESTION, "25%", ["adafv", "saliency"], 2]
GONE = "The picture is no longer there; choose or upload it again."
SECONDS = 60.0
"""That a request may take before it counts as stuck; the machine may be busy."""


def short(value: Any) -> str:
    """A parameter as part of a test's name."""
    return repr(value)[:24]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """After all attacks it still answers."""
    with serving(tmp_path_factory.mktemp("attacked")) as served:
        yield served
        with httpx.Client(base_url=served.url, timeout=SECONDS, trust_env=False) as client:
            picture = upload(client, served.samples / "sample1.png")
            assert "<article" in ask(client, [{"path": picture}, *SETTINGS])


@pytest.fixture
def http(server: Server) -> Iterator[Any]:
    """Someone with a network connection. Afterwards nothing unforeseen may have happened, and the page must still answer."""
    before = len(server.log.read_text())
    with httpx.Client(base_url=server.url, timeout=SECONDS, trust_env=False) as client:
        yield client
        assert "upload a picture first" in ask(client, [None, *SETTINGS])
    log = server.log.read_text()[before:]
    assert "Traceback" not in log, log
    assert server.process.poll() is None


@pytest.fixture
def secret(server: Server) -> Path:
    """A picture on the server's disk that nobody has uploaded; in the folder of temporary files, for Gradio trusts that."""
    path = server.folder / "secret.png"
    photo(7).save(path)
    return path


def upload(client: Any, path: Path) -> str:
    answer = client.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())})
    assert answer.status_code == 200, answer.text
    (there,) = answer.json()
    return str(there)


def outcome(client: Any, asked: Any, event_path: str) -> str:
    """What came of a call: the refusal, or all that was sent after it was taken on."""
    if asked.status_code != 200:
        assert 400 <= asked.status_code < 500, asked.text
        return str(asked.json()["detail"])
    text = client.get(event_path.format(**asked.json())).text
    assert "event: error" not in text, text
    (said,) = re.findall(r"event: complete\ndata: (.*)\n", text)
    return str(said)


def ask(client: Any, data: Any) -> str:
    return outcome(client, post(client, "/gradio_api/call/ask", {"data": data}), "/gradio_api/call/ask/{event_id}")


def post(client: Any, path: str, body: Any) -> Any:
    """As `json=`, but also for values that are no JSON, such as NaN, as Python's own parser takes them."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=content, headers={"Content-Type": "application/json"})


def problem(said: str) -> str:
    """The message in `said`, which must be one line and no answer."""
    assert "<article" not in said
    assert "data:image" not in said
    if said.startswith("["):
        (said,) = re.findall(r'role="alert">(.*?)<', json.loads(said)[1])
        said = html.unescape(said)
    assert said
    assert "\n" not in said
    assert len(said) < 400
    assert "not foresee" not in said
    return said


class TestFiles:
    """Only what was uploaded is read, and nobody learns what else there is."""

    @pytest.mark.parametrize("marked", [False, True])
    def test_outside(self, server: Server, http: Any, secret: Path, marked: bool) -> None:
        uploads = server.uploads
        own = upload(http, server.samples / "sample2.png")
        sibling = uploads.with_name(uploads.name + "-2")
        sibling.mkdir(exist_ok=True)
        beside = sibling / "secret.png"
        beside.write_bytes(secret.read_bytes())
        paths = [
            str(secret),
            str(beside),
            str(server.samples / "sample1.png"),
            f"{uploads}/../secret.png",
            f"{own}/../../../secret.png",
            f"{uploads}/./../secret.png",
            os.path.relpath(secret),
            secret.as_uri(),
            str(server.folder / "missing.png"),
            str(uploads),
            str(uploads / "missing.png"),
            os.path.dirname(own),
            f"{own}\0",
            f"{own}.png",
            "/etc/passwd",
            "/root",
            "/proc/self/environ",
            "/dev/zero",
            "/dev/tty",
            "/dev/stdin",
            "",
            "\ud800",
            "x" * 5000,
        ]
        try:
            pictures = [{"path": path, "meta": FILE} if marked else {"path": path} for path in paths]
            said = {
                path: problem(ask(http, [picture, *SETTINGS])) for path, picture in zip(paths, pictures, strict=True)
            }
        finally:
            beside.unlink()
            sibling.rmdir()
        assert set(said.values()) == {GONE}

    def test_links(self, server: Server, http: Any, secret: Path) -> None:
        folder = server.uploads / "links"
        folder.mkdir()
        try:
            (folder / "link.png").symlink_to(secret)
            (folder / "folder").symlink_to(secret.parent)
            for path in (folder / "link.png", folder / "folder" / "secret.png"):
                assert path.exists()
                assert problem(ask(http, [{"path": str(path)}, *SETTINGS])) == GONE
                assert http.get(f"/gradio_api/file={path}").status_code == 403
        finally:
            (folder / "link.png").unlink()
            (folder / "folder").unlink()
            folder.rmdir()

    def test_nothing_that_blocks(self, server: Server, http: Any) -> None:
        fifo = server.uploads / "fifo.png"
        os.mkfifo(fifo)
        began = time.monotonic()
        try:
            for path in (fifo, "/dev/zero", "/dev/tty", "/dev/random", "/proc/kmsg"):
                assert problem(ask(http, [{"path": str(path)}, *SETTINGS])) == GONE
            assert http.get(f"/gradio_api/file={fifo}").status_code == 403
        finally:
            fifo.unlink()
        assert time.monotonic() - began < SECONDS

    def test_served_files(self, server: Server, http: Any, secret: Path) -> None:
        own = upload(http, server.samples / "sample2.png")
        assert http.get(f"/gradio_api/file={own}").content == (server.samples / "sample2.png").read_bytes()
        quoted = urllib.parse.quote(str(secret), safe="")
        for path in (
            f"file={secret}",
            f"file={quoted}",
            f"file={server.uploads}/../secret.png",
            f"file={server.uploads}/%2e%2e/secret.png",
            f"file={server.uploads}",
            f"file={secret.as_uri()}",
            "file=http://example.com/",
            f"file/{own}",
            f"file/{secret}",
            f"proxy={secret}",
        ):
            answer = http.get(f"/gradio_api/{path}")
            assert answer.status_code in (403, 404), path
            assert secret.read_bytes() not in answer.content
            assert str(server.folder) not in answer.text
        for path in ("/static/", "/assets/"):
            for way in (
                "../../secret.png",
                "%2e%2e/%2e%2e/config",
                f"{'%2e%2e/' * 20}etc/passwd",
                f"/{secret}",
                "..%2f..%2froutes.py",
            ):
                assert http.get(path + way).status_code in (403, 404), way


class TestEndpoints:
    """Of all that Gradio offers, what the page needs."""

    def test_all_others_do_not_exist(self, server: Server, http: Any, secret: Path) -> None:
        import gradio
        from gradio.routes import App

        with gradio.Blocks(analytics_enabled=False) as blocks:
            gradio.Textbox()
        needed = re.compile(
            r"/|/config|/theme.css|/favicon.ico|/robots.txt|/manifest.json|/log(in|out)|/(static|assets)/.*"
            r"|/gradio_api/(info|app_id|startup-events|user|login_check|queue/(join|data|status)|upload(_progress)?)"
            r"|/gradio_api/(theme.css|cancel|reset|heartbeat/.*|call/[^/]*(/[^/]*)?|file=.*)"
        )
        refused = 0
        routes = list(App.create_app(blocks).routes)
        for route in routes:
            routes += getattr(getattr(route, "original_router", None), "routes", [])  # a router inside the router
            path = re.sub(r"{[^}]*}", "2", getattr(route, "path", "/"))
            if needed.fullmatch(path.rstrip("/") or "/"):
                continue
            for method in sorted(getattr(route, "methods", None) or {"GET", "POST"}):
                answer = http.request(method, path, json={"data": [{"path": str(secret)}, *SETTINGS], "fn_index": ASK})
                assert answer.status_code == 404, (method, path)
                assert method == "HEAD" or answer.json() == {"detail": "there is no such thing here"}, (method, path)
                refused += 1
        assert refused > 40

    @pytest.mark.parametrize(
        "way", ["run/predict", "run/ask", "api/predict", "api/ask", "call/v2/ask", "call/check", "call/choose"]
    )
    def test_ways_around_the_queue(self, http: Any, secret: Path, way: str) -> None:
        data = {"data": [{"path": str(secret)}, *SETTINGS], "fn_index": ASK, "session_hash": "s"}
        for path in (f"/gradio_api/{way}", f"/gradio_api/{way}/", f"//gradio_api/{way}"):
            assert post(http, path, data).status_code in (404, 405)

    def test_private_functions(self, server: Server, http: Any, secret: Path) -> None:
        """The browser calls them by number, and so may anybody; they read nothing that was not uploaded either."""
        event = {"index": 0, "value": {"image": {"path": str(secret), "meta": FILE}, "caption": None}}
        said = []
        for number in range(10):
            for data in ([], [{"path": str(secret)}], [{"path": str(secret), "meta": FILE}], [{"path": "/missing"}]):
                call = {"data": data, "fn_index": number, "session_hash": f"hash{number}", "event_data": event}
                asked = post(http, "/gradio_api/queue/join", call)
                if asked.status_code == 200:
                    with http.stream("GET", f"/gradio_api/queue/data?session_hash=hash{number}") as stream:
                        messages = [line for line in stream.iter_lines() if "process_completed" in line]
                    said += messages
                    assert all('"success":true' in line for line in messages), messages
        assert said
        assert "secret" not in "".join(said)
        assert sum(GONE in line for line in said) == 3

    def test_checks_of_what_was_not_uploaded(self, server: Server, http: Any, secret: Path) -> None:
        """Called by number, with what no browser would send: one clear line, and nothing is left over."""
        functions = http.get("/config").json()["dependencies"]
        (number,) = (each["id"] for each in functions if len(each["inputs"]) == 9)
        rest = ["50%", ["adafv"], 1, "refuse", "auto", "", 8]
        own = {"path": upload(http, server.samples / "sample1.png")}
        passwd = {"path": "/etc/passwd", "meta": FILE}
        for data, said in (
            ([None, None, *rest], "Choose a file of questions first."),
            ([passwd, own, *rest], "The file of questions is no longer there"),
            ([{"path": str(secret)}, own, *rest], "The file of questions is no longer there"),
            ([own, own, *rest], "give a .jsonl or .csv file"),
            ([own, own, "50%", "adafv", 1, "refuse", "auto", "", 8], "give a .jsonl or .csv file"),
            ([own, own, *[None] * 7], "Keep=None is not a budget"),
            ([own, own, "50%", ["<img src=x>"], 1, "refuse", "auto", "", 8], "there is no method"),
            (["x", own, *rest], "cannot be a text"),
            ([own, [own], *rest], "cannot be a list"),
            ([own, own, *rest[:2], {"a": 1}, *rest[3:]], "cannot be an object"),
        ):
            call = {"data": data, "fn_index": number, "session_hash": "checking"}
            asked = post(http, "/gradio_api/queue/join", call)
            text = asked.text
            if asked.status_code == 200:
                with http.stream("GET", "/gradio_api/queue/data?session_hash=checking") as stream:
                    text = "".join(line for line in stream.iter_lines() if "process_generating" in line)
            assert said.lower() in text.lower(), data
            assert "<img" not in text
            assert "not foresee" not in text
        assert not list(server.uploads.glob("check-*"))

    @pytest.mark.parametrize("index", [-1, 2, 10**30, "0", 1.5, None, [], {}, True])
    def test_samples_that_are_not_there(self, http: Any, index: Any) -> None:
        call = {"data": [], "fn_index": CHOOSE, "session_hash": "choose", "event_data": {"index": index}}
        assert post(http, "/gradio_api/queue/join", call).status_code == 200
        with http.stream("GET", "/gradio_api/queue/data?session_hash=choose") as stream:
            (completed,) = [line for line in stream.iter_lines() if "process_completed" in line]
        assert "there is no such picture" in completed.lower()

    def test_nothing_is_fetched(self, server: Server, http: Any) -> None:
        """Whatever address is sent, and wherever it stands in a call."""
        fetched = []

        class Elsewhere(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fetched.append(self.path)
                self.send_response(404)
                self.end_headers()

            do_HEAD = do_GET

        with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere:
            threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
            for name in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"):
                url = f"http://{name}:{elsewhere.server_port}/picture.png"
                for picture in (
                    {"path": url},
                    {"path": url, "meta": FILE},
                    {"url": url, "meta": FILE},
                    {"path": "x.png", "url": url, "meta": FILE},
                    {"path": url, "url": url, "orig_name": url, "is_stream": True, "meta": FILE},
                ):
                    problem(ask(http, [picture, *SETTINGS]))
                    problem(ask(http, [None, picture, *SETTINGS[1:]]))
                for path in (
                    f"file={url}",
                    f"proxy={url}",
                    f"stream/{url}",
                    f"file={urllib.parse.quote(url, safe='')}",
                ):
                    assert http.get(f"/gradio_api/{path}").status_code in (403, 404)
            elsewhere.shutdown()
        assert fetched == []


class TestShapes:
    """Anything may be sent; one clear line comes back."""

    @pytest.mark.parametrize(
        ("picture", "said"),
        [
            (None, "Choose or upload a picture first."),
            ("data:image/png;base64,iVBORw0KGgo=", "cannot be a text"),
            (7, "cannot be a number"),
            (True, "cannot be a number"),
            ([], "cannot be a list"),
            ([{"path": "x"}], "cannot be a list"),
            ({}, 'has no "path"'),
            ({"path": None}, 'has no "path"'),
            ({"path": ["x"]}, 'has no "path"'),
            ({"path": {"path": "x"}}, 'has no "path"'),
            ({"url": "http://example.com/x.png"}, 'has no "path"'),
            ({"path": "data:image/png;base64,iVBORw0KGgo="}, GONE),
        ],
    )
    def test_pictures(self, http: Any, picture: Any, said: str) -> None:
        assert said in problem(ask(http, [picture, *SETTINGS]))

    @pytest.mark.parametrize(
        ("place", "value", "said"),
        [
            (1, None, "Type a question"),
            (1, 7, "not a text"),
            (1, True, "not a text"),
            (1, ["x"], "cannot be a list"),
            (1, {"text": "x"}, "cannot be an object"),
            (1, "\ud800", "half a letter"),
            (1, "x" * 60_000, "shorten it to 500"),
            (1, "What is <image>?", "<image>"),
            (2, float("nan"), "Keep=nan: a share lies above 0"),
            (2, float("inf"), "Keep=inf: a share lies above 0"),
            (2, -float("inf"), "a share lies above 0"),
            (2, 0, "at least one visual token"),
            (2, 10**400, "no image has so many"),
            (2, "ten", "Keep='ten' is not a budget"),
            (2, "\ud800", "is not a budget"),
            (2, True, "is a truth value"),
            (2, None, "Keep=None is not a budget"),
            (2, [10], "cannot be a list"),
            (2, "9" * 60_000, "is not a budget"),
            (3, "guess", "no method 'guess'"),
            (2, "1,2,3,4,5,6,7", "6 at most"),
            (2, "," * 60_000, "6 at most"),
            (3, None, "Choose a method first"),
            (3, [], "Choose a method first"),
            (3, 7, "no method 7"),
            (3, [7], "no list of 64 texts"),
            (3, [["adafv"]], "no list of 64 texts"),
            (3, ["adafv"] * 65, "no list of 64 texts"),
            (3, ["adafv"] * 64, "choose 12 at most"),
            (3, {"adafv": 1}, "cannot be an object"),
            (3, ["<img src=x onerror=alert(1)>"], "no method '<img"),
            (3, ["x" * 60_000], "120 at most"),
            (3, ["adafv:objective=best"], "known are: joint, split"),
            (3, ["adafv:objective=" + "x" * 100], "known are: joint, split"),
            (3, ["adafv:<img onerror>"], "not of the form name=value"),
            (3, ["adafv:\ud800=\ud800"], "no option"),
            (3, ["saliency:seed=1"], "no option 'seed'; it has none"),
            (4, 0, "give 1 to 128"),
            (4, 10**9, "give 1 to 128"),
            (4, float("nan"), "give 1 to 128"),
            (4, "4", "cannot be '4'"),
            (4, False, "cannot be False"),
            (4, [4], "cannot be a list"),
        ],
        ids=short,
    )
    def test_settings(self, server: Server, http: Any, place: int, value: Any, said: str) -> None:
        data: list[Any] = [{"path": upload(http, server.samples / "sample1.png")}, *SETTINGS]
        data[place] = value
        answer = ask(http, data)
        assert "<img" not in answer
        assert said in problem(answer)

    @pytest.mark.parametrize("data", [[], [None], [None] * 4, [None] * 6, [None] * 5000, None, "x", {"a": 1}, 7])
    def test_lengths(self, http: Any, data: Any) -> None:
        problem(ask(http, data))

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b"7",
            b'"x"',
            b"[" * 30_000,
            b'{"data":' + b"[" * 30_000,
            b"\xff\xfe",
            b'{"data": [NaN',
        ],
        ids=short,
    )
    def test_bodies(self, http: Any, body: bytes) -> None:
        for path in ("/gradio_api/call/ask", "/gradio_api/queue/join"):
            assert post(http, path, body).status_code in (400, 422)

    @pytest.mark.parametrize("number", [-1, *IN_THE_BROWSER, 99, 10**30, str(ASK), None, True, [ASK]])
    def test_functions_that_are_not_there(self, http: Any, number: Any) -> None:
        call = {"data": [None, *SETTINGS], "fn_index": number, "session_hash": "s"}
        assert post(http, "/gradio_api/queue/join", call).status_code == 404

    def test_too_much(self, http: Any) -> None:
        assert post(http, "/gradio_api/call/ask", {"data": ["x" * 70_000]}).status_code == 413
        assert http.post("/gradio_api/call/ask", content=iter([b"{}"])).status_code == 411
        large = bytes(MAX_BYTES)
        files = [("files", (f"{number}.png", large)) for number in range(7)]
        assert http.post("/gradio_api/upload", files=files).status_code == 413

    def test_question_and_answer_are_text(self, server: Server, http: Any) -> None:
        picture = upload(http, server.samples / "sample1.png")
        said = ask(http, [{"path": picture}, "<script>alert(1)</script><img src=x onerror=alert(1)>", *SETTINGS[1:]])
        assert "<article" in said
        assert "<script" not in said
        assert "onerror" not in said

    def test_bombs(self, server: Server, http: Any, tmp_path: Path) -> None:
        from test_page import claims

        bomb = tmp_path / "bomb.png"
        for size in ((60_000, 60_000), (9_000, 9_000), (2**31 - 1, 2), (1, 1), (0, 0)):
            bomb.write_bytes(claims(*size))
            problem(ask(http, [{"path": upload(http, bomb)}, *SETTINGS]))

    def test_names_of_uploads(self, server: Server, http: Any) -> None:
        data = (server.samples / "sample1.png").read_bytes()
        for name in (
            "../../escaped.png",
            "/tmp/escaped.png",
            "..",
            "a\\..\\b.png",
            "x" * 300 + ".png",
            ".hidden",
            "a b<c>.png",
        ):
            answer = http.post("/gradio_api/upload", files={"files": (name, data)})
            if answer.status_code == 200:
                (there,) = answer.json()
                assert Path(there).resolve().is_relative_to(server.uploads), name
        assert not (server.folder / "escaped.png").exists()
        assert not Path("/tmp/escaped.png").exists()

    def test_eight_threads(self, server: Server, http: Any, secret: Path) -> None:
        """Attacks and honest questions at once."""
        picture = upload(http, server.samples / "sample1.png")
        calls = [
            [{"path": picture}, *SETTINGS],
            [{"path": str(secret)}, *SETTINGS],
            [{"path": picture}],
            ["x", *SETTINGS],
        ] * 6
        with ThreadPoolExecutor(8) as users:
            said = list(users.map(lambda data: ask(http, data), calls))
        assert [("<article" in text) for text in said] == [True, False, False, False] * 6


class TestUploads:
    """The folder itself, without a server."""

    def test_a_link_put_in_place_while_reading(self, tmp_path: Path) -> None:
        root, outside = tmp_path / "uploads", tmp_path / "outside"
        for folder, text in ((root / "a", b"mine"), (outside, b"secret")):
            folder.mkdir(parents=True)
            (folder / "x.png").write_bytes(text)
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                (root / "a").rename(root / "b")
                (root / "a").symlink_to(outside)
                (root / "a").unlink()
                (root / "b").rename(root / "a")

        swapping = threading.Thread(target=swap)
        swapping.start()
        read = []
        try:
            for _ in range(5000):
                try:
                    read.append(Uploads(root).read(str(root / "a" / "x.png")))
                except ImageError:
                    read.append(b"")
        finally:
            stop.set()
            swapping.join()
        # On a busy machine it may never be there when it is read, so once more when nobody takes it away.
        read.append(Uploads(root).read(str(root / "a" / "x.png")))
        assert set(read) == {b"mine", b""}

    def test_without_descriptors_of_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on Windows."""
        monkeypatch.setattr(os, "supports_dir_fd", set())
        root = tmp_path / "uploads"
        root.mkdir()
        (root / "mine.png").write_bytes(b"mine")
        (tmp_path / "secret.png").write_bytes(b"secret")
        (root / "link.png").symlink_to(tmp_path / "secret.png")
        (root / "folder").symlink_to(tmp_path)
        assert Uploads(root).read(str(root / "mine.png")) == b"mine"
        for path in ("link.png", "folder/secret.png", "../secret.png", "", "missing.png"):
            with pytest.raises(ImageError, match="no longer there"):
                Uploads(root).read(str(root / path) if path else str(root))

    def test_no_descriptor_is_left_open(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x.png").write_bytes(b"mine")
        before = len(os.listdir("/proc/self/fd"))
        for path in ("a/x.png", "a", "a/y.png", "b/x.png", "a/x.png/y"):
            for _ in range(5):
                Uploads(tmp_path).holds(str(tmp_path / path))
        assert len(os.listdir("/proc/self/fd")) == before

    def test_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x.png").write_bytes(bytes(100))
        (tmp_path / "broken-off").write_bytes(bytes(100))
        assert Uploads(tmp_path).has_room()
        monkeypatch.setattr(uploads_module, "MAX_FOLDER", MAX_ARCHIVE + 150)
        assert not Uploads(tmp_path).has_room()
        monkeypatch.setattr(uploads_module, "KEPT_SECONDS", -1)
        assert Uploads(tmp_path).has_room()
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "x.png"]
        monkeypatch.setattr(uploads_module, "MAX_FILES", 1)
        assert not Uploads(tmp_path).has_room()


class _Hanging(Session):
    """A model that does not come back until it is let go."""

    def inputs(self, image: Image.Image, question: str) -> Any:
        if question == "Hang.":
            HANGING.set()
            LET_GO.wait(SECONDS)
        return super().inputs(image, question)


HANGING, LET_GO = threading.Event(), threading.Event()


def test_a_question_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "picture.png"
    photo(1).save(picture)
    answers = Answers(_Hanging(speaking_model("llava"), processor("llava")), Uploads(tmp_path))
    monkeypatch.setattr(turns_module, "PATIENCE", 1.0)
    hanging = threading.Thread(target=answers.compare, args=(str(picture), "Hang.", "25%", ("adafv",), 2))
    hanging.start()
    try:
        assert HANGING.wait(SECONDS)
        with ThreadPoolExecutor(8) as users:
            asked = [users.submit(answers.compare, str(picture), QUESTION, "25%", ("adafv",), 2) for _ in range(8)]
            for one in asked:
                with pytest.raises(AdaFVError, match="another question has been going on") as error:
                    one.result(SECONDS)
                assert message(error.value).endswith("start it again.")
        answers.check_picture(str(picture))
    finally:
        LET_GO.set()
        hanging.join(SECONDS)
    monkeypatch.setattr(turns_module, "PATIENCE", SECONDS)
    assert answers.compare(str(picture), QUESTION, "25%", ("adafv",), 2).results[1].timing.tokens == 4


WORD = "correct horse"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("locked"), "--password", given=f"{WORD}\n", start=by_python) as served:
        yield served


class TestPassword:
    def test_nothing_without(self, locked: Server) -> None:
        with httpx.Client(base_url=locked.url, timeout=SECONDS, trust_env=False) as stranger:
            for answer in (
                post(stranger, "/gradio_api/call/ask", {"data": [None, *SETTINGS]}),
                post(
                    stranger,
                    "/gradio_api/queue/join",
                    {"data": [None, *SETTINGS], "fn_index": ASK, "session_hash": "s"},
                ),
                stranger.post("/gradio_api/upload", files={"files": ("x.png", b"x")}),
                stranger.get("/config"),
                stranger.get("/gradio_api/info"),
                stranger.get("/gradio_api/queue/data?session_hash=s"),
            ):
                assert answer.status_code == 401
            for wrong in ("", "correct", WORD.upper(), WORD + "x", "\u00e9"):
                assert stranger.post("/login", data={"username": "me", "password": wrong}).status_code in (400, 422)
            assert stranger.get("/config").status_code == 401

    def test_everything_with(self, locked: Server) -> None:
        with httpx.Client(base_url=locked.url, timeout=SECONDS, trust_env=False) as friend:
            assert friend.post("/login", data={"username": "anyone", "password": WORD}).status_code == 200
            assert "<article" in ask(friend, [{"path": upload(friend, locked.samples / "sample1.png")}, *SETTINGS])

    def test_not_to_be_seen(self, locked: Server) -> None:
        of_process = Path("/proc", str(locked.process.pid))
        assert b"--password" in (of_process / "cmdline").read_bytes()
        assert b"correct" not in (of_process / "cmdline").read_bytes()
        assert WORD not in locked.log.read_text()

    @needs("playwright", browser=True)
    def test_in_a_browser(self, locked: Server) -> None:
        with started_browser() as browser:
            tab = browser.new_page()
            tab.goto(locked.url)
            tab.get_by_label("username").fill("anyone")
            tab.get_by_label("password").fill(WORD)
            tab.get_by_role("button", name="Login").click()
            tab.get_by_role("button", name="Ask", exact=True).wait_for()

    def test_from_the_environment(self, tmp_path: Path) -> None:
        with serving(tmp_path, ADAFV_PAGE_PASSWORD=WORD) as locked, httpx.Client(trust_env=False) as client:
            assert client.get(f"{locked.url}/config").status_code == 401
            assert "warning" not in locked.log.read_text()


@pytest.mark.parametrize(
    ("host", "shown", "others"),
    [
        pytest.param("::1", "http://[::1]:{port}", False, marks=pytest.mark.release),
        ("[::1]", "http://[::1]:{port}", False),
        pytest.param("::", "http://[::]:{port}", True, marks=pytest.mark.release),
        pytest.param("localhost", "http://localhost:{port}", False, marks=pytest.mark.release),
        ("0.0.0.0", "http://0.0.0.0:{port}", True),
    ],
)
def test_hosts(tmp_path: Path, host: str, shown: str, others: bool) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 here")
    with serving(tmp_path, "--host", host, url=shown) as server:
        with httpx.Client(base_url=server.url, timeout=SECONDS, trust_env=False) as client:
            assert "<article" in ask(client, [{"path": upload(client, server.samples / "sample1.png")}, *SETTINGS])
        log = server.log.read_text()
        assert ("anybody who reaches it can use it and upload pictures" in log) == others
        assert "Traceback" not in log

"""What the page's server answers at all, decided before Gradio sees a request.

Gradio has many more endpoints than the page needs: it fetches addresses that it is sent, opens files that it is named, and
calls functions that were declared private. Here is the short list of what the page itself uses; all else does not
exist. The arguments of a call are looked through as well: each may be of its own kind, and of all that may be said about a
file only its path is passed on, which is how `Uploads` gets to see every one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adafv.page.uploads import MAX_ARCHIVE, MEGABYTE, Uploads

MAX_CALL = 2**16
"""Bytes of a question with all its settings."""
MAX_UPLOAD = MAX_ARCHIVE + MAX_CALL
"""Bytes of an upload with all that is around the file."""
MAX_WORDS = 64
"""Of a list of words."""
FILE, WORDS, VALUE = "file", "words", "value"
"""Kinds of arguments: a file that was uploaded, a list of texts, a text or number."""
_API = "/gradio_api"
_READ = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/logout|/(static|assets)/.+"
    rf"|{_API}/(info|app_id|startup-events|user|login_check|queue/data|queue/status|upload_progress|theme\.css)"
    rf"|{_API}/(heartbeat|call/ask)/[^/]+"
)
_FILE = f"{_API}/file="
_UPLOAD = f"{_API}/upload"
_ASK, _JOIN = f"{_API}/call/ask", f"{_API}/queue/join"
_SMALL = frozenset({"/login", f"{_API}/cancel", f"{_API}/reset"})


class _Refused(Exception):
    """The request is not passed on."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """ASGI middleware around Gradio."""

    def __init__(self, app: ASGIApp, uploads: Uploads, functions: Mapping[int, Sequence[str]], ask: int) -> None:
        """
        Args:
            functions: the kinds of arguments that each function of the page takes, by Gradio's number for it.
            ask: number of the function that answers, the only one with a name.
        """
        self._app, self._uploads, self._functions, self._ask = app, uploads, functions, ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                receive = await self._checked(scope, receive)
            except _Refused as refused:
                await JSONResponse({"detail": str(refused)}, refused.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            if path.startswith(_FILE):
                if not await run_in_threadpool(self._uploads.holds, path.removeprefix(_FILE)):
                    raise _Refused(403, "this file is not here, or not for you")
                return receive
            if _READ.fullmatch(path):
                return receive
        elif method == "POST":
            if path == _UPLOAD:
                _check_length(
                    scope, MAX_UPLOAD, f"the upload is larger than {MAX_ARCHIVE // MEGABYTE} MB; make it smaller"
                )
                if not await run_in_threadpool(self._uploads.has_room):
                    raise _Refused(507, "there is no room for another file now; try again in an hour")
                return receive
            if path in _SMALL:
                _check_length(scope, MAX_CALL, f"the request is longer than {MAX_CALL} bytes")
                return receive
            if path in (_ASK, _JOIN):
                _check_length(scope, MAX_CALL, f"the question is longer than {MAX_CALL} bytes; shorten it")
                return self._looked_through(scope, await _whole(receive), receive)
        raise _Refused(404, "there is no such thing here")

    def _looked_through(self, scope: Scope, body: bytes, receive: Receive) -> Receive:
        """The same call with what Gradio must not act on taken out.

        Raises:
            _Refused: it is none that the page makes.
        """
        try:
            call = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Refused(400, "the call is not JSON") from error
        if not isinstance(call, dict) or not isinstance(call.get("data"), list):
            raise _Refused(422, 'the call has no list named "data"')
        number = self._ask if scope["path"] == _ASK else call.get("fn_index")
        kinds = self._functions.get(number) if type(number) is int else None
        if kinds is None:
            raise _Refused(404, "the page has no such function")
        if len(call["data"]) != len(kinds):
            raise _Refused(422, f'"data" has {len(call["data"])} values; the function takes {len(kinds)}')
        values = enumerate(zip(kinds, call["data"], strict=True), 1)
        passed_on = {
            "data": [_value(place, kind, value) for place, (kind, value) in values],
            "fn_index": number,
            "session_hash": call.get("session_hash"),
            "trigger_id": call.get("trigger_id"),
            "event_data": _event(call.get("event_data")),
        }
        body = json.dumps(passed_on).encode()
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope["headers"].append((b"content-length", str(len(body)).encode()))
        return _given(body, receive)


def _value(place: int, kind: str, value: Any) -> Any:
    """An argument as it may be passed on: of a file nothing but a path."""
    if value is None:
        return None
    if kind == FILE and isinstance(value, dict):
        if not isinstance(value.get("path"), str):
            raise _Refused(422, 'the file has no "path"; upload it, and give the path that the upload returns')
        return {"path": value["path"]}
    if kind == WORDS and isinstance(value, list):
        if len(value) > MAX_WORDS or not all(isinstance(each, str) for each in value):
            raise _Refused(422, f'value {place} of "data" is no list of {MAX_WORDS} texts at most')
        return value
    if kind == FILE or isinstance(value, (dict, list)):
        named = {"dict": "object", "list": "list", "str": "text"}.get(type(value).__name__, "number")
        raise _Refused(422, f'value {place} of "data" cannot be a{"n" if named == "object" else ""} {named}')
    return value


def _event(event: Any) -> dict[str, int] | None:
    """What a click was on, which is all that the page wants to know about it."""
    index = event.get("index") if isinstance(event, dict) else None
    return {"index": index} if type(index) is int else None


def _check_length(scope: Scope, most: int, message: str) -> None:
    """Browsers always say how much is coming, and the server below stops reading there."""
    length = Headers(scope=scope).get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise _Refused(411, "the request does not say how long it is (Content-Length)")
    if len(length) > 15 or int(length) > most:
        raise _Refused(413, message)


async def _whole(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":  # whoever sent it is gone
            raise _Refused(400, "the call broke off")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _given(body: bytes, receive: Receive) -> Receive:
    """A source of `body`, and after that of whatever happens to the connection."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message

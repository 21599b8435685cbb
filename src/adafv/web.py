"""Downloading a picture: http and https alone, within a time and a size, whatever the server does.

A socket's own timeout starts anew with every byte, and neither looking up a name nor a chain of redirects has one. So the
download runs in a thread of its own, and who asked waits for it as long as was said, for all of it together.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any

from adafv.errors import ImageError
from adafv.printable import shortened

_CHUNK = 1 << 16
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""Where NAT64 puts IPv4 addresses."""


def fetch(url: str, most: int, timeout: float, total: float) -> bytes:
    """The body that `url` answers with.

    Args:
        most: bytes.
        timeout: seconds that the server may be silent.
        total: seconds that all of it may take: names, connections, headers, redirects and body.

    Raises:
        ImageError: there is none, or it is too large or too slow. What the server wrote is shown printable.
    """
    download = _Download(url, most, min(timeout, max(total, 0.01)))
    thread = threading.Thread(target=download.run, name="adafv-download", daemon=True)
    thread.start()
    try:
        thread.join(max(total, 0.0))
        late = thread.is_alive()  # what it comes to when it is stopped is not the server's answer
    finally:  # of Ctrl-C, too
        download.stop()
    if late:
        raise _unreachable(url, TimeoutError(f"not complete after {total:g} s"))
    if download.error is not None:
        raise download.error
    assert download.data is not None
    return download.data


class _Download:
    """One download, in a thread; `stop` ends it from another."""

    def __init__(self, url: str, most: int, timeout: float) -> None:
        self.data: bytes | None = None
        self.error: ImageError | None = None
        self._url, self._most, self._timeout = url, most, timeout
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._stopped = False
        self._from_outside = False
        """Whether a server of the public internet answered: it must not send us on to one of the private network."""

    def run(self) -> None:
        try:
            self.data = self._read()
        except ImageError as error:
            self.error = error
        except Exception as error:  # http.client and ssl raise errors of many kinds
            self.error = _unreachable(self._url, error)

    def stop(self) -> None:
        """End what waits for the server. Does nothing where the download has ended."""
        with self._lock:
            self._stopped = True
            while self._sockets:
                with contextlib.suppress(OSError), self._sockets.pop() as connection:
                    connection.shutdown(socket.SHUT_RDWR)

    def connect(self, proxied: bool, *address: Any) -> socket.socket:
        """Connect, as `socket.create_connection` does.

        Raises:
            ImageError: a redirect leads from the public internet into a private network.
        """
        connection = socket.create_connection(*address)
        with self._lock:
            if self._stopped:
                connection.close()
                raise TimeoutError("stopped")
            # Another handle of the same connection, which stays valid while TLS takes over the first one.
            self._sockets.append(connection.dup())
        if not proxied:
            public = _is_public(connection)
            if self._from_outside and not public:
                connection.close()
                raise ImageError(
                    f"{shortened(self._url)} redirects into a private network; give the address of the picture itself"
                )
            self._from_outside = public
        return connection

    def _read(self) -> bytes:
        url = self._url
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ImageError(
                    f"{shortened(url)} is not an http or https address; give one, or a path without a scheme"
                )
            # Addresses copied from a browser may hold spaces and letters outside ASCII.
            quoted = parts._replace(
                path=urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~"),
                query=urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?"),
                fragment="",
            )
            request = urllib.request.Request(quoted.geturl(), headers={"User-Agent": "adafv", "Accept": "image/*, */*"})
            with self._opener().open(request, timeout=self._timeout) as response:
                return self._body(response)
        except urllib.error.HTTPError as error:
            with contextlib.suppress(ValueError):  # of a redirect, it is closed already
                error.close()
            if 300 <= error.code < 400:
                problem = f"redirects in circles or to something that is not http or https (HTTP {error.code})"
            else:
                problem = f"was refused by the server (HTTP {error.code} {shortened(error.reason, 100)})"
            raise ImageError(
                f"{shortened(url)} {problem}; check the address, or download the image yourself"
            ) from error
        except urllib.error.URLError as error:
            raise _unreachable(url, error.reason) from error

    def _opener(self) -> urllib.request.OpenerDirector:
        """An opener for http and https alone; the one of `urlopen` reads file: and ftp: addresses as well."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _HTTP(self),
            _HTTPS(self),
            _WebRedirects(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        return opener

    def _body(self, response: Any) -> bytes:
        announced = response.headers.get("Content-Length")
        expected = int(announced) if announced and announced.isdecimal() else None
        if expected is not None and expected > self._most:
            raise self._too_large()
        data = bytearray()
        while piece := response.read1(_CHUNK):
            data += piece
            if len(data) > self._most:
                raise self._too_large()
        if expected is not None and len(data) < expected:
            raise ImageError(f"{shortened(self._url)} broke off after {len(data)} of {expected} bytes; try again")
        return bytes(data)

    def _too_large(self) -> ImageError:
        return too_many_bytes(self._url, self._most)


def too_many_bytes(name: str, most: int) -> ImageError:
    """What to raise for a file, download or stream of more than `most` bytes."""
    return ImageError(
        f"{shortened(name)} is larger than {most // 1_000_000} MB; scale it down, or save it as JPEG or WebP"
    )


class _HTTP(urllib.request.HTTPHandler):
    """http, over connections that the download can end."""

    def __init__(self, download: _Download) -> None:
        super().__init__()
        self._download = download

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connecting(http.client.HTTPConnection, self._download, req), req)


class _HTTPS(urllib.request.HTTPSHandler):
    """https, over connections that the download can end."""

    def __init__(self, download: _Download) -> None:
        super().__init__()
        self._download = download

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        made = _connecting(http.client.HTTPSConnection, self._download, req)
        return self.do_open(made, req, context=ssl.create_default_context())


def _connecting(kind: Any, download: _Download, request: urllib.request.Request) -> Any:
    """What makes connections of a kind, opened by the download."""
    proxied = request.host != urllib.parse.urlsplit(request.full_url).netloc

    def made(*args: Any, **kwargs: Any) -> Any:
        connection = kind(*args, **kwargs)
        connection._create_connection = lambda *address: download.connect(proxied, *address)
        return connection

    return made


def _is_public(connection: socket.socket) -> bool:
    """Whether the other end is an address of the public internet: not this machine, nor a private or reserved network."""
    address = ipaddress.ip_address(_peer(connection).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        # ::ffff:127.0.0.1 is this machine, and so are two ways of reaching IPv4 through IPv6.
        translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _TRANSLATED else None
        inner = address.ipv4_mapped or address.sixtofour or translated
        return inner.is_global if inner is not None else address.is_global
    return address.is_global


def _peer(connection: socket.socket) -> str:
    return str(connection.getpeername()[0])


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within http and https alone: a server must not be able to name a local file."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        fp.close()  # or all of its body would be read, however long it is
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _unreachable(url: str, reason: object) -> ImageError:
    text = shortened(" ".join(str(reason).split())) or type(reason).__name__
    problem = "did not answer in time" if isinstance(reason, TimeoutError) else "cannot be reached"
    return ImageError(
        f"{shortened(url)} {problem} ({text}); check the address and the network, or download the image yourself"
    )

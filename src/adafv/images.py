"""Reading an image from a path, a URL or standard input, without surprises.

Pictures come from anywhere, so nothing is taken on trust: sizes are read from the header before a pixel is decoded,
reading stops at a limit, and only raster formats are opened (Pillow would start Ghostscript for an EPS file). Whatever
goes wrong is an `ImageError` that names the source and the mend. No setting of Pillow or of `warnings` is touched, so
two threads may read at once.
"""

import http.client
import io
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image

from adafv.errors import ImageError

MAX_PIXELS = 64_000_000
"""Largest image that is decoded; a picture for a vision tower is scaled to well under a million pixels anyway."""
MAX_BYTES = 100_000_000
"""Largest file, download or stream that is read."""
TIMEOUT = 20.0
"""Seconds to wait for a server to answer, and for each further piece."""
TOTAL_TIMEOUT = 120.0
"""Seconds a whole download may take, so that a server that drips cannot hold us for ever."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000")
"""What is opened, by Pillow's names."""
_WELL_KNOWN = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "TIFF": "TIFF", "BMP": "BMP"}
_CHUNK = 1 << 16
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: str) -> Image.Image:
    """The image at `source` as RGB, upright, the first frame if it is animated, over white where it is transparent.

    Args:
        source: a path, an http or https URL, or "-" for the bytes of standard input.

    Raises:
        ImageError: there is no such image, or it cannot be read safely.
    """
    if source == "-":
        return read_image(_from_standard_input(), "standard input")
    if "://" in source:
        return read_image(_from_url(source), source)
    return read_image(_from_file(source), source)


def read_image(data: bytes, name: str, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The image in `data`, as `load_image` returns it.

    Args:
        name: what messages call it.
        formats: those of `FORMATS` that are opened.

    Raises:
        ImageError: it cannot be read safely.
    """
    if not data:
        raise ImageError(f"{name} is empty; {_use(formats)}")
    if len(data) > MAX_BYTES:
        raise _too_many_bytes(name)
    try:
        with _opened(data, name, formats) as image:
            _check_size(image.size, name)
            try:
                image.load()
            except Exception as error:  # decoders raise whatever they like on damaged data
                raise ImageError(
                    f"{name} is damaged or cut short ({_reason(error)}); get a complete copy of it"
                ) from error
            _check_size(image.size, name)
            return _upright(_to_rgb(image), image)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory; scale it down first") from error
    except Exception as error:
        raise ImageError(f"{name} cannot be read as RGB ({_reason(error)}); save it as PNG or JPEG first") from error


def _opened(data: bytes, name: str, formats: Sequence[str]) -> Image.Image:
    """The image with its header read and no pixel decoded."""
    Image.init()
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in formats if name in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels(name, "far more pixels") from error
    except Exception as error:
        start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start):
            mend = "it is an SVG drawing: export it as PNG first"
        elif start.startswith((b"<!doctype html", b"<html")):
            mend = "it is a web page: give the address of the picture itself"
        else:
            mend = _use(formats)
        raise ImageError(f"{name} is not an image that can be read, or its header is damaged; {mend}") from error


def _use(formats: Sequence[str]) -> str:
    *others, last = [shown for name, shown in _WELL_KNOWN.items() if name in formats]
    return f"give a {', '.join(others)} or {last} image"


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(size) < 2:
        raise ImageError(f"{name} is {width} x {height} pixels, too small to show anything; give a larger image")
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(name, f"{width} x {height} pixels")


def _too_many_pixels(name: str, size: str) -> ImageError:
    return ImageError(
        f"{name} has {size}, more than the {MAX_PIXELS // 1_000_000} million that are decoded; scale it down first"
    )


def _too_many_bytes(name: str) -> ImageError:
    return ImageError(f"{name} is larger than {MAX_BYTES // 1_000_000} MB; scale it down, or save it as JPEG or WebP")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, scaled; Pillow's own conversion clips them at 255, which gives a white image.

    Integers up to 65535 are taken as 16 bits and floats in [0, 1] or [0, 255] as what they look like. Anything else is
    stretched from its smallest to its largest value.
    """
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    hidden = values == transparent if isinstance(transparent, int) else None
    if values.dtype.kind == "f":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        ceilings: tuple[float, ...] = (1.0, 255.0)
    else:
        values = values.astype(np.float64)
        ceilings = (65535.0,)
    low, high = 0.0, next((ceiling for ceiling in ceilings if values.max() <= ceiling), 0.0)
    if not high or values.min() < 0:
        low, high = float(values.min()), float(values.max())
    scaled = np.rint((values - low) * (255.0 / max(high - low, 1e-30))).astype(np.uint8)
    if hidden is not None:
        scaled[hidden] = 255
    return Image.fromarray(scaled)


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """Turn `image` as the EXIF data of `original` say; damaged EXIF data are no reason to refuse a picture."""
    try:
        orientation = original.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return image
    transpose = _UPRIGHT.get(orientation)
    return image if transpose is None else image.transpose(transpose)


def _from_file(path: str) -> bytes:
    if not path.strip():
        raise ImageError(f"no image was named; {_use(FORMATS)}")
    try:
        with open(path, "rb") as file:
            return _read(file, path)
    except FileNotFoundError as error:
        raise ImageError(f"there is no file {path}; check the path") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a directory; name an image inside it") from error
    except PermissionError as error:
        raise ImageError(f"{path} may not be read; check its permissions") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path!r} cannot be read ({_reason(error)}); check the path") from error


def _from_standard_input() -> bytes:
    name = "standard input"
    try:
        if sys.stdin.isatty():
            raise ImageError(f"{name} is the terminal; send an image to it, as in: adafv ask - ... < photo.jpg")
        return _read(sys.stdin.buffer, name)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read ({_reason(error)}); send an image to it") from error


def _read(stream: IO[bytes], name: str) -> bytes:
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _too_many_bytes(name)
    return data


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
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _from_url(url: str) -> bytes:
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageError(f"{url} is not an http or https address; give one, or a path without a scheme")
        # Addresses copied from a browser may hold spaces and letters outside ASCII.
        quoted = parts._replace(
            path=urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~"),
            query=urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?"),
            fragment="",
        )
        request = urllib.request.Request(quoted.geturl(), headers={"User-Agent": "adafv", "Accept": "image/*, */*"})
        with _opener().open(request, timeout=TIMEOUT) as response:
            return _download(response, url)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                problem = f"redirects in circles or to something that is not http or https (HTTP {error.code})"
            else:
                problem = f"was refused by the server (HTTP {error.code} {error.reason})"
            raise ImageError(f"{url} {problem}; check the address, or download the image yourself") from error
    except urllib.error.URLError as error:
        raise _unreachable(url, error.reason) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise _unreachable(url, error) from error


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http and https alone; the one of `urlopen` reads file: and ftp: addresses as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        _WebRedirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _download(response: Any, url: str) -> bytes:
    deadline = time.monotonic() + TOTAL_TIMEOUT
    announced = response.headers.get("Content-Length")
    expected = int(announced) if announced and announced.isdigit() else None
    if expected is not None and expected > MAX_BYTES:
        raise _too_many_bytes(url)
    data = bytearray()
    while piece := response.read1(_CHUNK):
        data += piece
        if len(data) > MAX_BYTES:
            raise _too_many_bytes(url)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not complete after {TOTAL_TIMEOUT:.0f} s")
    if expected is not None and len(data) < expected:
        raise ImageError(f"{url} broke off after {len(data)} of {expected} bytes; try again")
    return bytes(data)


def _unreachable(url: str, reason: object) -> ImageError:
    if isinstance(reason, TimeoutError):
        problem = f"did not answer in time ({reason})"
    else:
        problem = f"cannot be reached ({_reason(reason)})"
    return ImageError(f"{url} {problem}; check the address and the network, or download the image yourself")


def _reason(error: object) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__

"""`adafv.images`: every kind of picture reads right, and everything else is refused with a message that helps."""

import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from processors import processor

from adafv import images, web
from adafv.errors import AdaFVError, ImageError
from adafv.images import MAX_RATIO, check_shape, load_image, read_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def quiet_and_tidy() -> Iterator[None]:
    """No warning escapes, no file stays open, and Pillow's global settings stay as they are."""
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """4 x 6 pixels, each corner of its own colour."""
    image = Image.new("RGB", (4, 6), "black")
    for place, colour in {(0, 0): RED, (3, 0): GREEN, (0, 5): BLUE, (3, 5): WHITE}.items():
        image.putpixel(place, colour)
    return image


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of any size on paper: the header is right, the pixels are missing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class TestPixels:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
    def test_lossless_kinds(self, kind: str) -> None:
        image = read_image(encoded(corners(), kind), "x")
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(corners()))

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
    def test_lossy_kinds(self, kind: str) -> None:
        image = read_image(encoded(Image.new("RGB", (16, 16), (200, 30, 60)), kind, quality=95), "x")
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - (200, 30, 60)).max() < 8

    def test_grey(self) -> None:
        image = read_image(encoded(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))), "x")
        assert image.getpixel((5, 0)) == (5, 5, 5)

    def test_black_and_white(self) -> None:
        image = Image.new("1", (4, 4))
        image.putpixel((1, 1), 1)
        read = read_image(encoded(image), "x")
        assert (read.getpixel((0, 0)), read.getpixel((1, 1))) == ((0, 0, 0), WHITE)

    def test_cmyk(self) -> None:
        image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        red = np.asarray(read_image(encoded(image, "JPEG", quality=100), "x")).astype(int)
        assert np.abs(red - (255, 0, 0)).max() < 12
        assert read_image(encoded(image, "TIFF"), "x").getpixel((3, 3)) == RED

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bits_are_scaled(self, kind: str) -> None:
        values = np.array([[0, 257, 32768], [65535, 128, 129], [1, 2, 3]], dtype=np.uint16)
        read = np.asarray(read_image(encoded(Image.fromarray(values), kind), "x"))[..., 0]
        assert read.tolist() == [[0, 1, 128], [255, 0, 1], [0, 0, 0]]

    def test_big_endian_sixteen_bits(self) -> None:
        buffer = io.BytesIO()
        Image.frombytes("I;16B", (2, 2), np.array([0, 257, 32768, 65535], dtype=">u2").tobytes()).save(buffer, "TIFF")
        assert np.asarray(read_image(buffer.getvalue(), "x"))[..., 0].flatten().tolist() == [0, 1, 128, 255]

    def test_thirty_two_bits_are_stretched(self) -> None:
        values = np.array([[-100_000, 0], [50_000, 100_000]], dtype=np.int32)
        read = np.asarray(read_image(encoded(Image.fromarray(values), "TIFF"), "x"))[..., 0]
        assert read.tolist() == [[0, 128], [191, 255]]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]), ([0.0, 10.0, 255.0, 3.0], [0, 10, 255, 3])],
    )
    def test_floats(self, values: list[float], expected: list[int]) -> None:
        image = Image.fromarray(np.array(values, dtype=np.float32).reshape(2, 2))
        assert np.asarray(read_image(encoded(image, "TIFF"), "x"))[..., 0].flatten().tolist() == expected

    def test_palette(self) -> None:
        image = corners().quantize(8)
        assert np.array_equal(np.asarray(read_image(encoded(image), "x")), np.asarray(image.convert("RGB")))

    def test_palette_with_transparency(self) -> None:
        image = Image.new("P", (2, 2), 1)
        image.putpalette([*RED, *GREEN])
        image.putpixel((0, 0), 0)
        read = read_image(encoded(image, transparency=0), "x")
        assert (read.getpixel((0, 0)), read.getpixel((1, 1))) == (WHITE, GREEN)

    def test_transparent_is_white(self) -> None:
        image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
        image.putpixel((1, 1), (10, 20, 30, 255))
        image.putpixel((0, 1), (0, 0, 0, 128))
        read = read_image(encoded(image), "x")
        assert (read.getpixel((0, 0)), read.getpixel((1, 1))) == (WHITE, (10, 20, 30))
        assert abs(read.getpixel((0, 1))[0] - 127) <= 1  # type: ignore[index]

    def test_grey_with_alpha(self) -> None:
        image = Image.new("LA", (2, 2), (40, 0))
        image.putpixel((1, 1), (40, 255))
        read = read_image(encoded(image), "x")
        assert (read.getpixel((0, 0)), read.getpixel((1, 1))) == (WHITE, (40, 40, 40))

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_animation_shows_its_first_frame(self, kind: str) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert read_image(data, "x").getpixel((4, 4)) == RED

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_upright(self, orientation: int, kind: str) -> None:
        """Store the picture as a camera would that was held that way; it must come back as it was seen."""
        seen = Image.new("RGB", (32, 48), "black")
        for x, y, colour in ((0, 0, RED), (16, 0, GREEN), (0, 24, BLUE), (16, 24, WHITE)):
            seen.paste(colour, (x, y, x + 16, y + 24))
        undo = {**images._UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        stored = seen.transpose(undo[orientation]) if orientation > 1 else seen
        exif = Image.Exif()
        exif[0x0112] = orientation
        read = read_image(encoded(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})), "x")
        assert read.size == (32, 48)
        assert np.abs(np.asarray(read).astype(int) - np.asarray(seen)).mean() < (0.5 if kind in ("PNG", "TIFF") else 12)

    def test_damaged_exif_is_no_reason_to_refuse(self) -> None:
        data = encoded(corners(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
        assert read_image(data, "x").size == (4, 6)


class TestRefusals:
    def test_empty(self) -> None:
        with pytest.raises(ImageError, match=r"x is empty; give a JPEG"):
            read_image(b"", "x")

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
    def test_truncated_anywhere(self, kind: str) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(noise), kind)
        refused = 0
        for end in range(1, len(data) - 8, max(1, len(data) // 60)):
            try:
                read_image(data[:end], "x")
            except ImageError:
                refused += 1
        assert refused >= 55

    def test_truncated_message(self) -> None:
        data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")
        with pytest.raises(ImageError, match=r"photo\.jpg is damaged or cut short .*; get a complete copy"):
            read_image(data[: len(data) // 2], "photo.jpg")

    def test_noise_is_refused_whatever_it_looks_like(self) -> None:
        """Bytes broken at random must never raise anything but ImageError."""
        generator = np.random.default_rng(1)
        for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
            good = np.frombuffer(encoded(corners(), kind), dtype=np.uint8)
            for _ in range(40):
                broken = good.copy()
                broken[generator.integers(0, len(broken), 4)] = generator.integers(0, 255, 4)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with contextlib.suppress(ImageError):
                        read_image(broken.tobytes(), "x")

    @pytest.mark.parametrize(
        ("data", "mend"),
        [
            (b"just some text", "give a JPEG"),
            (b"<!DOCTYPE html><html></html>", "web page"),
            (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "give a JPEG"),
            (b"%PDF-1.7", "give a JPEG"),
        ],
    )
    def test_not_an_image(self, data: bytes, mend: str) -> None:
        with pytest.raises(ImageError, match=f"x is not an image.*{mend}"):
            read_image(data, "x")

    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
    def test_too_small(self, size: tuple[int, int]) -> None:
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels, too small to show anything"):
            read_image(encoded(Image.new("RGB", size)), "x")

    @pytest.mark.parametrize("side", [8_001, 9_400, 20_000, 2**31 - 1])
    def test_bomb_is_refused_by_its_header(self, side: int) -> None:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # between 89 and 179 million Pillow warns by itself
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(ImageError, match=r"x .*(pixels|damaged).*"):
                read_image(png_header(side, side), "x")
        assert time.perf_counter() - start < 0.5

    @pytest.mark.parametrize(
        "size", [(2, 40_000), (40_000, 2), (2, 30_000_000), (30_000_000, 2), (3, 301), (500, 50_001), (2, 2**31 - 1)]
    )
    def test_too_narrow_for_its_length(self, size: tuple[int, int]) -> None:
        """Refused by the header: the pixels behind it are not there, and would be an error of their own."""
        with pytest.raises(ImageError, match=rf"x is {size[0]} x {size[1]} pixels, .*times as long|x has .*pixels"):
            read_image(png_header(*size), "x")

    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
    def test_too_narrow_in_every_kind(self, kind: str) -> None:
        with pytest.raises(ImageError, match="2 x 9000 pixels, 4,500 times as long"):
            read_image(encoded(Image.new("RGB", (2, 9_000)), kind), "x")

    def test_too_narrow_when_turned(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        with pytest.raises(ImageError, match="times as long as it is wide"):
            read_image(encoded(Image.new("RGB", (9_000, 2)), exif=exif), "x")

    @pytest.mark.parametrize("size", [(2, 200), (200, 2), (8_000, 400), (300, 30_000)])
    def test_narrow_enough(self, size: tuple[int, int]) -> None:
        assert read_image(encoded(Image.new("RGB", size)), "x").size == size

    def test_tiles_far_larger_than_the_image(self) -> None:
        """16 x 16 pixels of a tile of 16,000 x 16,000: the library would unpack all of it."""
        tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 16_000, 323: 16_000, 324: 134, 325: 1000}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + zlib.compress(bytes(1_000_000))
        with pytest.raises(ImageError, match="tiles of 16000 x 16000 pixels, far larger than the image"):
            read_image(data, "x")

    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            ("I;16", "PNG"),
            pytest.param("I", "TIFF", marks=pytest.mark.release),
            ("F", "TIFF"),
            pytest.param("RGBA", "PNG", marks=pytest.mark.release),
        ],
    )
    def test_few_bytes_take_little_memory(self, mode: str, kind: str) -> None:
        """8,000 x 8,000 pixels that are packed into some 100 KB; measured where nothing was in memory before."""
        data = encoded(
            Image.new(mode, (8_000, 8_000)), kind, **({"compression": "tiff_deflate"} if kind == "TIFF" else {})
        )
        assert len(data) < 500_000
        program = """
import sys
from adafv.images import read_image

def peak():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
read_image(sys.stdin.buffer.read(), "x")
print(peak() - before)
"""
        if not Path("/proc/self/status").exists():
            pytest.skip("no /proc")
        path = os.pathsep.join(filter(None, [str(Path(images.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=data,
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert int(done.stdout) < 700, f"{done.stdout!r} MiB"

    def test_a_real_bomb(self) -> None:
        rows = zlib.compress(b"\x00" * (20_001 * 2_000), 9)
        with pytest.raises(ImageError, match="more than the 64 million"):
            read_image(png_header(20_000, 20_000, rows), "x")

    def test_bomb_warning_as_error(self) -> None:
        with pytest.raises(ImageError, match="64 million"):
            read_image(png_header(10_000, 10_000), "x")

    def test_largest_that_is_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(images, "MAX_PIXELS", 24)
        assert read_image(encoded(corners()), "x").size == (4, 6)
        monkeypatch.setattr(images, "MAX_PIXELS", 23)
        with pytest.raises(ImageError, match="4 x 6 pixels"):
            read_image(encoded(corners()), "x")

    def test_too_many_bytes(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(images, "MAX_BYTES", 10)
        (tmp_path / "large.png").write_bytes(encoded(corners()))
        with pytest.raises(ImageError, match=r"large\.png is larger than"):
            load_image(str(tmp_path / "large.png"))
        with pytest.raises(ImageError, match="x is larger than"):
            read_image(encoded(corners()), "x")

    def test_is_an_adafv_error_and_a_value_error(self) -> None:
        assert issubclass(ImageError, AdaFVError)
        assert issubclass(ImageError, ValueError)


class _Settings:
    """What `check_shape` reads of an image processor."""

    def __init__(self, **settings: object) -> None:
        self.__dict__.update(settings)


class TestShape:
    """What an image processor would make of a picture, from its settings alone."""

    def test_scaled_up_by_the_shorter_side(self) -> None:
        narrow = (100, 100 * MAX_RATIO // 2)
        check_shape(narrow, "x", _Settings(size={"shortest_edge": 336}))
        with pytest.raises(ImageError, match=r"x is 100 x 5000 pixels, of which .* would make 1,024 x 51,200"):
            check_shape(narrow, "x", _Settings(size={"shortest_edge": 1024}))

    @pytest.mark.parametrize(
        "settings",
        [
            {"size": {"shortest_edge": 1024}, "do_resize": False},
            {"size": {"shortest_edge": 1024, "longest_edge": 2048}},
            {"size": {"shortest_edge": 3_136, "longest_edge": 12_845_056}},  # Qwen's, which are numbers of pixels
            {"size": {"longest_edge": 1456}},
            {"size": {"height": 1024, "width": 1024}},
            {"size": None},
            {},
        ],
    )
    def test_scaled_into_a_box(self, settings: dict[str, object]) -> None:
        check_shape((100, 5_000), "x", _Settings(**settings))

    @pytest.mark.parametrize("family", ["llava", "llava-next"])
    def test_real_processors(self, family: str) -> None:
        made = processor(family).image_processor
        check_shape((40, 30), "x", made)
        made.size = {"shortest_edge": 3_000}
        with pytest.raises(ImageError, match="3,000 x 60,000"):
            check_shape((50, 1_000), "x", made)


class TestFiles:
    def test_path(self, tmp_path: Path) -> None:
        corners().save(tmp_path / "ein bild.png")
        assert load_image(str(tmp_path / "ein bild.png")).size == (4, 6)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"no file .*nowhere\.png; check the path"):
            load_image(str(tmp_path / "nowhere.png"))

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="is a directory; name an image inside it"):
            load_image(str(tmp_path))

    @pytest.mark.parametrize("path", ["", "  ", "a\0b", "x" * 5000, "file.png/inside"])
    def test_impossible_paths(self, path: str) -> None:
        with pytest.raises(ImageError):
            load_image(path)


class _Stdin:
    def __init__(self, data: bytes, terminal: bool = False) -> None:
        self.buffer = io.BytesIO(data)
        self.isatty = lambda: terminal


class TestStandardInput:
    def test_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", _Stdin(encoded(corners())))
        assert load_image("-").size == (4, 6)

    @pytest.mark.parametrize(
        ("stdin", "message"),
        [
            (_Stdin(b""), "standard input is empty"),
            (_Stdin(b"", terminal=True), "standard input is the terminal"),
            (None, "standard input cannot be read"),
        ],
    )
    def test_nothing_there(self, monkeypatch: pytest.MonkeyPatch, stdin: object, message: str) -> None:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(ImageError, match=message):
            load_image("-")

    def test_stops_at_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stdin = _Stdin(b"x" * 1000)
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(images, "MAX_BYTES", 100)
        with pytest.raises(ImageError, match="standard input is larger"):
            load_image("-")
        assert stdin.buffer.tell() == 101


PAGES: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}


def page(path: str) -> Callable[[Callable[[BaseHTTPRequestHandler], None]], None]:
    def keep(function: Callable[[BaseHTTPRequestHandler], None]) -> None:
        PAGES[path] = function

    return keep


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@page("/image.png")
def _(handler: BaseHTTPRequestHandler) -> None:
    assert handler.headers["User-Agent"] == "adafv"
    answer(handler, 200, encoded(corners()))


@page("/ein%20bild%C3%A4.png?a=b")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 200, encoded(corners()))


@page("/moved")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 302, Location="/image.png")


@page("/to-file")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 302, Location="file:///etc/hostname")


@page("/to-ftp")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 301, Location="ftp://127.0.0.1/image.png")


@page("/circle")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 302, Location="/circle")


@page("/page")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 200, b"<!doctype html><p>hello")


@page("/broken")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 500)


@page("/announced")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 200, b"x", Content_Length="999999999999")


@page("/breaks-off")
def _(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 200, encoded(corners()), Content_Length="100000")


@page("/endless")
def _(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"x" * 100_000)


@page("/silent")
def _(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.5)


@page("/nonsense")
def _(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"this is not http\r\n\r\n")


@page("/drips-headers")
def _(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.1)


@page("/drips-body")
def _(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.1)


@page("/drips-redirects")
def _(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.2)
    answer(handler, 302, Location=f"/drips-redirects?{time.monotonic()}")


@page("/redirects-with-a-body")
def _(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/image.png")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"x" * 100_000)
        SENT.append(100_000)


@page("/escapes")
def _(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 404 \x1b]0;owned\x07\x1b[2J" + b"reason " * 2000 + b"\r\n\r\n")


@page("/escapes-before-http")
def _(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x1b]0;owned\x07\x1b[2J\r\n\r\n")


SENT: list[int] = []
"""Bytes of the redirect's body."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # the client has had enough, which is what some tests are about
            PAGES.get(
                self.path.partition("?")[0] if "?" in self.path and self.path not in PAGES else self.path,
                lambda handler: answer(handler, 404),
            )(self)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


class TestAddresses:
    @pytest.fixture(autouse=True)
    def no_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    @pytest.mark.parametrize("path", ["/image.png", "/moved", "/ein bildä.png?a=b", "/image.png#part"])
    def test_image(self, server: str, path: str) -> None:
        assert np.array_equal(np.asarray(load_image(server + path)), np.asarray(corners()))

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("/nowhere", "HTTP 404"),
            ("/broken", "HTTP 500"),
            ("/to-file", "not http or https"),
            ("/to-ftp", "not http or https"),
            ("/circle", "redirects in circles"),
            ("/page", "web page"),
            ("/announced", "larger than"),
            ("/breaks-off", "broke off after"),
            ("/nonsense", "cannot be reached"),
        ],
    )
    def test_refused(self, server: str, path: str, message: str) -> None:
        with pytest.raises(ImageError, match=message) as caught:
            load_image(server + path)
        assert str(caught.value).startswith(server + path)

    def test_stops_at_the_limit(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(images, "MAX_BYTES", 300_000)
        with pytest.raises(ImageError, match="larger than"):
            load_image(server + "/endless")

    def test_silence(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(images, "TIMEOUT", 0.2)
        with pytest.raises(ImageError, match="did not answer in time"):
            load_image(server + "/silent")

    @pytest.mark.parametrize("path", ["/drips-headers", "/drips-body", "/drips-redirects", "/silent"])
    def test_slow_in_any_part(self, server: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole has one limit. The server is never silent for as long as a single piece may take."""
        monkeypatch.setattr(images, "TOTAL_TIMEOUT", 0.5)
        start = time.perf_counter()
        with pytest.raises(ImageError, match=r"did not answer in time .*; check the address") as caught:
            load_image(server + path)
        assert time.perf_counter() - start < 1.4
        assert str(caught.value).startswith(server + path)

    def test_slow_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Looking up a name has no timeout of its own."""
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(2))
        monkeypatch.setattr(images, "TOTAL_TIMEOUT", 0.2)
        monkeypatch.setenv("no_proxy", "*")
        start = time.perf_counter()
        with pytest.raises(ImageError, match="did not answer in time"):
            load_image("http://slow.invalid/image.png")
        assert time.perf_counter() - start < 1.0

    def test_given_up_means_hung_up(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The thread ends, which the server alone would keep busy for ten seconds."""
        monkeypatch.setattr(images, "TOTAL_TIMEOUT", 0.3)
        before = set(threading.enumerate())
        with pytest.raises(ImageError, match="in time"):
            load_image(server + "/drips-body")
        for thread in set(threading.enumerate()) - before:
            if thread.name == "adafv-download":
                thread.join(2)
                assert not thread.is_alive()

    def test_body_of_a_redirect_is_not_read(self, server: str) -> None:
        SENT.clear()
        assert load_image(server + "/redirects-with-a-body").size == (4, 6)
        time.sleep(0.2)
        assert sum(SENT) < 10_000_000

    @pytest.mark.parametrize("path", ["/escapes", "/escapes-before-http"])
    def test_what_the_server_says_is_printable(self, server: str, path: str) -> None:
        with pytest.raises(ImageError) as caught:
            load_image(server + path)
        said = str(caught.value)
        assert said.isprintable()
        assert r"\x1b]0;owned\x07\x1b[2J" in said or "refused" not in said
        assert len(said) < 500

    @pytest.mark.parametrize("outside", ["93.184.216.34", "2606:4700::6810:84e5"])
    def test_redirect_from_outside_into_a_private_network(
        self, server: str, outside: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        peers = iter([outside, "127.0.0.1"])
        monkeypatch.setattr(web, "_peer", lambda connection: next(peers))
        with pytest.raises(ImageError, match="redirects into a private network"):
            load_image(server + "/moved")

    @pytest.mark.parametrize(
        ("address", "public"),
        [
            ("127.0.0.1", False),
            ("::1", False),
            ("::ffff:127.0.0.1", False),
            ("::ffff:10.0.0.1", False),
            ("10.1.2.3", False),
            ("192.168.0.1", False),
            ("169.254.169.254", False),
            ("fe80::1%eth0", False),
            ("fd00::1", False),
            ("0.0.0.0", False),
            ("64:ff9b::7f00:1", False),
            ("2002:7f00:1::", False),
            ("93.184.216.34", True),
            ("::ffff:93.184.216.34", True),
        ],
    )
    def test_private_addresses(self, address: str, public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(web, "_peer", lambda connection: address)
        with socket.socket() as connection:
            assert web._is_public(connection) is public

    def test_data_address_is_not_echoed(self) -> None:
        for source in ("data:image/png;base64," + "A" * 10**6, "DATA:image/png," + "%00" * 10**5):
            with pytest.raises(ImageError, match="is the picture itself, not where it lies") as caught:
                load_image(source)
            assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("start", ["http://127.0.0.1:1/", "", "ftp://example.org/"])
    def test_long_names_are_shortened(self, start: str) -> None:
        with pytest.raises(ImageError) as caught:
            load_image(start + "x" * 100_000)
        assert len(str(caught.value)) < 600

    def test_nobody_listens(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.raises(ImageError, match=r"cannot be reached.*check the address"):
            load_image(f"http://127.0.0.1:{port}/image.png")

    def test_unknown_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*args: object, **kwargs: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        monkeypatch.setenv("no_proxy", "*")
        with pytest.raises(ImageError, match=r"cannot be reached .*Name or service not known"):
            load_image("http://no-such-host.invalid/image.png")

    @pytest.mark.parametrize(
        "url", ["file:///etc/hostname", "ftp://127.0.0.1/x.png", "http://", "http://[::1", "s3://a/b"]
    )
    def test_other_schemes(self, url: str) -> None:
        with pytest.raises(ImageError):
            load_image(url)

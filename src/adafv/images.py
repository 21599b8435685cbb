"""Reading an image from a path, a URL or standard input, without surprises.

Pictures come from anywhere, so nothing is taken on trust: sizes are read from the header before a pixel is decoded,
reading stops at a limit, and only raster formats are opened (Pillow would start Ghostscript for an EPS file). Whatever
goes wrong is an `ImageError` that names the source and the mend. No setting of Pillow or of `warnings` is touched, so
two threads may read at once.

A picture of few pixels can still be a bomb: image processors scale the shorter side up to a fixed length and the longer
one with it, so that 2 x 40,000 pixels become 336 x 6,720,000. `check_shape` bounds that from the two numbers alone.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from PIL import Image

from adafv.errors import ImageError
from adafv.printable import shortened
from adafv.web import fetch, too_many_bytes

MAX_PIXELS = 64_000_000
"""Largest image that is decoded; a picture for a vision tower is scaled to well under a million pixels anyway."""
MAX_BYTES = 100_000_000
"""Largest file, download or stream that is read."""
TIMEOUT = 20.0
"""Seconds to wait for a server to answer, and for each further piece."""
TOTAL_TIMEOUT = 120.0
"""Seconds a whole download may take, from the look-up of the server's name to the last byte, so that a server that drips
cannot hold us for ever."""
MAX_RATIO = 100
"""Longer side / shorter side. A panorama has 20, the screenshot of a long web page 50; and Qwen's processor refuses 200."""
MAX_SCALED_PIXELS = 32_000_000
"""Largest image that a processor may make of a picture before it crops it; as 32-bit floats, that is 384 MB."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000")
"""What is opened, by Pillow's names."""
_WELL_KNOWN = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "TIFF": "TIFF", "BMP": "BMP"}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_BAND = 64
"""Rows."""
_TILE_TAGS = (322, 323)
"""Of TIFF: TileWidth and TileLength."""
_LARGEST_TILE = 4_000_000
"""Pixels of a tile that any image may have."""
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
    if source[:5].lower() == "data:":
        raise ImageError(
            f"{shortened(source, 60)} is the picture itself, not where it lies; save it to a file, or send its bytes to "
            "standard input"
        )
    if is_address(source):
        return read_image(fetch(source, MAX_BYTES, TIMEOUT, TOTAL_TIMEOUT), source)
    return read_image(_from_file(source), source)


def is_address(source: str) -> bool:
    """Whether `load_image` would ask a server for `source`."""
    return "://" in source


def check_shape(size: tuple[int, int], name: str, image_processor: Any = None) -> None:
    """Refuse a picture by its width and height, before an array is made of it.

    Args:
        size: width and height in pixels.
        name: what messages call it.
        image_processor: of transformers, whose settings say how far it would scale the picture up; None: not known yet.

    Raises:
        ImageError: it is too small, too large, or too narrow for its length.
    """
    width, height = size
    name = _named(name)
    if min(size) < 2:
        raise ImageError(f"{name} is {width} x {height} pixels, too small to show anything; give a larger image")
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(name, f"{width} x {height} pixels")
    ratio = max(size) / min(size)
    if ratio > MAX_RATIO:
        raise ImageError(
            f"{name} is {width} x {height} pixels, {ratio:,.0f} times as long as it is wide, more than the {MAX_RATIO} that "
            "are taken; cut out the part that matters"
        )
    shorter = _scaled_up_to(image_processor)
    if shorter is not None and shorter * shorter * ratio > MAX_SCALED_PIXELS:
        raise ImageError(
            f"{name} is {width} x {height} pixels, of which the model's image processor would make {shorter:,} x "
            f"{shorter * ratio:,.0f}; cut out the part that matters"
        )


def _scaled_up_to(image_processor: Any) -> int | None:
    """Pixels that an image processor scales the shorter side to, where the longer one follows without a bound.

    "longest_edge" beside "shortest_edge" is such a bound (or, for Qwen and its kin, both are numbers of pixels). All other
    sizes are boxes that pictures are fitted into.
    """
    if image_processor is None or getattr(image_processor, "do_resize", True) is False:
        return None
    size = getattr(image_processor, "size", None)
    if isinstance(size, int):  # before transformers 5: of the shorter side
        return size
    if not isinstance(size, Mapping):
        size = {name: getattr(size, name, None) for name in ("shortest_edge", "longest_edge")}
    shorter = size.get("shortest_edge")
    return shorter if isinstance(shorter, int) and size.get("longest_edge") is None else None


def read_image(data: bytes, name: str, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The image in `data`, as `load_image` returns it.

    Args:
        name: what messages call it.
        formats: those of `FORMATS` that are opened.

    Raises:
        ImageError: it cannot be read safely.
    """
    name = _named(name)
    if not data:
        raise ImageError(f"{name} is empty; {_use(formats)}")
    if len(data) > MAX_BYTES:
        raise too_many_bytes(name, MAX_BYTES)
    try:
        with _opened(data, name, formats) as image:
            check_shape(image.size, name)
            _check_tiles(image, name)
            try:
                image.load()
            except Exception as error:  # decoders raise whatever they like on damaged data
                raise ImageError(
                    f"{name} is damaged or cut short ({_reason(error)}); get a complete copy of it"
                ) from error
            check_shape(image.size, name)
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
        elif data[4:8] == b"ftyp" and data[8:12] in _HEIC:
            mend = "it is HEIC, as telephones write it: save it as JPEG first"
        else:
            mend = _use(formats)
        raise ImageError(f"{name} is not an image that can be read, or its header is damaged; {mend}") from error


def _check_tiles(image: Image.Image, name: str) -> None:
    """Refuse a TIFF whose tiles are far larger than its image: each is unpacked whole, however little of it is shown."""
    tags = getattr(image, "tag_v2", None)
    width, height = (0, 0) if tags is None else (tags.get(tag, 0) for tag in _TILE_TAGS)
    largest = max(4 * image.width * image.height, _LARGEST_TILE)
    if isinstance(width, int) and isinstance(height, int) and width * height > largest:
        raise ImageError(
            f"{name} consists of tiles of {width} x {height} pixels, far larger than the image itself; save it as PNG first"
        )


def _use(formats: Sequence[str]) -> str:
    *others, last = [shown for name, shown in _WELL_KNOWN.items() if name in formats]
    return f"give a {', '.join(others)} or {last} image"


def _named(name: str) -> str:
    """What messages call a picture: the end of a long address tells nobody anything, and a data: URL is megabytes."""
    return shortened(name)


def _too_many_pixels(name: str, size: str) -> ImageError:
    return ImageError(
        f"{name} has {size}, more than the {MAX_PIXELS // 1_000_000} million that are decoded; scale it down first"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, scaled; Pillow's own conversion clips them at 255, which gives a white image.

    Integers up to 65535 are taken as 16 bits and floats in [0, 1] or [0, 255] as what they look like. Anything else is
    stretched from its smallest to its largest value. Worked off in bands of rows: 64 bits for each of 64 million pixels,
    several times over, would be gigabytes.
    """
    transparent = image.info.get("transparency")
    tops = range(0, image.height, _BAND)

    def band(top: int) -> Any:
        return np.asarray(image.crop((0, top, image.width, min(top + _BAND, image.height))))

    extremes = [(values.min(), values.max()) for values in (_finite(band(top)) for top in tops)]
    smallest, largest = float(min(low for low, _ in extremes)), float(max(high for _, high in extremes))
    ceilings = (1.0, 255.0) if band(0).dtype.kind == "f" else (65535.0,)
    low, high = 0.0, next((ceiling for ceiling in ceilings if largest <= ceiling), 0.0)
    if not high or smallest < 0:
        low, high = smallest, largest
    scale = 255.0 / max(high - low, 1e-30)
    scaled = np.empty((image.height, image.width), dtype=np.uint8)
    for top in tops:
        values = band(top)
        rows = scaled[top : top + _BAND]
        rows[:] = np.rint((_finite(values) - low) * scale)
        if isinstance(transparent, int):
            rows[values == transparent] = 255
    return Image.fromarray(scaled)


def _finite(values: Any) -> Any:
    """float64, zero where there is no number."""
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


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
            return _read(file, _named(path))
    except FileNotFoundError as error:
        raise ImageError(f"there is no file {_named(path)}; check the path") from error
    except IsADirectoryError as error:
        raise ImageError(f"{_named(path)} is a directory; name an image inside it") from error
    except PermissionError as error:
        raise ImageError(f"{_named(path)} may not be read; check its permissions") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{_named(path)} cannot be read ({_os_reason(error)}); check the path") from error


def _from_standard_input() -> bytes:
    name = "standard input"
    try:
        if sys.stdin.isatty():
            raise ImageError(f"{name} is the terminal; send an image to it, as in: adafv ask - ... < photo.jpg")
        return _read(sys.stdin.buffer, name)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read ({_os_reason(error)}); send an image to it") from error


def _read(stream: IO[bytes], name: str) -> bytes:
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise too_many_bytes(name, MAX_BYTES)
    return data


def _os_reason(error: Exception) -> str:
    """Without the name of the file, which an OSError repeats."""
    return _reason(getattr(error, "strerror", None) or error)


def _reason(error: object) -> str:
    return shortened(" ".join(str(error).split())) or type(error).__name__

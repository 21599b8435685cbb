"""What image processors cost, by family, and what would make them faster: with the same pixels, or which others.

    python -m benchmarks.preprocessing --photos FOLDER [--count 5] [--rounds 3]

`docs/speed.md` has the results. Photographs as they are, and the same scaled up to 4,032 x 3,024 and written as JPEG with
quality 92: the pixels of a camera's 12 megapixels, if with less detail, so that decoding is a little faster than of a
camera's own. One thread. Processors as checkpoints set them up; both backends of transformers where torchvision is there.

- decoding: of the JPEG, also at half and quarter size by the decoder itself ("draft"), which gives other pixels.
- processors: ms a picture from the decoded picture to the tensor.
- pixels: how far the torchvision backend's are from PIL's, in steps of 1/255.
- resizing: PIL's own, from PIL's picture, against the way of the PIL backend, which goes through an array and back.
"""

import argparse
import importlib.util
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

LARGE = (4032, 3024)
NEXT_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
OV_GRID = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
CLIP_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
PROCESSORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LLaVA-1.5 (CLIP, 336)": ("clip", "CLIPImageProcessor", CLIP_336),
    "SigLIP, 384": ("siglip", "SiglipImageProcessor", {"size": {"height": 384, "width": 384}}),
    "Gemma 3, 896": ("gemma3", "Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}}),
    "LLaVA-NeXT": ("llava_next", "LlavaNextImageProcessor", {**CLIP_336, "image_grid_pinpoints": NEXT_GRID}),
    "LLaVA-OneVision": (
        "llava_onevision",
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": OV_GRID},
    ),
    "Qwen2-VL, at most 1,280 tokens": (
        "qwen2_vl",
        "Qwen2VLImageProcessor",
        {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}},
    ),
    "Idefics3, 1,456 in crops of 364": (
        "idefics3",
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    ),
    "SmolVLM, 2,048 in crops of 512": (
        "smolvlm",
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    ),
}
"""(module, class, options of checkpoints)"""


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Of a core, so that a busy machine does no harm: the median; the first run does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def processor_of(family: str, backend: str) -> Any:
    module, name, options = PROCESSORS[family]
    if backend == "torchvision" and importlib.util.find_spec("torchvision") is None:
        raise ImportError("not installed")
    place = f"transformers.models.{module}.image_processing_{'pil_' if backend == 'pil' else ''}{module}"
    made = getattr(__import__(place, fromlist=[name]), name + ("Pil" if backend == "pil" else ""))
    return made(**options)


def pixels_of(processor: Any, photo: Image.Image) -> torch.Tensor:
    found = processor(images=[photo], return_tensors="pt")["pixel_values"]
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(found)


def through_an_array(photo: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """As the PIL backend resizes: the picture becomes an array, colours first, is turned, and becomes a picture again."""
    array = np.moveaxis(np.array(photo.convert("RGB")), -1, 0)
    return np.array(Image.fromarray(np.moveaxis(array, 0, -1)).resize(size, Image.Resampling.BICUBIC))


def at_once(photo: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.array(photo.resize(size, Image.Resampling.BICUBIC))


def _decoding(files: list[bytes], rounds: int) -> dict[str, float]:
    def decoded(file: bytes, draft: int) -> None:
        with Image.open(io.BytesIO(file)) as photo:
            if draft > 1:
                photo.draft("RGB", (photo.width // draft, photo.height // draft))
            photo.load()

    return {f"1/{draft}": _each(decoded, [(file, draft) for file in files], rounds) for draft in (1, 2, 4)}


def _each(run: Callable[..., object], given: Sequence[tuple[Any, ...]], rounds: int) -> float:
    """Milliseconds of one of them."""
    return milliseconds(lambda: [run(*each) for each in given], rounds) / len(given)


def _processors(console: Console, photos: dict[str, list[Image.Image]], rounds: int) -> None:
    for family in PROCESSORS:
        row, made = [family], {}
        for backend in ("pil", "torchvision"):
            try:
                made[backend] = processor_of(family, backend)
            except (ImportError, AttributeError) as error:
                row.append(f"{backend}: {str(error).splitlines()[0][:60]}")
        for name, some in photos.items():
            for backend, processor in made.items():
                ms = _each(pixels_of, [(processor, photo) for photo in some], rounds)
                row.append(f"{name}, {backend}: {ms:.1f} ms")
            if len(made) == 2:
                one, two = (torch.cat([pixels_of(each, photo).flatten() for photo in some]) for each in made.values())
                far = (one - two).abs() * float(np.mean(made["pil"].image_std)) * 255
                row.append(f"apart {far.max():.1f} at most, {far.mean():.3f} on average")
        console.print(" | ".join(row))


def _resizing(console: Console, photos: dict[str, list[Image.Image]], rounds: int) -> None:
    for side in (336, 672):
        for name, some in photos.items():
            pairs = [
                (photo, (round(side * photo.width / min(photo.size)), round(side * photo.height / min(photo.size))))
                for photo in some
            ]
            same = all(np.array_equal(at_once(*pair), through_an_array(*pair)) for pair in pairs)
            around, direct = (_each(way, pairs, rounds) for way in (through_an_array, at_once))
            console.print(
                f"to {side}, {name}: through an array {around:.1f} ms, at once {direct:.1f} ms, same pixels: {same}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    small = [Image.open(path).convert("RGB") for path in sorted(options.photos.glob("*.jpg"))[: options.count]]
    files = []
    for photo in small:
        file, size = io.BytesIO(), LARGE if photo.width >= photo.height else LARGE[::-1]
        photo.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    photos = {"as it is": small, "12 MP": [Image.open(io.BytesIO(file)).convert("RGB") for file in files]}
    console.print(
        f"{len(small)} photos, {small[0].size} and so on; at 12 MP {np.mean(list(map(len, files))) / 1e6:.1f} MB"
    )
    console.print("decoding 12 MP, ms:", {name: round(ms, 1) for name, ms in _decoding(files, options.rounds).items()})
    _resizing(console, photos, options.rounds)
    _processors(console, photos, options.rounds)


if __name__ == "__main__":
    main()

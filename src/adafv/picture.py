"""A picture of what was kept, and why: what the tower saw, the two scores of AdaFV, and their mixture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from adafv.core import ImageLayout
from adafv.engines.transformers.record import Record
from adafv.errors import OptionError

WIDTH = 1400
"""Pixels, about: patches are drawn as squares of whole pixels."""
OPACITY = 0.6
"""Of the heat map over the grey image."""
DIMMED = 0.34
"""Brightness of a dropped patch."""

_ANCHORS = (
    (0.05, 0.05, 0.30),
    (0.24, 0.16, 0.55),
    (0.50, 0.21, 0.56),
    (0.78, 0.33, 0.40),
    (0.95, 0.60, 0.22),
    (0.99, 0.93, 0.40),
)
"""Colours of the heat maps from nothing to most, of evenly rising lightness, so that brighter always reads as more."""
_OUTLINE = (255, 214, 64)
_THIN_OUTLINE = (255, 255, 255)
_CUT_OFF = (208, 208, 212)
_HATCH = (182, 182, 188)
_PAPER, _INK, _PALE_INK = (255, 255, 255), (24, 26, 32), (104, 108, 120)
_MARGIN, _GAP = 24, 20


def tower_view(pixel_values: Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> Tensor:
    """Undo the normalisation of the tower's input: [..., 3, H, W] -> the same shape, float32 in 0..255, on the CPU."""
    mean, std = (torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1) for values in (image_mean, image_std))
    return ((pixel_values.detach().float().cpu() * std + mean) * 255.0).clamp(0, 255)


def draw(
    record: Record, index: int, crops: Any, *, question: str = "", answer: str = "", width: int = WIDTH
) -> Image.Image:
    """Draw what was kept of image `index` of a run.

    Panels, left to right; one whose score the method did not compute is left out:

        kept            what the tower saw, dropped patches darkened, the kept ones outlined
        saliency        s, what the tower finds striking
        text attention  t, what the text asks for
        both            t / sum of t over kept + s / sum of s over kept: how much a patch adds to either, which is what
                        AdaFV's search ranks patches by; the kept ones outlined

    Scores are heavy-tailed: a few patches hold most of the mass, and drawn as they are all others would be black. So
    colours follow the square root of the score between its minimum and its 99th percentile. Ranks would show every
    patch, but they would make an even score look as decided as a peaked one.

    An image in several crops is drawn twice in each panel: the thumbnail, and below it the other crops put together.
    What the model cuts off as padding is hatched.

    Args:
        record: what the run did.
        index: the image, as numbered in the record's lists.
        crops: the tower's own input for this image in 0..255: a tensor [C, 3, H, W] (see `tower_view`) or an array
            [C, H, W, 3]. Where the tower's processor pads the number of crops, the surplus is ignored.
        question, answer: for the footer.
        width: of the whole picture, in pixels, about.
    """
    maps = _maps(record, index)
    count = max(len(maps), 3)
    drawn = _panels(record, index, crops, maps, (width - 2 * _MARGIN - (count - 1) * _GAP) // count)
    return _page([_panel(panel) for panel in drawn], _footer(record, index, question, answer), heat=len(drawn) > 1)


@dataclass(frozen=True)
class Panel:
    """One of the drawings of `draw`, without its lettering."""

    title: str
    subtitle: str
    drawings: list[tuple[Image.Image, str]]
    """Each with its label; two for an image in several crops, of which neither label is empty."""


def panels(record: Record, index: int, crops: Any, *, width: int) -> list[Panel]:
    """The panels of `draw` one by one, for whoever lays them out otherwise.

    Args:
        record, index, crops: see `draw`.
        width: of each drawing in pixels, or a little less: patches are squares of whole pixels.
    """
    return _panels(record, index, crops, _maps(record, index), width)


_Maps = list[tuple[str, str, Tensor | None]]
"""Title, subtitle and score per patch of every panel; the first one shows no score."""


def _panels(record: Record, index: int, crops: Any, maps: _Maps, width: int) -> list[Panel]:
    layout = record.layouts[index]
    views = _views(layout, _crops(crops, layout))
    shown, kept = _shown_and_kept(record, index)
    # Whole pixels per patch in the finest view, and all views of one width.
    finest = max(view.patches.shape[1] for view in views)
    width = max(2, width // finest) * finest
    drawn = []
    for title, subtitle, scores in maps:
        level = None if scores is None else _level(scores)
        outlined = scores is None or title == "both"
        drawn.append(
            Panel(title, subtitle, [_drawn(view, shown, kept, level, outlined, width) for view in views]),
        )
    return drawn


def _maps(record: Record, index: int) -> _Maps:
    layout = record.layouts[index]
    saliency, text = (_by_patch(scores[index], layout) for scores in (record.saliency, record.text_attention))
    maps: _Maps = [
        (f"kept {record.tokens_after[index]} of {record.tokens_before[index]}", "what the language model reads", None)
    ]
    if saliency is not None:
        maps.append(("saliency", "what the tower finds striking", saliency))
    if text is not None:
        maps.append(("text attention", "what the question asks for", text))
    if saliency is not None and text is not None:
        _, kept = _shown_and_kept(record, index)
        # Of other methods that read both, such as facet, the sum of two shares is no more than that.
        meaning = "what the search ranks by" if record.images[index].method == "adafv" else "the two scores, added"
        maps.append(("both", meaning, _mixture(text, saliency, kept)))
    return maps


@dataclass(frozen=True)
class _View:
    """One picture made of crops, with the patch that each of its cells shows."""

    pixels: Tensor
    """[3, H, W] in 0..255."""
    patches: Tensor
    """[rows, columns] long: crop * rows * columns + row * columns + column."""
    label: str = ""


def _crops(crops: Any, layout: ImageLayout) -> Tensor:
    """[C, 3, H, W] float32 of what the caller gave."""
    pixels = torch.as_tensor(crops)
    if pixels.dim() == 3:
        pixels = pixels.unsqueeze(0)
    if pixels.dim() == 4 and not isinstance(crops, Tensor):
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[0] < layout.crops:
        raise OptionError(
            f"crops is {list(torch.as_tensor(crops).shape)}, but the image has {layout.crops} crop(s); give a tensor "
            f"[{layout.crops}, 3, H, W] or an array [{layout.crops}, H, W, 3], with values in 0..255"
        )
    return pixels[: layout.crops].detach().float().cpu().clamp(0, 255)


def _views(layout: ImageLayout, pixels: Tensor) -> list[_View]:
    patches = torch.arange(layout.crops * layout.rows * layout.columns)
    patches = patches.view(layout.crops, layout.rows, layout.columns)
    if layout.crops == 1:
        return [_View(pixels[0], patches[0])]
    first = 0 if layout.tiling is None else 1
    if layout.tiling is not None:
        vertical, horizontal = layout.tiling
    else:  # in reading order, in as square a field as they fill
        horizontal = next(n for n in range(math.isqrt(layout.crops - 1) + 1, layout.crops + 1) if layout.crops % n == 0)
        vertical = layout.crops // horizontal

    def join(parts: Tensor) -> Tensor:
        """[crops, ..., h, w] -> [..., vertical * h, horizontal * w]"""
        rows = [torch.cat(list(row), dim=-1) for row in torch.split(parts, horizontal)]
        return torch.cat(rows, dim=-2)

    thumbnail = [_View(pixels[0], patches[0], "thumbnail")] if first else []
    label = f"{vertical} x {horizontal} crops in detail" if first else f"{layout.crops} crops, one after the other"
    return [*thumbnail, _View(join(pixels[first:]), join(patches[first:]), label)]


def _shown_and_kept(record: Record, index: int) -> tuple[Tensor, Tensor]:
    """Two [patches] bool: the patches that reach the language model at all, and those that were kept."""
    layout = record.layouts[index]
    shown = torch.zeros(layout.crops * layout.rows * layout.columns, dtype=torch.bool)
    kept = shown.clone()
    shown[layout.source[layout.shows_patch]] = True
    crop, row, column = (places[index].cpu() for places in (record.crop, record.row, record.column))
    place = (crop * layout.rows + row) * layout.columns + column
    kept[place[crop >= 0]] = True
    return shown | kept, kept


def _by_patch(scores: Tensor | None, layout: ImageLayout) -> Tensor | None:
    """Scores per token as scores per patch, NaN where there is none."""
    if scores is None:
        return None
    by_patch = torch.full((layout.crops * layout.rows * layout.columns,), float("nan"))
    by_patch[layout.source[layout.shows_patch]] = scores.detach().float().cpu()[layout.shows_patch]
    return by_patch


def _mixture(text: Tensor, saliency: Tensor, kept: Tensor) -> Tensor:
    return sum((score / score[kept].nansum().clamp_min(1e-30) for score in (text, saliency)), torch.zeros(()))


def _level(scores: Tensor) -> Tensor:
    """Scores as 0..1, see `draw`; NaN stays."""
    known = scores[~scores.isnan()]
    if known.numel() == 0:
        return scores
    low, high = known.min(), known.quantile(0.99)
    if high <= low:
        high = known.max()
    return ((scores - low) / (high - low).clamp_min(1e-30)).clamp(0, 1).sqrt()


def _colours(level: Tensor) -> Tensor:
    """[...] in 0..1 -> [3, ...] in 0..255."""
    anchors = torch.tensor(_ANCHORS)
    place = level.clamp(0, 1) * (len(anchors) - 1)
    below = place.long().clamp_max(len(anchors) - 2)
    part = (place - below).unsqueeze(-1)
    return ((1 - part) * anchors[below] + part * anchors[below + 1]).movedim(-1, 0) * 255


def _drawn(
    view: _View, shown: Tensor, kept: Tensor, level: Tensor | None, outlined: bool, width: int
) -> tuple[Image.Image, str]:
    """One view as an image `width` pixels wide, or a little less: patches are whole pixels."""
    rows, columns = view.patches.shape
    side = width // columns

    def spread(cells: Tensor) -> Tensor:
        return cells.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)

    size = (rows * side, columns * side)
    pixels = torch.nn.functional.interpolate(
        view.pixels.unsqueeze(0), size=size, mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 255)
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True).expand_as(pixels)
    kept_cells = kept[view.patches]
    if level is None:
        dimmed = (0.6 * grey + 0.4 * pixels) * DIMMED
        pixels = torch.where(spread(kept_cells), pixels, dimmed)
        lacking = ~shown[view.patches]
    else:
        heat = level[view.patches]
        lacking = heat.isnan()
        pixels = (1 - OPACITY) * 0.8 * grey + OPACITY * spread(_colours(heat.nan_to_num()))
    pixels = torch.where(spread(lacking), _hatched(size), pixels)
    image = Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    if outlined and not bool(kept_cells.all()):
        _outline(image, kept_cells, side, _OUTLINE if level is None else _THIN_OUTLINE)
    return image, view.label


def _hatched(size: tuple[int, int]) -> Tensor:
    down, across = (torch.arange(count) for count in size)
    stripe = (down.unsqueeze(-1) + across) % 9 < 2
    paper, line = (torch.tensor(colour, dtype=torch.float32).view(3, 1, 1) for colour in (_CUT_OFF, _HATCH))
    return torch.where(stripe, line, paper)


def _outline(image: Image.Image, kept: Tensor, side: int, colour: tuple[int, int, int]) -> None:
    """A line along every border between a kept patch and one that is not, inside the former."""
    pen = ImageDraw.Draw(image)
    thin = (1 if side < 14 else 2) - 1
    padded = torch.nn.functional.pad(kept, (1, 1, 1, 1)).tolist()
    for row, column in kept.nonzero().tolist():
        left, top = column * side, row * side
        right, bottom = left + side - 1, top + side - 1
        if not padded[row][column + 1]:
            pen.rectangle((left, top, right, top + thin), fill=colour)
        if not padded[row + 2][column + 1]:
            pen.rectangle((left, bottom - thin, right, bottom), fill=colour)
        if not padded[row + 1][column]:
            pen.rectangle((left, top, left + thin, bottom), fill=colour)
        if not padded[row + 1][column + 2]:
            pen.rectangle((right - thin, top, right, bottom), fill=colour)


def _panel(panel: Panel) -> Image.Image:
    """Title, subtitle and the drawings, one below the other."""
    pieces = panel.drawings
    width = max(image.width for image, _ in pieces)
    heading = _text_block([(panel.title, 22, _INK), (panel.subtitle, 15, _PALE_INK)], width)
    labels = [_text_block([(label, 14, _PALE_INK)], width) if label else None for _, label in pieces]
    height = heading.height + 8 + sum(image.height for image, _ in pieces)
    height += sum(label.height + 6 for label in labels if label) + 12 * (len(pieces) - 1)
    drawn = Image.new("RGB", (width, height), _PAPER)
    drawn.paste(heading, (0, 0))
    top = heading.height + 8
    for (image, _), label in zip(pieces, labels, strict=True):
        drawn.paste(image, ((width - image.width) // 2, top))
        top += image.height
        if label:
            drawn.paste(label, (0, top + 6))
            top += label.height + 6
        top += 12
    return drawn


def _footer(record: Record, index: int, question: str, answer: str) -> list[tuple[str, int, tuple[int, int, int]]]:
    """Lines of the footer: text, size and colour."""
    before, after = record.tokens_before[index], record.tokens_after[index]
    facts = f"kept {after} of {before} visual tokens ({100 * after / before:.3g} %)"
    objective, certificate = record.objective[index], record.certificate[index]
    if objective is not None:
        facts += f", objective {objective:.4g}"
    if certificate is not None:
        facts += f", within {max(100 * certificate, 0.01):.2g} % of the best possible"
    lines = []
    if question.strip():
        lines.append((question.strip(), 22, _INK))
    if answer.strip():
        lines.append((answer.strip(), 22, (22, 92, 160)))
    return [*lines, (facts, 16, _PALE_INK)]


def _page(panels: list[Image.Image], footer: list[tuple[str, int, tuple[int, int, int]]], *, heat: bool) -> Image.Image:
    inner = max(sum(panel.width for panel in panels) + _GAP * (len(panels) - 1), 480)
    text = _text_block(footer, inner - (190 if heat else 0))
    tallest = max(panel.height for panel in panels)
    page = Image.new("RGB", (inner + 2 * _MARGIN, tallest + text.height + 20 + 2 * _MARGIN), _PAPER)
    left = _MARGIN
    for panel in panels:
        page.paste(panel, (left, _MARGIN))
        left += panel.width + _GAP
    page.paste(text, (_MARGIN, _MARGIN + tallest + 20))
    if heat:
        page.paste(_legend(), (_MARGIN + inner - 170, _MARGIN + tallest + 20))
    return page


def _legend() -> Image.Image:
    legend = Image.new("RGB", (170, 34), _PAPER)
    bar = _colours(torch.linspace(0, 1, 170).expand(12, -1))
    legend.paste(Image.fromarray(bar.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()), (0, 2))
    pen, font = ImageDraw.Draw(legend), ImageFont.load_default(14)
    pen.text((0, 17), "less", fill=_PALE_INK, font=font)
    pen.text((170, 17), "more", fill=_PALE_INK, font=font, anchor="ra")
    return legend


def _text_block(parts: list[tuple[str, int, tuple[int, int, int]]], width: int, most_lines: int = 12) -> Image.Image:
    """Paragraphs below each other, wrapped to `width`."""
    lines = []
    for text, size, colour in parts:
        font = ImageFont.load_default(size)
        wrapped = _wrapped(text, font, width)
        if len(wrapped) > most_lines:
            wrapped = [*wrapped[: most_lines - 1], "..."]
        lines += [(line, font, size, colour) for line in wrapped]
    block = Image.new("RGB", (width, sum(_line_height(size) for _, _, size, _ in lines) or 1), _PAPER)
    pen, top = ImageDraw.Draw(block), 0
    for line, font, size, colour in lines:
        pen.text((0, top), line, fill=colour, font=font)
        top += _line_height(size)
    return block


def _line_height(size: int) -> int:
    return size + size // 3 + 2


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Lines that fit `width`: broken between words, and inside a word that does not fit by itself."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                fits = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return [line for line in lines if line]

"""From images to kept tokens: run the tower, then the method on all images of one size and budget together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adafv.core import ImageLayout
from adafv.engines.transformers.conversation import Conversation, PublishedImage
from adafv.engines.transformers.prompt import PlacedImage
from adafv.families import Encoded, Family
from adafv.methods import Kept, Method, VisualTokens


@dataclass
class Choice:
    """What was decided for one image."""

    kept: Tensor
    """[K] indices into the tokens as fed."""
    places: Tensor
    """[K] distinct indices into the image's placeholders: which of them stay."""
    layout: ImageLayout
    features: Tensor
    saliency: Tensor | None = None
    text_attention: Tensor | None = None
    objective: float | None = None
    certificate: float | None = None


def encode_images(
    model: Any,
    family: Family,
    method: Method,
    images: dict[str, Any],
    pruned: list[bool],
    grids: list[tuple[int, int] | None],
) -> Encoded:
    sizes = set(grids)
    wants_saliency = method.needs_saliency and any(pruned)
    if len(sizes) == 1:
        return family.encode(model, images, saliency=wants_saliency, grid=sizes.pop())
    # Down-sampling images of different sizes: one run of the tower per grid.
    features: list[Any] = [None] * len(pruned)
    for size in sizes:
        wanted = [i for i, grid in enumerate(grids) if grid == size]
        part = family.encode(model, family.take(model, images, wanted), saliency=False, grid=size)
        for i, feature in zip(wanted, part.features, strict=True):
            features[i] = feature
    return Encoded(features, None)


def choose_tokens(
    model: Any,
    family: Family,
    method: Method,
    placed: list[PlacedImage],
    keeps: list[int],
    grids: list[tuple[int, int] | None],
    encoded: Encoded,
    texts: list[Tensor | None],
    call: Conversation,
) -> list[Choice]:
    """Run the method on all images; those of one size and budget together."""
    groups: dict[Any, list[int]] = {}
    choices: list[Any] = [None] * len(placed)
    filler = family.filler(model)
    for i, (image, keep) in enumerate(zip(placed, keeps, strict=True)):
        layout = image.layout
        if keep == layout.tokens:
            everything = torch.arange(keep)
            features = _tokens(encoded.features[i], layout.source, filler)
            choices[i] = Choice(everything, everything, layout, features)
            continue
        layout = image.fed
        groups.setdefault((layout.tokens, layout.crops, layout.rows, layout.columns, keep, grids[i]), []).append(i)

    for (_, crops, rows, columns, keep, grid), members in groups.items():
        device = encoded.features[members[0]].device
        source = torch.stack([placed[i].fed.source for i in members]).to(device)
        parts = [encoded.features[i] for i in members]
        if grid is None:
            parts = [_tokens(part, order, filler) for part, order in zip(parts, source, strict=True)]
        saliency = None
        if encoded.saliency is not None:
            saliency = _stack([encoded.saliency[i] for i in members]).gather(1, source.clamp_min(0))
            saliency = saliency.masked_fill(source < 0, 0.0)
        text, text_mask = _embedded_text(model, [(placed[i].row, texts[i]) for i in members], call, device)
        tokens = VisualTokens(_stack(parts), saliency, text, text_mask, source >= 0, source, crops, rows, columns, grid)
        kept = method.select(tokens, keep)
        for place, i in enumerate(members):
            choices[i] = _choice(kept, place, parts[place], saliency, placed[i])
    return choices


def _choice(kept: Kept, place: int, features: Tensor, saliency: Tensor | None, image: PlacedImage) -> Choice:
    layout = image.fed
    indices = kept.indices[place]
    chosen = features[indices] if kept.features is None else kept.features[place]
    places = torch.arange(indices.numel()) if isinstance(image, PublishedImage) else indices

    def scores(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        shown = layout.shows_patch.to(values.device)
        return values[place].masked_fill(~shown, float("nan"))

    return Choice(
        indices,
        places,
        layout,
        chosen,
        scores(saliency),
        scores(kept.text_attention),
        None if kept.objective is None else float(kept.objective[place]),
        None if kept.certificate is None else float(kept.certificate[place]),
    )


def _tokens(features: Tensor, source: Tensor, filler: Tensor | None) -> Tensor:
    """Put the features of the patches into the order of the tokens, `filler` where a token shows none. [P, D] -> [N, D]"""
    source = source.to(features.device)
    if filler is not None:
        features = torch.cat((features, filler.to(features).unsqueeze(0)))
        source = source.where(source >= 0, features.shape[0] - 1)
    return features.index_select(0, source)


def _stack(parts: list[Tensor]) -> Tensor:
    """torch.stack, without the copy where there is one part."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _embedded_text(
    model: Any, texts: list[tuple[int, Tensor | None]], call: Conversation, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Input embeddings [G, T, D] and mask [G, T] of the text that counts for each image of a group."""
    if any(columns is None for _, columns in texts):
        return None, None
    parts = []
    for row, columns in texts:
        assert columns is not None
        if call.embeds is not None:
            parts.append(call.embeds[row, columns.to(call.embeds.device)].detach().to(device))
        else:
            ids = call.prompt.tokens[row, columns].to(call.device)
            parts.append(model.get_input_embeddings()(ids).detach().to(device))
    mask = pad_sequence([torch.ones(len(part), dtype=torch.bool, device=device) for part in parts], batch_first=True)
    return pad_sequence(parts, batch_first=True), mask

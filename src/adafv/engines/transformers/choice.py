"""From images to kept tokens: run the tower, then the method on all images of one size and budget together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adafv.core import ImageLayout
from adafv.core.tokens import SALIENCY
from adafv.engines.transformers.conversation import Conversation
from adafv.engines.transformers.families import Encoded, Family
from adafv.methods import Kept, Method, VisualTokens
from adafv.prompts.prompt import PlacedImage


@dataclass
class Choice:
    """What was decided for one image."""

    kept: Tensor
    """[K] indices into the tokens as fed."""
    places: Tensor
    """[K] distinct indices into the image's placeholders: which of them stay."""
    layout: ImageLayout
    features: Tensor
    """[K, D]"""
    deepstack: Tensor | None = None
    """[K, L, D], what travels with them to the language model's layers."""
    saliency: Tensor | None = None
    text_attention: Tensor | None = None
    objective: float | None = None
    certificate: float | None = None


@dataclass
class EncodedImage:
    """What the tower made of one image; see `adafv.engines.transformers.families.Encoded`."""

    features: Tensor
    saliency: Tensor | None
    deepstack: Tensor | None

    def part(self, tokens: Tensor | None) -> "EncodedImage":
        """Some of its tokens alone; None: all."""
        if tokens is None:
            return self
        tokens = tokens.to(self.features.device)
        return EncodedImage(
            *(None if values is None else values[tokens] for values in (self.features, self.saliency, self.deepstack))  # type: ignore[arg-type]
        )


def encode_images(
    model: Any,
    family: Family,
    methods: list[Method],
    visuals: dict[str, dict[str, Any]],
    layouts: dict[str, list[ImageLayout]],
    placed: list[PlacedImage],
    pruned: list[bool],
    grids: list[tuple[int, int] | None],
) -> list[EncodedImage]:
    """Run the tower once per modality, or where images are scaled down once per grid; one entry per placed image."""
    wants_saliency = any(method.needs_saliency and lose for method, lose in zip(methods, pruned, strict=True))
    signals = frozenset({SALIENCY} if wants_saliency else ())
    family.check_signals(model, signals)
    results: list[Any] = [None] * len(placed)
    for modality, inputs in visuals.items():
        members = [i for i, image in enumerate(placed) if image.modality == modality]
        numbers = {placed[i].number: grids[i] for i in members}
        encoded: dict[int, EncodedImage] = {}
        for grid in set(numbers.values()):
            wanted = [number for number in sorted(numbers) if numbers[number] == grid]
            some, fed = inputs, layouts[modality]
            if len(wanted) < len(numbers):
                some, fed = family.take(model, modality, inputs, fed, wanted), [fed[number] for number in wanted]
            if grid is None:
                part = family.encode(model, modality, some, fed, signals)
            else:
                part = Encoded(family.encode_smaller(model, some, fed, grid))
            for place, number in enumerate(wanted):
                encoded[number] = EncodedImage(
                    part.features[place],
                    None if part.saliency is None else part.saliency[place],
                    part.deepstack[place] if part.deepstack else None,
                )
        for i in members:
            results[i] = encoded[placed[i].number].part(placed[i].part)
    return results


def choose_tokens(
    model: Any,
    methods: list[Method],
    placed: list[PlacedImage],
    keeps: list[int],
    grids: list[tuple[int, int] | None],
    encoded: list[EncodedImage],
    texts: list[Tensor | None],
    call: Conversation,
) -> list[Choice]:
    """Run the methods on all images; those of one size, budget and method together."""
    groups: dict[Any, list[int]] = {}
    choices: list[Any] = [None] * len(placed)
    for i, (image, keep) in enumerate(zip(placed, keeps, strict=True)):
        layout = image.layout
        if keep == layout.tokens:
            everything = torch.arange(keep)
            choices[i] = Choice(everything, everything, layout, encoded[i].features, encoded[i].deepstack)
            continue
        layout = image.fed
        alike = (layout.tokens, layout.crops, layout.rows, layout.columns, keep, grids[i], methods[i].name)
        groups.setdefault(alike, []).append(i)

    for (_, crops, rows, columns, keep, grid, _), members in groups.items():
        device = encoded[members[0]].features.device
        source = torch.stack([placed[i].fed.source for i in members]).to(device)
        features = _stack([encoded[i].features for i in members])
        saliency = None
        if encoded[members[0]].saliency is not None:
            saliency = _stack([encoded[i].saliency for i in members])  # type: ignore[misc]
            saliency = saliency.masked_fill(source < 0, 0.0)
        text, text_mask = _embedded_text(model, [(placed[i].row, texts[i]) for i in members], call, device)
        tokens = VisualTokens(features, saliency, text, text_mask, source >= 0, source, crops, rows, columns, grid)
        kept = methods[members[0]].select(tokens, keep)
        for place, i in enumerate(members):
            choices[i] = _choice(kept, place, encoded[i], saliency, placed[i])
    return choices


def _choice(kept: Kept, place: int, encoded: EncodedImage, saliency: Tensor | None, image: PlacedImage) -> Choice:
    layout = image.fed
    indices = kept.indices[place]
    chosen = encoded.features[indices] if kept.features is None else kept.features[place]
    places = torch.arange(indices.numel()) if image.published is not None else indices

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
        None if encoded.deepstack is None else encoded.deepstack[indices],
        scores(saliency),
        scores(kept.text_attention),
        None if kept.objective is None else float(kept.objective[place]),
        None if kept.certificate is None else float(kept.certificate[place]),
    )


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
            # As a batch of one: hooks on the embeddings, as NEFTune puts there, expect [B, T, D].
            parts.append(model.get_input_embeddings()(ids[None])[0].detach().to(device))
    mask = pad_sequence([torch.ones(len(part), dtype=torch.bool, device=device) for part in parts], batch_first=True)
    return pad_sequence(parts, batch_first=True), mask

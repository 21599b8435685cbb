"""The one preparation in front of every method, in every engine: encoded images and words -> the tokens that stay.

Images of one size, plan and method go through the method together. What it decides is checked here, and here merged
tokens are mixed, from weights, so that features and whatever travels with them are mixed alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, SupportsIndex

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adafv.core.encoded import EncodedImage
from adafv.core.layout import ImageLayout
from adafv.core.sending import sent
from adafv.core.tokens import READ, SALIENCY, STRINGS, Cut, Kept, Plan, Signal, VisualTokens, Words
from adafv.errors import BudgetError, MethodError

TOKENS, TOWER = "tokens", "tower"
"""What a method may mix: see `Method.mixes`."""
MIX_TOKENS = "give it before_projector=false, which mixes the visual tokens instead, or use another method"


class Chooser(Protocol):
    """What is asked of a method here: see `adafv.methods.base.Method`, which knows this package, not the reverse."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Signal]: ...
    @property
    def of_tower(self) -> frozenset[Signal]: ...
    @property
    def needs_words(self) -> bool: ...
    @property
    def stages(self) -> frozenset[str]: ...
    @property
    def may_repeat(self) -> bool: ...
    @property
    def mixes(self) -> str: ...
    def plan(self, layout: ImageLayout, keep: int) -> Plan: ...
    def cuts(self, depth: int, tokens: int, keep: int) -> Sequence[Cut]: ...
    def count(self, tokens: VisualTokens, keep: int) -> Tensor: ...
    def select(self, tokens: VisualTokens, keep: int) -> Kept: ...


@dataclass(frozen=True)
class Wanted:
    """One image of which fewer tokens are to stay."""

    encoded: EncodedImage
    method: Chooser
    plan: Plan
    most: int
    """What the budget leaves of it; the plan's own number where that is known."""
    words: Tensor | None = None
    """[T, D], embeddings of the text that counts; None where the method needs none."""
    ids: Tensor | None = None
    """[T] long; None where only the embeddings are known."""
    strings: Sequence[str] | None = None
    project: Callable[[Tensor], Tensor] | None = None
    """[..., E] -> [..., D], the projector: of methods that mix what it reads."""
    among: int | None = None
    """N of the whole image, where crops of it were not encoded; None: these are all of its tokens."""


@dataclass(frozen=True)
class Selected:
    """What was chosen for G like images."""

    members: tuple[int, ...]
    """Which of the images they are."""
    kept: Kept
    features: Tensor
    """[G, K, D], what the language model reads."""
    deepstack: Tensor | None
    """[G, K, L, D], what travels with them to the language model's layers."""
    saliency: Tensor | None
    """[G, N] float32, as the method saw it; None where it did not need it."""


def plan_of(method: Chooser, layout: Any, keep: int) -> Plan:
    """The method's plan for an image of which the budget leaves `keep` tokens, checked.

    Raises:
        MethodError: it plans more tokens than that, or none, or for another grid or crops than there can be.
    """
    # Images of one size may share their layout, and `source` be counted in as it lies there.
    plan = method.plan(layout if is_ours(method) else replace(layout, source=layout.source.clone()), keep)
    if not isinstance(plan, Plan):
        raise MethodError(f"`plan` of the method {method.name} returned a {type(plan).__name__}; return a Plan")
    if plan.keep is not None and (isinstance(plan.keep, bool) or not isinstance(plan.keep, int)):
        raise MethodError(
            f"the method {method.name} plans to keep {plan.keep!r} tokens, which is no whole number; give an int, or None to "
            "count after the scores"
        )
    if plan.keep is not None and not 1 <= plan.keep <= keep:
        raise MethodError(
            f"the method {method.name} plans to keep {plan.keep} tokens where the budget leaves {keep}; it may keep fewer, "
            "and at least one, but never more"
        )
    if plan.grid is not None and not (_are_numbers(plan.grid) and len(plan.grid) == 2 and min(plan.grid) > 0):
        raise MethodError(f"the method {method.name} plans the grid {plan.grid!r}; give (rows, columns), whole numbers")
    if plan.grid is not None and plan.keep != math.prod(plan.grid):
        raise MethodError(
            f"the method {method.name} plans to keep {plan.keep} tokens of a grid of {plan.grid[0]} x {plan.grid[1]}, all of "
            f"whose tokens stay; plan {math.prod(plan.grid)}"
        )
    if plan.crops is not None:
        if not _are_numbers(plan.crops):
            raise MethodError(f"the method {method.name} plans the crops {plan.crops!r}; give a tuple of whole numbers")
        allowed = plan.allowed(layout)
        if not allowed:
            raise MethodError(
                f"the method {method.name} plans to keep tokens of the crops {plan.crops} alone, which show none; there are "
                f"crops 0 to {layout.crops - 1}"
            )
        if plan.keep is not None and plan.keep > allowed:
            raise BudgetError(
                f"keep={keep}: the method {method.name} looks at {len(plan.crops)} of {layout.crops} crops, which have "
                f"{allowed} tokens; give at most that"
            )
    return plan


def _are_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(number, SupportsIndex) for number in value)


def cuts_of(method: Chooser, depth: int, tokens: int, keep: int) -> tuple[Cut, ...]:
    """The method's cuts inside a language model of `depth` layers, checked; those that take nothing are left out.

    Raises:
        MethodError: they are not in order, or leave more than the budget or nothing.
    """
    cuts = tuple(method.cuts(depth, tokens, keep))

    def refuse(what: str) -> None:
        raise MethodError(f"`cuts` of the method {method.name} {what}")

    if not cuts:
        refuse("gave none; give at least one Cut")
    layer, left = 0, tokens
    for cut in cuts:
        if not isinstance(cut, Cut):
            refuse(f"gave a {type(cut).__name__}; give Cut(layer, keep, rated)")
        if any(type(value) is not int for value in (cut.layer, cut.keep, cut.rated)):
            refuse(f"gave {cut}, whose numbers must be of type int")
        if not layer < cut.layer < depth:
            refuse(f"gave layer {cut.layer} after {layer}; layers ascend, from 1 to {depth - 1} in this model")
        if cut.rated not in (cut.layer - 1, cut.layer):
            refuse(
                f"asked at layer {cut.layer} for the attention of layer {cut.rated}; it can have that of the same layer, or "
                "of the one before"
            )
        if not 1 <= cut.keep <= left:
            refuse(f"keeps {cut.keep} of {left} tokens at layer {cut.layer}; at least one stays, and none comes back")
        layer, left = cut.layer, cut.keep
    if left > keep:
        refuse(f"leave {left} tokens where the budget leaves {keep}; they may leave fewer, never more")
    before = (tokens, *(cut.keep for cut in cuts))
    return tuple(cut for cut, there in zip(cuts, before, strict=False) if cut.keep < there)


def check_method(
    method: Chooser,
    engine: str,
    stages: frozenset[str],
    signals: Callable[[Signal], bool],
    mixes: Sequence[str] = (TOKENS,),
) -> None:
    """The one place where a method that an engine cannot serve is refused.

    Args:
        stages: at which the engine lets a method act.
        signals: whether the engine has one of those that are not of the tower.
        mixes: what the engine can mix by weights.

    Raises:
        MethodError: the engine lacks something that the method needs.
    """
    for stage in sorted(method.stages - stages):
        raise MethodError(
            f"the method {method.name} acts at the stage {stage!r}, which {engine} does not have here; it has "
            f"{', '.join(sorted(stages))}: use another method"
        )
    if method.mixes not in (TOKENS, TOWER):
        raise MethodError(f"the method {method.name} mixes {method.mixes!r}; known are: {TOKENS}, {TOWER}")
    if method.mixes not in mixes:
        raise MethodError(
            f"the method {method.name} mixes what the projector reads, which {engine} does not do here: {MIX_TOKENS}"
        )
    for signal in sorted(method.needs, key=str):
        if not signal.of_tower and not signals(signal):
            raise MethodError(
                f"the method {method.name} needs {signal} of the prompt, which {engine} does not have here: {mends(signal)}"
            )


def mends(signal: Signal) -> str:
    """What to do where a signal of the prompt is not there."""
    if signal != STRINGS:
        return "use another method"
    return "give the processor, and input_ids rather than embeddings, or use another method"


def select_tokens(images: Sequence[Wanted], agree: Callable[[Kept], Kept] = lambda kept: kept) -> list[Selected]:
    """Choose the tokens of some images.

    Args:
        agree: what makes the workers of one model agree on a choice, before anything is taken by it.

    Raises:
        MethodError: a method does not keep its contract.
    """
    groups: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        layout, plan = image.encoded.layout, image.plan
        size = (image.among, layout.tokens, layout.crops, layout.rows, layout.columns, layout.tiling)
        intended = (plan.keep, plan.grid, plan.crops, image.most, id(image.method))
        groups.setdefault((size, intended), []).append(i)
    selected = []
    for members in groups.values():
        tokens = visual_tokens([images[i] for i in members])
        first = images[members[0]]
        for part, keep, some in _counted(first, tokens, members):
            kept = chosen_by(first.method, some, keep)
            planned = first.plan.crops
            if planned is not None and not (is_ours(first.method) or some.candidates.gather(1, kept.indices).all()):
                raise MethodError(
                    f"the method {first.method.name} plans to keep tokens of the crops {planned} alone, and chose others: "
                    "choose from `candidates`"
                )
            selected.append(_taken(images, part, some, agree(kept)))
    return selected


def chosen_by(method: Chooser, tokens: VisualTokens, keep: int) -> Kept:
    """What a method chooses, checked.

    What it returns it may hold on to, as a buffer for the next images; of that, copies are kept.

    Raises:
        MethodError: it does not keep its contract.
    """
    kept = method.select(_shown_to(method, tokens), keep)
    check_kept(method, tokens, keep, kept)
    return kept if is_ours(method) else kept.copy()


def is_ours(method: Chooser) -> bool:
    """Whether a method is one of adafv's own, whose contract the tests hold it to."""
    return type(method).__module__.startswith("adafv.")


def _shown_to(method: Chooser, tokens: VisualTokens) -> VisualTokens:
    """Copies for methods that are not adafv's own. These tensors are what the language model reads, and what the next
    question about an encoded image will; `detach().float()` of float32 is no copy, and what is then written into it, through
    NumPy or in inference mode, nothing counts."""
    return tokens if is_ours(method) else tokens.copy()


def visual_tokens(images: Sequence[Wanted]) -> VisualTokens:
    """What a method sees of images that are alike: stacked, masked, with their words."""
    first = images[0]
    layout, device = first.encoded.layout, first.encoded.features.device
    source = torch.stack([image.encoded.layout.source for image in images])
    candidates = shown = source >= 0
    if first.plan.crops is not None:
        candidates = torch.stack([image.encoded.layout.of_crops(first.plan.crops) for image in images])
    nothing_hidden = bool(shown.all())  # on the host
    source, candidates, shown = (sent(values, device) for values in (source, candidates, shown))
    signals = {}
    for signal in first.method.of_tower - {READ} if first.plan.grid is None else ():
        values = _stack([image.encoded.signals[signal] for image in images])
        if not nothing_hidden:
            values = values.masked_fill(~shown.view(*shown.shape, *[1] * (values.dim() - 2)), 0.0)
        signals[signal] = values
    return VisualTokens(
        features=_stack([image.encoded.features for image in images]),
        candidates=candidates,
        source=source,
        crops=layout.crops,
        rows=layout.rows,
        columns=layout.columns,
        tiling=layout.tiling,
        signals=signals,
        words=_words(images) if first.method.needs_words else None,
        grid=first.plan.grid,
    )


def at_places(tokens: VisualTokens, places: Tensor) -> VisualTokens:
    """Of the tokens of every image those at `places` ([n] long) alone."""
    return replace(
        tokens,
        features=tokens.features[:, places],
        candidates=tokens.candidates[:, places],
        source=tokens.source[:, places],
        signals={signal: values[:, places] for signal, values in tokens.signals.items()},
    )


def _words(images: Sequence[Wanted]) -> Words:
    parts = [image.words for image in images]
    device = parts[0].device  # type: ignore[union-attr]
    lengths = [len(part) for part in parts]  # type: ignore[arg-type]
    ids = [
        torch.full((length,), -1, device=device) if image.ids is None else sent(image.ids, device)
        for image, length in zip(images, lengths, strict=True)
    ]
    strings = None
    if STRINGS in images[0].method.needs:
        strings = [image.strings or () for image in images]
    if len(set(lengths)) == 1:
        mask = torch.ones(len(images), lengths[0], dtype=torch.bool, device=device)
        return Words(_stack(parts), mask, _stack(ids), strings)  # type: ignore[arg-type]
    embeddings, mask = words_of(parts)  # type: ignore[arg-type]
    return Words(
        embeddings,
        mask,
        pad_sequence(ids, batch_first=True, padding_value=-1),
        strings,
    )


def words_of(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings of the words of every image ([T, D] each) -> padded [G, T, D], and [G, T] bool, False on padding."""
    lengths = torch.tensor([len(part) for part in parts])
    mask = torch.arange(int(lengths.max())).expand(len(parts), -1) < lengths.unsqueeze(1)
    return pad_sequence(list(parts), batch_first=True), sent(mask, parts[0].device)


def whole_of(image: Wanted) -> Selected:
    """All tokens of an image of which no more are there than stay: of one whose other crops were not encoded."""
    encoded = image.encoded
    features, saliency = encoded.features.unsqueeze(0), encoded.saliency
    kept = Kept(torch.arange(encoded.layout.tokens, device=features.device).unsqueeze(0))
    deepstack = None if encoded.deepstack is None else encoded.deepstack.unsqueeze(0)
    return Selected((0,), kept, features, deepstack, None if saliency is None else saliency.unsqueeze(0))


def among_all(selected: Selected, places: Sequence[Tensor], tokens: int) -> Selected:
    """What was chosen among some tokens of every image, as places among all of them.

    Args:
        places: per member ([n] long, on the host), which tokens of the whole image these are.
        tokens: N of the whole image.

    Scores are NaN where there was nothing to choose.
    """
    kept = selected.kept
    there = sent(torch.stack(list(places)), kept.indices.device)

    def spread(values: Tensor | None, filler: float) -> Tensor | None:
        if values is None:
            return None
        index = there if values.dim() == 2 else there.unsqueeze(1).expand(-1, values.shape[1], -1)
        return values.new_full((*values.shape[:-1], tokens), filler).scatter(-1, index, values)

    new = replace(
        kept,
        indices=there.gather(1, kept.indices),
        weights=spread(kept.weights, 0.0),
        text_attention=spread(kept.text_attention, float("nan")),
    )
    return replace(selected, kept=new, saliency=spread(selected.saliency, float("nan")))


def _counted(
    image: Wanted, tokens: VisualTokens, members: list[int]
) -> list[tuple[tuple[int, ...], int, VisualTokens]]:
    """(images, K, what the method sees of them): all together, or by the number that the method counts after the scores."""
    if image.plan.keep is not None:
        return [(tuple(members), image.plan.keep, tokens)]
    # No more than there are in the crops that the method looks at: what it keeps beyond them would be of other crops.
    most = min(image.most, image.plan.allowed(image.encoded.layout))
    counted = image.method.count(_shown_to(image.method, tokens), most)
    if not isinstance(counted, Tensor) or counted.shape != (len(members),) or counted.dtype != torch.long:
        given = f"{counted.dtype} {list(counted.shape)}" if isinstance(counted, Tensor) else type(counted).__name__
        raise MethodError(
            f"`count` of the method {image.method.name} gave {given}; give one whole number per image, long [{len(members)}]"
        )
    counts = counted.tolist()  # one wait for the device
    if any(not 1 <= count <= most for count in counts):
        raise MethodError(
            f"the method {image.method.name} counts {counts} tokens where the budget leaves {most}; it may keep fewer, "
            "and at least one, but never more"
        )
    parts = []
    for keep in sorted(set(counts)):
        places = [place for place, count in enumerate(counts) if count == keep]
        parts.append((tuple(members[place] for place in places), keep, _some(tokens, places)))
    return parts


def _some(tokens: VisualTokens, places: list[int]) -> VisualTokens:
    """Of some of the images alone."""
    if len(places) == len(tokens.features):
        return tokens
    words = tokens.words
    if words is not None:
        strings = None if words.strings is None else [words.strings[place] for place in places]
        words = Words(words.embeddings[places], words.mask[places], words.ids[places], strings)
    return replace(
        tokens,
        features=tokens.features[places],
        candidates=tokens.candidates[places],
        source=tokens.source[places],
        signals={signal: values[places] for signal, values in tokens.signals.items()},
        words=words,
    )


def check_kept(method: Chooser, tokens: VisualTokens, keep: int, kept: Kept) -> None:
    """Raise MethodError where a method returns what it must not.

    Shapes and types cost nothing. Values can only be looked at by waiting for the device: that is done on the CPU, and on an
    accelerator for methods that are not adafv's own.
    """
    images, available = tokens.source.shape

    def refuse(what: str) -> None:
        raise MethodError(f"the method {method.name} does not keep its contract: {what}")

    if not isinstance(kept, Kept):
        refuse(f"`select` returned a {type(kept).__name__}; return Kept(indices)")
    indices, weights = kept.indices, kept.weights
    for name in ("indices", "weights", "text_attention", "objective", "certificate"):
        value = getattr(kept, name)
        if value is None and name != "indices":
            continue
        if not isinstance(value, Tensor):
            refuse(f"{name} is a {type(value).__name__}, not a tensor")
        if value.device != tokens.source.device:
            refuse(f"{name} is on {value.device}, not on {tokens.source.device}, where the tokens are")
    if indices.dtype != torch.long or indices.shape != (images, keep):
        refuse(f"indices are {indices.dtype} {list(indices.shape)}, not long [{images}, {keep}]")
    if weights is not None and (not weights.is_floating_point() or weights.shape != (images, keep, available)):
        refuse(f"weights are {weights.dtype} {list(weights.shape)}, not floating-point [{images}, {keep}, {available}]")
    if weights is not None and (tokens.grid is not None or method.may_repeat):
        refuse("weights mix the tokens of the image, but it plans another grid, or repeats tokens")
    for name, shape in (("text_attention", (images, available)), ("objective", (images,)), ("certificate", (images,))):
        value = getattr(kept, name)
        if value is not None and tuple(value.shape) != shape:
            refuse(f"{name} is {list(value.shape)}, not {list(shape)}")
    if indices.device.type != "cpu" and is_ours(method):
        return
    if method.may_repeat:
        if not bool(((indices >= 0) & (indices < available)).all()):
            refuse(f"indices lie outside 0 to {available - 1}")
        return
    before = torch.nn.functional.pad(indices, (1, 0), value=-1)
    if not bool((before.diff(dim=-1) > 0).all() & (indices[:, -1] < available).all()):
        refuse(f"indices must be ascending, distinct and in 0 to {available - 1}; sort them, as `top_tokens` does")
    if weights is None:
        return
    if not bool(weights.isfinite().all()):
        refuse("weights are not finite")
    if method.mixes == TOWER:
        mixed = weights.masked_fill(_as_they_are(weights).unsqueeze(-1), 0.0)
        if bool((mixed.masked_fill((tokens.source >= 0).unsqueeze(1), 0.0) != 0).any()):
            refuse("weights mix tokens that show no patch, such as newlines, which the projector never reads")


def _taken(images: Sequence[Wanted], members: tuple[int, ...], tokens: VisualTokens, kept: Kept) -> Selected:
    """What stays of features and deepstack rows."""
    features, deepstack = tokens.features, None
    if tokens.grid is None:
        if kept.weights is not None and images[members[0]].method.mixes == TOWER:
            features = _projected(images, members, features, kept.weights)
        else:
            features = take(kept, features)
        if images[members[0]].encoded.deepstack is not None:
            deepstack = take(kept, _stack([images[i].encoded.deepstack for i in members]))  # type: ignore[misc]
    return Selected(members, kept, features, deepstack, tokens.signals.get(SALIENCY))


def _projected(images: Sequence[Wanted], members: tuple[int, ...], features: Tensor, weights: Tensor) -> Tensor:
    """[G, K, D]: the projector's tokens for mixes of what it reads. A token that stays as it is is the one of `features`, bit
    by bit: a product of other shape may be rounded in another way, and a newline is none of the projector's."""
    project = images[members[0]].project
    assert project is not None
    mixed = project(take(Kept(weights.argmax(-1), weights), _stack([images[i].encoded.signals[READ] for i in members])))
    alone = take(Kept(weights.argmax(-1)), features)
    return torch.where(_as_they_are(weights).unsqueeze(-1), alone, mixed.to(features))


def _as_they_are(weights: Tensor) -> Tensor:
    """[G, K] bool, which rows of [G, K, N] are one token with a weight of 1."""
    return (weights.amax(-1) == 1) & ((weights != 0).sum(-1) == 1)


def take(kept: Kept, values: Tensor) -> Tensor:
    """Of values per token ([G, N, ...]), those that stay, or their mixes ([G, K, ...])."""
    flat = values.flatten(2) if values.dim() > 3 else values
    if kept.weights is None:
        if len(flat) == 1:
            taken = flat[0].index_select(0, kept.indices[0]).unsqueeze(0)
        else:
            taken = flat.gather(1, kept.indices.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
    else:
        # In float32, where a weight of 1 gives the token back as it is.
        taken = (kept.weights.to(flat.device).float() @ flat.float()).to(values.dtype)
    return taken.unflatten(-1, values.shape[2:]) if values.dim() > 3 else taken


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """torch.stack, without the copy where the parts lie one behind the other in one tensor, as images that went through the
    tower together do, or are one tensor, as one image for several questions is."""
    first, size = parts[0], parts[0].numel()
    if len(parts) == 1:
        return first.unsqueeze(0)
    offsets = [part.storage_offset() - first.storage_offset() for part in parts]
    step = offsets[1]
    like = (first.shape, first.dtype, first.untyped_storage()._cdata)
    if (
        step in (0, size)
        and offsets == [number * step for number in range(len(parts))]
        and all((part.shape, part.dtype, part.untyped_storage()._cdata) == like for part in parts)
        and all(part.is_contiguous() and not part.requires_grad for part in parts)
    ):
        return first.as_strided((len(parts), *first.shape), (step, *first.stride()))
    return torch.stack(list(parts))

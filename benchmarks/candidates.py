"""Selections that were tried for the default, by name; what came of each stands in docs/evidence.md.

All are greedy: token after token is taken, whichever adds most. They differ in what is added up. Not part of the package:
the one that won is in `adafv.methods`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adafv.core import joint_search, top_tokens
from adafv.core.facets import facet_rounds, facet_steps, fewest, of_views, two_scores, with_the_farthest, worth
from adafv.core.greedy import block_sizes
from adafv.core.likeness import crop_of, unit_vectors
from adafv.core.tokens import HIDDEN, SALIENCY, WORDS, Kept, Signal, VisualTokens, saliency_of
from adafv.methods import Method
from adafv.methods.scope import covering

_TINY = 1e-12


def cosines_of(tokens: VisualTokens, space: str, centred: bool) -> Tensor:
    """[G, N, N], of the projected tokens or of the tower's."""
    values = (tokens.features.detach() if space == "tokens" else tokens.signals[HIDDEN]).float()
    if centred:
        shown = tokens.candidates.unsqueeze(-1)
        values = values - (values * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)
    values = normalize(values, dim=-1)
    return values @ values.transpose(1, 2)


def word_cosines(tokens: VisualTokens) -> Tensor:
    """[G, T, N]."""
    words = normalize(tokens.text.embeddings.float(), dim=-1)
    return words @ normalize(tokens.features.detach().float(), dim=-1).transpose(1, 2)


def within(values: Tensor, mask: Tensor) -> Tensor:
    """To 0 .. 1 over the candidates."""
    low = values.masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
    high = values.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
    return ((values - low) / (high - low).clamp_min(_TINY)).clamp(0, 1)


def attention_per_word(tokens: VisualTokens, temperature: float, support: float) -> Tensor:
    """[G, T, N], the softmax of each word; with `support`, spread over that share of the image."""
    cosines = word_cosines(tokens)
    shown = tokens.candidates.unsqueeze(1)
    if not support:
        return (temperature * cosines).masked_fill(~shown, float("-inf")).softmax(-1)
    wanted = support * shown.sum(-1).float()
    low, high = (torch.full_like(cosines[..., 0], value) for value in (0.0, 7.0))
    for _ in range(12):
        middle = (low + high) / 2
        attention = (middle.exp().unsqueeze(-1) * cosines).masked_fill(~shown, float("-inf")).softmax(-1)
        wide = 1 / attention.square().sum(-1) > wanted
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return attention


@dataclass(frozen=True)
class Masses(Method):
    """Greedy on a sum of logarithms of masses: text (its largest word, or each word), saliency, coverage."""

    words: str = "max"
    """"max": one mass of each token's best word; "each": a mass per word, weighted 1 / T; "covered": as MMTok."""
    text: float = 1.0
    saliency: float = 1.0
    coverage: float = 1.0
    space: str = "hidden"
    centred: bool = False
    weighted: str = "plain"
    """What counts for how much in the coverage: "plain", "saliency", "quality" (t and s at the joint optimum)."""
    sharp: float = 1.0
    """Power of the similarity in the coverage."""
    temperature: float = 100.0
    support: float = 0.0
    soft: float = 1.0
    """Power of the saliency."""

    name = "masses"
    summary = "logarithms of masses"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        shown = tokens.candidates
        per_word = attention_per_word(tokens, self.temperature, self.support).masked_fill(
            ~tokens.text.mask.unsqueeze(-1), 0.0
        )
        best_word = per_word.amax(1)
        s = tokens.saliency.clamp_min(0).pow(self.soft).masked_fill(~shown, 0.0)
        s = s / s.sum(-1, keepdim=True).clamp_min(_TINY)
        t = best_word / best_word.sum(-1, keepdim=True).clamp_min(_TINY)
        similar = cosines_of(tokens, self.space, self.centred).clamp_min(0).pow(self.sharp)
        if self.weighted == "plain":
            w = shown.float()
        elif self.weighted == "saliency":
            w = s
        else:
            w = t + s
        w = w / w.sum(-1, keepdim=True).clamp_min(_TINY)
        images, number = shown.shape
        count = tokens.text.mask.sum(-1, keepdim=True).float()
        text_mass = torch.zeros(images, 1, device=shown.device)
        word_mass = torch.zeros(images, per_word.shape[1], 1, device=shown.device)
        salient_mass = torch.zeros(images, 1, device=shown.device)
        best = torch.zeros(images, number, device=shown.device)
        taken = ~shown
        picked = []
        for _ in range(keep):
            gain = torch.zeros(images, number, device=shown.device)
            if self.text and self.words == "max":
                gain = gain + self.text * (text_mass + t + _TINY).log()
            elif self.text and self.words == "each":
                logs = (word_mass + per_word + 1e-6).log().masked_fill(~tokens.text.mask.unsqueeze(-1), 0.0)
                gain = gain + self.text * logs.sum(1) / count
            elif self.text:
                covered = torch.maximum(word_mass, per_word).sum(1)
                gain = gain + self.text * (covered + _TINY).log()
            if self.saliency:
                gain = gain + self.saliency * (salient_mass + s + _TINY).log()
            if self.coverage:
                more = torch.maximum(similar, best.unsqueeze(1))  # [G, candidate, covered]
                cover = (more * w.unsqueeze(1)).sum(-1)
                gain = gain + self.coverage * (cover + _TINY).log()
            pick = gain.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
            picked.append(pick)
            taken = taken.scatter(1, pick, True)
            text_mass = text_mass + t.gather(1, pick)
            at = per_word.gather(2, pick.unsqueeze(1).expand(-1, per_word.shape[1], -1))
            word_mass = torch.maximum(word_mass, at) if self.words == "covered" else word_mass + at
            salient_mass = salient_mass + s.gather(1, pick)
            row = similar.gather(1, pick.unsqueeze(-1).expand(-1, -1, number)).squeeze(1)
            best = torch.maximum(best, row)
        return Kept(torch.cat(picked, 1).sort(-1).values)


@dataclass(frozen=True)
class Volume(Method):
    """Greedy on the determinant of q_i cos(i, j) q_j."""

    quality: str = "minmax"
    """"minmax": (best word's cosine + root of saliency) / 2, each within 0 .. 1; "joint": t / T + s / S at the joint optimum;
    "text", "saliency": half of minmax; "product": of the two."""
    space: str = "hidden"
    centred: bool = False
    power: float = 1.0
    """Of the quality: 0 is diversity alone."""
    share: float = 0.5
    """Of the text in the quality."""
    floor: float = 0.05
    """Of each factor of the product."""
    words: str = "max"
    """"max": of the cosines to all words; "each": of each word's cosines within 0 .. 1; "mean": over the words."""
    root: float = 0.5
    """Power of the saliency."""

    name = "volume"
    summary = "determinant"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})

    def quality_of(self, tokens: VisualTokens, keep: int) -> Tensor:
        shown = tokens.candidates
        mask, per_word = tokens.text.mask.unsqueeze(-1), word_cosines(tokens)
        if self.words == "each":
            per_word = within(per_word, shown.unsqueeze(1))
        cosines = per_word.masked_fill(~mask, float("-inf")).amax(1)
        if self.words == "mean":
            cosines = (per_word * mask).sum(1) / mask.sum(1)
        text, salient = within(cosines, shown), within(tokens.saliency.clamp_min(0).pow(self.root), shown)
        if self.quality == "minmax":
            return self.share * text + (1 - self.share) * salient
        if self.quality == "text":
            return text
        if self.quality == "saliency":
            return salient
        if self.quality == "product":
            return (text + self.floor).pow(self.share) * (salient + self.floor).pow(1 - self.share)
        t = attention_per_word(tokens, 100.0, 0.0).masked_fill(~tokens.text.mask.unsqueeze(-1), 0.0).amax(1)
        s = tokens.saliency.masked_fill(~shown, 0.0)
        found = joint_search(t, s, keep, shown).indices
        return 0.5 * t / t.gather(1, found).sum(-1, keepdim=True) + 0.5 * s / s.gather(1, found).sum(-1, keepdim=True)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        q = self.quality_of(tokens, keep).clamp_min(1e-4).pow(self.power)
        kernel = q.unsqueeze(-1) * cosines_of(tokens, self.space, self.centred) * q.unsqueeze(1)
        return Kept(determinantal(kernel, keep, tokens.candidates))


def determinantal(kernel: Tensor, keep: int, shown: Tensor) -> Tensor:
    images, number, _ = kernel.shape
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = torch.zeros(images, keep, number, device=kernel.device)
    taken, picked = ~shown, []
    for step in range(keep):
        pick = left.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
        picked.append(pick)
        taken = taken.scatter(1, pick, True)
        at = pick.unsqueeze(1).expand(-1, keep, -1)
        row = kernel.gather(1, pick.unsqueeze(-1).expand(-1, -1, number)).squeeze(1)
        row = (row - (rows.gather(2, at) * rows).sum(1)) / left.gather(1, pick).clamp_min(1e-10).sqrt()
        rows[:, step] = row
        left = left - row.square()
    return torch.cat(picked, 1).sort(-1).values


@dataclass(frozen=True)
class Apart(Volume):
    """Greedy on (1 - largest cosine to the kept) x quality^power."""

    name = "apart"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        q = self.quality_of(tokens, keep).clamp_min(1e-4).pow(self.power)
        similar = cosines_of(tokens, self.space, self.centred)
        images, number, _ = similar.shape
        near = torch.zeros(images, number, device=q.device)
        taken, picked = ~tokens.candidates, []
        for _ in range(keep):
            pick = (q * (1 - near)).masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
            picked.append(pick)
            taken = taken.scatter(1, pick, True)
            row = similar.gather(1, pick.unsqueeze(-1).expand(-1, -1, number)).squeeze(1)
            near = torch.maximum(near, row)
        return Kept(torch.cat(picked, 1).sort(-1).values)


@dataclass(frozen=True)
class Rounds(Volume):
    """`Apart` without its K steps: every round keeps the top K of quality x (1 - largest cosine to a better one that the
    round before kept). The first takes every better one for kept."""

    rounds: int = 6
    first: str = "all"

    name = "rounds"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        q = self.quality_of(tokens, keep).clamp_min(1e-4).pow(self.power).masked_fill(~tokens.candidates, 0.0)
        order = q.argsort(dim=-1, descending=True, stable=True)
        place = order.argsort(dim=-1)
        similar = cosines_of(tokens, self.space, self.centred).clamp_min(0)
        similar = similar * (place.unsqueeze(1) < place.unsqueeze(2))  # [G, j, i], of the better ones
        kept = tokens.candidates
        if self.first == "top":
            kept = place < keep
        for _ in range(self.rounds):
            score = q * (1 - (similar * kept.unsqueeze(1)).amax(-1))
            picked = score.masked_fill(~tokens.candidates, -1.0).topk(keep).indices
            kept = torch.zeros_like(kept).scatter(1, picked, True)
        return Kept(picked.sort(-1).values)


@dataclass(frozen=True)
class Dense(Method):
    """`facet` with a third factor: how much of the image a token is like, which is what SCOPE's first step counts."""

    rounds: int = 3
    power: float = 1.0
    dense: float = 1.0
    plain: bool = False
    """Whether the mean cosine is taken of all tokens, without leaving out those below 0."""

    name = "dense"
    summary = "facet times density"
    needs = frozenset({WORDS, SALIENCY})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit, shown = normalize(tokens.features.detach().float(), dim=-1), tokens.candidates
        if self.plain:
            mean = (unit * shown.unsqueeze(-1)).sum(1, keepdim=True) / shown.sum(-1).view(-1, 1, 1)
            like = (unit @ mean.mT).squeeze(-1).clamp_min(0.01)
        else:
            like = ((unit @ unit.mT).clamp_min(0) * shown.unsqueeze(1)).sum(-1) / shown.sum(-1, keepdim=True)
        value = worth(two_scores(tokens, unit), shown).pow(self.power) * like.pow(self.dense)
        if not self.rounds:
            return Kept(facet_steps(unit, value, keep, shown).sort(dim=-1).values)
        return Kept(facet_rounds(unit, value, keep, shown, self.rounds).sort(dim=-1).values)


@dataclass(frozen=True)
class Covering(Method):
    """SCOPE: saliency^alpha x what is newly covered."""

    space: str = "hidden"
    quality: str = "saliency"
    alpha: float = 1.0
    centred: bool = False
    sharp: float = 1.0
    falling: bool = False
    """Whether the power of the quality falls as the budget grows."""
    needs = frozenset({WORDS, SALIENCY, HIDDEN})
    name = "covering"
    summary = "SCOPE"
    volume: Volume = field(default=Volume(), init=False)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        if self.quality == "saliency":
            q = tokens.saliency.masked_fill(~tokens.candidates, 0.0)
        else:
            q = Volume(quality=self.quality).quality_of(tokens, keep)
        alpha = self.alpha * (1 - keep / q.shape[-1]) ** 2 * 1.2 if self.falling else self.alpha
        q = q.clamp_min(1e-9).pow(alpha)
        similar = cosines_of(tokens, self.space, self.centred).clamp_min(0).pow(self.sharp)
        similar = similar * tokens.candidates.unsqueeze(1)
        best = torch.zeros(similar.shape[:2], device=q.device)
        taken, picked = ~tokens.candidates, []
        for _ in range(keep):
            gain = q * (similar - best.unsqueeze(1)).clamp_min(0).sum(-1)
            pick = gain.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
            picked.append(pick)
            taken = taken.scatter(1, pick, True)
            row = similar.gather(1, pick.unsqueeze(-1).expand(-1, -1, similar.shape[1])).squeeze(1)
            best = torch.maximum(best, row)
        return Kept(torch.cat(picked, 1).sort(-1).values)


def nearness(tokens: VisualTokens, reach: float) -> Tensor:
    """[G, N, N], exp(-d^2 / 2 reach^2) of the distance of tokens in a view, in its sides."""
    inside = tokens.source.clamp_min(0) % (tokens.rows * tokens.columns)
    down, across = inside // tokens.columns / tokens.rows, inside % tokens.columns / tokens.columns
    rows, columns = (axis.unsqueeze(1) - axis.unsqueeze(2) for axis in (down, across))
    return ((rows**2 + columns**2) / (-2 * reach**2)).exp()


@dataclass(frozen=True)
class Phased(Method):
    """`facet`, one token a step, whose worth counts the less the more tokens are kept already."""

    gain: str = "cover"
    """What worth is multiplied with: "cover", what a token adds to the coverage of all others; "novel", one minus its
    largest cosine to a kept one; "both"."""
    space: str = "hidden"
    """Of the cosines."""
    power: float = 2.0
    """Of the worth, for the first token."""
    half: float = 0.0
    """Share of the image at which that power has fallen by half; 0: it never falls."""
    after: float = 1.0
    """Share of the image after which novelty takes the place of coverage."""
    demand: float = 0.0
    """Power of the worth in what is to be covered."""
    words: str = "max"
    """"max"; "contrast": of every word's cosines less their mean over the image; "each": within 0 to 1."""
    share: float = 0.5
    """Of the text in the worth."""
    local: float = 0.0
    """How much less alike two tokens are that lie far from each other: 0 not at all, 1 wholly."""
    reach: float = 0.15
    """Of the side of the image, the distance at which that is most of it."""

    name = "phased"
    summary = "facet, coverage in the end"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit, shown = normalize(tokens.features.detach().float(), dim=-1), tokens.candidates
        text, salient = two_scores(tokens, unit)
        if self.words != "max":
            each, mask = word_cosines(tokens), tokens.text.mask.unsqueeze(-1)
            if self.words == "contrast":
                each = each - (each * shown.unsqueeze(1)).sum(-1, keepdim=True) / shown.sum(-1).view(-1, 1, 1)
            else:
                each = within(each, shown.unsqueeze(1))
            text = within(each.masked_fill(~mask, float("-inf")).amax(1), shown)
        value = (text + 0.05) ** self.share * (salient + 0.05) ** (1 - self.share)
        value = value.masked_fill(~shown, 0.0)
        similar = cosines_of(tokens, self.space, False).clamp_min(0) * shown.unsqueeze(1)
        if self.local:
            similar = similar * (1 - self.local + self.local * nearness(tokens, self.reach))
        wanted = value**self.demand * shown
        images, number = shown.shape
        best = torch.zeros(images, number, device=value.device)
        near, taken, picked = torch.zeros_like(best), ~shown, []
        count = shown.sum(-1, keepdim=True)
        for step in range(keep):
            power = self.power / (1 + step / (self.half * count)) if self.half else self.power
            gain = value**power
            late = step >= self.after * count
            cover = (wanted.unsqueeze(1) * (similar - best.unsqueeze(1)).clamp_min(0)).sum(-1)
            if self.gain != "novel":
                gain = gain * torch.where(late, 1.0, cover)
            if self.gain != "cover":
                gain = gain * (1 - near)
            elif self.after < 1:
                gain = gain * torch.where(late, 1 - near, 1.0)
            pick = gain.masked_fill(taken, float("-inf")).argmax(-1, keepdim=True)
            picked.append(pick)
            taken = taken.scatter(1, pick, True)
            row = similar.gather(1, pick.unsqueeze(-1).expand(-1, -1, number)).squeeze(1)
            best, near = torch.maximum(best, row), torch.maximum(near, row)
        return Kept(torch.cat(picked, 1).sort(-1).values)


@dataclass(frozen=True)
class Views(Method):
    """`facet`, one token a step, and something said about the thumbnail and the crops of an image."""

    half: bool = False
    """Whether half of the budget is the thumbnail's, the other half the crops', and neither sees the other."""
    chain: bool = False
    """Whether a crop's saliency is multiplied with the thumbnail's where it lies, so that all crops together have 1."""
    demand: bool = False
    """Whether thumbnail and crops are covered for the same weight together, not each token alike."""
    blocks: int = 0
    """Steps; 0: as many as tokens are kept."""

    name = "views"
    summary = "facet by views"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        weighed, demand = of_views(tokens)
        unit = unit_vectors(tokens.features.detach())
        value = worth(two_scores(weighed if self.chain else tokens, unit), tokens.candidates).square()
        demand = demand if self.demand else tokens.candidates.float()
        if not self.half or tokens.tiling is None:
            found = covering(tokens, keep, value, demand=demand, blocks=self.blocks)
            return Kept(found.sort(dim=-1).values)
        small = tokens.candidates & (crop_of(tokens.source, tokens.rows * tokens.columns) == 0)
        views = (small, tokens.candidates & ~small)
        first = min(keep // 2, int(small.sum(-1).min()))
        of_each = [
            covering(replace(tokens, candidates=some), share, value, demand=some.float())
            for some, share in zip(views, (first, keep - first), strict=True)
        ]
        return Kept(torch.cat(of_each, -1).sort(-1).values)


@dataclass(frozen=True)
class NearBy(Method):
    """`facet` in blocks, of single views: tokens are alike near each other alone, and what is covered counts against a token.

    The same thing at another place is another thing, to whoever counts. docs/evidence.md says what that gains and loses.
    """

    reach: float = 0.1
    """In sides of the image, the deviation of the Gaussian that likeness falls off with."""
    power: float = 1.0
    """Of the worth."""
    blocks: int = 6

    name = "near by"
    summary = "facet, near by"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        shown = tokens.candidates
        value = worth(two_scores(tokens, unit_vectors(tokens.features.detach())), shown) ** self.power
        alike = cosines_of(tokens, "hidden", False) * nearness(tokens, self.reach)
        image = torch.arange(len(shown)).unsqueeze(-1)
        best, picked = torch.zeros_like(value), []
        out = torch.zeros_like(value).masked_fill(~shown, -1e9)
        for size in block_sizes(keep, self.blocks):
            cover = ((alike - best.unsqueeze(1)).clamp_min(0) * shown.unsqueeze(1)).sum(-1)
            gain, order = (value * cover * (1 - best) + out).sort(dim=-1, descending=True, stable=True)
            some = order[:, : 3 * size]
            gain = gain[:, : 3 * size]
            nearest = alike[image.unsqueeze(-1), some.unsqueeze(-1), some.unsqueeze(1)].tril(-1).amax(-1).clamp(0, 1)
            score = gain - gain.clamp_min(0) * nearest
            chosen = some.gather(-1, score.argsort(dim=-1, descending=True, stable=True)[:, :size])
            picked.append(chosen)
            out = out.scatter(-1, chosen, float("-inf"))
            best = best.maximum(alike[image, chosen].amax(1)).clamp(0, 1)
        return Kept(torch.cat(picked, -1).sort(-1).values)


@dataclass(frozen=True)
class Far(Method):
    """`facet` whose last tokens are those that are least like any that is kept, with its choices changed one at a time."""

    share: float = 0.25
    """Of the budget, for the farthest."""
    blocks: int = 0
    """Steps in which the farthest are chosen; 0: one after the other."""
    until: float = 0.0
    """Above 0: no more tokens are chosen for their worth than hold this share of the image's worth squared."""
    cap: float = 1.0
    """No more tokens are chosen for their worth than this share of the image's."""
    space: str = "tokens"
    """"tokens" or "hidden", in which they are compared."""
    power: float = 0.0
    """Of the worth, that the distance is multiplied with."""

    name = "far"
    summary = "facet, and the farthest"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        unit, shown = unit_vectors(tokens.features.detach()), tokens.candidates
        tokens, demand = of_views(tokens)
        value = worth(two_scores(tokens, unit), shown)
        most = max(1, keep - round(self.share * keep))
        most = min(most, max(1, round(self.cap * value.shape[-1])))
        numbers = [most] * len(shown)
        if self.until:
            numbers = [max(1, min(most, n)) for n in fewest(value, self.until, shown).tolist()]
        apart = unit if self.space == "tokens" else unit_vectors(tokens.signals[HIDDEN].detach())
        kept = []
        for image, number in enumerate(numbers):
            some, count = slice(image, image + 1), torch.tensor([number])
            chosen = covering(one_of(tokens, image), number, value[some].square(), demand=demand[some], blocks=6)
            if not self.power and number < keep:
                chosen = with_the_farthest(apart[some], chosen, count, number, keep, shown[some], self.blocks)
            while chosen.shape[-1] < keep:
                far = (1 - (apart[some] @ apart[some].mT)[:, chosen[0]].amax(1)).clamp_max(1)
                score = (far * value[some].clamp_min(1e-6) ** self.power).masked_fill(~shown[some], -1e9)
                chosen = torch.cat((chosen, score.scatter(-1, chosen, float("-inf")).argmax(-1, keepdim=True)), -1)
            kept.append(chosen.sort(-1).values)
        return Kept(torch.cat(kept))


def one_of(tokens: VisualTokens, image: int) -> VisualTokens:
    """What `covering` reads, of one image."""
    some = slice(image, image + 1)
    return replace(tokens, candidates=tokens.candidates[some], signals={HIDDEN: tokens.signals[HIDDEN][some]})


@dataclass(frozen=True)
class Top(Method):
    """The top K of a quality: no search."""

    quality: str = "minmax"
    needs = frozenset({WORDS, SALIENCY, HIDDEN})
    name = "top"
    summary = "top K"

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        return Kept(top_tokens(Volume(quality=self.quality).quality_of(tokens, keep), keep, tokens.candidates))


@dataclass(frozen=True)
class Ablation(Method):
    """AdaFV with one of the paper's choices changed."""

    temperature: float = 100.0
    words: str = "max"
    """"max" or "mean": over the words of the text."""
    mean: str = "geometric"
    """"geometric"; "arithmetic": the top K of t / sum t + s / sum s; "product": the top K of t * s; "raw sum": of t + s."""
    floor: float = 0.0
    """Share of the budget that each list gets without a search, as in the published code (a quarter)."""
    layer: int | None = None
    """Of the saliency, as `saliency_of` counts; None: the one that the projector reads."""
    deep: int = 0
    """Layers of the language model that the words have gone through when they are compared."""
    both: bool = False
    """Whether the visual tokens go through them as well, in front of the words."""

    name = "ablation"
    summary = "AdaFV with one choice changed"

    @property
    def saliency(self) -> Signal:
        return SALIENCY if self.layer is None else saliency_of(self.layer)

    @property
    def needs(self) -> frozenset[Signal]:  # type: ignore[override]
        return frozenset({WORDS, self.saliency})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        shown, mask = tokens.candidates, tokens.text.mask.unsqueeze(-1)
        if self.deep:
            tokens = _after_layers(tokens, self.deep, self.both)
        per_word = attention_per_word(tokens, self.temperature, 0.0).masked_fill(~mask, 0.0)
        t = per_word.amax(1) if self.words == "max" else per_word.sum(1) / mask.sum(1)
        s = tokens.signals[self.saliency].masked_fill(~shown, 0.0)
        if self.mean == "geometric" and not self.floor:
            return Kept(joint_search(t, s, keep, shown).indices)
        if self.mean == "geometric":
            first = int(self.floor * keep)
            sure = torch.zeros_like(shown)
            for scores in (t, s) if first else ():
                sure.scatter_(1, top_tokens(scores, first, shown), True)
            # Each list's head stays whatever the search says: it gets the rest of the budget to choose.
            rest = joint_search(t.masked_fill(sure, 0.0), s.masked_fill(sure, 0.0), keep, shown & ~sure)
            chance = torch.zeros_like(t).scatter(1, rest.indices, 1 + (t + s).gather(1, rest.indices))
            return Kept(top_tokens(chance.masked_fill(sure, 1e6), keep, shown))
        whole = [scores / scores.sum(-1, keepdim=True).clamp_min(_TINY) for scores in (t, s)]
        mixed = {"arithmetic": whole[0] + whole[1], "product": whole[0] * whole[1], "raw sum": t + s}[self.mean]
        return Kept(top_tokens(mixed, keep, shown))


LANGUAGE_MODEL: Any = None
"""Of the model that is asked; for words that have gone through some of its layers."""


def _after_layers(tokens: VisualTokens, depth: int, both: bool) -> VisualTokens:
    words = tokens.text
    first = tokens.features.shape[1] if both else 0
    given = torch.cat((tokens.features.detach(), words.embeddings), 1) if both else words.embeddings
    mask = torch.cat((torch.ones_like(tokens.candidates), words.mask), 1) if both else words.mask
    out = LANGUAGE_MODEL(inputs_embeds=given, attention_mask=mask.long(), output_hidden_states=True, use_cache=False)
    found = out.hidden_states[depth]
    features = found[:, :first] if both else tokens.features
    return replace(tokens, features=features, words=replace(words, embeddings=found[:, first:]))


CANDIDATES: dict[str, Method] = {
    # the paper's choices
    "as-it-is": Ablation(),
    "temperature-10": Ablation(temperature=10.0),
    "temperature-30": Ablation(temperature=30.0),
    "temperature-300": Ablation(temperature=300.0),
    "mean-over-words": Ablation(words="mean"),
    "arithmetic": Ablation(mean="arithmetic"),
    "raw-sum": Ablation(mean="raw sum"),
    "product": Ablation(mean="product"),
    "floors": Ablation(floor=0.25),
    "layer-last": Ablation(layer=-1),
    "layer-3": Ablation(layer=-3),
    "layer-4": Ablation(layer=-4),
    "layer-6": Ablation(layer=-6),
    "deep-1": Ablation(deep=1),
    "deep-2": Ablation(deep=2),
    "deep-4": Ablation(deep=4),
    "deep-2-both": Ablation(deep=2, both=True),
    "deep-4-both": Ablation(deep=4, both=True),
    # masses
    "m3": Masses(),
    "m3-tokens": Masses(space="tokens"),
    "m3-centred": Masses(centred=True),
    "m3-sharp4": Masses(sharp=4.0),
    "m3-each": Masses(words="each"),
    "m3-each-c4": Masses(words="each", coverage=4.0),
    "m3-each-sharp4": Masses(words="each", sharp=4.0),
    "m3-each-centred": Masses(words="each", centred=True),
    "m3-each-tokens-centred": Masses(words="each", centred=True, space="tokens"),
    "m3-each-quality": Masses(words="each", weighted="quality", centred=True),
    "m3-each-saliency": Masses(words="each", weighted="saliency", centred=True),
    "m3-each-support": Masses(words="each", centred=True, support=0.1),
    "m3-covered": Masses(words="covered", centred=True),
    "m2-each": Masses(words="each", coverage=0.0),
    "m2-max": Masses(words="max", coverage=0.0),
    "cover": Masses(text=0.0, saliency=0.0),
    "cover-centred": Masses(text=0.0, saliency=0.0, centred=True),
    # determinants
    "v": Volume(),
    "v-tokens": Volume(space="tokens"),
    "v-centred": Volume(centred=True),
    "v-tokens-centred": Volume(space="tokens", centred=True),
    "v-joint": Volume(quality="joint", power=0.5),
    "v-joint-centred": Volume(quality="joint", power=0.5, centred=True),
    "v-product": Volume(quality="product"),
    "v-text": Volume(quality="text"),
    "v-saliency": Volume(quality="saliency"),
    "v-p2": Volume(power=2.0),
    "v-p.5": Volume(power=0.5),
    # distances
    "a": Apart(quality="joint", power=0.5),
    "a-tokens": Apart(quality="joint", power=0.5, space="tokens"),
    "a-centred": Apart(quality="joint", power=0.5, centred=True),
    "a-minmax": Apart(),
    "a-minmax-centred": Apart(centred=True),
    # coverage
    "scope-again": Covering(),
    "scope-joint": Covering(quality="joint"),
    "scope-minmax": Covering(quality="minmax"),
    "scope-joint-centred": Covering(quality="joint", centred=True),
    "scope-joint-sharp4": Covering(quality="joint", sharp=4.0),
    "top-minmax": Top(),
    "top-joint": Top(quality="joint"),
    # the second round
    "a-product": Apart(quality="product"),
    "a-product-p2": Apart(quality="product", power=2.0),
    "a-product-p.5": Apart(quality="product", power=0.5),
    "a-product-tokens": Apart(quality="product", space="tokens"),
    "a-minmax-p2": Apart(power=2.0),
    "scope-product": Covering(quality="product"),
    "scope-product-a2": Covering(quality="product", alpha=2.0),
    "scope-minmax-a2": Covering(quality="minmax", alpha=2.0),
    "scope-product-tokens": Covering(quality="product", space="tokens"),
    "v-product-p2": Volume(quality="product", power=2.0),
    "v-product-p.5": Volume(quality="product", power=0.5),
    "v-product-tokens": Volume(quality="product", space="tokens"),
    # the third round
    "scope-product-a3": Covering(quality="product", alpha=3.0),
    "scope-product-tokens-a2": Covering(quality="product", space="tokens", alpha=2.0),
    "scope-product-tokens-a3": Covering(quality="product", space="tokens", alpha=3.0),
    "scope-product-falling": Covering(quality="product", alpha=2.0, falling=True),
    "a-product-tokens-p.7": Apart(quality="product", space="tokens", power=0.7),
    "a-product-tokens-p.5": Apart(quality="product", space="tokens", power=0.5),
    "a-product-tokens-p1.5": Apart(quality="product", space="tokens", power=1.5),
    "a-product-tokens-centred": Apart(quality="product", space="tokens", centred=True),
    "a-product-floor.02": Apart(quality="product", space="tokens", floor=0.02),
    "a-product-floor.2": Apart(quality="product", space="tokens", floor=0.2),
    "a-product-text.3": Apart(quality="product", space="tokens", share=0.3),
    "a-product-text.7": Apart(quality="product", space="tokens", share=0.7),
    "a-product-each": Apart(quality="product", space="tokens", words="each"),
    "a-product-mean": Apart(quality="product", space="tokens", words="mean"),
    "a-product-root1": Apart(quality="product", space="tokens", root=1.0),
    "a-product-root.25": Apart(quality="product", space="tokens", root=0.25),
    "a-minmax-tokens": Apart(space="tokens"),
    "a-minmax-tokens-text.7": Apart(space="tokens", share=0.7),
    "v-product-tokens-p.7": Volume(quality="product", space="tokens", power=0.7),
    "v-product-tokens-p.5": Volume(quality="product", space="tokens", power=0.5),
    # facet and density
    "d3": Dense(),
    "d3-p2": Dense(power=2.0),
    "d0": Dense(rounds=0),
    "d0-p2": Dense(rounds=0, power=2.0),
    "d3-plain": Dense(plain=True),
    "d3-half": Dense(dense=0.5),
    "f3-p2": Dense(power=2.0, dense=0.0),
    # worth that counts less and less
    "p-1": Phased(power=1.0),
    "p-1.5": Phased(power=1.5),
    "p-2-h.03": Phased(half=0.03),
    "p-2-h.05": Phased(half=0.05),
    "p-2-h.1": Phased(half=0.1),
    "p-3-h.05": Phased(power=3.0, half=0.05),
    "p-2-both": Phased(gain="both"),
    "p-2-both-h.05": Phased(gain="both", half=0.05),
    "p-2-both-h.1": Phased(gain="both", half=0.1),
    "p-1-novel-h.05": Phased(gain="novel", power=1.0, half=0.05),
    "p-1-novel-tokens-h.05": Phased(gain="novel", space="tokens", power=1.0, half=0.05),
    "p-2-switch.05": Phased(half=0.05, after=0.05),
    "p-2-switch.1": Phased(half=0.05, after=0.1),
    "p-2-demand1": Phased(demand=1.0),
    "p-1-demand1": Phased(power=1.0, demand=1.0),
    "p-2-h.05-contrast": Phased(half=0.05, words="contrast"),
    "p-2-h.05-each": Phased(half=0.05, words="each"),
    "p-2-contrast": Phased(words="contrast"),
    "p-1.5-both-h.1": Phased(gain="both", power=1.5, half=0.1),
    "p-1.5-both-h.2": Phased(gain="both", power=1.5, half=0.2),
    "p-2-both-h.2": Phased(gain="both", half=0.2),
    "p-3-both-h.05": Phased(gain="both", power=3.0, half=0.05),
    "p-2-both-h.1-demand1": Phased(gain="both", half=0.1, demand=1.0),
    "p-2-both-h.1-contrast": Phased(gain="both", half=0.1, words="contrast"),
    "p-1.5-both-h.1-contrast": Phased(gain="both", power=1.5, half=0.1, words="contrast"),
    # the same twice is two things, where it lies apart
    "l-2-.5": Phased(local=0.5),
    "l-2-1": Phased(local=1.0),
    "l-2-1-r.3": Phased(local=1.0, reach=0.3),
    "l-2-.5-r.3": Phased(local=0.5, reach=0.3),
    "l-1-1": Phased(local=1.0, power=1.0),
    "l-1-1-r.3": Phased(local=1.0, power=1.0, reach=0.3),
    "l-1-.5": Phased(local=0.5, power=1.0),
    "l-2-both-h.1-.5": Phased(gain="both", half=0.1, local=0.5),
    "l-2-both-h.1-1": Phased(gain="both", half=0.1, local=1.0),
    "l-2-.5-r.1": Phased(local=0.5, reach=0.1),
    "l-1-both-1": Phased(gain="both", power=1.0, local=1.0),
    "l-1.5-both-h.2-1": Phased(gain="both", power=1.5, half=0.2, local=1.0),
    "l-2-both-h.1-1-r.25": Phased(gain="both", half=0.1, local=1.0, reach=0.25),
    # crops
    "views-chain": Views(chain=True),
    "views-demand": Views(demand=True),
    "views-chain-demand": Views(chain=True, demand=True),
    "views-half": Views(half=True),
    "views-half-chain": Views(half=True, chain=True),
    # few steps
    "blocks-4": Views(chain=True, demand=True, blocks=4),
    "blocks-6": Views(chain=True, demand=True, blocks=6),
    "blocks-8": Views(chain=True, demand=True, blocks=8),
    # near by
    "n-1": NearBy(reach=0.15),
    "n-1-r.05": NearBy(reach=0.05),
    "n-1-r.07": NearBy(reach=0.07),
    "n-1-r.1": NearBy(),
    "n-1-r.2": NearBy(reach=0.2),
    "n-1-b10": NearBy(reach=0.15, blocks=10),
    "n-1.5": NearBy(reach=0.15, power=1.5),
    "n-1.5-r.07": NearBy(reach=0.07, power=1.5),
    "n-1.5-r.1": NearBy(power=1.5),
    "n-2": NearBy(reach=0.15, power=2.0),
    "n-2-r.1": NearBy(power=2.0),
    # the farthest
    "far-.25": Far(),
    "far-.5": Far(share=0.5),
    "far-.75": Far(share=0.75),
    "far-.25-b2": Far(blocks=2),
    "far-.25-b3": Far(blocks=3),
    "far-.25-b4": Far(blocks=4),
    "far-.25-hidden": Far(space="hidden"),
    "far-.25-p.25": Far(power=0.25),
    "far-.25-p.5": Far(power=0.5),
    "far-.5-p.25": Far(share=0.5, power=0.25),
    "far-.5-p.5": Far(share=0.5, power=0.5),
    "far-.25-u.5": Far(until=0.5),
    "far-.25-u.6": Far(until=0.6),
    "far-.25-u.7": Far(until=0.7),
    "far-.25-u.8": Far(until=0.8),
    "far-0-u.2": Far(share=0.0, until=0.2),
    "far-0-u.3": Far(share=0.0, until=0.3),
    "far-0-u.4": Far(share=0.0, until=0.4),
    "far-0-u.5": Far(share=0.0, until=0.5),
    "far-.15-u.3": Far(share=0.15, until=0.3),
    "far-.15-u.3-hidden": Far(share=0.15, until=0.3, space="hidden"),
    "far-.15-u.4": Far(share=0.15, until=0.4),
    "far-.15-u.4-hidden": Far(share=0.15, until=0.4, space="hidden"),
    "far-.15-u.4-b3": Far(share=0.15, until=0.4, blocks=3),
    "far-.15-u.4-b6": Far(share=0.15, until=0.4, blocks=6),
    "far-.15-u.5": Far(share=0.15, until=0.5),
    "far-.15-u.5-hidden": Far(share=0.15, until=0.5, space="hidden"),
    "far-0-c.07": Far(share=0.0, cap=0.07),
    "far-0-c.1": Far(share=0.0, cap=0.1),
    # without serial steps
    "t3-product-p.5": Rounds(quality="product", space="tokens", rounds=3, first="top", power=0.5),
    "r3-top-product": Rounds(quality="product", rounds=3, first="top"),
    "t6-product": Rounds(quality="product", space="tokens", rounds=6, first="top"),
    "r1-product": Rounds(quality="product", rounds=1),
    "r2-product": Rounds(quality="product", rounds=2),
    "r4-product": Rounds(quality="product", rounds=4),
    "r8-product": Rounds(quality="product", rounds=8),
    "r4-minmax": Rounds(rounds=4),
    "r4-top-product": Rounds(quality="product", rounds=4, first="top"),
    "t2-product": Rounds(quality="product", space="tokens", rounds=2, first="top"),
    "t3-product": Rounds(quality="product", space="tokens", rounds=3, first="top"),
    "t4-product": Rounds(quality="product", space="tokens", rounds=4, first="top"),
    "t3-product-p.7": Rounds(quality="product", space="tokens", rounds=3, first="top", power=0.7),
}

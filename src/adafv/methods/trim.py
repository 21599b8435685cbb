"""TRIM: the tokens that stand out in their similarity to the question, and one for all the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adafv.core import ImageLayout, top_tokens
from adafv.core.merging import indices_of, marks_of, outliers, with_the_rest
from adafv.core.scores import TEMPERATURE
from adafv.core.tokens import WORDS, Kept, Plan, VisualTokens
from adafv.methods.base import Mixing


@dataclass(frozen=True)
class Trim(Mixing):
    """Keep the tokens whose similarity to the question is an outlier, and the mean of all others.

    Paper: arXiv 2409.11402; public code: FreedomIntelligence/TRIM, llava/model/multimodal_encoder/clip_encoder.py,
    "TextSim+" (read at 0e66677). Similarities go through a softmax over the image; those above Q3 + 1.5 (Q3 - Q1) stay,
    and the mean of the others is one more token, in the place of the last of them.

    Departures: the text is the mean of the words' embeddings in the language model, compared with the projected tokens by
    cosine, where the paper has CLIP's text tower and projection, which most models do not have. CLIP's patches are less
    like the text where they show what it names, so the public code changes the sign; see `negated`. The budget bounds the
    count, from which the mean is taken: with a budget of one, that is all there is. Newlines are never mixed, and are
    kept once all else is.

    Args:
        temperature: factor on the cosine before the softmax; the public code has products of CLIP's features as they are.
        negated: whether the least similar tokens stay, as with CLIP.
        fill: whether exactly the budget is kept, by falling similarity, rather than as many as there are outliers.
        before_projector: whether the mean is one before the projector, as in the paper, or behind it.
    """

    temperature: float = TEMPERATURE
    negated: bool = False
    fill: bool = False
    before_projector: bool = True

    name = "trim"
    summary = "outliers of the similarity to the question, and the mean of the rest"
    paper = "TRIM, arXiv 2409.11402"
    cost = "sort"
    needs = frozenset({WORDS})

    def plan(self, layout: ImageLayout, keep: int) -> Plan:
        return Plan(keep if self.fill else None)

    def count(self, tokens: VisualTokens, keep: int) -> Tensor:
        return (outliers(self._likeness(tokens), tokens.candidates) + 1).clamp(1, keep)

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        kept = torch.zeros_like(tokens.candidates)
        if keep > 1:
            kept = marks_of(top_tokens(self._likeness(tokens), keep - 1, tokens.candidates), kept.shape[-1])
        indices = indices_of(kept, keep - 1)
        own = torch.nn.functional.one_hot(indices, kept.shape[-1]).float()
        alike = 1 / (tokens.candidates & ~kept).sum(-1, keepdim=True).clamp_min(1).float()
        return Kept(*with_the_rest(indices, own, kept, tokens.candidates, alike))

    def _likeness(self, tokens: VisualTokens) -> Tensor:
        """[G, N] float32, a softmax over the candidates."""
        counted = tokens.text.mask.unsqueeze(-1)
        words = tokens.text.embeddings.detach().float() * counted
        text = normalize(words.sum(-2) / counted.sum(-2).clamp_min(1), dim=-1)
        features = tokens.features.detach().float()
        lengths = torch.linalg.vector_norm(features, dim=-1).clamp_min(1e-12)
        cosine = (features @ text.unsqueeze(-1)).squeeze(-1) / lengths
        logits = (-cosine if self.negated else cosine) * self.temperature
        return logits.masked_fill(~tokens.candidates, float("-inf")).softmax(dim=-1)

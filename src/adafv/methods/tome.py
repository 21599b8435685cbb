"""ToMe: the most similar tokens become one, again and again."""

from dataclasses import dataclass

import torch

from adafv.core import top_tokens
from adafv.core.likeness import cosines, unit_vectors
from adafv.core.merging import first_largest, in_turn, marks_of, means, rows_at
from adafv.core.tokens import KEYS, Kept, VisualTokens
from adafv.methods.base import Mixing


@dataclass(frozen=True)
class ToMe(Mixing):
    """Merge the visual tokens by bipartite soft matching until the budget is reached.

    Paper: "Token Merging: Your ViT But Faster", arXiv 2210.09461 (ICLR 2023); public code: facebookresearch/ToMe,
    tome/merge.py (known by the paper). In each round every other token of a list is matched with the token between them
    whose key (mean over the heads) is most similar to its own, by cosine; the most similar pairs become one token, their
    mean weighted by how many tokens they stand for. At most half of the tokens go in one round.

    Departures: the paper merges a few tokens in every layer of the tower, where the next one gives a mean a new key; here
    all merging is behind the layer that the projector reads, and keys are averaged as the tokens are. Tokens stay in the
    order of the image; a mean stands in the place of the one that the others were matched with. Newlines are never mixed,
    and are kept once all else is.

    Args:
        before_projector: whether the means are those of what the projector reads, or of the visual tokens.
    """

    before_projector: bool = True

    name = "tome"
    summary = "means of what is alike, merged in pairs"
    paper = "ToMe, arXiv 2210.09461"
    cost = "N x N, log(N / K) rounds"
    needs = frozenset({KEYS})

    def select(self, tokens: VisualTokens, keep: int) -> Kept:
        images, count = tokens.source.shape
        own = torch.arange(count, device=tokens.source.device).expand(images, count)
        listed, left = in_turn(tokens.candidates), tokens.candidates.sum(-1, keepdim=True)
        keys = rows_at(tokens.signals[KEYS].detach().float().mean(-2), listed)
        sizes = torch.ones_like(listed, dtype=torch.float32)
        belongs = own
        while listed.shape[-1] > keep:  # as often for every image: with fewer candidates there is nothing left to merge
            place = torch.arange(listed.shape[-1], device=listed.device)
            valid = place < left
            likeness = cosines(unit_vectors(keys[:, ::2]), unit_vectors(keys[:, 1::2])).masked_fill(
                ~valid[:, 1::2].unsqueeze(-2), -2.0
            )
            match, score = first_largest(likeness), likeness.amax(-1)
            merges = (left - keep).clamp_min(0).minimum(left // 2)
            order = score.masked_fill(~valid[:, ::2], -3.0).argsort(dim=-1, descending=True, stable=True)
            goes = order.argsort(dim=-1) < merges
            # [G, second, first]: what each of the second half takes in.
            takes = ((match.unsqueeze(-2) == place[: listed.shape[-1] // 2].unsqueeze(-1)) & goes.unsqueeze(-2)).float()
            weighted = keys * sizes.unsqueeze(-1)
            sizes[:, 1::2] += (takes @ sizes[:, ::2].unsqueeze(-1)).squeeze(-1)
            keys = keys.clone()
            keys[:, 1::2] = (weighted[:, 1::2] + takes @ weighted[:, ::2]) / sizes[:, 1::2].unsqueeze(-1)
            into = listed[:, 1::2].gather(-1, match)
            leads = own.scatter(-1, listed[:, ::2], torch.where(goes, into, listed[:, ::2]))
            belongs = leads.gather(-1, belongs)
            gone = torch.zeros_like(valid)
            gone[:, ::2] = goes
            length = max(listed.shape[-1] - listed.shape[-1] // 2, keep)
            order = in_turn(valid & ~gone, ~gone)[:, :length]
            listed, sizes, keys = listed.gather(-1, order), sizes.gather(-1, order), rows_at(keys, order)
            left = left - merges
        kept = top_tokens(marks_of(listed, count).float(), keep, tokens.candidates)
        return Kept(kept, means(kept, belongs))

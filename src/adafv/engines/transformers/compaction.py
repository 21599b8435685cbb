"""Taking columns out of a prompt, row by row; which of them stay is known on the device alone, so it is done there."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adafv.core.sending import sent


@dataclass(frozen=True)
class Compaction:
    """Which columns of a prompt stay, row by row."""

    columns: Tensor
    """[B, S'] long on the device: the column that each new column was; -1 for padding put in. Ascending."""
    length: int
    """S, columns before."""
    changed: bool
    """Whether any row lost a column."""
    lost: Tensor
    """[B] long on the host: visual tokens that each row lost; padding does not count."""
    padded: bool = False
    """Whether any row got padding put in."""

    @property
    def removed(self) -> int:
        """Columns fewer than before, the same for every row."""
        return self.length - self.columns.shape[1]

    def take(self, values: Tensor, fill: Any) -> Tensor:
        """[B, S, ...] -> [B, S', ...]; padding put in gets `fill`."""
        columns = sent(self.columns, values.device)
        index, padding = columns.clamp_min(0), columns < 0
        if values.dim() == 3:
            index = index.unsqueeze(-1).expand(*index.shape, values.shape[-1])
            padding = padding.unsqueeze(-1)
        return values.gather(1, index).masked_fill(padding, fill)

    def give_back(
        self,
        values: Tensor,
        last: int | None = None,
        *,
        fill: float | None,
        dropped: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        """Values of the new columns -> of the columns before, where the caller looks for them: what `take` took apart.

        Args:
            values: [B * repeats, L, ...], of the last L new columns (L <= S').
            last: how many of the last columns before are asked for; None: all S.
            fill: what stands at columns that were taken out; None: what stands at the column that stayed in front of it,
                from which the next one that stayed is predicted, and 0 where none did.
            dropped: [B, S] bool, at which of them: padding that was taken out gets 0, as it means nothing. None: at all.
            repeats: rows of `values` per row of the prompt, one after the other: beams, return sequences.

        Returns:
            [B * repeats, S or `last`, ...]
        """
        width = self.length if last is None else min(last, self.length)
        columns = sent(self.columns, values.device)[:, self.columns.shape[1] - values.shape[1] :]
        place = columns - (self.length - width)
        # One column more takes what is not asked for.
        index = torch.full((len(columns), width + 1), -1, device=values.device)
        order = torch.arange(values.shape[1], device=values.device).expand_as(place)
        index = index.scatter(1, place.where(place >= 0, width), order)[:, :width]
        if fill is None:
            index = index.cummax(1).values
        index = index.repeat_interleave(repeats, dim=0)
        missing = index < 0
        filled = missing if dropped is None else missing & sent(self._asked(dropped, width, repeats), missing.device)
        for _ in range(values.dim() - 2):
            index, missing, filled = index.unsqueeze(-1), missing.unsqueeze(-1), filled.unsqueeze(-1)
        index = index.clamp_min(0).expand(*index.shape[:2], *values.shape[2:])
        found = values.gather(1, index).masked_fill(missing, 0.0)
        return found if not fill else found.masked_fill(filled, fill)

    @staticmethod
    def _asked(marks: Tensor, width: int, repeats: int) -> Tensor:
        """The last columns of [B, S], for [B * repeats, width]."""
        return marks[:, marks.shape[1] - width :].repeat_interleave(repeats, dim=0)

    def then(self, after: "Compaction") -> "Compaction":
        """Both, side by side: `after` is about the columns that follow these."""
        shifted = after.columns.where(after.columns < 0, after.columns + self.length)
        columns = torch.cat((sent(self.columns, shifted.device), shifted), dim=1)
        return Compaction(
            columns,
            self.length + after.length,
            changed=self.changed or after.changed,
            lost=self.lost + after.lost,
            padded=self.padded or after.padded,
        )

    def rows(self, index: Tensor) -> "Compaction":
        """Of other rows: those at `index` ([B'] long on the host), as a cache may be reordered or repeated."""
        columns = self.columns[sent(index, self.columns.device)]
        return Compaction(columns, self.length, self.changed, self.lost[index], self.padded)


def nothing_removed(batch: int, length: int, device: torch.device | None = None) -> Compaction:
    """The compaction that leaves [batch, length] as it is."""
    columns = torch.arange(length, device=device).expand(batch, length)
    return Compaction(columns, length, changed=False, lost=torch.zeros(batch, dtype=torch.long))


def compact(
    attended: Tensor, dropped: list[int], stays: Tensor, anchored: Tensor | None = None, guard: bool = False
) -> Compaction:
    """Take out the columns where `stays` is False.

    What stands behind the last image of a row keeps its distance from the end of the row, trailing padding included: who
    reads logits or answers from the end reads the same tokens, and `generate` goes on from the column from which it would
    have gone on. Rows that lose different numbers of columns are aligned again in front: padding is taken away there where
    a row has more than it needs, and put in where it has too little. The new length is as small as the longest row allows,
    but never smaller than the row that loses most would be, so that prompts padded to a fixed length keep a fixed length.

    Args:
        attended: [B, S] bool on the host.
        dropped: per row, the number of columns that `stays` takes out; known on the host before `stays` is.
        stays: [B, S] bool on the device.
        anchored: [B] bool on the host, rows that have an image; the others may lose trailing padding. None: all.
        guard: whether to leave at least one column of padding in front of every row.
    """
    batch, length = attended.shape
    if not any(dropped):
        return nothing_removed(batch, length, stays.device)
    lost, there = np.array(dropped), attended.numpy()
    # From the first attended column to the last: what is masked inside that span stays, and stays masked.
    not_before = np.logical_or.accumulate(there, axis=1)
    not_behind = np.logical_or.accumulate(there[:, ::-1], axis=1)[:, ::-1]
    inside, behind = not_before & not_behind, not_before & ~not_behind
    needed, trailing = inside.sum(1) - lost, behind.sum(1)
    fixed = needed + (trailing if anchored is None else trailing * anchored.numpy())
    new_length = int(max(fixed.max(), length - max(dropped))) + guard
    trailing = np.minimum(trailing, new_length - guard - needed)
    kept = inside | (behind & (np.cumsum(~not_behind, axis=1) <= trailing[:, None]))
    counts = needed + trailing

    wanted = stays & sent(torch.from_numpy(kept), stays.device)
    first = sent(torch.from_numpy(new_length - 1 - counts), stays.device)
    place = wanted.cumsum(1) + first.unsqueeze(1)
    place = place.masked_fill(~wanted, new_length)  # one column beyond the end takes what is not wanted
    columns = torch.full((batch, new_length + 1), -1, device=stays.device)
    columns = columns.scatter(1, place, torch.arange(length, device=stays.device).expand(batch, length))
    padded = bool((counts < new_length).any())
    return Compaction(columns[:, :new_length], length, changed=True, lost=torch.from_numpy(lost), padded=padded)

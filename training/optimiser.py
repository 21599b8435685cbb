"""One optimiser out of two stock ones: Muon for the matrices inside the layers, AdamW for all else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Optimiser:
    """Muon is meant for hidden matrices only; embeddings, norms and biases are left to AdamW.

    Args:
        parameters: name and parameter, of everything to train.
        matrix_rate, other_rate: peak learning rates of the two.
        position_rate: of position embeddings, where another one.
        steps: length of the schedule: linear warm-up, then linear decay over the last `decay` share.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        steps: int,
        matrix_rate: float = 2e-3,
        other_rate: float = 2e-3,
        position_rate: float | None = None,
        warmup: int = 100,
        decay: float = 0.4,
    ) -> None:
        named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        hidden = [parameter for name, parameter in named if _is_hidden_matrix(name, parameter)]
        other: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named:
            if not _is_hidden_matrix(name, parameter):
                rate = position_rate if position_rate and "position_embedding" in name else other_rate
                other.setdefault(rate, []).append(parameter)
        self.parts: list[torch.optim.Optimizer] = []
        if hidden:
            self.parts.append(
                torch.optim.Muon(hidden, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )
        for rate, parameters_at in other.items():
            self.parts.append(torch.optim.AdamW(parameters_at, lr=rate, betas=(0.9, 0.98), weight_decay=0.0))
        self.all = [parameter for _, parameter in named]
        self.steps, self.warmup, self.decay = steps, warmup, decay
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, number: int) -> None:
        """One step with the gradients that lie on the parameters; `number` counts from 0."""
        share = min(1.0, (number + 1) / self.warmup, (self.steps - number) / (self.decay * self.steps))
        torch.nn.utils.clip_grad_norm_(self.all, 1.0)
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.param_groups[0]["lr"] = peak * share
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 and "embed" not in name and "head" not in name

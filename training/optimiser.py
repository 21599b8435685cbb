"""One optimiser out of two: Muon for the matrices inside the layers, AdamW for all else."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class StackedMuon(torch.optim.Muon):
    """Stock Muon, with matrices of one shape in one product.

    The stock one takes them one by one: 78 matrices are some 2,000 launches, a good part of a step on a GPU. For a GPU
    only: on a CPU such products of bfloat16 are far slower than one by one.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in given:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            if not given:
                continue
            gradients = [parameter.grad for parameter in given]
            momenta = [self.state[parameter]["momentum_buffer"] for parameter in given]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
            torch._foreach_mul_(given, 1 - group["lr"] * group["weight_decay"])
            shapes: dict[torch.Size, list[int]] = {}
            for place, parameter in enumerate(given):
                shapes.setdefault(parameter.shape, []).append(place)
            for shape, places in shapes.items():
                turned = _orthogonal(torch.stack([updates[place] for place in places]), group)
                steps = turned.to(given[places[0]].dtype).unbind()
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # as "match_rms_adamw" has it
                torch._foreach_add_([given[place] for place in places], steps, alpha=-rate)


def _orthogonal(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """Newton-Schulz iteration in bfloat16, as `torch.optim.Muon` does it, on [matrices, rows, columns] at once."""
    a, b, c = group["ns_coefficients"]
    tall = matrices.shape[1] > matrices.shape[2]
    turned = matrices.bfloat16()
    if tall:
        turned = turned.mT
    turned = turned / torch.linalg.vector_norm(turned, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = turned @ turned.mT
        turned = torch.baddbmm(turned, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), turned, beta=a)
    return turned.mT if tall else turned


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
            muon = StackedMuon if all(parameter.is_cuda for parameter in hidden) else torch.optim.Muon
            self.parts.append(muon(hidden, lr=matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        for rate, parameters_at in other.items():
            fused = all(parameter.is_cuda for parameter in parameters_at)
            self.parts.append(
                torch.optim.AdamW(parameters_at, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
            )
        self.all = [parameter for _, parameter in named]
        self.steps, self.warmup, self.decay = steps, warmup, decay
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, number: int, left: float = 1.0) -> None:
        """One step with the gradients that lie on the parameters.

        Args:
            number: counts from 0.
            left: share of the time that is left, where time is short: rates then go to zero with it.
        """
        share = min(
            1.0, (number + 1) / self.warmup, (self.steps - number) / (self.decay * self.steps), left / self.decay
        )
        share = max(0.0, share)
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

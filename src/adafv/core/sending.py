"""Small tensors on their way from the host to a device."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device. What comes from the host does not make the host wait until a GPU has caught up.

    That is safe with CUDA: memory that is not pinned is copied before the call returns, and nobody changes these tensors
    later. Other accelerators promise no such thing: there, and the other way round, the host waits.
    """
    return values.to(device, non_blocking=values.is_cpu and device.type == "cuda")

"""A constant tensor that follows its caller to any device."""

from __future__ import annotations

import torch
from torch import Tensor


class OnDevice:
    """A constant that is copied to each device once, when it is first used there.

    Paths live in loader threads on the CPU and in samplers on a GPU; this spares both from moving them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {tensor.device: tensor}

    def __call__(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if device not in self._copies:
            with torch.inference_mode(False):  # the copy may outlive a sampler's inference mode
                self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]

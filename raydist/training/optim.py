"""AdamW that refuses to write a bad step.

The decision not to write is taken on the device: the fused kernel reads a flag and leaves weights, moments and step count
alone when it is set. So a non-finite gradient is caught before it does damage, without a host synchronisation in the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from raydist.config.schema import OptimizerConfig


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW (Loshchilov and Hutter 2019) with decay on matrices only and a sticky no-write flag."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        parameters = [parameter for _, parameter in named_parameters]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def set_learning_rate(self, learning_rate: float) -> None:
        """For all groups, from the next step on."""
        for group in self.param_groups:
            group["lr"] = learning_rate

    def guarded_step(self, do_not_write: Tensor) -> None:
        """One update, or none where ``do_not_write`` (a scalar of 0 or 1, equal on all ranks) is 1."""
        self.found_inf = do_not_write.to(torch.float32)
        self.grad_scale = None
        self.step()

    @override
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Hands the kernel this rank's rows: the update is elementwise, and a DTensor costs more to unpack than to update."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return has_complex

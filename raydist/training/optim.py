"""AdamW that refuses to write a bad step.

The decision not to write is taken on the device: the fused kernel reads a flag and leaves weights, moments and step count
alone when it is set. So a non-finite gradient is caught before it does damage, without a host synchronisation in the step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

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
        first = self.param_groups[0]["params"][0]
        flag = do_not_write.to(torch.float32)
        if isinstance(first, DTensor):
            flag = DTensor.from_local(flag, first.device_mesh, [Replicate()] * first.device_mesh.ndim, run_check=False)
        self.found_inf = flag
        self.grad_scale = None
        self.step()

"""Which numbers are used where, by name."""

from __future__ import annotations

from typing import Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

Precision = Literal["fp32", "bf16"]


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """FSDP's policy for ``training.precision``.

    ``bf16``: parameters are gathered and used in bfloat16, so activations are bfloat16 too; the sharded master weights,
    the sums of gradients over workers and microbatches, and the optimizer stay in float32. ``fp32``: all in float32.

    Inputs are not cast: a block gets activations that the embedding made in the right dtype, and the rotation, which
    must stay float32.
    """
    if precision == "bf16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy()

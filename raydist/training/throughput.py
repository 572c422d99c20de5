"""Model FLOPs utilisation: the arithmetic that the model needs, over what the devices could do in that time.

Two conventions are in use, and a number means nothing without its name:

- ``torchtitan``: ``6 (P - E) + 12 L H h S`` a token, where E, the embedding, is left out only if the head is not tied to it;
- ``llm_foundry``: ``6 P + 12 L H h S``.

P are all parameters, L layers, H heads of h channels, S tokens of a row. Neither credits the half of attention that a causal
mask skips, nor recomputed activations. The run's ``mfu`` is the first one.

An objective that shows the model f copies of a row costs f times as much per clean token. Each copy's queries count S keys,
as a causal row's do: the masks let none see more than a row and its own block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from raydist.config.schema import RunConfig
from raydist.core.dist import Workers
from raydist.models.config import DecoderConfig
from raydist.objectives.base import Needs

Convention = Literal["torchtitan", "llm_foundry"]

# Dense bfloat16 FLOP/s from the vendor's data sheets; the first name that the device's name contains counts.
_PEAK_FLOPS_PER_S = (
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("B200", 2250e12),
    ("A100", 312e12),
)


def flops_per_token(
    config: DecoderConfig, *, seq_len: int, needs: Needs | None = None, convention: Convention = "torchtitan"
) -> float:
    """FLOPs of forward and backward for one clean token.

    Args:
        config: the decoder.
        seq_len: clean tokens of a row, S.
        needs: of the objective, which may lengthen the sequence.
        convention: what is counted, see the module.
    """
    counted = config.num_parameters
    if convention == "torchtitan" and not config.tied_embeddings:
        counted -= config.num_embedding_parameters
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return float((needs or Needs()).sequence_factor * (6 * counted + attention))


def peak_flops_per_s(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU by the name that its driver gives, or None for one that is not in the table."""
    return next((peak for name, peak in _PEAK_FLOPS_PER_S if name in device_name), None)


@dataclass(frozen=True)
class Utilisation:
    """What turns tokens a second into MFU.

    Attributes:
        flops_per_token: of one clean token.
        peak_flops_per_s: of all devices together.
    """

    flops_per_token: float
    peak_flops_per_s: float

    def mfu(self, tokens_per_s: float) -> float:
        """The share of the peak, 0 to 1, at this many clean tokens a second over all workers."""
        return tokens_per_s * self.flops_per_token / self.peak_flops_per_s


def utilisation_of(config: RunConfig, decoder: DecoderConfig, *, needs: Needs, workers: Workers) -> Utilisation | None:
    """The run's own, or None where the peak of its devices is neither known nor configured."""
    if config.training.peak_tflops is not None:
        peak: float | None = config.training.peak_tflops * 1e12
    elif workers.device.type == "cuda":
        peak = peak_flops_per_s(torch.cuda.get_device_name(workers.device))
    else:
        peak = None
    if peak is None:
        return None
    flops = flops_per_token(decoder, seq_len=config.data.seq_len, needs=needs)
    return Utilisation(flops, peak_flops_per_s=peak * workers.world_size)

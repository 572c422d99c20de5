"""From logits to tokens: greedy, temperature, top-k, top-p. The noise belongs to the prompt, not to the batch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydist.core.rng import RowRng


class PromptNoise:
    """Uniform draws that belong to a prompt and a purpose, not to the batch.

    The key is (seed, the prompt's tokens, how many equal prompts come before it), so that what else is in the batch,
    and in which order, does not change a prompt's continuation, while equal prompts get different ones.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], *, seed: int, device: torch.device) -> None:
        seen: Counter[bytes] = Counter()
        rows, repeats = [], []
        for prompt in prompts:
            digest = hashlib.blake2b(np.asarray(prompt, dtype="<i8").tobytes(), digest_size=8).digest()
            rows.append(int.from_bytes(digest, "little", signed=True))
            repeats.append(seen[digest])
            seen[digest] += 1
        self._rng = RowRng(seed=seed, step=0, epochs_B=torch.tensor(repeats), rows_B=torch.tensor(rows))
        self._device = device

    def uniforms(self, purpose: str, num_positions: int) -> Tensor:
        """One uniform in [0, 1) per prompt and position, float64 ``[B, num_positions]``, multiples of 2**-48.

        Args:
            purpose: names an independent stream, e.g. ``"token"`` or, in a sampler that draws anew in every forward,
                ``f"jump/{forward}"``.
            num_positions: a longer draw begins with the shorter one.
        """
        high, low = self._rng.words(f"sampling/{purpose}", num_positions)
        return (high.double() * 2.0**-32 + (low >> 16).double() * 2.0**-48).to(self._device)


def prompt_uniforms(prompts: Sequence[Sequence[int]], *, seed: int, num_positions: int, device: torch.device) -> Tensor:
    """One uniform per prompt and new position, ``[B, num_positions]``, for samplers that draw each position once."""
    return PromptNoise(prompts, seed=seed, device=device).uniforms("token", num_positions)


def draw_tokens(
    logits_BNV: Tensor,
    *,
    uniforms_BN: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Tokens ``[B, N]``: the argmax at temperature 0, else the inverse of the cumulative distribution at the uniforms.

    Args:
        logits_BNV: -inf for tokens that cannot be drawn.
        uniforms_BN: float64 in [0, 1), multiples of 2**-48, so that the product with the total stays below the total.
        temperature: >= 0; logits are divided by it, then filtered by ``top_k`` and ``top_p`` in this order.
        top_k: keep this many of the largest logits (ties with the last one are kept); None for all.
        top_p: keep the smallest set of most likely tokens that holds this much probability; None for all.
    """
    if temperature == 0.0:
        return logits_BNV.argmax(dim=-1)
    scaled_BNV = logits_BNV.double() / temperature
    if top_k is not None:
        kth = scaled_BNV.topk(min(top_k, scaled_BNV.shape[-1]), dim=-1).values[..., -1:]
        scaled_BNV = scaled_BNV.masked_fill(scaled_BNV < kth, -torch.inf)
    probabilities_BNV = torch.softmax(scaled_BNV, dim=-1)
    if top_p is not None:
        ordered, order = probabilities_BNV.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities_BNV = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    cumulative_BNV = probabilities_BNV.cumsum(dim=-1)
    thresholds_BN1 = uniforms_BN[..., None] * cumulative_BNV[..., -1:]
    return torch.searchsorted(cumulative_BNV, thresholds_BN1, right=True)[..., 0]

"""The first forward of every sampler: the prompts, causally, into a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raydist.core.errors import ConfigError
from raydist.models.mask_spec import CausalMask
from raydist.sampling.kv_cache import KvCache


def check_prompts(
    prompts: Sequence[Sequence[int]], *, max_new_tokens: int, max_positions: int, where: str = "prompt {}"
) -> None:
    """Refuses what cannot be continued.

    Args:
        prompts: token ids.
        max_new_tokens: an upper limit per prompt.
        max_positions: of the model.
        where: what the user calls a prompt, with a place for its index.

    Raises:
        ConfigError: a prompt without tokens, or one that leaves no room for the new tokens.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(
                "a prompt has no tokens",
                where=where.format(index),
                expected="at least one token",
                fix="give some text, or the beginning-of-text token",
            )
        if len(prompt) + max_new_tokens > max_positions:
            raise ConfigError(
                "a prompt and its continuation are longer than the model's positions",
                where=where.format(index),
                found=f"{len(prompt)} prompt tokens + {max_new_tokens} new tokens",
                expected=f"at most {max_positions} together",
                fix="shorten the prompt or lower --max-new-tokens",
            )


def prefill(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_scratch: int = 0,
    features: Mapping[str, int] | None = None,
) -> tuple[KvCache, Tensor]:
    """Encodes prompts of different lengths in one causal forward.

    Prompts are padded on the right: a causal position never sees what follows, and the padding's keys are not kept.

    Args:
        model: the decoder.
        prompts: token ids.
        max_new_tokens: tokens that will be added to each prompt.
        num_scratch: slots of the cache beyond that, for forwards whose keys are not kept.
        features: the value that each of the model's input features has at all of the prompts' tokens.

    Returns:
        A cache with room for ``max_new_tokens`` more, and the hidden states at each prompt's last token, ``[B, D]``.
    """
    check_prompts(prompts, max_new_tokens=max_new_tokens, max_positions=model.config.max_positions)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths_B.max())
    tokens_BL = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    device = next(model.parameters()).device
    cache = KvCache(batch_size=len(prompts), capacity=longest + max_new_tokens + num_scratch)
    positions_BL = torch.arange(longest).expand_as(tokens_BL)
    conditions: dict[str, Any] = {}
    if features is not None:
        values = {name: torch.full_like(tokens_BL, value, device=device) for name, value in features.items()}
        conditions["features"] = values
    hidden_BLD = model.hidden(
        tokens_BL.to(device), positions_BL.to(device), CausalMask(length=longest), cache=cache, **conditions
    )
    cache.commit(lengths_B)
    last_B = (lengths_B - 1).to(device)
    return cache, hidden_BLD[torch.arange(len(prompts), device=device), last_B]

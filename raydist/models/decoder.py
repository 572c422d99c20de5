"""The decoder of the Llama-3 and Qwen-3 families."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydist.core.terms import HeadTerm, TermResult
from raydist.models.attention import Attention, AttentionBackend, AttentionKernel, KeyValueCache, attention_kernel
from raydist.models.config import DecoderConfig
from raydist.models.heads import evaluate_terms
from raydist.models.mask_spec import MaskSpec
from raydist.models.norm import RMSNorm
from raydist.models.rope import Rotation, rope_frequencies


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden_width, bias=False)
        self.up = nn.Linear(config.width, config.hidden_width, bias=False)
        self.down = nn.Linear(config.hidden_width, config.width, bias=False)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Returns what is added to the residual stream."""
        return self.down(F.silu(self.gate(hidden_BLD)) * self.up(hidden_BLD))


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each behind its norm, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer=layer)
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, hidden_BLD: Tensor, rotation: Rotation, kernel: AttentionKernel, cache: KeyValueCache | None = None
    ) -> Tensor:
        """The residual stream after this block."""
        hidden_BLD = self.attention(self.attention_norm(hidden_BLD), rotation, kernel, cache).add_(hidden_BLD)
        return self.feed_forward(self.feed_forward_norm(hidden_BLD)).add_(hidden_BLD)


class Decoder(nn.Module):
    """Embedding, blocks, norm and head.

    Training calls :meth:`forward`, which evaluates head terms and never builds the ``[B * L, V]`` logits; decoding
    calls :meth:`logits`. Weights are whatever torch's constructors left (nothing at all on the meta device) until
    :func:`raydist.models.init.initialize` or a loader fills them.

    Args:
        config: the sizes.
        attention: ``"sdpa"`` anywhere; ``"flex"`` for training on CUDA.
    """

    frequencies_f: Tensor

    def __init__(self, config: DecoderConfig, attention: AttentionBackend = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer=layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("frequencies_f", torch.empty(config.head_dim // 2), persistent=False)
        self.reset_buffers(self.embedding.weight.device)
        self.retie()

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes the rotary frequencies anew, float32; needed after ``to_empty`` and after a cast of the module."""
        self.frequencies_f = rope_frequencies(self.config, device=device)

    def retie(self) -> None:
        """Makes the head's weight the embedding's again where the configuration ties them."""
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens_BL: Tensor, positions_BL: Tensor, mask: MaskSpec, terms: Sequence[HeadTerm]
    ) -> list[TermResult]:
        """Evaluates head terms, in their order, on the tokens' hidden states.

        Args:
            tokens_BL: token ids, int64.
            positions_BL: rotary positions, ``[B, L]`` or ``[1, L]``.
            mask: who may attend to whom.
            terms: what to evaluate, on the same device.
        """
        return evaluate_terms(self.hidden(tokens_BL, positions_BL, mask), terms=terms, heads={"lm": self.head.weight})

    def hidden(
        self, tokens_BL: Tensor, positions_BL: Tensor, mask: MaskSpec, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Hidden states after the last norm, ``[B, L, D]``."""
        hidden_BLD = self.embedding(tokens_BL)
        rotation = Rotation.at(positions_BL, frequencies=self.frequencies_f)
        kernel = attention_kernel(
            mask, backend=self.attention_backend, device=hidden_BLD.device, dtype=hidden_BLD.dtype
        )
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, rotation, kernel, cache)
        return self.norm(hidden_BLD)

    def logits(
        self, tokens_BL: Tensor, positions_BL: Tensor, mask: MaskSpec, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Logits of every position, ``[B, L, V]``, for decoding."""
        return self.head(self.hidden(tokens_BL, positions_BL, mask, cache))

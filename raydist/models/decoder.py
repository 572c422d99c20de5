"""The decoder of the Llama-3 and Qwen-3 families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raydist.core.terms import HeadTerm, TermResult
from raydist.models.attention import Attention, AttentionBackend, AttentionKernel, KeyValueCache, attention_kernel
from raydist.models.conditioning import TimeEmbedding, gated, modulated, require_conditions
from raydist.models.config import DecoderConfig
from raydist.models.heads import evaluate_terms, require_head
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
    """Attention and feed-forward, each behind its norm, each added to the residual stream.

    With a time input, a projection of the time's condition c gives six vectors: scale and shift of each norm's output and
    a gate on each branch, ``h + (1 + gate) f(norm(h) (1 + scale) + shift)``. It starts at zero.
    """

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer=layer)
        self.feed_forward_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.modulation = nn.Linear(config.time_width, 6 * config.width) if config.time_input else None

    def forward(
        self,
        hidden_BLD: Tensor,
        rotation: Rotation,
        kernel: AttentionKernel,
        cache: KeyValueCache | None = None,
        condition_BLC: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after this block."""
        if self.modulation is None:
            hidden_BLD = self.attention(self.attention_norm(hidden_BLD), rotation, kernel, cache).add_(hidden_BLD)
            return self.feed_forward(self.feed_forward_norm(hidden_BLD)).add_(hidden_BLD)
        vectors = self.modulation(condition_BLC).chunk(6, dim=-1)
        normed_BLD = modulated(self.attention_norm(hidden_BLD), *vectors[0:2])
        hidden_BLD = gated(hidden_BLD, self.attention(normed_BLD, rotation, kernel, cache), vectors[2])
        normed_BLD = modulated(self.feed_forward_norm(hidden_BLD), *vectors[3:5])
        return gated(hidden_BLD, self.feed_forward(normed_BLD), vectors[5])


class Decoder(nn.Module):
    """Embedding, blocks, norm and heads.

    Training calls :meth:`forward`, which evaluates head terms and never builds the ``[B * L, V]`` logits; decoding
    calls :meth:`logits`. Weights are whatever torch's constructors left (nothing at all on the meta device) until
    :func:`raydist.models.init.initialize` or a loader fills them.

    Inputs that all methods share:

    - ``tokens_BL``: token ids, int64.
    - ``positions_BL``: rotary positions, ``[B, L]`` or ``[1, L]``.
    - ``mask``: who may attend to whom.
    - ``time_BL``: float32 in [0, 1], ``[B, L]`` or, for one time a row, ``[B, 1]``; given if and only if
      ``config.time_input``.
    - ``features``: name -> int64 ``[B, L]``, one for each of ``config.input_features``.

    They raise ModelError where time or features are not those that the decoder was built for.

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
        self.input_features = nn.ModuleDict(
            {name: nn.Embedding(num_values, config.width) for name, num_values in sorted(config.input_features.items())}
        )
        self.time_embedding = TimeEmbedding(config) if config.time_input else None
        self.blocks = nn.ModuleList(DecoderBlock(config, layer=layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.output_modulation = nn.Linear(config.time_width, 2 * config.width) if config.time_input else None
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.extra_heads = nn.ModuleDict(
            {
                name: nn.Linear(config.width, outputs or config.vocab_size, bias=False)
                for name, outputs in sorted(config.extra_heads.items())
            }
        )
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
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        mask: MaskSpec,
        terms: Sequence[HeadTerm],
        *,
        time_BL: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> list[TermResult]:
        """Evaluates head terms, in their order, on the tokens' hidden states; terms are on the same device."""
        hidden_BLD = self.hidden(tokens_BL, positions_BL, mask, time_BL=time_BL, features=features)
        return evaluate_terms(hidden_BLD, terms=terms, heads=self.head_weights())

    def hidden(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        mask: MaskSpec,
        cache: KeyValueCache | None = None,
        *,
        time_BL: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """What the heads read, ``[B, L, D]``: the hidden states after the last norm and its modulation."""
        require_conditions(self.config, tokens_BL=tokens_BL, time_BL=time_BL, features=features)
        hidden_BLD = self.embedding(tokens_BL)
        if features is not None:
            for name, table in self.input_features.items():
                hidden_BLD = hidden_BLD + table(features[name])
        rotation = Rotation.at(positions_BL, frequencies=self.frequencies_f)
        kernel = attention_kernel(
            mask, backend=self.attention_backend, device=hidden_BLD.device, dtype=hidden_BLD.dtype
        )
        if self.time_embedding is None or self.output_modulation is None or time_BL is None:
            for block in self.blocks:
                hidden_BLD = block(hidden_BLD, rotation, kernel, cache)
            return self.norm(hidden_BLD)
        condition_BLC = self.time_embedding(time_BL)
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD, rotation, kernel, cache, condition_BLC)
        return modulated(self.norm(hidden_BLD), *self.output_modulation(condition_BLC).chunk(2, dim=-1))

    def logits(
        self,
        tokens_BL: Tensor,
        positions_BL: Tensor,
        mask: MaskSpec,
        cache: KeyValueCache | None = None,
        *,
        time_BL: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits of every position, ``[B, L, V]``, for decoding."""
        return self.head(self.hidden(tokens_BL, positions_BL, mask, cache, time_BL=time_BL, features=features))

    def head_weights(self) -> dict[str, Tensor]:
        """Head name -> weight ``[outputs, D]``; ``"lm"`` is the language model's own."""
        return {"lm": self.head.weight, **{name: head.weight for name, head in self.extra_heads.items()}}

    def head_logits(self, hidden_BLD: Tensor, head: str = "lm") -> Tensor:
        """One head's outputs of hidden states, ``[..., outputs]``.

        Raises:
            ModelError: the model has no such head.
        """
        return F.linear(hidden_BLD, require_head(self.head_weights(), head, where="head"))

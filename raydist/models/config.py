"""The numbers that fix a decoder."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raydist.config.base import StrictModel

Family = Literal["llama", "qwen3"]


class RopeScaling(StrictModel):
    """The Llama-3.1 rule that stretches the slow rotary frequencies to a longer context (see
    :mod:`raydist.models.rope`).
    """

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_positions: PositiveInt = 8192


class DecoderConfig(StrictModel):
    """A decoder of the Llama-3 or Qwen-3 family.

    The families share the block; ``qwen3`` normalises each head's queries and keys before the rotation, and the two
    differ in the law of initialisation and in the names of the Hugging Face architecture.
    """

    family: Family
    vocab_size: NonNegativeInt
    """Rows of the embedding, V; 0 in a preset that takes the vocabulary of the data."""
    num_layers: PositiveInt
    width: PositiveInt
    """Channels of the residual stream, D."""
    hidden_width: PositiveInt
    """Channels inside the SwiGLU feed-forward."""
    num_heads: PositiveInt
    """Query heads, H."""
    num_kv_heads: PositiveInt
    """Key and value heads, G; each serves H / G consecutive query heads."""
    head_dim: PositiveInt
    """Channels of one head, h. Never derived: H h differs from D in several Qwen-3 sizes."""
    rope_theta: PositiveFloat = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tied_embeddings: bool = False
    max_positions: PositiveInt = 8192
    """Positions the weights are meant for; goes to config.json."""

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for the rotary embedding")
        return self

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.family == "qwen3"

    @property
    def num_embedding_parameters(self) -> int:
        """``V D``, once; the head has as many where it is not tied."""
        return self.vocab_size * self.width

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one block."""
        attention = 2 * self.width * self.num_heads * self.head_dim + 2 * self.width * self.num_kv_heads * self.head_dim
        norms = 2 * self.width + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.width * self.hidden_width + norms

    @property
    def num_parameters(self) -> int:
        """All parameters, in closed form; tied weights count once."""
        tables = self.num_embedding_parameters * (1 if self.tied_embeddings else 2)
        return self.num_layers * self.num_layer_parameters + self.width + tables

    def with_vocab(self, min_vocab: int, *, multiple_of: int = 1) -> DecoderConfig:
        """The same decoder with room for at least ``min_vocab`` tokens; never fewer rows than now.

        A mask token needs its row before the weights are sharded, so the vocabulary grows here and nowhere else;
        loading weights fills the new rows (:class:`raydist.models.hf.HfWeights`).
        """
        if min_vocab <= self.vocab_size:
            return self
        return self.model_copy(update={"vocab_size": -(-min_vocab // multiple_of) * multiple_of})

"""The numbers that fix a decoder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raydist.config.base import StrictModel

Family = Literal["llama", "qwen3"]
EXTRA_FIELDS = ("time_input", "time_width", "extra_heads", "input_features")


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
    time_input: bool = False
    """Whether the decoder reads a time per token or row, which modulates every norm and gate."""
    time_width: PositiveInt = 128
    """Channels of the time's features and of the network behind them, C; even. Our choice."""
    extra_heads: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Heads beside ``"lm"``: name to number of outputs, 0 for the vocabulary."""
    input_features: dict[str, PositiveInt] = Field(default_factory=dict)
    """Tables whose rows are added to the token embeddings: name to number of rows."""

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for the rotary embedding")
        if self.time_width % 2:
            raise ValueError(f"time_width={self.time_width} must be even: sines and cosines")
        return self

    @model_validator(mode="after")
    def _names_fit_parameters(self) -> DecoderConfig:
        for name in (*self.extra_heads, *self.input_features):
            if not name.isidentifier():
                raise ValueError(f"{name!r} must be an identifier: it becomes part of a parameter's name")
        if "lm" in self.extra_heads:
            raise ValueError("extra_heads: lm is the name of the language model's own head")
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
        modulation = 6 * self.width * (self.time_width + 1) if self.time_input else 0
        return attention + 3 * self.width * self.hidden_width + norms + modulation

    @property
    def num_outer_extra_parameters(self) -> int:
        """Parameters of extra heads, feature tables and time input outside the blocks."""
        rows = sum(outputs or self.vocab_size for outputs in self.extra_heads.values())
        rows += sum(self.input_features.values())
        time = 2 * (self.time_width + self.width) * (self.time_width + 1) if self.time_input else 0
        return rows * self.width + time

    @property
    def num_parameters(self) -> int:
        """All parameters, in closed form; tied weights count once."""
        tables = self.num_embedding_parameters * (1 if self.tied_embeddings else 2)
        layers = self.num_layers * self.num_layer_parameters
        return layers + self.width + tables + self.num_outer_extra_parameters

    @property
    def extras(self) -> dict[str, Any]:
        """The fields that no other library knows; all at their defaults in a plain decoder."""
        return self.model_dump(include=set(EXTRA_FIELDS))

    @property
    def has_extras(self) -> bool:
        """Whether there are parameters that a plain decoder of the family lacks."""
        return self.time_input or bool(self.extra_heads) or bool(self.input_features)

    def with_vocab(self, min_vocab: int, *, multiple_of: int = 1) -> DecoderConfig:
        """The same decoder with room for at least ``min_vocab`` tokens; never fewer rows than now.

        A mask token needs its row before the weights are sharded, so the vocabulary grows here and nowhere else;
        loading weights fills the new rows (:class:`raydist.models.hf.HfWeights`).
        """
        if min_vocab <= self.vocab_size:
            return self
        return self.model_copy(update={"vocab_size": -(-min_vocab // multiple_of) * multiple_of})

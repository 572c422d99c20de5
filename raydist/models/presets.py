"""Decoders by name. Small ones take the vocabulary of the data; those of published weights have their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydist.config.base import nearest_hint, unknown_key, validated
from raydist.core.errors import ConfigError
from raydist.models.config import DecoderConfig, Family, RopeScaling


def _small(
    *, layers: int, width: int, hidden: int, heads: int, kv_heads: int, head_dim: int, family: Family = "llama"
) -> DecoderConfig:
    return DecoderConfig(
        family=family,
        vocab_size=0,
        num_layers=layers,
        width=width,
        hidden_width=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=10_000.0,
        tied_embeddings=True,
        max_positions=4096,
    )


def _llama(
    *,
    layers: int,
    width: int,
    hidden: int,
    heads: int,
    head_dim: int = 128,
    scaling_factor: float | None = 8.0,
    tied: bool = False,
) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=128_256,
        num_layers=layers,
        width=width,
        hidden_width=hidden,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        rope_theta=500_000.0,
        rope_scaling=None if scaling_factor is None else RopeScaling(factor=scaling_factor),
        norm_eps=1e-5,
        tied_embeddings=tied,
        max_positions=8192 if scaling_factor is None else 131_072,
    )


def _qwen3(*, layers: int, width: int, hidden: int, heads: int, tied: bool = False) -> DecoderConfig:
    return DecoderConfig(
        family="qwen3",
        vocab_size=151_936,
        num_layers=layers,
        width=width,
        hidden_width=hidden,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        tied_embeddings=tied,
        max_positions=40_960,
    )


PRESETS: dict[str, DecoderConfig] = {
    "debug": _small(layers=2, width=128, hidden=384, heads=4, kv_heads=2, head_dim=32),
    "tiny-1m": _small(layers=4, width=128, hidden=512, heads=4, kv_heads=2, head_dim=32, family="qwen3"),
    "tiny-2m": _small(layers=5, width=192, hidden=512, heads=6, kv_heads=2, head_dim=32),
    "small-4m": _small(layers=6, width=256, hidden=640, heads=4, kv_heads=2, head_dim=64),
    "small-12m": _small(layers=8, width=384, hidden=1024, heads=6, kv_heads=2, head_dim=64),
    "small-30m": _small(layers=10, width=512, hidden=1408, heads=8, kv_heads=4, head_dim=64),
    "smollm2-135m": DecoderConfig(
        family="llama",
        vocab_size=49_152,
        num_layers=30,
        width=576,
        hidden_width=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tied_embeddings=True,
        max_positions=8192,
    ),
    "llama3-8b": _llama(layers=32, width=4096, hidden=14_336, heads=32, scaling_factor=None),
    "llama3.1-8b": _llama(layers=32, width=4096, hidden=14_336, heads=32),
    "llama3.1-70b": _llama(layers=80, width=8192, hidden=28_672, heads=64),
    "llama3.1-405b": _llama(layers=126, width=16_384, hidden=53_248, heads=128),
    "llama3.2-1b": _llama(layers=16, width=2048, hidden=8192, heads=32, head_dim=64, scaling_factor=32.0, tied=True),
    "llama3.2-3b": _llama(layers=28, width=3072, hidden=8192, heads=24, scaling_factor=32.0, tied=True),
    "qwen3-0.6b": _qwen3(layers=28, width=1024, hidden=3072, heads=16, tied=True),
    "qwen3-1.7b": _qwen3(layers=28, width=2048, hidden=6144, heads=16, tied=True),
    "qwen3-4b": _qwen3(layers=36, width=2560, hidden=9728, heads=32, tied=True),
    "qwen3-8b": _qwen3(layers=36, width=4096, hidden=12_288, heads=32),
    "qwen3-14b": _qwen3(layers=40, width=5120, hidden=17_408, heads=40),
    "qwen3-32b": _qwen3(layers=64, width=5120, hidden=25_600, heads=64),
}


def find(name: str) -> DecoderConfig:
    """The decoder of a preset.

    Raises:
        ConfigError: no preset has the name.
    """
    if name not in PRESETS:
        raise ConfigError(
            "no such model",
            where="model.preset",
            found=name,
            expected="a name of: raydist list models",
            fix=nearest_hint(name, PRESETS),
        )
    return PRESETS[name]


def changed(base: DecoderConfig, overrides: Mapping[str, Any], **extras: Any) -> DecoderConfig:
    """A decoder with a recipe's ``model.overrides``, and with fields that no recipe sets.

    Raises:
        ConfigError: an override that is no field, or does not fit the others.
    """
    return validated(DecoderConfig, {**base.model_dump(), **overrides, **extras}, prefix="model.overrides")


def require_fields(overrides: Mapping[str, Any]) -> None:
    """Refuses overrides of what no decoder has, where the decoder itself is not known yet.

    Raises:
        ConfigError: an override that is no field.
    """
    for name in overrides:
        if name not in DecoderConfig.model_fields:
            raise unknown_key(name, DecoderConfig.model_fields, where=f"model.overrides.{name}")

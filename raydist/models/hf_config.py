"""``config.json`` of Hugging Face, in and out, and what ``raydist.json`` adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydist.config.base import validated
from raydist.core import storage
from raydist.core.errors import ModelError
from raydist.models.config import EXTRA_FIELDS, DecoderConfig, RopeScaling

META_NAME = "raydist.json"

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DEFAULT_HEAD_DIM = {"llama": None, "qwen3": 128}
_MUST_BE = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def read_hf_config(folder: str) -> DecoderConfig:
    """Reads ``config.json``, in the form of transformers 4 (``rope_theta``, ``rope_scaling``) or 5
    (``rope_parameters``); extra inputs and heads from ``decoder`` in ``raydist.json``, where there is one.

    Raises:
        ModelError: there is no such file, or it asks for something that this decoder does not do; the key is named.
    """
    path = storage.join(folder, "config.json")
    if not storage.exists(path):
        raise ModelError(
            "no config.json in the model folder",
            where=folder,
            fix="give a Hugging Face directory (config.json, *.safetensors)",
        )
    values = storage.read_json(path)
    family = values.get("model_type")
    if family not in _ARCHITECTURES:
        raise _unsupported(path, "model_type", family, " or ".join(_ARCHITECTURES))
    for key, expected in _MUST_BE.items():
        if values.get(key, expected) != expected:
            raise _unsupported(path, key, values[key], expected)
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        raise _unsupported(path, "layer_types", sorted(set(values["layer_types"])), "full_attention in every layer")
    width, num_heads = _required(path, values, "hidden_size"), _required(path, values, "num_attention_heads")
    theta, scaling = _rope(path, values)
    fields = {
        "family": family,
        "vocab_size": _required(path, values, "vocab_size"),
        "num_layers": _required(path, values, "num_hidden_layers"),
        "width": width,
        "hidden_width": _required(path, values, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": values.get("num_key_value_heads") or num_heads,
        "head_dim": values.get("head_dim") or _DEFAULT_HEAD_DIM[family] or width // num_heads,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "tied_embeddings": values.get("tie_word_embeddings", False),
        "max_positions": values.get("max_position_embeddings", 2048),
        **_extras(folder),
    }
    return validated(DecoderConfig, fields, prefix=path)


def to_hf_config(config: DecoderConfig, *, token_ids: Mapping[str, int | None], dtype: str) -> dict[str, Any]:
    """The contents of ``config.json``, with the rotary keys of both transformers 4 and 5.

    Args:
        config: the decoder.
        token_ids: ``bos``, ``eos`` and ``pad``, where there are any.
        dtype: of the weights, ``"float32"`` or ``"bfloat16"``.
    """
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_positions,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.family == "llama":
        values["mlp_bias"] = False
    if config.rope_scaling is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
        values["rope_parameters"] = {**values["rope_scaling"], "rope_theta": config.rope_theta}
    for name in ("bos", "eos", "pad"):
        values[f"{name}_token_id"] = token_ids.get(name)
    return values


def _extras(folder: str) -> dict[str, Any]:
    path = storage.join(folder, META_NAME)
    if not storage.exists(path):
        return {}
    extras: dict[str, Any] = storage.read_json(path).get("decoder", {})
    for key in extras:
        if key not in EXTRA_FIELDS:
            raise _unsupported(path, f"decoder.{key}", key, " or ".join(EXTRA_FIELDS))
    return extras


def _rope(path: str, values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(key) or {}
    theta = float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise _unsupported(path, f"{key}.rope_type", kind, "default or llama3")
    scaling = RopeScaling(
        factor=_required(path, rope, "factor"),
        low_freq_factor=_required(path, rope, "low_freq_factor"),
        high_freq_factor=_required(path, rope, "high_freq_factor"),
        original_max_positions=_required(path, rope, "original_max_position_embeddings"),
    )
    return theta, scaling


def _required(path: str, values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise ModelError("a key is missing from config.json", where=path, expected=key)
    return values[key]


def _unsupported(path: str, key: str, found: object, expected: object) -> ModelError:
    return ModelError(f"the model's {key} is not supported", where=f"{path}: {key}", found=found, expected=expected)

"""Parameter names here and in Hugging Face's Llama and Qwen-3 files, which use the same scheme."""

from __future__ import annotations

_OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


_EXTRA_PARTS = {"input_features", "extra_heads", "time_embedding", "modulation", "output_modulation"}


def is_extra(name: str) -> bool:
    """Whether a parameter of ours belongs to what a plain decoder lacks; it then has no Hugging Face name."""
    return not _EXTRA_PARTS.isdisjoint(name.split("."))


def hf_name(name: str) -> str:
    """``blocks.3.attention.query.weight`` as ``model.layers.3.self_attn.q_proj.weight``."""
    if name in _OUTER:
        return _OUTER[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_IN_BLOCK[rest.removesuffix('.weight')]}.weight"

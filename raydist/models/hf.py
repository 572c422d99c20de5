"""Hugging Face directories, in and out.

A directory made here also holds ``raydist.json``: the special ids, how the model was trained, how to sample it, and which
inputs and heads it has beside those of its family, whose weights are in ``raydist_extras.safetensors``.
"""

from __future__ import annotations

from typing import Any

import torch

from raydist.core import storage
from raydist.models.attention import AttentionBackend
from raydist.models.decoder import Decoder
from raydist.models.hf_config import META_NAME, read_hf_config
from raydist.models.hf_save import save_hf
from raydist.models.hf_weights import HfWeights

__all__ = ["META_NAME", "HfWeights", "load_decoder", "read_hf_config", "read_meta", "save_hf"]


def load_decoder(
    folder: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: AttentionBackend = "sdpa",
) -> tuple[Decoder, dict[str, Any]]:
    """A whole decoder on one device, in evaluation mode, and what is known about it besides.

    Returns:
        The decoder, and the contents of ``raydist.json`` (see :func:`save_hf`). A directory
        made by others has none; it then holds ``token_ids`` and ``stop_ids`` as far as config.json knows them.

    Raises:
        ModelError: the directory cannot be read as a decoder.
    """
    config = read_hf_config(folder)
    weights = HfWeights(folder, config)
    with torch.device("meta"):
        decoder = Decoder(config, attention=attention).to(dtype)
    decoder.to_empty(device=device)
    decoder.retie()
    decoder.reset_buffers(device)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(weights.read(name))
    return decoder.eval(), read_meta(folder)


def read_meta(folder: str) -> dict[str, Any]:
    """``raydist.json``, or its like derived from ``config.json`` and ``generation_config.json``."""
    path = storage.join(folder, META_NAME)
    if storage.exists(path):
        meta: dict[str, Any] = storage.read_json(path)
        return meta
    values = storage.read_json(storage.join(folder, "config.json"))
    generation_path = storage.join(folder, "generation_config.json")
    generation = storage.read_json(generation_path) if storage.exists(generation_path) else {}
    eos = generation.get("eos_token_id", values.get("eos_token_id"))
    stop_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    token_ids = {
        "bos": values.get("bos_token_id"),
        "eos": stop_ids[0] if stop_ids else None,
        "mask": None,
        "pad": values.get("pad_token_id"),
    }
    return {"token_ids": token_ids, "stop_ids": stop_ids}

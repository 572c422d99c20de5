"""A Hugging Face directory from a decoder's weights, for ``transformers`` and for raydist's own samplers."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raydist.core import storage
from raydist.core.errors import ModelError
from raydist.models.config import DecoderConfig
from raydist.models.hf_config import META_NAME, to_hf_config
from raydist.models.hf_names import hf_name, is_extra
from raydist.models.hf_weights import EXTRAS_NAME, INDEX_NAME, WEIGHTS_NAME

FORMAT_VERSION = 1
_DEFAULT_SHARD_BYTES = 5 * 10**9


def save_hf(
    folder: str,
    *,
    state: Mapping[str, Tensor],
    config: DecoderConfig,
    tokenizer_json: str | None,
    token_ids: Mapping[str, int | None],
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the directory. A local one appears by rename when complete; in a bucket ``raydist.json`` comes last.

    Tensors are taken from ``state`` one by one and a shard at a time is in memory, so a lazy mapping may be passed.
    Parameters that a plain decoder lacks go to ``raydist_extras.safetensors``, which ``transformers`` does not look at, and
    the fields of the configuration that ask for them to ``decoder`` in ``raydist.json``.

    Args:
        folder: an earlier raydist export there is replaced.
        state: our parameter name -> full tensor; ``head.weight`` is left out where it is tied.
        config: the decoder.
        tokenizer_json: the contents of ``tokenizer.json``; None for a model without text.
        token_ids: ``bos``, ``eos``, ``mask``, ``pad`` -> id or None.
        extra: goes to ``raydist.json`` beside the ids: objective, block sizes, sampling defaults. ``stop_ids``
            defaults to the end-of-text id.
        max_shard_bytes: upper limit of one weight file; a single larger tensor has its own file.
        dtype: what the weights are cast to; None keeps them.

    Raises:
        ModelError: the folder holds something else, or a special id is not in the tokenizer.
    """
    if storage.list_names(folder) and not storage.exists(storage.join(folder, META_NAME)):
        raise ModelError(
            "the folder is in use", where=folder, expected="an empty folder or an earlier export", fix="choose another"
        )
    eos = token_ids.get("eos")
    meta = {"stop_ids": [] if eos is None else [eos], **(extra or {})}
    meta |= {"format_version": FORMAT_VERSION, "token_ids": dict(token_ids), "decoder": config.extras}
    with _published(folder) as partial:
        written = _write_weights(partial, state, config, max_shard_bytes, dtype)
        _write_extras(partial, state, dtype)
        generation = {f"{name}_token_id": token_ids.get(name) for name in ("bos", "pad")}
        generation["eos_token_id"] = meta["stop_ids"] or None
        hf_config = to_hf_config(config, token_ids=token_ids, dtype=str(written).removeprefix("torch."))
        storage.write_json(os.path.join(partial, "config.json"), hf_config)
        storage.write_json(os.path.join(partial, "generation_config.json"), generation)
        storage.write_json(os.path.join(partial, META_NAME), meta)
        if tokenizer_json is not None:
            settings = _tokenizer_config(tokenizer_json, token_ids, config.max_positions)
            storage.write_bytes(os.path.join(partial, "tokenizer.json"), tokenizer_json.encode())
            storage.write_json(os.path.join(partial, "tokenizer_config.json"), settings)


@contextmanager
def _published(folder: str) -> Iterator[str]:
    """Yields a local folder to fill, whose contents take the place of ``folder`` when the block ends well."""
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory() as partial:
            yield partial
            storage.remove_tree(folder)
            for name in sorted(os.listdir(partial), key=lambda name: name == META_NAME):
                storage.upload_file(os.path.join(partial, name), storage.join(folder, name))
        return
    target = storage.local_path(folder)
    partial = f"{target}.partial-{uuid.uuid4().hex[:8]}"
    os.makedirs(partial)
    try:
        yield partial
        storage.remove_tree(target)
        os.replace(partial, target)
    finally:
        storage.remove_tree(partial)


def _write_weights(
    folder: str, state: Mapping[str, Tensor], config: DecoderConfig, max_bytes: int, dtype: torch.dtype | None
) -> torch.dtype:
    """Writes the shards and their index; returns the dtype of the weights."""
    from safetensors.torch import save_file

    weight_map: dict[str, int] = {}
    num_bytes = num_shards = 0
    written = torch.float32
    for shard in _shards(state, config, max_bytes, dtype):
        num_shards += 1
        save_file(shard, os.path.join(folder, f"part-{num_shards}"), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, num_shards)
        num_bytes += sum(tensor.nbytes for tensor in shard.values())
        written = next(iter(shard.values())).dtype
    if num_shards == 1:
        os.replace(os.path.join(folder, "part-1"), os.path.join(folder, WEIGHTS_NAME))
        return written
    files = {i: f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)}
    for i, file in files.items():
        os.replace(os.path.join(folder, f"part-{i}"), os.path.join(folder, file))
    index = {"metadata": {"total_size": num_bytes}, "weight_map": {name: files[i] for name, i in weight_map.items()}}
    storage.write_json(os.path.join(folder, INDEX_NAME), index)
    return written


def _shards(
    state: Mapping[str, Tensor], config: DecoderConfig, max_bytes: int, dtype: torch.dtype | None
) -> Iterator[dict[str, Tensor]]:
    """Their name -> tensor, filled up to ``max_bytes``."""
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name in state:
        if is_extra(name) or (name == "head.weight" and config.tied_embeddings):
            continue
        tensor = state[name].detach().to("cpu", dtype).contiguous()
        if shard and num_bytes + tensor.nbytes > max_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[hf_name(name)] = tensor
        num_bytes += tensor.nbytes
    yield shard


def _write_extras(folder: str, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    extras = {name: state[name].detach().to("cpu", dtype).contiguous() for name in state if is_extra(name)}
    if extras:
        save_file(extras, os.path.join(folder, EXTRAS_NAME), metadata={"format": "pt"})


def _tokenizer_config(tokenizer_json: str, token_ids: Mapping[str, int | None], max_positions: int) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "mask", "pad"):
        token_id = token_ids.get(name)
        if token_id is None:
            continue
        token = tokenizer.id_to_token(token_id)
        if token is None:
            raise ModelError(
                f"the {name} id is not in the tokenizer", found=token_id, expected=f"below {tokenizer.get_vocab_size()}"
            )
        settings[f"{name}_token"] = token
    return settings

"""Weights from a Hugging Face directory: safetensors only, read one parameter at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from raydist.core import storage
from raydist.core.errors import ModelError
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf_config import read_hf_config
from raydist.models.hf_names import hf_name, is_extra
from raydist.models.init import initial_value, is_vocabulary_head, lm_head_name

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
EXTRAS_NAME = "raydist_extras.safetensors"
_VOCABULARY_TABLES = ("embedding.weight", "head.weight")


class HfWeights(Mapping[str, Tensor]):
    """Our parameter name -> full float32 tensor on CPU, read when asked for.

    Where ``config`` has more vocabulary rows than the files, the new rows are the mean of the old ones: a new token
    then starts as an average token, with logits that neither win nor distort the softmax.

    Where ``config`` has extra inputs or heads that the directory was not saved with, they start without effect: a
    vocabulary-sized head as a copy of the loaded language-model head, the rest by
    :func:`raydist.models.init.initial_value`.

    Args:
        folder: holds ``model.safetensors``, or shards and their index.
        config: the decoder that the weights are for.
        seed: of the extra weights that the directory does not have.

    Raises:
        ModelError: files or parameters are missing or damaged, or the files hold parameters that the decoder lacks.
    """

    def __init__(self, folder: str, config: DecoderConfig, *, seed: int = 0) -> None:
        if storage.is_remote(folder):
            raise ModelError("weights are read from a local folder", where=folder, fix="copy the directory here first")
        self.folder = storage.local_path(folder)
        self._config, self._seed = config, seed
        self._shapes = _parameter_shapes(config)
        self._files = _weight_map(self.folder)
        self._stored_extras = _stored_extras(self.folder)
        expected = {hf_name(name) for name in self._shapes if not is_extra(name)}
        missing, unknown = sorted(expected - self._files.keys()), sorted(self._files.keys() - expected)
        unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"]
        if missing or unknown:
            raise ModelError(
                "the weight files do not fit config.json",
                where=folder,
                found=_some("unknown", unknown) if unknown else _some("missing", missing),
                expected=f"{len(expected)} parameters",
            )

    def names(self) -> list[str]:
        """Our names of all parameters; a tied head is not among them."""
        return list(self._shapes)

    def read(self, name: str) -> Tensor:
        """One parameter."""
        shape = self._shapes[name]
        if is_extra(name) and name not in self._stored_extras:
            return self._initial_extra(name)
        their_name = name if is_extra(name) else hf_name(name)
        file = EXTRAS_NAME if is_extra(name) else self._files[their_name]
        value = _read_tensor(os.path.join(self.folder, file), their_name).to(torch.float32)
        has_vocabulary_rows = name in _VOCABULARY_TABLES or is_vocabulary_head(name, self._config)
        if has_vocabulary_rows and value.ndim == 2 and value.shape[0] < shape[0]:
            new_rows = value.mean(dim=0, keepdim=True).expand(shape[0] - value.shape[0], -1)
            value = torch.cat((value, new_rows))
        if tuple(value.shape) != shape:
            raise ModelError(
                "a weight has the wrong shape",
                where=f"{self.folder}: {their_name}",
                found=tuple(value.shape),
                expected=shape,
            )
        return value

    def _initial_extra(self, name: str) -> Tensor:
        if is_vocabulary_head(name, self._config):
            return self.read(lm_head_name(self._config))
        return initial_value(name, self._shapes[name], config=self._config, seed=self._seed)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}


def _stored_extras(folder: str) -> set[str]:
    """Our names of the extra parameters that the directory was saved with."""
    stored = read_hf_config(folder)
    if not stored.has_extras:
        return set()
    promised = {name for name in _parameter_shapes(stored) if is_extra(name)}
    path = os.path.join(folder, EXTRAS_NAME)
    if not os.path.exists(path):
        raise ModelError("a weight file is missing", where=folder, expected=EXTRAS_NAME, fix="copy the directory again")
    with _opened(path) as reader:
        missing = sorted(promised - set(reader.keys()))
    if missing:
        raise ModelError(
            "the extra weights do not fit raydist.json",
            where=path,
            found=_some("missing", missing),
            expected=f"{len(promised)} parameters",
        )
    return promised


def _weight_map(folder: str) -> dict[str, str]:
    """Their parameter name -> file name."""
    index_path, single_path = os.path.join(folder, INDEX_NAME), os.path.join(folder, WEIGHTS_NAME)
    if os.path.exists(index_path):
        files = {
            name: storage.safe_name(file, where=index_path)
            for name, file in storage.read_json(index_path)["weight_map"].items()
        }
    elif os.path.exists(single_path):
        with _opened(single_path) as reader:
            files = dict.fromkeys(reader.keys(), WEIGHTS_NAME)
    else:
        raise ModelError(
            "no safetensors weights in the model folder",
            where=folder,
            expected=f"{WEIGHTS_NAME} or {INDEX_NAME}",
            fix="convert other formats with transformers' save_pretrained; pickled weights are never loaded",
        )
    for file in sorted(set(files.values())):
        if not os.path.exists(os.path.join(folder, file)):
            raise ModelError("a weight file is missing", where=folder, expected=file, fix="copy the directory again")
    return files


def _read_tensor(path: str, name: str) -> Tensor:
    from safetensors import SafetensorError

    with _opened(path) as reader:
        try:
            return reader.get_tensor(name)
        except SafetensorError as error:
            raise ModelError("a weight file is damaged", where=path, found=error) from None


def _opened(path: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError("a weight file is damaged", where=path, found=error, fix="copy the file again") from None


def _some(label: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{label}: {', '.join(names[:3])}{more}"

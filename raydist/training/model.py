"""From ``model:`` in a recipe to the decoder's numbers."""

from __future__ import annotations

import os

from data_loaders.tokenizer import Tokenizer
from raydist.config.schema import ModelConfig
from raydist.core.errors import ConfigError, TokenizerError
from raydist.models.config import DecoderConfig
from raydist.models.hf import HfWeights, read_hf_config
from raydist.models.presets import changed, find
from raydist.objectives.base import Needs
from raydist.training.data import TrainingData

_VOCAB_MULTIPLE = 64
_MAX_ADDED_TOKENS = 16
_PROBE = "def f(x):\n    return 'naïve 日本' + str(x)  # 1234\n"


def decoder_config(model: ModelConfig, *, data: TrainingData, seq_len: int, needs: Needs) -> DecoderConfig:
    """The decoder that a recipe asks for, with rows for every id of the dataset and the inputs and heads of its objective.

    Of a model to start from, inputs and heads that this objective does not use are left out.

    Raises:
        ConfigError: unknown preset, an override that does not fit, or a ``seq_len`` beyond the model's positions.
        TokenizerError: the dataset's tokenizer is not the one of the weights to start from.
    """
    vocab_size = data.ids.vocab_size
    if model.init_from is not None:
        base = read_hf_config(model.init_from)
        _require_same_vocabulary(base, model.init_from, data=data)
    else:
        rows = -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
        base = find(model.preset).model_copy(update={"vocab_size": rows})
    extras = {
        "time_input": needs.time,
        "extra_heads": dict(needs.extra_heads),
        "input_features": dict(needs.input_features),
    }
    config = changed(base, model.overrides, **extras).with_vocab(vocab_size, multiple_of=_VOCAB_MULTIPLE)
    if seq_len > config.max_positions:
        raise ConfigError(
            "rows are longer than the model's positions",
            where="data.seq_len",
            found=seq_len,
            expected=f"at most {config.max_positions}",
            fix="shorten data.seq_len, or set model.overrides.max_positions if you mean it",
        )
    return config


def initial_weights(model: ModelConfig, config: DecoderConfig, *, seed: int) -> HfWeights | None:
    """The weights to start from, or None for fresh ones; what they lack is drawn from the seed."""
    return None if model.init_from is None else HfWeights(model.init_from, config, seed=seed)


def _require_same_vocabulary(base: DecoderConfig, directory: str, *, data: TrainingData) -> None:
    """The model must have been trained with the tokenizer that made the dataset, give or take added special tokens."""
    manifest = data.train.manifest
    problem = None
    if manifest.vocab_size > base.vocab_size + _MAX_ADDED_TOKENS:
        problem = f"{manifest.vocab_size} ids in the dataset, {base.vocab_size} rows in the model"
    path = os.path.join(directory, "tokenizer.json")
    if problem is None and os.path.exists(path):
        theirs, ours = Tokenizer.load(path).encode(_PROBE), data.train.datasets[0].tokenizer().encode(_PROBE)
        if theirs != ours:
            problem = f"a probe text becomes {ours[:6]}... in the dataset, {theirs[:6]}... for the model"
    if problem is not None:
        raise TokenizerError(
            "the dataset's tokenizer is not the model's",
            where="model.init_from",
            found=problem,
            expected="a dataset prepared with the model's own tokenizer",
            fix=f"raydist data prepare ... --tokenizer {path}",
        )

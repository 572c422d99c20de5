"""Trials that sample: one trained model, many settings of its samplers, held-out text to continue."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune

from data_loaders.cache import NodeCache
from data_loaders.gather import gather
from data_loaders.mixture import DatasetWeight, open_mixture
from data_loaders.tokenizer import Tokenizer
from raydist.config.base import validated
from raydist.config.load import merge
from raydist.config.schema import RunConfig, SamplingConfig, ScalingConfig, TrackingConfig
from raydist.config.sweep import Sweep
from raydist.config.sweep_space import nested
from raydist.core.errors import ConfigError, RaydistError
from raydist.core.log import quiet_libraries
from raydist.core.units import parse_bytes
from raydist.evaluation.continuation import score_continuations
from raydist.evaluation.sweep_records import TrialRecord
from raydist.models.hf import load_decoder, read_meta
from raydist.runtime.bookkeeper import Bookkeeper
from raydist.runtime.sweep_capacity import Nodes, require_slots
from raydist.runtime.sweep_dir import SweepDir
from raydist.sampling.base import Trained

_SCALING = ScalingConfig(num_workers=1, cpus_per_worker=1.0)


class SampleTrial(tune.Trainable):
    """One sampler on all prompts; the actor loads the model once and is used for one trial after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        """Loads the model."""
        os.environ.update(config["environment"])
        quiet_libraries()
        tokenizer = Tokenizer.load(config["model_dir"])
        self._decoder, meta = load_decoder(config["model_dir"])
        self._trained = Trained.from_meta(
            meta, vocab_size=tokenizer.vocab_size, seed=config["seed"], tokenizer=tokenizer.byte_level
        )
        self._trial = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial."""
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        """The whole trial."""
        trial = self._trial
        try:
            sampler = SamplingConfig.model_validate(trial["sampling"]).sampler.build(self._trained)
            score = score_continuations(
                sampler,
                self._decoder,
                trial["rows"],
                prompt_tokens=trial["prompt_tokens"],
                new_tokens=trial["new_tokens"],
            )
        except RaydistError as error:
            return {"step": 0, "trial_state": "failed", "failure": str(error), "done": True}
        return {"step": 1, **score.metrics, "trial_state": "finished", "failure": "", "done": True}


@dataclass(frozen=True)
class SampleTrials:
    """The trials of a sweep over samplers.

    Attributes:
        sweep: the sweep.
        folder: its directory.
        books: keeps the trials' MLflow runs.
        model_dir: the trained model.
        rows: the text to continue.
    """

    sweep: Sweep
    folder: SweepDir
    books: Bookkeeper
    model_dir: str
    rows: Sequence[Sequence[int]]
    trainable = SampleTrial

    def check(self, parameters: Mapping[str, Any]) -> None:
        """Refuses what is no sampler.

        Raises:
            ConfigError: naming the key that does not fit.
        """
        self._sampling(parameters)

    def share(self, parameters: Mapping[str, Any], nodes: Nodes) -> float:
        """One CPU of the cluster.

        Raises:
            CapacityError: no node has one.
        """
        return 1 / require_slots(_SCALING, nodes, where=self.sweep.path)

    def resources(self, parameters: Mapping[str, Any]) -> dict[str, float]:
        """One CPU."""
        return {"CPU": 1.0}

    def prepare(self, index: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What the actor needs to know."""
        continuation = self.sweep.config.continuation
        assert continuation is not None
        return {
            "model_dir": self.model_dir,
            "seed": self.sweep.config.search.seed,
            "sampling": self._sampling(parameters).model_dump(mode="json"),
            "rows": self.rows,
            "prompt_tokens": continuation.prompt_tokens,
            "new_tokens": continuation.new_tokens,
        }

    def _sampling(self, parameters: Mapping[str, Any]) -> SamplingConfig:
        return self.sweep.sampling_of(parameters, defaults=read_meta(self.model_dir).get("sampling"))

    def ended(self, record: TrialRecord) -> None:
        """Writes the trial's MLflow run."""
        self.books.add_measured(
            record,
            self.folder.file(record.name),
            tracking=tracking_of(self.sweep),
            output_dir=output_dir_of(self.sweep),
        )

    def rebook(self, index: int, record: TrialRecord) -> None:
        """Writes it anew."""
        self.ended(record)


def tracking_of(sweep: Sweep) -> TrackingConfig:
    """Where a sweep over samplers is tracked: its ``tracking`` overrides.

    Raises:
        ConfigError: one of them is unknown or does not fit.
    """
    values: dict[str, Any] = {}
    for key, value in sweep.config.overrides.items():
        values = merge(values, nested(key, value))
    return validated(TrackingConfig, values.get("tracking") or {}, prefix="overrides.tracking")


def output_dir_of(sweep: Sweep) -> str:
    """The folder of the directory of a sweep over samplers."""
    return str(sweep.config.overrides.get("output_dir", RunConfig.model_fields["output_dir"].default))


def read_rows(sweep: Sweep, *, model_dir: str) -> list[list[int]]:
    """The held-out text that every trial continues: the first rows of the dataset, as they lie.

    Raises:
        DataError: no such dataset, or too few rows of that length.
        ConfigError: the dataset's vocabulary is not the model's.
    """
    continuation = sweep.config.continuation
    assert continuation is not None
    cache = NodeCache(None, limit_bytes=parse_bytes("20GiB", where="continuation.data"))
    mixture = open_mixture(
        [DatasetWeight(continuation.data, 1.0)],
        cache=cache,
        seq_len=continuation.prompt_tokens + continuation.new_tokens,
        seed=0,
        order="sequential",
        window_shards=1,
    )
    vocab_size = Tokenizer.load(model_dir).vocab_size
    if mixture.manifest.vocab_size != vocab_size:
        raise ConfigError(
            "the held-out text was prepared with another tokenizer than the model's",
            where="continuation.data",
            found=f"{mixture.manifest.vocab_size} tokens in its vocabulary",
            expected=f"{vocab_size}, those of {model_dir}",
        )
    if mixture.num_rows < continuation.num_prompts:
        raise ConfigError(
            "the dataset has too few rows of that length",
            where="continuation.num_prompts",
            found=f"{mixture.num_rows} rows of {mixture.seq_len} tokens",
            expected=f"at least {continuation.num_prompts}",
            fix="ask for fewer or shorter prompts",
        )
    (chunk,) = gather(mixture, np.arange(continuation.num_prompts), chunk_rows=continuation.num_prompts)
    return [[int(token) for token in row] for row in chunk.tokens_NS]

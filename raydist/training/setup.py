"""Builds all parts of a run from its configuration, on every worker alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from data_loaders.loader import Loader
from data_loaders.mixture import Mixture
from raydist.config.schema import RunConfig
from raydist.core.dist import Workers
from raydist.core.errors import ConfigError
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.fsdp_utils.materialize import materialize
from raydist.fsdp_utils.mesh import make_mesh
from raydist.models.attention import AttentionBackend
from raydist.models.decoder import Decoder
from raydist.objectives.base import Objective
from raydist.sampling.base import Trained
from raydist.sampling.prefill import check_prompts
from raydist.training.batches import StepBatch, step_batch_maker
from raydist.training.data import TrainingData, open_data
from raydist.training.host_memory import keep_freed_memory
from raydist.training.model import decoder_config, initial_weights
from raydist.training.optim import GuardedAdamW

# Validation draws its noise from another seed than training, the same one in every run.
_VALIDATION_SEED = 0x5EED


class ValidationBatches:
    """The same batches at every validation: rows in the order of the dataset, noise keyed by row.

    Attributes:
        objective: what made them, and what turns their terms into metrics.
    """

    def __init__(
        self, loader: Loader[StepBatch], make: Callable[[Rows], StepBatch], *, objective: Objective, batch_rows: int
    ) -> None:
        self.objective = objective
        self._loader = loader
        self._make = make
        self._batch_rows = batch_rows

    def batch(self, index: int) -> StepBatch:
        """This rank's part of the ``index``-th batch."""
        return self._make(self._loader.rows(first_sample=index * self._batch_rows, step=index))


@dataclass(frozen=True)
class Assembly:
    """The parts of one attempt."""

    model: Decoder
    optimizer: GuardedAdamW
    objective: Objective
    data: TrainingData
    validation: ValidationBatches | None

    @property
    def data_hash(self) -> str:
        """Names datasets, shares, row length, seed and order."""
        return self.data.train.sha256


def assemble(config: RunConfig, workers: Workers) -> Assembly:
    """Opens the data, builds and shards the model, makes optimizer and objective.

    Raises:
        RaydistError: whatever does not fit, before any step.
    """
    training = config.training
    if workers.device.type == "cpu":
        keep_freed_memory()
        if training.num_threads is not None:
            torch.set_num_threads(training.num_threads)
    data = open_data(config.data, seed=config.seed)
    objective = config.objective.build(data.ids)
    model_config = decoder_config(config.model, data=data, seq_len=config.data.seq_len, needs=objective.needs)
    _require_sampler(config, data, max_positions=model_config.max_positions)
    model = materialize(
        model_config,
        mesh=make_mesh(workers),
        device=workers.device,
        seed=config.seed,
        precision=training.precision,
        recompute=config.model.recompute,
        compile=config.model.compile,
        reshard_after_forward=config.scaling.reshard_after_forward,
        weights=initial_weights(config.model, model_config, seed=config.seed),
        attention=_attention(config, workers),
    )
    return Assembly(
        model=model,
        optimizer=GuardedAdamW(model.named_parameters(), training.optimizer),
        objective=objective,
        data=data,
        validation=_validation(config, data.validation, validation_objective(config, objective, ids=data.ids), workers),
    )


def train_loader(
    config: RunConfig, parts: Assembly, workers: Workers, *, start_step: int, start_sample: int
) -> Loader[StepBatch]:
    """This rank's batches from a step on."""
    return Loader(
        parts.data.train,
        batch_rows=config.training.batch_rows,
        rank=workers.rank,
        world_size=workers.world_size,
        start_sample=start_sample,
        start_step=start_step,
        num_steps=config.training.num_steps - start_step,
        prefetch_steps=config.data.prefetch_steps,
        transform=step_batch_maker(
            parts.objective, noise_seed=config.seed, microbatch_rows=config.training.microbatch_rows
        ),
    )


def _validation(
    config: RunConfig, mixture: Mixture | None, objective: Objective, workers: Workers
) -> ValidationBatches | None:
    if mixture is None:
        return None
    training = config.training
    loader: Loader[StepBatch] = Loader(
        mixture, batch_rows=training.batch_rows, rank=workers.rank, world_size=workers.world_size
    )
    make = step_batch_maker(objective, noise_seed=_VALIDATION_SEED, microbatch_rows=training.microbatch_rows)
    return ValidationBatches(loader, make, objective=objective, batch_rows=training.batch_rows)


def validation_objective(config: RunConfig, objective: Objective, *, ids: TokenIds) -> Objective:
    """What validation measures.

    Raises:
        ConfigError: it needs inputs or heads that the model is trained without.
    """
    if config.training.validation_objective is None:
        return objective.for_validation()
    other: Objective = config.training.validation_objective.build(ids)
    for name in ("time", "extra_heads", "input_features"):
        trained, needed = getattr(objective.needs, name), getattr(other.needs, name)
        if trained != needed:
            raise ConfigError(
                "the model is trained without what this objective needs",
                where="training.validation_objective",
                found=f"{name}: {needed}",
                expected=f"{trained}, as the objective {config.objective.name} has it",
                fix="validate by the same kind of objective as it trains, with other settings",
            )
    return other.for_validation()


def _require_sampler(config: RunConfig, data: TrainingData, *, max_positions: int) -> None:
    """A sampler or a prompt that does not fit the model would otherwise be refused after the last step."""
    sampling = config.sampling
    if sampling.prompts or "sampler" in sampling.model_fields_set:
        objective = config.objective.model_dump(mode="json")
        tokenizer = data.train.datasets[0].tokenizer
        sampling.sampler.build(Trained(ids=data.ids, objective=objective, tokenizer=lambda: tokenizer().byte_level()))
        check_prompts(
            [tokenizer().encode(prompt) for prompt in sampling.prompts],
            max_new_tokens=sampling.max_new_tokens,
            max_positions=max_positions,
            where="sampling.prompts[{}]",
        )


def _attention(config: RunConfig, workers: Workers) -> AttentionBackend:
    if config.model.attention != "auto":
        return config.model.attention
    return "flex" if workers.device.type == "cuda" else "sdpa"

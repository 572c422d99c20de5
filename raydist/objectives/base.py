"""The objective contract: corrupt, terms, combine. An objective never sees the trainer, the model or its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raydist.config.base import StrictModel
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.terms import HeadTerm, TermResult
from raydist.core.token_ids import TokenIds


@dataclass(frozen=True)
class Needs:
    """What an objective needs of the model; the run builds the decoder with it, and the planner counts it.

    Attributes:
        sequence_factor: model positions per clean token (2 where clean and noised copies stand side by side).
        bidirectional: True where attention is not causal.
        time: True where the model takes a time input, ``time_BL``.
        extra_heads: name -> outputs of heads beside ``"lm"``; 0 stands for the vocabulary.
        input_features: name -> number of values of tables whose rows are added to the token embeddings; such a feature is
            an input ``features[name]``, int64 ``[B, L]``. Their weights start at zero.
    """

    sequence_factor: int = 1
    bidirectional: bool = False
    time: bool = False
    extra_heads: Mapping[str, int] = field(default_factory=dict)
    input_features: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NoisedBatch:
    """What ``corrupt`` made of a batch of rows. The loop looks at ``inputs`` and ``counts`` only.

    Attributes:
        inputs: keyword arguments of the model: ``tokens_BL``, ``positions_BL``, ``mask`` and, where declared, ``time_BL``
            (float32 ``[B, L]`` or ``[B, 1]``) and ``features`` (name -> int64 ``[B, L]``).
        counts: name of a denominator -> its value for this batch. Plain numbers: they depend on data and noise only, are
            known before the forward, and are summed over microbatches and ranks before anything is divided.
        targets: what ``terms`` needs, private to the objective.
    """

    inputs: dict[str, Any]
    counts: dict[str, float]
    targets: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Mean:
    """A metric that is a ratio of sums over all microbatches and ranks; both scalars are detached float32 tensors."""

    total: Tensor
    count: Tensor


@dataclass(frozen=True)
class LossTerms:
    """The cost of one microbatch before the global division.

    Attributes:
        sums: denominator name -> loss sum with gradient. The loss of the step is
            ``sum over names of (sum over ranks and microbatches of sums[name]) / (the same sum of counts[name])``.
        metrics: metric name -> :class:`Mean`.
    """

    sums: dict[str, Tensor]
    metrics: dict[str, Mean]


class Objective(ABC):
    """One training objective. Stateless; noise comes from the :class:`RowRng` alone."""

    needs: Needs = Needs()
    """Of this objective with its settings; known before the model is built."""

    @abstractmethod
    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Clean rows to model inputs; may change the length. Runs on CPU, in the loader's thread."""

    @abstractmethod
    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """Which positions carry which cost."""

    def combine(self, results: Sequence[TermResult]) -> LossTerms:
        """Adds up term results; each term's mean cost is the metric ``loss/<name>``."""
        sums: dict[str, Tensor] = {}
        metrics: dict[str, Mean] = {}
        for result in results:
            name = result.term.denominator
            sums[name] = sums[name] + result.loss_sum if name in sums else result.loss_sum
            count = torch.full_like(result.loss_sum, float(result.losses_T.numel()), requires_grad=False)
            metrics[f"loss/{result.term.name}"] = Mean(total=result.losses_T.sum(), count=count)
        return LossTerms(sums=sums, metrics=metrics)

    def for_validation(self) -> Objective:
        """What measures a model that this objective trains, where that is more than the loss.

        The loss and the needs stay the same. A metric may be measured on more than the loss is.
        """
        return self


class ObjectiveConfig(StrictModel, ABC):
    """The base of the configuration of an objective; a subclass is registered under its ``name``."""

    name: str

    @abstractmethod
    def build(self, ids: TokenIds) -> Objective:
        """The objective for a vocabulary.

        Raises:
            ConfigError: the vocabulary lacks an id that the objective needs.
        """


def require_mask_id(ids: TokenIds, *, objective: str) -> int:
    """The vocabulary's mask id.

    Raises:
        ConfigError: there is none.
    """
    if ids.mask is None:
        raise ConfigError(
            "mask id missing: the vocabulary has no mask token",
            where="objective.name",
            found=f"{objective} on a dataset whose special ids have no mask",
            expected="a mask id in the dataset's manifest.json",
            fix="prepare the dataset again with this version: raydist data prepare adds one",
        )
    return ids.mask

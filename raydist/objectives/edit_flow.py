"""Edit Flows: generation by insertions, deletions and substitutions, with lengths that grow and shrink.

Source: Havasi et al. 2025, "Edit Flows: Flow Matching with Edit Operations", arXiv 2506.09018.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from raydist.config.base import choice
from raydist.config.registries import OBJECTIVES, SCHEDULES, SOURCES
from raydist.core.edit_model import (
    CLOSED,
    CONTEXT_FEATURE,
    FREE,
    INSERT_RIGHT,
    NUM_CONTEXTS,
    NUM_OPERATIONS,
    SUBSTITUTE_TOKEN,
    begin_token,
)
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.terms import CrossEntropyTerm, HeadTerm, PoissonTerm
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import FullMask
from raydist.objectives.alignment import BLANK, AlignmentKind, Ragged, align
from raydist.objectives.base import Needs, NoisedBatch, Objective, ObjectiveConfig
from raydist.objectives.edit_targets import (
    Edits,
    Example,
    Noised,
    compact,
    context_feature,
    edits_to,
    noise,
    splice_given,
)
from raydist.objectives.flips import independent_flips, localised_flips
from raydist.objectives.packing import Packing, pack
from raydist.objectives.row_sequences import RowSequences, row_sequences
from raydist.paths.schedules import Schedule
from raydist.paths.sources import Source
from raydist.paths.time import TimeSampling

_HEADS = {
    "rates": "rates",
    "insert": "lm",
    "substitute": "substitute",
    "reverse_rates": "reverse_rates",
    "reverse_insert": "reverse_insert",
    "reverse_substitute": "reverse_substitute",
}
"""Term name -> head."""

_SMALLEST_RATE = 1e-9  # of r_t: at a lower one kappa_t is below the grain of uniforms, and no column has flipped


class EditFlow(Objective):
    """The augmented-space loss of Edit Flows.

    Each document of a row is a sequence of its own behind a begin token. x0 is empty or ``noise_length`` tokens of the source;
    an alignment puts x0 and x1 side by side in columns, and at time t every column shows x1's symbol with probability
    ``kappa_t``, x0's otherwise. The model reads the tokens that are left, ``x_t``, bidirectionally, and gives each token i a
    rate of insertions to its right, of its deletion and of its substitution. Rates are relative to
    ``r_t = (d kappa_t / dt) / (1 - kappa_t)``: the heads give ``o = log(rate / r_t)``, so that nothing diverges at t = 1. With
    ``pos(j)`` the last token of ``x_t`` at or before column j::

        loss = r_t [ sum over i and allowed operations of exp(o_i)
                     - sum over columns j with z_t^j != z_1^j of o_pos(j) + log Q_pos(j)(z_1^j) ]

    where Q, the law of the token, is left out for deletions. The first line and the o of the second are a Poisson term, the
    rest are cross entropies; insertions read the ``lm`` head, for which the token to the right is what a causal model
    predicts. The step divides by the number of data tokens that are not given.

    A prefix of each sequence, or both its ends, is given: never edited, marked by the input feature ``context``, and left out
    altogether for some sequences, which trains the unconditional model of guidance. Tokens that the loss mask excludes are
    given too.

    ``reverse`` trains rates of the reverse process the same way: columns with ``z_t^j != z_0^j`` ask for the edit back to
    ``z_0^j``, with weight ``(d kappa_t / dt) / kappa_t``. With an empty x0 that rate is known: every free token disappears
    with rate ``(d kappa_t / dt) / kappa_t``.

    With ``spread_rate`` flips spread to neighbouring columns (appendix C.1), and the rate of an unflipped column is
    ``r_t + spread_rate * (origins that reach a neighbour)``.
    """

    def __init__(self, config: EditFlowConfig, *, ids: TokenIds, begin_id: int) -> None:
        self.config = config
        self.begin_id = begin_id
        self.law = config.source.build(ids) if config.noise_length else None
        self.needs = Needs(
            bidirectional=True,
            time=True,
            extra_heads=config.extra_heads,
            input_features={CONTEXT_FEATURE: NUM_CONTEXTS},
        )

    def corrupt(self, rows: Rows, rng: RowRng) -> NoisedBatch:
        """Rows to packed sequences ``x_t``, and the edits that are missing."""
        sequences = row_sequences(rows, begin_id=self.begin_id)
        noise_source = sequences.rng(rng)
        time_S1 = self.config.time.per_row(rng, purpose="edit_flow/time")[sequences.rows_S]
        example = self._example(sequences, noise_source)
        flipped_SN, weights_SN = self._flips(example, time_S1, noise_source)
        max_length = self.config.max_length or rows.tokens_BS.shape[1] + self.config.noise_length
        noised = noise(example, flipped_SN=flipped_SN, max_length=max_length)
        return self._batch(noised, time_S1=time_S1, weights_SN=weights_SN, width=max_length)

    def terms(self, noised: NoisedBatch) -> list[HeadTerm]:
        """``rates``, ``insert`` and, where x0 holds tokens, ``substitute``; the same again for the reverse process."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in noised.targets.items():
            term, field = key.split("/")
            groups.setdefault(term, {})[field] = value
        return [
            (PoissonTerm if name.endswith("rates") else CrossEntropyTerm)(name=name, head=_HEADS[name], **fields)
            for name, fields in groups.items()
        ]

    def _example(self, sequences: RowSequences, rng: RowRng) -> Example:
        """Draws what is given and x0, and aligns the rest of each sequence with it."""
        given_T, kept_T = self._given(sequences, rng)
        free_T = kept_T & ~given_T
        data = sequences.ragged(sequences.tokens_T, keep_T=free_T)
        given = sequences.ragged(sequences.tokens_T, keep_T=kept_T & given_T)
        free_so_far_T = free_T.cumsum(0)
        before_S = (data.lengths_S.cumsum(0) - data.lengths_S)[sequences.sequences_T]
        free_before = sequences.ragged(free_so_far_T - before_S, keep_T=kept_T & given_T)
        start = self._start(data, given, rng)
        width = start.tokens_SL.shape[1] + data.tokens_SL.shape[1]
        uniforms_SN = rng.uniform("edit_flow/order", width)
        aligned = align(start, data, kind=self.config.alignment, uniforms_SN=uniforms_SN)
        return splice_given(
            aligned, given_SG=given.tokens_SL, free_before_SG=free_before.tokens_SL, begin_id=self.begin_id
        )

    def _given(self, sequences: RowSequences, rng: RowRng) -> tuple[Tensor, Tensor]:
        """Which tokens are given, and which are kept: a sequence whose condition is dropped loses its given tokens."""
        uniforms_S3 = rng.uniform("edit_flow/condition", 3)
        lengths_S = sequences.lengths()
        num_given_S = (uniforms_S3[:, 0] ** self.config.condition_power * lengths_S).long()
        share_S = uniforms_S3[:, 1] if self.config.condition == "ends" else torch.ones_like(uniforms_S3[:, 1])
        num_first_S = (share_S * (num_given_S + 1)).long().clamp(max=num_given_S)
        first_T, all_T = num_first_S[sequences.sequences_T], num_given_S[sequences.sequences_T]
        last_from_T = lengths_S[sequences.sequences_T] - (all_T - first_T)
        given_T = sequences.given_T | (sequences.index_T < first_T) | (sequences.index_T >= last_from_T)
        dropped_S = uniforms_S3[:, 2] < self.config.condition_dropout
        return given_T, ~(given_T & dropped_S[sequences.sequences_T])

    def _start(self, data: Ragged, given: Ragged, rng: RowRng) -> Ragged:
        """x0 without its given tokens; empty for a sequence that has nothing to generate."""
        if self.law is None:
            return Ragged(data.tokens_SL[:, :0], torch.zeros_like(data.lengths_S))
        context_SL = F.pad(given.tokens_SL, (0, 1), value=BLANK)  # a column also where no token is given
        law = self.law.in_context(context_SL.clamp(min=0), given_BL=context_SL != BLANK)
        tokens_SL = law.draw(rng.uniform("edit_flow/start", self.config.noise_length))
        lengths_S = torch.where(data.lengths_S > 0, self.config.noise_length, 0)
        index_L = torch.arange(self.config.noise_length)
        return Ragged(tokens_SL.masked_fill(index_L >= lengths_S[:, None], BLANK), lengths_S)

    def _flips(self, example: Example, time_S1: Tensor, rng: RowRng) -> tuple[Tensor, Tensor]:
        """Which columns show x1, and the rate at which each other column will, relative to ``r_t``."""
        num_columns = example.given_SN.shape[1]
        schedule, spread_rate = self.config.schedule, self.config.spread_rate
        if spread_rate == 0:
            uniforms_SN = rng.uniform("edit_flow/flip", num_columns)
            flipped_SN = independent_flips(uniforms_SN, kappa_S1=schedule.value(time_S1))
            return flipped_SN, torch.ones_like(uniforms_SN)
        uniforms_SN3 = rng.uniform("edit_flow/flip", 3 * num_columns).unflatten(1, (num_columns, 3))
        used_SN = (example.aligned.start_SN != BLANK) | (example.aligned.data_SN != BLANK)
        flips = localised_flips(
            uniforms_SN3,
            time_S1=time_S1,
            schedule=schedule,
            spread_rate=spread_rate,
            origins_SN=used_SN & ~example.given_SN,
        )
        spread_S1 = spread_rate / schedule.jump_rate(time_S1).clamp(min=_SMALLEST_RATE)
        return flips.flipped_SN, 1 + spread_S1 * flips.neighbours_SN

    def _batch(self, noised: Noised, *, time_S1: Tensor, weights_SN: Tensor, width: int) -> NoisedBatch:
        """Packs ``x_t`` and lays out the targets."""
        tokens_SL = compact(noised.noised_SN, noised_SN=noised.noised_SN, fill=BLANK)
        context_SL = compact(context_feature(noised), noised_SN=noised.noised_SN, fill=FREE)
        packing = pack((tokens_SL != BLANK).sum(dim=1), width=width)
        documents_RW = packing.place(packing.documents_S[:, None].expand_as(tokens_SL), fill=packing.valid_SL.shape[0])
        index_SL = torch.arange(tokens_SL.shape[1]).expand_as(tokens_SL)
        schedule, most = self.config.schedule, self.config.max_weight
        forward = edits_to(noised.aligned.data_SN, noised_SN=noised.noised_SN)
        targets = self._targets(forward, packing, context_SL, schedule.jump_rate(time_S1).clamp(max=most), weights_SN)
        if self.config.reverse:
            backward = edits_to(noised.aligned.start_SN, noised_SN=noised.noised_SN)
            reverse_S1 = schedule.reverse_rate(time_S1).clamp(max=most)
            found = self._targets(backward, packing, context_SL, reverse_S1, torch.ones_like(weights_SN))
            targets.update({f"reverse_{name}": value for name, value in found.items()})
        num_free = int(((noised.aligned.data_SN != BLANK) & ~noised.given_SN).sum())
        return NoisedBatch(
            inputs={
                "tokens_BL": packing.place(tokens_SL, fill=self.begin_id),
                "positions_BL": packing.place(index_SL, fill=0),
                "mask": FullMask(length=width, documents_BL=documents_RW),
                "time_BL": packing.place(time_S1.expand_as(tokens_SL), fill=0.0),
                "features": {CONTEXT_FEATURE: packing.place(context_SL, fill=FREE)},
            },
            counts={"targets": float(num_free)},
            targets=targets,
        )

    def _targets(
        self, edits: Edits, packing: Packing, context_SL: Tensor, rate_S1: Tensor, weights_SN: Tensor
    ) -> dict[str, Tensor]:
        """What the terms need: ``rates/...``, ``insert/...`` and, where x0 holds tokens, ``substitute/...``.

        Args:
            edits: the missing edits.
            packing: where the tokens lie.
            context_SL: their context feature.
            rate_S1: the weight of the sequence, r_t, clipped.
            weights_SN: the rate of each column's flip relative to r_t.
        """
        inserts_SL = packing.valid_SL & (context_SL != CLOSED)
        changes_SL = packing.valid_SL & (context_SL == FREE) & (self.law is not None)
        exposure_SL3 = torch.stack([inserts_SL, changes_SL, changes_SL], dim=2).float()
        counts_SL3 = edits.counts(weights_SN, length=context_SL.shape[1])
        targets = {
            "rates/positions_T": packing.flat_SL[inserts_SL],
            "rates/weights_T": rate_S1.expand_as(context_SL)[inserts_SL],
            "rates/exposure_TK": exposure_SL3[inserts_SL],
            "rates/counts_TK": counts_SL3[inserts_SL],
        }
        positions_SN = packing.flat_SL.gather(1, edits.position_SN)
        operations = {"insert": INSERT_RIGHT, "substitute": SUBSTITUTE_TOKEN}
        for part, operation in operations.items():
            if part == "substitute" and self.law is None:
                continue
            chosen_SN = edits.operation_SN == operation
            targets[f"{part}/positions_T"] = positions_SN[chosen_SN]
            targets[f"{part}/targets_T"] = edits.tokens_SN[chosen_SN]
            targets[f"{part}/weights_T"] = (rate_S1 * weights_SN)[chosen_SN]
        return targets


@OBJECTIVES.register
class EditFlowConfig(ObjectiveConfig):
    """Edit Flows: insert, delete and substitute tokens until the text is there (Havasi et al. 2025)."""

    name: Literal["edit_flow"] = "edit_flow"
    schedule: choice(SCHEDULES, Schedule) = Field(  # type: ignore[valid-type]
        default={"name": "polynomial", "power": 3.0}, validate_default=True
    )
    """kappa_t; the paper found t^3 better than t."""
    time: TimeSampling = TimeSampling()
    """Times of rows; all documents of a row share one."""
    noise_length: NonNegativeInt = 0
    """Tokens of x0. 0 starts from nothing, so that training only ever inserts; the paper's noisy start has 100."""
    source: choice(SOURCES, Source) = Field(default={"name": "uniform"}, validate_default=True)  # type: ignore[valid-type]
    """The law of x0's tokens, where there are any; the paper takes the frequencies of tokens (`name: given`)."""
    alignment: AlignmentKind = "optimal"
    """Which token of x0 becomes which of x1: optimal (fewest edits), shuffled (the paper's for a noisy start), random, padded
    or replace. Without effect where x0 is empty."""
    condition: Literal["prefix", "ends"] = "prefix"
    """What is given: the beginning of each sequence, or its beginning and its end, which a sampler needs to fill gaps."""
    condition_power: float = Field(default=3.0, gt=0)
    """The given fraction of a sequence is c to this power, c uniform in [0, 1)."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of sequences that lose their given tokens, which trains the unconditional model of guidance."""
    spread_rate: float = Field(default=0.0, ge=0)
    """Rate lambda_prop at which flips spread to neighbouring columns, per unit of time; 0 is off. The paper has no value."""
    reverse: bool = False
    """Train the rates of the reverse process too, for the corrector of the sampler; needs a noisy start."""
    max_weight: float = Field(default=20.0, gt=0)
    """Upper limit of the weight r_t, which diverges at t = 1. It leaves the best rates at each time as they are. Our choice."""
    max_length: PositiveInt | None = None
    """Tokens per row of the model. Sequences are packed into rows; one that is longer at its time loses the rest of its
    columns. Null for seq_len + 1 + noise_length, which cuts nothing."""

    @model_validator(mode="after")
    def _reverse_has_a_process(self) -> EditFlowConfig:
        if self.reverse and self.noise_length == 0:
            raise ValueError("reverse=true needs noise_length > 0: from an empty start the reverse rates are known")
        if self.reverse and self.spread_rate > 0:
            raise ValueError("reverse=true needs spread_rate=0: reverse rates of spreading flips are not defined")
        return self

    @property
    def extra_heads(self) -> dict[str, int]:
        """Heads beside ``lm``: only those that this start can train."""
        heads = {"rates": NUM_OPERATIONS}
        if self.noise_length:
            heads["substitute"] = 0
        if self.reverse:
            heads.update({"reverse_rates": NUM_OPERATIONS, "reverse_insert": 0, "reverse_substitute": 0})
        return heads

    def build(self, ids: TokenIds) -> EditFlow:
        """The objective.

        Raises:
            ConfigError: the vocabulary has neither a begin-of-text nor an end-of-text token to stand in front of a text.
        """
        begin_id = begin_token(ids)
        if begin_id is None:
            raise ConfigError(
                "begin token missing: the vocabulary has neither a begin-of-text nor an end-of-text token",
                where="objective.name",
                found=self.name,
                expected="a token that stands in front of every text, so that something can be inserted behind it",
                fix="prepare the dataset with a tokenizer that has one: raydist data prepare adds it for its own",
            )
        return EditFlow(self, ids=ids, begin_id=begin_id)

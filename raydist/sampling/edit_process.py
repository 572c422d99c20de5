"""What a sampler of Edit Flows must know of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raydist.config.registries import SCHEDULES, SOURCES
from raydist.core.edit_model import begin_token
from raydist.core.errors import ConfigError
from raydist.paths.schedules import Schedule
from raydist.paths.sources import SourceLaw
from raydist.sampling.base import Trained
from raydist.sampling.drawing import PromptNoise
from raydist.sampling.edit_rates import EditHeads


@dataclass(frozen=True)
class TrainedProcess:
    """What the model was trained on.

    Attributes:
        schedule: kappa.
        start: law of x0's tokens, or None for an empty x0, with which the model learnt insertions alone.
        start_length: tokens of x0.
        forward: heads of the rates.
        reverse: heads of the reverse rates, or None.
        fills_gaps: whether text behind a gap was given in training.
        spreads: whether flips spread to neighbours.
        begin_id: the token in front of every text.
    """

    schedule: Schedule
    start: SourceLaw | None
    start_length: int
    forward: EditHeads
    reverse: EditHeads | None
    fills_gaps: bool
    spreads: bool
    begin_id: int

    def draw_start(self, given: Sequence[Sequence[int]], *, limit: int, noise: PromptNoise) -> list[list[int]]:
        """The free tokens of x0, at most ``limit``; none for an empty x0.

        Args:
            given: the given tokens of each text, the begin token in front.
            limit: the most free tokens of a text.
            noise: of the texts.
        """
        if self.start is None:
            return [[] for _ in given]
        longest = max(map(len, given))
        given_BL = torch.tensor([[0 < index < len(part) for index in range(longest)] for part in given])
        tokens_BL = torch.tensor([[*part, *[0] * (longest - len(part))] for part in given])
        uniforms_BL = noise.uniforms("edit/start", min(limit, self.start_length)).cpu()
        drawn: list[list[int]] = self.start.in_context(tokens_BL, given_BL=given_BL).draw(uniforms_BL).tolist()
        return drawn


def trained_process(trained: Trained, *, sampler: str) -> TrainedProcess:
    """Reads the objective's configuration.

    Raises:
        ConfigError: the model was trained with another objective, or its vocabulary has no begin token.
    """
    objective = trained.objective
    if objective is None or objective["name"] != "edit_flow":
        raise ConfigError(
            "the model has no rates of edits",
            where="sampler",
            found=f"{sampler} for a model trained with {'nothing' if objective is None else objective['name']}",
            expected="a model trained with objective.name=edit_flow",
            fix="use --sampler autoregressive",
        )
    begin_id = begin_token(trained.ids)
    if begin_id is None:
        raise ConfigError(
            "begin token missing: the vocabulary has neither a begin-of-text nor an end-of-text token",
            where="raydist.json",
            expected="token_ids with bos or eos, as every model trained with edit_flow has them",
        )
    start_length = objective["noise_length"]
    return TrainedProcess(
        schedule=SCHEDULES.parse(objective["schedule"]),
        start=SOURCES.parse(objective["source"]).build(trained.ids) if start_length else None,
        start_length=start_length,
        forward=EditHeads("rates", "lm", "substitute" if start_length else None),
        reverse=EditHeads("reverse_rates", "reverse_insert", "reverse_substitute") if objective["reverse"] else None,
        fills_gaps=objective["condition"] == "ends",
        spreads=objective["spread_rate"] > 0,
        begin_id=begin_id,
    )

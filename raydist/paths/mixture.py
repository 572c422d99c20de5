"""The mixture path: each token is either still the source's or already the data's."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from raydist.config.base import StrictModel, choice
from raydist.config.registries import PATHS, SCHEDULES, SOURCES
from raydist.core.terms import TokenRates
from raydist.core.token_ids import TokenIds
from raydist.paths.base import JumpNoise, Path, PathConfig
from raydist.paths.schedules import LinearSchedule, Schedule
from raydist.paths.sources import MaskSource, Source, SourceLaw
from raydist.paths.token_schedule import GreatCircle, SharedSchedule, SourceKineticOptimal, TokenSchedule

_LARGEST_HAZARD = 1e30
StepRule = Literal["integrated", "euler"]


class MixturePath(Path):
    """``p_t(x | x0, x1) = (1 - kappa_t) delta_{x0}(x) + kappa_t delta_{x1}(x)``, and p in the place of x0 without it.

    With forward rate ``lambda = kappa' / (1 - kappa)`` and reverse rate ``mu = kappa' / kappa``::

        u_t(x, z | x1) = lambda (delta_{x1}(x) - delta_z(x))
        preserving     = lambda (delta_{x1}(x) - delta_z(x)) + mu (p(x) - delta_z(x))

    The second one is the forward minus the backward velocity, so that ``u + c * preserving`` is the corrected velocity of
    Gat et al. 2024 (arXiv 2407.15595) with ``alpha = 1 + c`` and ``beta = c``. Rates depend on x1 where the schedule does.

    **Steps.** With ``integrated`` steps the hazards are integrals over the step, ``log((1 - kappa_t) / (1 - kappa_{t+h}))``
    forward and ``log(kappa_{t+h} / kappa_t)`` backward; without corrector a token then turns into a given x1 with its
    exact probability ``(kappa_{t+h} - kappa_t) / (1 - kappa_t)``. With ``euler`` steps they are h times the rates at t.
    Where the reverse rate is infinite (t = 0) the state is a draw of the source, which needs no re-noising: that step
    takes no corrector.

    Attributes:
        schedule: ``kappa_t(x1)`` and its rates.
        source: the law p of a token at t = 0.
    """

    def __init__(self, *, schedule: TokenSchedule, source: SourceLaw, step_rule: StepRule) -> None:
        self.vocab_size = source.vocab_size
        self.schedule = schedule
        self.source = source
        self._step_rule = step_rule

    def in_context(self, tokens_BL: Tensor, *, given_BL: Tensor) -> MixturePath:
        """The path with the source's law for these rows."""
        return MixturePath(
            schedule=self.schedule,
            source=self.source.in_context(tokens_BL, given_BL=given_BL),
            step_rule=self._step_rule,
        )

    @property
    def absorbing_id(self) -> int | None:
        """The mask id, for the mask source."""
        return self.source.absorbing_id

    @property
    def rates(self) -> TokenRates:
        """``lambda_t`` for the likelihood bound."""
        return self.schedule.rates

    def probabilities(self, clean_X: Tensor, time_X: Tensor, *, start_X: Tensor | None = None) -> Tensor:
        """``[X, V]``, float64."""
        kappa_X1 = self.schedule.value(time_X, clean_X).double().expand(clean_X.shape)[..., None]
        noise_XV = self.source.dense(clean_X) if start_X is None else self._delta(start_X)
        return (1 - kappa_X1) * noise_XV + kappa_X1 * self._delta(clean_X)

    def velocity(self, clean_X: Tensor, current_X: Tensor, time_X: Tensor) -> Tensor:
        """``[X, V]``, float64; infinite at t = 1."""
        rate_X = self.schedule.jump_rate(time_X, clean_X).double().expand(clean_X.shape)
        difference_XV = self._delta(clean_X) - self._delta(current_X)
        return torch.where(difference_XV == 0, 0.0, rate_X[..., None] * difference_XV)

    def preserving_velocity(self, clean_X: Tensor, current_X: Tensor, time_X: Tensor) -> Tensor:
        """Forward minus backward velocity, ``[X, V]``, float64; infinite at t = 0 and 1."""
        rate_X = self.schedule.reverse_rate(time_X, clean_X).double().expand(clean_X.shape)
        backward_XV = rate_X[..., None] * (self.source.dense(clean_X) - self._delta(current_X))
        return self.velocity(clean_X, current_X, time_X) + backward_XV

    def draw_start(self, clean_BL: Tensor, *, uniforms_BL: Tensor) -> Tensor:
        """Draws of the source."""
        return self.source.draw(uniforms_BL.expand(clean_BL.shape))

    def corrupt(self, clean_BL: Tensor, *, start_BL: Tensor, time_BL: Tensor, uniforms_BL: Tensor) -> Tensor:
        """The clean token with probability ``kappa_t``, else the source's."""
        return torch.where(uniforms_BL < self.schedule.value(time_BL, clean_BL), clean_BL, start_BL)

    def jump(
        self,
        current_BL: Tensor,
        *,
        clean_BL: Tensor,
        start_time_BL: Tensor,
        stop_time_BL: Tensor,
        corrector_BL: Tensor | None,
        noise: JumpNoise,
    ) -> Tensor:
        """One step; see the class. Elementwise: nothing is as large as the vocabulary."""
        to_data_BL = self._forward_hazard(start_time_BL, stop_time_BL, clean_BL) * (current_BL != clean_BL)
        if corrector_BL is None:
            leaves_BL = noise.whether < -torch.expm1(-to_data_BL)
            return torch.where(leaves_BL | (stop_time_BL >= 1), clean_BL, current_BL)
        to_source_BL, corrector_BL = self._backward_hazard(start_time_BL, stop_time_BL, clean_BL, corrector_BL)
        to_data_BL = (1 + corrector_BL) * to_data_BL
        to_source_BL = to_source_BL * (1 - self.source.probability(current_BL))
        total_BL = to_data_BL + to_source_BL
        leaves_BL = noise.whether < -torch.expm1(-total_BL)
        share_BL = torch.where(total_BL > 0, to_data_BL / total_BL, 1.0)
        within_BL = ((noise.where - share_BL) / (1 - share_BL)).clamp(min=0).nan_to_num(0.0)
        other_BL = self.source.draw_other(current_BL, uniforms_BL=within_BL)
        target_BL = torch.where(noise.where < share_BL, clean_BL, other_BL)
        after_BL = torch.where(leaves_BL, target_BL, current_BL)
        return torch.where(stop_time_BL >= 1, clean_BL, after_BL)

    def may_jump(
        self,
        current_BL: Tensor,
        *,
        start_time_BL: Tensor,
        stop_time_BL: Tensor,
        corrector_BL: Tensor | None,
        noise: JumpNoise,
    ) -> Tensor:
        """Compares with the hazards of the tokens whose rates are highest."""
        fast = torch.full_like(current_BL, self.schedule.fastest_forward)
        noisy_BL = torch.ones_like(current_BL, dtype=torch.bool)
        if self.absorbing_id is not None:
            noisy_BL = current_BL == self.absorbing_id
        hazard_BL = self._forward_hazard(start_time_BL, stop_time_BL, fast) * noisy_BL
        if corrector_BL is not None:
            fast = torch.full_like(current_BL, self.schedule.fastest_backward)
            to_source_BL, corrector_BL = self._backward_hazard(start_time_BL, stop_time_BL, fast, corrector_BL)
            hazard_BL = (1 + corrector_BL) * hazard_BL + to_source_BL * (1 - self.source.probability(current_BL))
        return (noise.whether < -torch.expm1(-hazard_BL)) | ((stop_time_BL >= 1) & noisy_BL)

    def _forward_hazard(self, start_BL: Tensor, stop_BL: Tensor, clean_BL: Tensor) -> Tensor:
        """The hazard of turning into the clean token in a step; 0 where the step ends at t = 1, which is a rule of its own."""
        if self._step_rule == "euler":
            hazard_BL = (stop_BL - start_BL) * self.schedule.jump_rate(start_BL, clean_BL)
        else:
            hazard_BL = -torch.log1p(-self.schedule.jump_probability(start_BL, stop_BL, clean_BL))
        return torch.where(stop_BL >= 1, 0.0, hazard_BL.clamp(max=_LARGEST_HAZARD))

    def _backward_hazard(
        self, start_BL: Tensor, stop_BL: Tensor, clean_BL: Tensor, corrector_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``c_t`` times the hazard of being drawn anew, and the ``c_t`` in use: 0 where the reverse rate is infinite."""
        if self._step_rule == "euler":
            hazard_BL = (stop_BL - start_BL) * self.schedule.reverse_rate(start_BL, clean_BL)
        else:
            before_BL, after_BL = self.schedule.value(start_BL, clean_BL), self.schedule.value(stop_BL, clean_BL)
            hazard_BL = torch.log1p((after_BL - before_BL) / before_BL)
        used_BL = torch.where(torch.isfinite(hazard_BL), corrector_BL, 0.0)
        return used_BL * hazard_BL.nan_to_num(posinf=0.0), used_BL

    def _delta(self, tokens_X: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens_X, self.vocab_size).double()


@PATHS.register
class MixturePathConfig(PathConfig):
    """Each token jumps once from the source to the data, at the pace of a schedule."""

    name: Literal["mixture"] = "mixture"
    schedule: choice(SCHEDULES) = LinearSchedule()  # type: ignore[valid-type]
    """How much of the data is there at time t."""
    source: choice(SOURCES, Source) = MaskSource()  # type: ignore[valid-type]
    """The law of a token at t = 0."""
    step_rule: StepRule = "integrated"
    """How a sampler's step counts the rates: integrated over the step, or h times their value at its start (euler)."""

    @model_validator(mode="after")
    def _law_is_one_for_all_rows(self) -> MixturePathConfig:
        if isinstance(self.schedule, SourceKineticOptimal) and self.source.name == "previous":
            raise ValueError(
                "schedule source_kinetic_optimal needs a source that is the same for all rows, not previous"
            )
        return self

    def build(self, ids: TokenIds) -> MixturePath:
        """The path; raises ConfigError for a vocabulary without the mask id that the source needs."""
        law = self.source.build(ids)
        return MixturePath(
            schedule=_token_schedule(self.schedule, law=law, ids=ids), source=law, step_rule=self.step_rule
        )


def _token_schedule(schedule: StrictModel, *, law: SourceLaw, ids: TokenIds) -> TokenSchedule:
    if isinstance(schedule, Schedule):
        return SharedSchedule(schedule)
    return GreatCircle(law.probability(torch.arange(ids.vocab_size)), never_clean=ids.mask)

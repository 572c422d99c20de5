"""The corrector whose backward velocity is that of the noise prediction ``p_{0|t}``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raydist.paths.base import JumpNoise
from raydist.paths.mixture import MixturePath


@dataclass(frozen=True)
class NoisePrediction:
    """Steps of a mixture path like those of :meth:`raydist.paths.base.Path.jump`, with another backward velocity.

    Time runs backward by ``kappa' / kappa (delta_z - p_{0|t}(. | z))`` (Gat et al. 2024, arXiv 2407.15595), as well as by the
    source's own ``kappa' / kappa (delta_z - p)``; the marginals are the same. The posterior of the source token given x1 is,
    with an independent coupling::

        z != x1:  x0 = z
        z = x1:   x0 ~ p with probability kappa / (kappa + (1 - kappa) p(z)),  else x0 = z

    so that only tokens that are data by now are noised again, where the other form also replaces noise by noise. With x0
    drawn from it, the rates out of z are ``(1 + c) kappa' / (1 - kappa)`` to x1 and ``c kappa' / kappa`` to x0, each where it
    differs from z. Steps are Euler steps with the rates at their start, which is above 0.
    """

    path: MixturePath

    def may_jump(
        self,
        current_BL: Tensor,
        *,
        start_time_BL: Tensor,
        stop_time_BL: Tensor,
        corrector_BL: Tensor,
        noise: JumpNoise,
    ) -> Tensor:
        """Where :meth:`jump` could change the token for some clean token; it moves forward or backward, never both."""
        schedule = self.path.schedule
        forward_BL = schedule.jump_rate(start_time_BL, torch.full_like(current_BL, schedule.fastest_forward))
        backward_BL = schedule.reverse_rate(start_time_BL, torch.full_like(current_BL, schedule.fastest_backward))
        highest_BL = torch.maximum((1 + corrector_BL) * forward_BL, corrector_BL * backward_BL)
        leaves_BL = noise.whether < -torch.expm1(-(stop_time_BL - start_time_BL) * highest_BL)
        return leaves_BL | (stop_time_BL >= 1)

    def jump(
        self,
        current_BL: Tensor,
        *,
        clean_BL: Tensor,
        start_time_BL: Tensor,
        stop_time_BL: Tensor,
        corrector_BL: Tensor,
        noise: JumpNoise,
        refills: JumpNoise,
    ) -> Tensor:
        """One step, int64 ``[B, L]``.

        Args:
            current_BL: tokens z.
            clean_BL: drawn clean tokens x1.
            start_time_BL: above 0.
            stop_time_BL: 1 gives x1.
            corrector_BL: c.
            noise: of the jump.
            refills: whether x0 is drawn from the source, and which.
        """
        schedule, source = self.path.schedule, self.path.source
        kappa_BL = schedule.value(start_time_BL, clean_BL)
        again_BL = kappa_BL / (kappa_BL + (1 - kappa_BL) * source.probability(current_BL))
        refilled_BL = (current_BL == clean_BL) & (refills.whether < again_BL)
        source_BL = torch.where(refilled_BL, source.draw(refills.where), current_BL)
        to_clean_BL = (1 + corrector_BL) * schedule.jump_rate(start_time_BL, clean_BL) * (clean_BL != current_BL)
        to_source_BL = corrector_BL * schedule.reverse_rate(start_time_BL, clean_BL) * (source_BL != current_BL)
        total_BL = to_clean_BL + to_source_BL
        leaves_BL = noise.whether < -torch.expm1(-(stop_time_BL - start_time_BL) * total_BL)
        target_BL = torch.where(noise.where * total_BL < to_clean_BL, clean_BL, source_BL)
        return torch.where(stop_time_BL >= 1, clean_BL, torch.where(leaves_BL, target_BL, current_BL))

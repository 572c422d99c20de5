"""Velocities for any probability path: the flow of least kinetic energy that moves the probabilities as they are given.

For one token with laws ``p(x)`` and their time derivative ``p'(x)``, a velocity is valid when its flux ``j(x, z) = u(x, z)
p(z) >= 0`` satisfies the continuity equation ``p'(x) = sum_z [j(x, z) - j(z, x)]``. Among those, the one of least energy
``sum_{x != z} j(x, z)^2 / (p(x) p(z))`` is ``j = [p(z) p'(x) - p'(z) p(x)]_+`` (Shaul et al. 2025, arXiv 2412.03487).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from raydist.paths.base import JumpNoise, Path
from raydist.paths.sources import SourceLaw

FluxRule = Literal["kinetic_optimal", "uniform"]
_CHUNK_ELEMENTS = 2**22


def rates_from_path(laws_NV: Tensor, derivatives_NV: Tensor, *, current_N: Tensor, rule: FluxRule) -> Tensor:
    """Rates ``u(x, z) >= 0`` from the current token z to every other, ``[N, V]``; 0 at z and where ``p(z) = 0``.

    - ``kinetic_optimal``: ``[p'(x) - p'(z) p(x) / p(z)]_+``, of energy ``sum_x p'(x)^2 / p(x)``.
    - ``uniform``: ``[p'(x) - p'(z)]_+ / (K p(z))`` over the K tokens with ``p > 0``: valid where these stay the same for a
      while, and of higher energy.
    """
    law_N1 = laws_NV.gather(1, current_N[:, None])
    derivative_N1 = derivatives_NV.gather(1, current_N[:, None])
    if rule == "kinetic_optimal":
        rates_NV = (derivatives_NV - derivative_N1 / law_N1 * laws_NV).clamp(min=0)
    else:
        support_NV = laws_NV > 0
        rates_NV = (derivatives_NV - derivative_N1).clamp(min=0) * support_NV
        rates_NV = rates_NV / (support_NV.sum(1, keepdim=True) * law_N1)
    return torch.where(law_N1 > 0, rates_NV, 0.0).scatter(1, current_N[:, None], 0.0)


class KineticPath(Path):
    """A path that its author gives as probabilities; velocity, corruption and jumps follow from them.

    A subclass writes :meth:`laws` and nothing else: the time derivative comes from forward-mode differentiation, unless
    :meth:`laws_and_derivatives` or :meth:`rates_at` is overridden with a closed form. The path must be the source at
    t = 0 and the clean token at t = 1, and the clean token must at no time be less likely than at t = 0.

    Source tokens that equal the clean one mark positions that stay clean, as the contract of :meth:`corrupt` asks. So
    that this changes no law, the other positions draw from ``p_t(. | x1)`` less the share ``p_0(x1 | x1)`` of the clean
    token, normalised; together they have the law ``p_t(. | x1)`` exactly.

    Work and memory are a few ``[chunk, V]`` tensors per chunk of positions.

    Args:
        source: the law p_0.
        flux_rule: which velocity; see :func:`rates_from_path`.
    """

    def __init__(self, *, source: SourceLaw, flux_rule: FluxRule = "kinetic_optimal") -> None:
        self.vocab_size = source.vocab_size
        self.source = source
        self._flux_rule = flux_rule

    @abstractmethod
    def laws(self, clean_N: Tensor, time_N: Tensor) -> Tensor:
        """``p_t(. | x1)``, ``[N, V]``, differentiable in the times by torch operations; the dtype of the times."""

    def laws_and_derivatives(self, clean_N: Tensor, time_N: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`laws` and their derivatives in time, both ``[N, V]``."""
        with torch.inference_mode(False), torch.no_grad():
            clean_N, time_N = clean_N.clone(), time_N.clone()
            laws, derivatives = torch.func.jvp(
                lambda time: self.laws(clean_N, time), (time_N,), (torch.ones_like(time_N),)
            )
        return laws, derivatives

    def rates_at(self, clean_N: Tensor, *, current_N: Tensor, time_N: Tensor) -> Tensor:
        """Rates ``u_t(., z | x1)`` to every other token, ``[N, V]``."""
        laws_NV, derivatives_NV = self.laws_and_derivatives(clean_N, time_N)
        return rates_from_path(laws_NV, derivatives_NV, current_N=current_N, rule=self._flux_rule)

    def step_rates(self, clean_N: Tensor, *, current_N: Tensor, start_N: Tensor, stop_N: Tensor) -> Tensor:
        """Expected jumps ``h u_t(., z | x1)`` of a step to every other token, ``[N, V]``."""
        return (stop_N - start_N)[:, None] * self.rates_at(clean_N, current_N=current_N, time_N=start_N)

    @property
    def transitions(self) -> KineticPath:
        """The path itself."""
        return self

    def tables(self, time: Tensor, *, current_G: Tensor) -> Iterator[Tensor]:
        """:meth:`rates_at` of all clean tokens, ``[V, V]`` for each current token; the laws are worked out once."""
        clean_V = torch.arange(self.vocab_size, device=current_G.device)
        laws_VV, derivatives_VV = self.laws_and_derivatives(clean_V, time.expand(self.vocab_size))
        for current in current_G:
            current_V = current.expand(self.vocab_size)
            yield rates_from_path(laws_VV, derivatives_VV, current_N=current_V, rule=self._flux_rule)

    def probabilities(self, clean_X: Tensor, time_X: Tensor, *, start_X: Tensor | None = None) -> Tensor:
        """``[X, V]``."""
        clean_N, time_N = clean_X.reshape(-1), time_X.expand(clean_X.shape).reshape(-1)
        laws_NV = self.laws(clean_N, time_N)
        if start_X is not None:
            one_hot_NV = torch.nn.functional.one_hot(clean_N, self.vocab_size).to(laws_NV.dtype)
            given_N1 = (start_X.reshape(-1) == clean_N)[:, None]
            laws_NV = torch.where(given_N1, one_hot_NV, self._without_given(laws_NV, clean_N))
        return laws_NV.reshape(*clean_X.shape, self.vocab_size)

    def velocity(self, clean_X: Tensor, current_X: Tensor, time_X: Tensor) -> Tensor:
        """``[X, V]``."""
        current_N = current_X.reshape(-1)
        time_N = time_X.expand(clean_X.shape).reshape(-1)
        rates_NV = self.rates_at(clean_X.reshape(-1), current_N=current_N, time_N=time_N)
        velocity_NV = rates_NV.scatter(1, current_N[:, None], -rates_NV.sum(1, keepdim=True))
        return velocity_NV.reshape(*clean_X.shape, self.vocab_size)

    def draw_start(self, clean_BL: Tensor, *, uniforms_BL: Tensor) -> Tensor:
        """Draws of the source."""
        return self.source.draw(uniforms_BL.expand(clean_BL.shape))

    def corrupt(self, clean_BL: Tensor, *, start_BL: Tensor, time_BL: Tensor, uniforms_BL: Tensor) -> Tensor:
        """Draws of the path; where ``start = clean`` the clean token."""

        def draw(clean_N: Tensor, time_N: Tensor, uniforms_N: Tensor) -> Tensor:
            return _draw(self._without_given(self.laws(clean_N, time_N), clean_N), uniforms_N)

        moves_BL = start_BL != clean_BL
        at_moving = [tensor.expand(clean_BL.shape)[moves_BL] for tensor in (clean_BL, time_BL, uniforms_BL)]
        return clean_BL.masked_scatter(moves_BL, self._by_chunks(draw, *at_moving))

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
        """One step; rates are those of the start of the step."""
        corrector = torch.zeros_like(start_time_BL) if corrector_BL is None else corrector_BL

        def step(clean_N: Tensor, current_N: Tensor, *rest: Tensor) -> Tensor:
            start_N, stop_N, corrector_N, whether_N, where_N = rest
            rates_NV = self.step_rates(clean_N, current_N=current_N, start_N=start_N, stop_N=stop_N)
            if corrector_BL is not None:
                redrawn_NV = self.laws(clean_N, start_N).scatter(1, current_N[:, None], 0.0)
                rates_NV = rates_NV + ((stop_N - start_N) * corrector_N)[:, None] * redrawn_NV
            leaves_N = whether_N < -torch.expm1(-rates_NV.sum(1))
            return torch.where(leaves_N, _draw(rates_NV, where_N), current_N)

        stepped_BL = self._by_chunks(
            step, clean_BL, current_BL, start_time_BL, stop_time_BL, corrector, noise.whether, noise.where
        )
        return torch.where(stop_time_BL >= 1, clean_BL, stepped_BL)

    def _without_given(self, laws_NV: Tensor, clean_N: Tensor) -> Tensor:
        """``p_t`` less the probability that the source token is the clean one, normalised."""
        at_start_N = self.source.probability(clean_N).to(laws_NV.dtype)
        rest_NV = laws_NV.scatter_add(1, clean_N[:, None], -at_start_N[:, None]).clamp(min=0)
        return rest_NV / rest_NV.sum(1, keepdim=True)

    def _by_chunks(self, function: Callable[..., Tensor], *tensors_BL: Tensor) -> Tensor:
        """Applies a function of flat tensors to chunks of positions, so that ``[chunk, V]`` stays small."""
        flat = [tensor.expand(tensors_BL[0].shape).reshape(-1) for tensor in tensors_BL]
        chunk = max(1, _CHUNK_ELEMENTS // self.vocab_size)
        pieces = zip(*(tensor.split(chunk) for tensor in flat), strict=True)
        return torch.cat([function(*piece) for piece in pieces]).reshape(tensors_BL[0].shape)


def _draw(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Inverse transform over unnormalised weights, ``[N]``; a token of weight 0 is drawn only where all are 0."""
    cumulative_NV = weights_NV.double().cumsum(1)
    places_N1 = uniforms_N.double()[:, None] * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, places_N1, right=True)[:, 0].clamp(max=weights_NV.shape[1] - 1)

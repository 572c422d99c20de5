"""The probability denoiser ``p_{1|t}(. | x_t)`` of a model, read only where a clean token is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raydist.sampling.canvas import Canvas
from raydist.sampling.drawing import draw_tokens

_CHUNK_LOGITS_CPU, _CHUNK_LOGITS_CUDA = 2**18, 2**25


def draw_chunked(
    read_logits: Callable[[Tensor], Tensor],
    places_T: Tensor,
    *,
    uniforms_T: Tensor,
    vocab_size: int,
    banned_id: int | None,
    temperature: float,
) -> Tensor:
    """Draws one token at each place, with the logits of one chunk of places in memory at a time; int64 ``[T]``.

    Args:
        read_logits: places ``[C]`` to their logits, ``[C, V]``; a new tensor each time.
        places_T: what ``read_logits`` understands, int64.
        uniforms_T: the noise, as :func:`raydist.sampling.drawing.draw_tokens` takes it.
        vocab_size: ids that may be drawn are below it; a model may have more rows.
        banned_id: an id that is never drawn, the mask.
        temperature: >= 0; 0 takes the most likely token.
    """
    chunk_logits = _CHUNK_LOGITS_CUDA if places_T.is_cuda else _CHUNK_LOGITS_CPU
    drawn_T = torch.empty_like(places_T)
    chunk = max(1, chunk_logits // vocab_size)
    for start in range(0, places_T.shape[0], chunk):
        part = slice(start, start + chunk)
        logits_CV = read_logits(places_T[part])[:, :vocab_size]
        if banned_id is not None:
            logits_CV[:, banned_id] = -torch.inf
        drawn_T[part] = draw_tokens(logits_CV, uniforms_BN=uniforms_T[part], temperature=temperature)
    return drawn_T


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A model over a canvas, as a source of clean tokens.

    With guidance weight w the law is ``p(. | condition)^(1 + w) p(. | no condition)^(-w)``, normalised: the logits are
    ``(1 + w) logits(x_t | condition) - w logits(x_t | no condition)``, in float32. Without the condition means that the
    given tokens are replaced by source tokens. w = 0 is one forward.

    Attributes:
        model: a decoder in evaluation mode.
        canvas: the given text.
        null_BL: source tokens that stand for the given ones where there is no condition.
        guidance: w.
        shift: position i is read from the hidden state of position i - 1.
        vocab_size: ids that may be drawn.
        mask_id: never drawn; None where there is none.
    """

    model: Any
    canvas: Canvas
    null_BL: Tensor
    guidance: float
    shift: bool
    vocab_size: int
    mask_id: int | None

    @property
    def num_forwards(self) -> int:
        """Forwards of the model in an evaluation."""
        return 2 if self.guidance else 1

    def draw(
        self, tokens_BL: Tensor, *, wanted_BL: Tensor, uniforms_BL: Tensor, time: float, temperature: float
    ) -> Tensor:
        """Clean tokens ``x1 ~ p_{1|t}(. | x_t)`` where wanted, the current ones elsewhere, int64 ``[B, L]``.

        Rows without a wanted position are not run, and the head is not applied to other positions.

        Args:
            tokens_BL: the state x_t with the given text.
            wanted_BL: where a clean token is needed.
            uniforms_BL: float64 noise.
            time: the time that the model is told, if it takes one.
            temperature: of the draw.
        """
        rows_R = wanted_BL.any(dim=1).nonzero()[:, 0]
        if not len(rows_R):
            return tokens_BL
        weighted = [(1.0 + self.guidance, tokens_BL)]
        if self.guidance:
            weighted.append((-self.guidance, torch.where(self.canvas.given_BL, self.null_BL, tokens_BL)))
        branches = [
            (weight, self._hidden(inputs_BL[rows_R], rows_R=rows_R, wanted_RL=wanted_BL[rows_R], time=time))
            for weight, inputs_BL in weighted
        ]
        uniforms_T = uniforms_BL[wanted_BL]
        drawn_T = draw_chunked(
            lambda places_C: self._logits(branches, places_C),
            torch.arange(uniforms_T.shape[0], device=tokens_BL.device),
            uniforms_T=uniforms_T,
            vocab_size=self.vocab_size,
            banned_id=self.mask_id,
            temperature=temperature,
        )
        return tokens_BL.masked_scatter(wanted_BL, drawn_T)

    def _logits(self, branches: list[tuple[float, Tensor]], places_C: Tensor) -> Tensor:
        parts = [(weight, self.model.head_logits(hidden_TD[places_C])) for weight, hidden_TD in branches]
        if len(parts) == 1:
            return parts[0][1]
        dtype = torch.promote_types(parts[0][1].dtype, torch.float32)
        (weight, logits_CV), (null_weight, null_logits_CV) = parts
        return weight * logits_CV.to(dtype) + null_weight * null_logits_CV.to(dtype)

    def _hidden(self, inputs_RL: Tensor, *, rows_R: Tensor, wanted_RL: Tensor, time: float) -> Tensor:
        """Hidden states from which the wanted positions are read, ``[T, D]``, in row order."""
        inputs: dict[str, Any] = {}
        if self.model.config.time_input:
            inputs["time_BL"] = torch.full((len(rows_R), 1), time, dtype=torch.float32, device=inputs_RL.device)
        hidden_RLD = self.model.hidden(inputs_RL, self.canvas.positions(), self.canvas.mask(rows_R), **inputs)
        places_T, columns_T = wanted_RL.nonzero(as_tuple=True)
        return hidden_RLD[places_T, columns_T - int(self.shift)]

"""How likely a text is to a token model, byte for byte: comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raydist.core.errors import ConfigError
from raydist.models.mask_spec import CausalMask
from raydist.sampling.text_bytes.covers import END
from raydist.sampling.text_bytes.reader import ByteModel, ByteReader, Start
from raydist.sampling.text_bytes.segmentation import Tail

_POSITIONS_PER_CHUNK = 64


@dataclass(frozen=True)
class ByteScore:
    """The likelihood of a text.

    Attributes:
        log_prob_nats: ln P(text | context).
        num_bytes: bytes of the text.
    """

    log_prob_nats: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """``-log2 P(text) / bytes``."""
        return -self.log_prob_nats / (math.log(2) * self.num_bytes)


def byte_log_likelihood(model: ByteModel, text: bytes, *, context: Sequence[int] = (), ends: bool = False) -> ByteScore:
    """``ln P(x_1..x_n)``: the sum over covers, equal to the sum of the logarithms of all next-byte probabilities.

    It is at least the log-likelihood of the text's own tokens, which leaves out every other token that the text could go
    on with. Tokens before the last settled boundary are in all covers and are scored in one forward; the sum goes over
    the covers of the rest. With ``model.exact`` the law before each token is renormalised over what the encoder can
    produce there, which asks the encoder about the whole vocabulary once a place; without it that step is left out.

    Args:
        model: the model.
        text: at least one byte.
        context: token ids before the text; empty for :meth:`ByteModel.start`.
        ends: whether the text ends here, so that the probability of the end counts too.

    Raises:
        ConfigError: no text, no UTF-8, or longer than the model's positions.
    """
    if not text:
        raise ConfigError("there is no text to score", where="text", expected="at least one byte")
    before = list(context) or model.start()
    start = Start.of(model, text, context=before)
    reader = ByteReader(model, [text], contexts=[before], max_new_bytes=0)
    log_prob = _settled_log_prob(model, start, num_context=len(before)) + reader.log_masses()[0]
    if ends:
        probability = float(reader.next_symbols()[0, END])
        log_prob += math.log(probability) if probability > 0 else -math.inf
    return ByteScore(log_prob_nats=log_prob, num_bytes=len(text))


@torch.inference_mode()
def _settled_log_prob(model: ByteModel, start: Start, *, num_context: int) -> float:
    """``ln P`` of the tokens before the last settled boundary, given the context."""
    if not start.forced:
        return 0.0
    device = next(model.model.parameters()).device
    length = len(start.base)
    tokens_1L = torch.tensor([start.base], device=device)
    positions_1L = torch.arange(length, device=device)[None]
    hidden_LD = model.model.hidden(tokens_1L, positions_1L, CausalMask(length=length))[0]
    total, tail = 0.0, Tail()
    for low in range(num_context - 1, length - 1, _POSITIONS_PER_CHUNK):
        high = min(low + _POSITIONS_PER_CHUNK, length - 1)
        log_probs_TV = torch.log_softmax(model.model.head(hidden_LD[low:high]).double(), dim=-1).cpu().numpy()
        for log_probs_V, token in zip(log_probs_TV, start.forced[low - num_context + 1 :], strict=False):
            total += _log_prob(model, log_probs_V, token=token, tail=tail)
            tail = model.segmentation.extend(tail, token)
    return total


def _log_prob(model: ByteModel, log_probs_V: NDArray[np.float64], *, token: int, tail: Tail) -> float:
    """One token's log-probability, renormalised over what the encoder can produce if the model is exact."""
    segmentation = model.segmentation
    found = float(log_probs_V[segmentation.vocabulary.ids_S[token]])
    if not model.exact:
        return found
    possible = segmentation.vocabulary.ids_S[segmentation.followers(tail)].tolist()
    ends = list(model.stop_ids) if segmentation.is_whole(tail) else []
    return found - float(np.logaddexp.reduce(log_probs_V[[*possible, *ends]]))

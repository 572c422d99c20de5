"""A model that knows the exact conditionals of a small joint law, for tests of samplers.

Vocabulary of a law over ``[K]^d``: symbols 0..K-1, then the mask id K, then the beginning-of-text id K + 1.
"""

import itertools
import math
from types import SimpleNamespace

import torch
from torch import nn


def random_law(shape, *, seed, sharpness=1.5):
    logits = sharpness * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(logits.flatten(), dim=0).reshape(shape)


def conditional(law, known):
    """The law of all variables given some of them: ``known`` maps variable to value."""
    given = torch.zeros_like(law)
    index = tuple(known.get(i, slice(None)) for i in range(law.ndim))
    given[index] = law[index]
    return given / given.sum()


def marginal(law, i):
    return law.sum(dim=[j for j in range(law.ndim) if j != i]) if law.ndim > 1 else law


def entropy(p):
    return float(torch.special.entr(p).sum())


def total_correlation(law, subset):
    others = [j for j in range(law.ndim) if j not in subset]
    joint = law.sum(dim=others) if others else law
    return sum(entropy(marginal(law, i)) for i in subset) - entropy(joint)


def divergence(p, q):
    """KL(p || q)."""
    used = p > 0
    return float((p[used] * (p[used].log() - q[used].log())).sum())


def sampler_law(law, *, policy, order_uniforms=None):
    """Enumerates a sampler of mask states that reads the exact conditionals, for given uniforms of the order.

    Returns its output law, the expected number of steps, the largest total correlation of a revealed set, and the
    expected sum of those total correlations under the true law.
    """
    order_Bk = (
        torch.zeros(1, law.ndim, dtype=torch.float64) if order_uniforms is None else torch.tensor([order_uniforms])
    )
    output, stats = torch.zeros_like(law), {"steps": 0.0, "largest": 0.0, "errors": 0.0}

    def walk(known, probability):
        if len(known) == law.ndim:
            output[tuple(known[i] for i in range(law.ndim))] += probability
            return
        given = conditional(law, known)
        logits = torch.stack([marginal(given, i).log() for i in range(law.ndim)])
        masked = torch.tensor([i not in known for i in range(law.ndim)])
        chosen = policy.reveal(logits[None], masked_Bk=masked[None], order_uniforms_Bk=order_Bk)[0]
        subset = chosen.nonzero()[:, 0].tolist()
        assert subset
        error = total_correlation(given, subset)
        true_weight = float(law[tuple(known.get(i, slice(None)) for i in range(law.ndim))].sum())
        stats["steps"] += true_weight
        stats["errors"] += true_weight * error
        stats["largest"] = max(stats["largest"], error)
        for values in itertools.product(*[range(law.shape[i]) for i in subset]):
            factor = math.prod(float(logits[i, v].exp()) for i, v in zip(subset, values, strict=True))
            if factor > 0:
                walk({**known, **dict(zip(subset, values, strict=True))}, probability * factor)

    walk({}, 1.0)
    return output, stats


class OracleDecoder(nn.Module):
    """Speaks the decoder's inference interface and answers from a joint law of the text after a one-token prompt.

    Text position i + 1 holds variable i. A mask token is answered with the law of its own variable, or of the next one
    with ``shift``, any other token with that of the next one, given the tokens that the attention mask shows it. Tokens and
    positions travel through the cache, if there is one, as if they were keys and values.
    """

    def __init__(self, law, *, shift=False):
        super().__init__()
        self.law = law
        self.shift = shift
        self.num_symbols = law.shape[0]
        self.mask_id, self.bos = self.num_symbols, self.num_symbols + 1
        self.config = SimpleNamespace(max_positions=law.ndim + 1, width=self.num_symbols + 2)
        self.register_parameter("device_marker", nn.Parameter(torch.zeros(())))
        self.fed_tokens = []
        self._answers = {}

    def head(self, hidden):
        return hidden.clone()

    def hidden(self, tokens_BL, positions_BL, mask, cache=None):
        self.fed_tokens.append(tokens_BL.shape[1])
        shown, places = tokens_BL[:, None, :, None].double(), positions_BL[:, None, :, None].double()
        if cache is not None:
            shown, places = cache.extend(0, shown, places)
        shown_BW, places_BW = shown[:, 0, :, 0].long().tolist(), places[:, 0, :, 0].long().tolist()
        seen_BLW = mask.dense()[:, 0].expand(len(shown_BW), -1, -1).tolist()
        answers = [
            [
                self._answer(
                    tokens_BL[b, q].item(), positions_BL[b, q].item(), shown_BW[b], places_BW[b], seen_BLW[b][q]
                )
                for q in range(tokens_BL.shape[1])
            ]
            for b in range(len(shown_BW))
        ]
        return torch.stack([torch.stack(row) for row in answers])

    def _answer(self, token, position, shown, places, seen):
        known = {
            place - 1: value
            for value, place, visible in zip(shown, places, seen, strict=True)
            if visible and value < self.num_symbols and 1 <= place <= self.law.ndim
        }
        variable = position - 1 if token == self.mask_id and not self.shift else position
        key = (variable, frozenset(known.items()))
        if key not in self._answers:
            logits = torch.full((self.num_symbols + 2,), -50.0, dtype=torch.float64)
            if 0 <= variable < self.law.ndim and variable not in known:
                logits[: self.num_symbols] = marginal(conditional(self.law, known), variable).log()
            self._answers[key] = logits
        return self._answers[key]


def empirical_law(samples, shape):
    counts = torch.zeros(shape, dtype=torch.float64)
    for sample in samples:
        counts[tuple(sample)] += 1
    return counts


def chi_square(counts, law):
    """Pearson's statistic over the possible outcomes, and its degrees of freedom."""
    expected = law * counts.sum()
    possible = law > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    return float(statistic), int(possible.sum()) - 1


def agrees(counts, law):
    """Whether the counts may well come from the law: Pearson's statistic within four deviations of its mean."""
    statistic, df = chi_square(counts, law)
    return statistic < df + 4 * (2 * df) ** 0.5

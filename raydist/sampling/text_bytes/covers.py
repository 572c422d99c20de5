"""The covers of the bytes read so far, kept up to date byte by byte.

A cover of ``x_1..x_n`` is a reachable token sequence whose text begins with ``x_1..x_n`` and whose text without the last
token does not reach ``x_n``. Every token text that begins with ``x_1..x_n`` begins with exactly one cover, so

    P(x_1..x_n) = sum over covers t of P(t),    P(b | x_1..x_n) = P(x_1..x_n, b) / P(x_1..x_n)

(Phan et al. 2025, arXiv 2410.09303, the byte-token representation lemma). P(t) is the product of the model's conditionals.

A *branch* holds all covers that share the tokens before the last: in the sorted vocabulary their last tokens are a range,
and reading a byte narrows it. Tokens that end with the byte just read make *closed* covers. Each asks the model once for
the law of what follows it and becomes a branch itself. The encoder leaves one closed cover at most places, sometimes two
(inside white space that a pattern splits by what follows it), and none inside many characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raydist.sampling.text_bytes.segmentation import Segmentation, Tail
from raydist.sampling.text_bytes.vocabulary import ByteVocabulary, TokenRange

END = 256
"""The index of "the text ends here" in a law over what may come next."""
NUM_SYMBOLS = 257


@dataclass(frozen=True)
class TokenLaw:
    """What a model says after a closed cover.

    Attributes:
        log_probs_S: of each token of the sorted vocabulary, float64.
        log_prob_end: of the end of the text.
    """

    log_probs_S: NDArray[np.float64]
    log_prob_end: float


@dataclass(frozen=True)
class Closed:
    """A cover that ends exactly where the bytes end.

    Attributes:
        tokens: vocabulary indices since the start of the state.
        tail: what of them decides what may follow.
        log_weight: log P of the sequence, nats, given the start.
    """

    tokens: tuple[int, ...]
    tail: Tail
    log_weight: float


@dataclass(frozen=True, eq=False)
class Branch:
    """A closed cover of an earlier place with the last tokens that are still possible after it.

    Attributes:
        root: the cover.
        tokens: those last tokens; their common bytes have been read since the root.
        probabilities: of the tokens of the range, given the root.
        end: probability that the text ends at the root.
    """

    root: Closed
    tokens: TokenRange
    probabilities: NDArray[np.float64]
    end: float

    @property
    def mass(self) -> float:
        """Probability, given the root, of what is still possible."""
        return float(self.probabilities.sum())


class Covers:
    """All covers of a text that is being read, with their probabilities.

    After construction and after each :meth:`advance`, ``closed`` holds the covers that wait for their law; :meth:`grow`
    takes it. Then :meth:`next_symbols` can be asked.

    Args:
        segmentation: the encoder.
        tail: the end of the text before the first byte, where every sequence is known to have a token boundary.
        exact: tokens that no encoding could have here are taken out of the law after each closed cover, and what is left
            is renormalised. Without it only the tokens that agree with the next byte are tested, after the byte was
            read: a model's mass on impossible tokens then counts in :meth:`next_symbols`, unnormalised.
    """

    def __init__(self, segmentation: Segmentation, *, tail: Tail, exact: bool) -> None:
        self.segmentation = segmentation
        self.exact = exact
        self.closed: list[Closed] = [Closed(tokens=(), tail=tail, log_weight=0.0)]
        self.branches: list[Branch] = []
        self._steps: dict[int, list[tuple[list[Closed], Branch]]] = {}

    def log_mass(self) -> float:
        """``log P(x_1..x_n)`` of the bytes read, nats, given the start: the lemma's sum. To be asked before `grow`."""
        branches = [branch.root.log_weight + _log(branch.mass) for branch in self.branches]
        return float(np.logaddexp.reduce([-np.inf, *branches, *(cover.log_weight for cover in self.closed)]))

    def grow(self, laws: Sequence[TokenLaw]) -> None:
        """Turns the closed covers into branches by what the model says after each, in their order."""
        for cover, law in zip(self.closed, laws, strict=True):
            branch = self._branch(cover, law)
            if branch.mass + branch.end > 0:
                self.branches.append(branch)
        self.closed = []

    def next_symbols(self) -> NDArray[np.float64]:
        """The law of what comes next, float64 ``[257]``: the bytes, then the end of the text.

        Zero throughout where the model has led into a sequence that nothing can follow.
        """
        weights = np.array([branch.root.log_weight for branch in self.branches])
        masses = np.zeros(NUM_SYMBOLS)
        for branch, weight in zip(self.branches, np.exp(weights - weights.max(initial=-np.inf)), strict=True):
            column = self.segmentation.vocabulary.column(branch.tokens)
            masses[:END] += weight * np.bincount(column, weights=branch.probabilities, minlength=END)
            masses[END] += weight * branch.end
        total = masses.sum()
        return masses / total if total > 0 else masses

    def can_advance(self, byte: int) -> bool:
        """Whether any cover goes on with this byte; a byte may fail that has mass only where nothing was tested."""
        return any(closed or branch.mass > 0 for closed, branch in self._step(byte))

    def advance(self, byte: int) -> None:
        """Reads one more byte."""
        step = self._step(byte)
        self.branches = [branch for _, branch in step if branch.mass > 0]
        self.closed = [cover for closed, _ in step for cover in closed]
        self._steps = {}

    def num_forced(self) -> int:
        """How many first tokens all covers have in common."""
        sequences = [cover.tokens for cover in self.closed] + [branch.root.tokens for branch in self.branches]
        if not sequences:
            return 0
        first, last = min(sequences), max(sequences)
        pairs = zip(first, last, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))

    def _step(self, byte: int) -> list[tuple[list[Closed], Branch]]:
        if byte not in self._steps:
            self._steps[byte] = [self._narrowed(branch, byte) for branch in self.branches]
        return self._steps[byte]

    def _branch(self, cover: Closed, law: TokenLaw) -> Branch:
        probabilities = np.exp(law.log_probs_S)
        end = float(np.exp(law.log_prob_end)) if self.segmentation.is_whole(cover.tail) else 0.0
        if self.exact:
            probabilities = np.where(self.segmentation.followers(cover.tail), probabilities, 0.0)
            total = probabilities.sum() + end
            if total > 0:
                probabilities, end = probabilities / total, end / total
        return Branch(root=cover, tokens=self.segmentation.vocabulary.all, probabilities=probabilities, end=end)

    def _narrowed(self, branch: Branch, byte: int) -> tuple[list[Closed], Branch]:
        ending, going_on = self.segmentation.vocabulary.narrow(branch.tokens, byte)
        low, root = branch.tokens.low, branch.root
        probabilities = branch.probabilities[ending.start - low : going_on.high - low]
        if not self.exact and branch.tokens.depth == 0:
            possible = self.segmentation.can_follow(root.tail, range(ending.start, going_on.high))
            probabilities = np.where(possible, probabilities, 0.0)
        closed = [
            Closed(
                tokens=(*root.tokens, token),
                tail=self.segmentation.extend(root.tail, token),
                log_weight=root.log_weight + _log(probability),
            )
            for token, probability in zip(ending, probabilities[: len(ending)].tolist(), strict=True)
            if probability > 0
        ]
        return closed, Branch(root=root, tokens=going_on, probabilities=probabilities[len(ending) :].copy(), end=0.0)


def closed_covers(segmentation: Segmentation, *, tail: Tail, text: bytes) -> list[tuple[int, ...]]:
    """The tokens of every reachable sequence whose text is a beginning of ``text``, the empty one included.

    Those are all covers that will be closed while the text is read, so one forward can answer for all of them.
    """
    reached: list[list[tuple[tuple[int, ...], Tail]]] = [[((), tail)], *([] for _ in text)]
    for start in range(len(text)):
        candidates = _beginnings(segmentation.vocabulary, text[start:]) if reached[start] else []
        for sequence, before in reached[start]:
            possible = segmentation.can_follow(before, candidates).tolist()
            for token in (token for token, follows in zip(candidates, possible, strict=True) if follows):
                stop = start + len(segmentation.vocabulary.strings[token])
                reached[stop].append(((*sequence, token), segmentation.extend(before, token)))
    return [sequence for place in reached for sequence, _ in place]


def _beginnings(vocabulary: ByteVocabulary, text: bytes) -> list[int]:
    """The tokens with which a text begins."""
    found: list[int] = []
    tokens = vocabulary.all
    for byte in text:
        ending, tokens = vocabulary.narrow(tokens, byte)
        found.extend(ending)
        if tokens.low == tokens.high:
            break
    return found


def _log(probability: float) -> float:
    return float(np.log(probability)) if probability > 0 else -np.inf

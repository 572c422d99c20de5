"""Rows, forced noise and exact answers for tests of the masked objectives."""

import numpy as np
import torch

from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from tests.sampling.decoders import MASK_ID
from tests.sampling.oracle import conditional, marginal

IDS = TokenIds(vocab_size=12, bos=None, eos=None, mask=MASK_ID, pad=None)
LENGTH = 13


def rows_of(tokens_BS, *, documents=None, loss_mask=None, step=3):
    num_rows = tokens_BS.shape[0]
    return Rows(
        step=step,
        tokens_BS=tokens_BS,
        documents_BS=torch.zeros(tokens_BS.shape, dtype=torch.int32) if documents is None else documents,
        loss_mask_BS=loss_mask,
        rows_B=torch.arange(num_rows),
        epochs_B=torch.zeros(num_rows, dtype=torch.int64),
        samples_B=torch.arange(num_rows) + 100,
    )


def random_rows(num_rows, *, length=LENGTH, **fields):
    generator = torch.Generator().manual_seed(1)
    return rows_of(torch.randint(0, MASK_ID, (num_rows, length + 1), generator=generator), **fields)


def rng_of(rows, *, seed=0):
    return RowRng(seed=seed, step=rows.step, epochs_B=rows.epochs_B, rows_B=rows.rows_B, samples_B=rows.samples_B)


def check_slicing(objective, rows):
    """The noise is the same for every slicing of the batch, and the counts add up."""
    whole = objective.corrupt(rows, rng_of(rows))
    for pieces in ([(0, 4), (4, 8)], [(0, 1), (1, 3), (3, 8)]):
        parts = [objective.corrupt(rows.narrow(a, b), rng_of(rows).narrow(a, b)) for a, b in pieces]
        assert torch.equal(torch.cat([part.inputs["tokens_BL"] for part in parts]), whole.inputs["tokens_BL"])
        assert sum(part.counts["targets"] for part in parts) == whole.counts["targets"]


class ForcedRng(RowRng):
    """Gives the draws of some purposes, named by their last word; all others are the usual ones."""

    def force(self, **draws):
        object.__setattr__(self, "draws", draws)
        return self

    def uniform(self, purpose, num_positions):
        draws = self.draws.get(purpose.split("/")[-1])
        return super().uniform(purpose, num_positions) if draws is None else draws.float().expand(-1, num_positions)


def forced(rows, **draws):
    rng = ForcedRng(seed=0, step=rows.step, epochs_B=rows.epochs_B, rows_B=rows.rows_B, samples_B=rows.samples_B)
    return rng.force(**draws)


def all_patterns(length):
    """Every mask pattern, bool ``[2^L, L]``."""
    return (torch.arange(2**length)[:, None] >> torch.arange(length)) % 2 == 1


def gauss_legendre(num_nodes):
    """Nodes and weights on [0, 1], float64."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)


class Posterior:
    """Answers terms with the exact conditionals of a law: ``-log q(x_i | tokens that are shown and no mask)``."""

    def __init__(self, law, *, mask_id, smoothing=0.0):
        self.law, self.mask_id, self.smoothing = law, mask_id, smoothing
        self._answers = {}

    def cost(self, shown, variable, target):
        key = (tuple(shown), variable)
        if key not in self._answers:
            known = {i: token for i, token in enumerate(shown) if token != self.mask_id}
            exact = marginal(conditional(self.law, known), variable)
            self._answers[key] = -((1 - self.smoothing) * exact + self.smoothing / len(exact)).log()
        return float(self._answers[key][target])

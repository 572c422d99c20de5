"""Which positions are given: laws of the prefix's length and of the share, and independence from the batch."""

import pytest
import torch

from raydist.config.registries import COUPLINGS
from raydist.core.rng import RowRng

ROWS, LENGTH = 9000, 8
CLEAN = torch.zeros(ROWS, LENGTH, dtype=torch.int64)


def rng(rows=ROWS, *, step=0):
    return RowRng(seed=1, step=step, epochs_B=torch.zeros(rows, dtype=torch.int64), rows_B=torch.arange(rows))


def given_of(fields):
    return COUPLINGS.parse(fields).given(CLEAN, rng())


def is_uniform(values, num_values):
    counts = torch.bincount(values, minlength=num_values).double()
    expected = len(values) / num_values
    return (
        len(counts) == num_values
        and ((counts - expected) ** 2 / expected).sum() < num_values + 5 * (2 * num_values) ** 0.5
    )


def test_independent_gives_nothing():
    assert not given_of("independent").any()


def test_prefix_lengths_are_uniform_and_leave_a_token():
    given = given_of("prefix")
    lengths = given.sum(1)
    assert torch.equal(given, torch.arange(LENGTH) < lengths[:, None])
    assert is_uniform(lengths, LENGTH)


def test_prefix_power():
    """The share ``u^3`` is below 1/8 for half of the rows."""
    lengths = given_of({"name": "prefix", "power": 3.0}).sum(1)
    assert (lengths == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert lengths.max() == LENGTH - 1


def test_positions_are_exchangeable_and_their_number_uniform():
    given = given_of("positions")
    assert is_uniform(given.sum(1), LENGTH + 1)
    assert given.double().mean(0).tolist() == pytest.approx([0.5] * LENGTH, abs=0.02)
    assert given_of({"name": "positions", "max_share": 0.2}).double().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("name", ["prefix", "positions"])
def test_unconditional_rows(name):
    plain = given_of(name)
    dropped = given_of({"name": name, "unconditional_probability": 0.25})
    kept = (dropped == plain).all(1)
    assert not dropped[~kept].any()
    assert (~kept).sum() / plain.any(1).sum() == pytest.approx(0.25, abs=0.02)
    assert not given_of({"name": name, "unconditional_probability": 1.0}).any()


@pytest.mark.parametrize("name", sorted(COUPLINGS.classes()))
def test_a_row_does_not_depend_on_its_batch(name):
    coupling = COUPLINGS.parse(name)
    parts = [coupling.given(CLEAN[a:b], rng(20).narrow(a, b)) for a, b in ((0, 3), (3, 20))]
    assert torch.equal(torch.cat(parts), coupling.given(CLEAN[:20], rng(20)))

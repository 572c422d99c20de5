"""Time sampling: uniform for each row, spread over the rows of a step, and the same for every slicing of it."""

from dataclasses import replace

import pytest
import torch

from raydist.config.base import validated
from raydist.config.registries import SCHEDULES
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.paths.time import TimeSampling

KINDS = ["uniform", "antithetic", "stratified"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def rng(rows, *, step=0, first=0, samples=True, seed=1):
    """Rows in an order of their own; samples in order."""
    numbers = torch.arange(first, first + rows)
    return RowRng(
        seed=seed,
        step=step,
        epochs_B=torch.zeros(rows, dtype=torch.int64),
        rows_B=numbers * 7919 % 100_003,
        samples_B=numbers if samples else None,
    )


def sampling(kind, **fields):
    return TimeSampling(kind=kind, **{"low": 0.0, "high": 1.0, **fields})


def looks_uniform(times):
    """Chi-square over 16 cells."""
    counts = torch.bincount((times.flatten() * 16).long(), minlength=16).double()
    expected = times.numel() / 16
    return len(counts) == 16 and ((counts - expected) ** 2 / expected).sum() < 16 + 5 * 32**0.5


@every_kind
@pytest.mark.parametrize("samples", [True, False])
def test_one_row_is_uniform_over_steps(kind, samples):
    times = torch.stack([sampling(kind).per_row(rng(3, step=s, first=3 * s, samples=samples)) for s in range(800)])
    for row in range(3):
        assert looks_uniform(times[:, row])
    assert times.min() >= 0
    assert times.max() < 1


@every_kind
def test_blocks_are_uniform_and_differ(kind):
    times = torch.stack(
        [sampling(kind).per_block(rng(1, step=s, first=s), length=7, block_size=3) for s in range(800)]
    )[:, 0]
    assert times.shape == (800, 7)
    assert (times[:, 0] == times[:, 2]).all()
    assert (times[:, 2] != times[:, 3]).float().mean() > 0.99
    for block in (0, 3, 6):
        assert looks_uniform(times[:, block])


def test_stratified_times_are_spread_over_any_consecutive_rows():
    """The largest gap on the circle of m times, also of a microbatch from the middle of the step, is at most 2.7 / m."""
    for num_rows, start in ((8, 0), (64, 0), (64, 24), (1000, 13)):
        step = rng(2000, step=5, first=40_000).narrow(start, start + num_rows)
        times = sampling("stratified").per_row(step)[:, 0].sort().values
        gaps = torch.cat([times.diff(), (times[:1] + 1 - times[-1:])])
        assert gaps.max() < 2.7 / num_rows
        independent = sampling("uniform").per_row(step)[:, 0].sort().values
        assert num_rows < 64 or independent.diff().max() > 3 / num_rows


def test_stratified_lowers_the_variance_of_a_steps_mean():
    means = {}
    for kind in KINDS:
        times = torch.stack([sampling(kind).per_row(rng(32, step=s, first=32 * s)) for s in range(200)])
        means[kind] = (times**2).mean(dim=(1, 2)).var().item()
    assert means["stratified"] < means["antithetic"] < means["uniform"] / 4
    assert means["stratified"] < means["uniform"] / 10


def test_antithetic_pairs_mirror_each_other():
    for samples in (True, False):
        source = rng(20, first=10, samples=samples)
        if not samples:
            source = replace(source, rows_B=torch.arange(10, 30))
        for draw in (
            sampling("antithetic").per_row(source),
            sampling("antithetic").per_block(source, length=6, block_size=2),
        ):
            torch.testing.assert_close(draw[0::2] + draw[1::2], torch.full_like(draw[0::2], 1 - 2.0**-24))
            assert len(draw[0::2, 0].unique()) == 10


@every_kind
@pytest.mark.parametrize("samples", [True, False])
def test_times_do_not_depend_on_the_slicing(kind, samples):
    whole = rng(12, step=3, samples=samples)
    for pieces in ([(0, 6), (6, 12)], [(0, 1), (1, 12)]):
        rows = torch.cat([sampling(kind).per_row(whole.narrow(a, b)) for a, b in pieces])
        blocks = torch.cat([sampling(kind).per_block(whole.narrow(a, b), length=8, block_size=4) for a, b in pieces])
        assert torch.equal(rows, sampling(kind).per_row(whole))
        assert torch.equal(blocks, sampling(kind).per_block(whole, length=8, block_size=4))


@every_kind
def test_clipping_and_purposes(kind):
    source = rng(500)
    times = sampling(kind, low=0.2, high=0.7).per_row(source)
    assert times.min() >= 0.2
    assert times.max() < 0.7
    torch.testing.assert_close(times, 0.2 + 0.5 * sampling(kind).per_row(source))
    assert not torch.equal(sampling(kind).per_row(source), sampling(kind).per_row(source, purpose="other"))
    assert not torch.equal(sampling(kind).per_row(source), sampling(kind).per_row(replace(source, seed=2)))
    assert torch.equal(sampling(kind).per_row(source), sampling(kind).per_row(replace(source, step=1))) == (
        kind == "uniform"
    )


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.5, 1.0), (0.0, 1e-9)])
def test_the_ends_are_never_drawn(low, high, monkeypatch):
    """Rates are infinite at t = 1 and may be at t = 0; float32 would round the largest draws to 1, and the least is 0."""
    ends = torch.tensor([[0.0], [1 - 2.0**-24]])
    monkeypatch.setattr(RowRng, "uniform", lambda self, purpose, num_positions: ends)
    times = sampling("uniform", low=low, high=high).per_row(rng(2))
    assert times.min() > 0
    assert low <= times.min()
    assert times.max() < high


def test_an_empty_range_is_refused():
    with pytest.raises(ConfigError, match="is not below"):
        validated(TimeSampling, {"low": 0.5, "high": 0.5})


@pytest.mark.parametrize(
    ("schedule", "high", "covered"),
    [("linear", 0.99, True), ("linear", 0.98, False), ("polynomial", 0.99, False), ("polynomial", 0.999, True)],
)
def test_a_range_covers_the_noise_levels_of_its_schedule(schedule, high, covered):
    """What is left out is a share of noise levels, not of times: kappa = t^2 is at 0.98 when t = 0.99."""
    assert TimeSampling(high=high).covers(SCHEDULES.parse(schedule)) is covered
    assert not TimeSampling(low=0.5, high=high).covers(SCHEDULES.parse(schedule))

"""Oracles: the published known-answer vectors of Philox-4x32-10, and invariance under slicing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.core.rng import RowRng, philox_4x32

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def rng_of(rows: list[int], *, seed: int = 7, step: int = 0, epoch: int = 0) -> RowRng:
    rows_B = torch.tensor(rows, dtype=torch.int64)
    return RowRng(seed, step, torch.full_like(rows_B, epoch), rows_B)


def test_known_answers() -> None:
    for counter, key, expected in KNOWN_ANSWERS:
        words = philox_4x32(tuple(torch.tensor(word, dtype=torch.int64) for word in counter), key)  # type: ignore[arg-type]
        assert tuple(int(word) for word in words) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12), st.integers(1, 40), st.integers(0, 2**31))
def test_a_draw_depends_on_its_row_alone(rows: list[int], num_positions: int, seed: int) -> None:
    together = rng_of(rows, seed=seed).uniform("mask", num_positions)
    for index, row in enumerate(rows):
        alone = rng_of([row], seed=seed, step=99).uniform("mask", num_positions + 3)
        assert torch.equal(alone[0, :num_positions], together[index])


def test_purpose_seed_epoch_and_row_all_matter() -> None:
    base = rng_of([5]).uniform("mask", 16)
    others = [
        rng_of([5]).uniform("time", 16),
        rng_of([5], seed=8).uniform("mask", 16),
        rng_of([5], epoch=1).uniform("mask", 16),
        rng_of([5 + 2**32]).uniform("mask", 16),
        rng_of([6]).uniform("mask", 16),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_uniform_is_uniform() -> None:
    draws = rng_of(list(range(400))).uniform("mask", 250).flatten()
    assert float(draws.min()) >= 0.0
    assert float(draws.max()) < 1.0
    counts = torch.histc(draws, bins=20, min=0, max=1)
    expected = draws.numel() / 20
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert (
        chi_square < 45.3
    )  # the 0.9994 quantile at 19 degrees of freedom; the draws are fixed, so this never flickers


def test_step_integer_is_shared_by_the_step_and_differs_between_steps() -> None:
    of_step = [rng_of([3], step=step).step_integer("size", low=2, high=16) for step in range(300)]
    assert of_step == [rng_of([8, 9], step=step, epoch=4).step_integer("size", low=2, high=16) for step in range(300)]
    assert set(of_step) == set(range(2, 17))
    counts = [of_step.count(size) for size in range(2, 17)]
    assert sum((count - 20) ** 2 / 20 for count in counts) < 38.1  # 0.9995 quantile, 14 degrees of freedom


def test_narrow_keeps_rows_and_epochs_together() -> None:
    whole = RowRng(1, 0, torch.tensor([0, 1, 2]), torch.tensor([10, 11, 12]))
    assert torch.equal(whole.narrow(1, 3).uniform("mask", 5), whole.uniform("mask", 5)[1:3])

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.permutation import keyed_permutation, order_key


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), tweak=st.integers(0, 2**40))
def test_is_a_permutation_with_random_access(size: int, key: int, tweak: int) -> None:
    images = keyed_permutation(np.arange(size), size=size, key=key, tweak=tweak)
    assert sorted(images.tolist()) == list(range(size))
    probe = size // 2
    assert keyed_permutation(np.array([probe]), size=size, key=key, tweak=tweak)[0] == images[probe]


@settings(max_examples=20, deadline=None)
@given(size=st.one_of(st.integers(4, 50), st.integers(2**39, 2**41), st.just(2**62 + 1)))
def test_tweaks_may_differ_by_index(size: int) -> None:
    indices, tweaks = [3, 3, size - 1, size - 1], [0, 1, 2, 3]
    together = keyed_permutation(np.array(indices), size=size, key=7, tweak=np.array(tweaks))
    for n, (index, tweak) in enumerate(zip(indices, tweaks, strict=True)):
        assert keyed_permutation(np.array([index]), size=size, key=7, tweak=tweak)[0] == together[n]
        assert 0 <= together[n] < size


def test_is_spread_evenly_over_keys() -> None:
    """Where index 0 of 16 goes, over 4096 keys: chi-squared with 15 degrees of freedom, 0.1% quantile 37.7."""
    images = [keyed_permutation(np.array([0]), size=16, key=order_key(seed, "x"))[0] for seed in range(4096)]
    counts = np.bincount(images, minlength=16)
    assert ((counts - 256) ** 2 / 256).sum() < 37.7


def test_neighbours_do_not_stay_together() -> None:
    images = keyed_permutation(np.arange(10_000), size=10_000, key=order_key(0, "x"))
    assert np.mean(np.abs(np.diff(images)) < 100) < 0.03
    assert abs(np.corrcoef(np.arange(10_000), images)[0, 1]) < 0.05


def test_keys_depend_on_every_part() -> None:
    keys = [order_key(0, "a"), order_key(1, "a"), order_key(0, "b"), order_key(0, "a", 0), order_key(0, "a", 0, 1)]
    assert len(set(keys)) == len(keys)

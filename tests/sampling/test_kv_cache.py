import pytest
import torch

from raydist.sampling.kv_cache import KvCache


def keys_of(rows):
    """[B, 1, n, 1] from one list of numbers per row."""
    return torch.tensor(rows, dtype=torch.float64)[:, None, :, None]


def contents(keys, row, *places):
    return [keys[row, 0, place, 0].item() for place in places]


def test_rows_of_different_lengths_keep_their_own_tokens():
    cache = KvCache(batch_size=2, capacity=8)
    cache.extend(0, keys_of([[1, 2, 3], [4, 5, 99]]), keys_of([[-1, -2, -3], [-4, -5, -99]]))
    cache.commit(torch.tensor([3, 2]))
    keys, values = cache.extend(0, keys_of([[6, 7], [8, 9]]), keys_of([[-6, -7], [-8, -9]]))
    assert cache.lengths_B.tolist() == [3, 2]
    assert keys.shape == (2, 1, 5, 1)
    assert contents(keys, 0, 0, 1, 2, 3, 4) == [1, 2, 3, 6, 7]
    assert contents(keys, 1, 0, 1, 3, 4) == [4, 5, 8, 9]
    assert torch.equal(values[:, :, 3:], -keys[:, :, 3:])
    cache.commit(torch.tensor([1, 2]))
    keys, _ = cache.extend(0, keys_of([[0], [0]]), keys_of([[0], [0]]))
    assert cache.lengths_B.tolist() == [4, 4]
    assert contents(keys, 0, 0, 1, 2, 3) == [1, 2, 3, 6]
    assert contents(keys, 1, 0, 1, 2, 3) == [4, 5, 8, 9]


def test_dropped_tokens_leave_no_trace_and_layers_are_apart():
    cache = KvCache(batch_size=1, capacity=4)
    for layer, number in ((0, 1.0), (1, 10.0)):
        cache.extend(layer, keys_of([[number]]), keys_of([[number]]))
    cache.commit(torch.tensor([1]))
    for layer in (0, 1):
        cache.extend(layer, keys_of([[50, 51, 52]]), keys_of([[50, 51, 52]]))
    cache.commit(torch.tensor([0]))
    assert cache.width == 1
    for layer, number in ((0, 1.0), (1, 10.0)):
        keys, values = cache.extend(layer, keys_of([[7]]), keys_of([[8]]))
        assert keys.flatten().tolist() == [number, 7]
        assert values.flatten().tolist() == [number, 8]


def test_kept_rows_move_up():
    cache = KvCache(batch_size=3, capacity=3)
    cache.extend(0, keys_of([[1, 0], [2, 3], [4, 0]]), keys_of([[1, 0], [2, 3], [4, 0]]))
    cache.commit(torch.tensor([1, 2, 1]))
    cache.keep_rows(torch.tensor([2, 0]))
    keys, _ = cache.extend(0, keys_of([[5], [6]]), keys_of([[5], [6]]))
    assert cache.lengths_B.tolist() == [1, 1]
    assert keys[:, 0, :, 0].tolist() == [[4, 5], [1, 6]]


def test_truncated_rows_forget_their_ends_only():
    cache = KvCache(batch_size=2, capacity=5)
    cache.extend(0, keys_of([[1, 2, 3], [4, 5, 0]]), keys_of([[1, 2, 3], [4, 5, 0]]))
    cache.commit(torch.tensor([3, 2]))
    cache.truncate(torch.tensor([1, 9]))
    assert cache.lengths_B.tolist() == [1, 2]
    cache.extend(0, keys_of([[6], [7]]), keys_of([[6], [7]]))
    cache.commit(torch.tensor([1, 1]))
    keys, _ = cache.extend(0, keys_of([[8], [9]]), keys_of([[8], [9]]))
    assert keys[0, 0, :2, 0].tolist() == [1, 6]
    assert keys[1, 0, :3, 0].tolist() == [4, 5, 7]


def test_more_than_the_capacity_is_refused():
    cache = KvCache(batch_size=1, capacity=2)
    with pytest.raises(ValueError, match="3 slots needed"):
        cache.extend(0, keys_of([[1, 2, 3]]), keys_of([[1, 2, 3]]))

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.models.mask_spec import (
    BlockCausalMask,
    BlockDiffusionMask,
    CachedBlockMask,
    CachedMask,
    CausalMask,
    FullMask,
    MaskSpec,
    SetBlockMask,
    document_positions,
)


def documents(lengths_of_rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(
        [[d for d, n in enumerate(lengths) for _ in range(n)] for lengths in lengths_of_rows], dtype=torch.int32
    )


def brute_causal(length: int, docs: list[int]) -> torch.Tensor:
    return torch.tensor([[j <= i and docs[i] == docs[j] for j in range(length)] for i in range(length)])


def brute_set_block(length: int, k: int, docs: list[int]) -> torch.Tensor:
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            if docs[i] != docs[j]:
                continue
            mask[i, j] = j <= i
            mask[length + i, length + j] = i // k == j // k
            mask[length + i, j] = j // k < i // k
    return mask


def brute_full(length: int, docs: list[int]) -> torch.Tensor:
    return torch.tensor([[docs[i] == docs[j] for j in range(length)] for i in range(length)])


def brute_block_diffusion(length: int, k: int, docs: list[int]) -> torch.Tensor:
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            if docs[i] != docs[j]:
                continue
            mask[i, j] = j // k <= i // k
            mask[length + i, length + j] = i // k == j // k
            mask[length + i, j] = j // k < i // k
    return mask


def brute_cached_block(length: int, width: int, num_finished: int, num_current: int) -> torch.Tensor:
    mask = torch.zeros(num_finished + num_current, width + num_finished + num_current, dtype=torch.bool)
    for i in range(num_finished + num_current):
        mask[i, :length] = True
        for j in range(num_finished + num_current):
            mask[i, width + j] = i >= num_finished or j < num_finished
    return mask


def brute_cached(length: int, width: int, num_causal: int, num_block: int) -> torch.Tensor:
    mask = torch.zeros(num_causal + num_block, width + num_causal + num_block, dtype=torch.bool)
    for i in range(num_causal + num_block):
        mask[i, :length] = True
        for j in range(num_causal + num_block):
            mask[i, width + j] = j <= i if i < num_causal else True
    return mask


def joined_parts(spec: MaskSpec) -> torch.Tensor:
    """The parts as one bool mask; what no part covers is False."""
    whole = torch.zeros(spec.num_rows, 1, spec.num_queries, spec.num_keys, dtype=torch.bool)
    covered = 0
    for part in spec.parts(device=torch.device("cpu"), dtype=torch.float32):
        assert part.queries.start == covered
        covered = part.queries.stop
        keys = torch.cat([torch.arange(s.start, s.stop) for s in part.keys])
        num_queries = part.queries.stop - part.queries.start
        assert (part.bias is None) == (part.rule != "listed")
        if part.bias is None:
            allowed = torch.ones(num_queries, len(keys), dtype=torch.bool)
            if part.rule == "causal":
                assert num_queries == len(keys)
                allowed = allowed.tril()
        else:
            assert set(part.bias.unique().tolist()) <= {0.0, float("-inf")}
            allowed = part.bias == 0
        whole[:, :, part.queries.start : part.queries.stop, keys] = allowed
    assert covered == spec.num_queries
    return whole


ROWS = [[4, 1, 8, 2], [15], [1] * 15]


@pytest.mark.parametrize("rows", [None, ROWS])
def test_causal_dense_equals_loops(rows):
    spec = CausalMask(length=15, documents_BL=None if rows is None else documents(rows))
    docs = [[0] * 15] if rows is None else documents(rows).tolist()
    expected = torch.stack([brute_causal(15, d) for d in docs])[:, None]
    assert torch.equal(spec.dense(), expected)
    assert torch.equal(joined_parts(spec), expected)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 15, 16])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_set_block_dense_equals_loops(k, rows):
    spec = SetBlockMask(length=15, block_size=k, documents_BL=None if rows is None else documents(rows))
    docs = [[0] * 15] if rows is None else documents(rows).tolist()
    expected = torch.stack([brute_set_block(15, k, d) for d in docs])[:, None]
    assert torch.equal(spec.dense(), expected)
    assert torch.equal(joined_parts(spec), expected)


@pytest.mark.parametrize("rows", [None, ROWS])
def test_full_dense_equals_loops(rows):
    spec = FullMask(length=15, documents_BL=None if rows is None else documents(rows))
    docs = [[0] * 15] if rows is None else documents(rows).tolist()
    expected = torch.stack([brute_full(15, d) for d in docs])[:, None]
    assert torch.equal(spec.dense(), expected)
    assert torch.equal(joined_parts(spec), expected)


def test_full_without_documents_has_no_bias():
    (part,) = FullMask(length=500).parts(device=torch.device("cpu"), dtype=torch.float32)
    assert part.rule == "all"
    assert part.bias is None


@pytest.mark.parametrize("k", [1, 2, 4, 5, 15, 16])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_block_diffusion_dense_equals_loops(k, rows):
    spec = BlockDiffusionMask(length=15, block_size=k, documents_BL=None if rows is None else documents(rows))
    docs = [[0] * 15] if rows is None else documents(rows).tolist()
    expected = torch.stack([brute_block_diffusion(15, k, d) for d in docs])[:, None]
    assert torch.equal(spec.dense(), expected)
    assert torch.equal(joined_parts(spec), expected)


@pytest.mark.parametrize(("length", "k"), [(15, 4), (15, 1), (5, 7), (130, 4), (200, 70)])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_block_causal_is_the_clean_half_of_block_diffusion(length, k, rows):
    docs = None if rows is None else documents([[*row, length] for row in rows])[:, :length]
    spec = BlockCausalMask(length=length, block_size=k, documents_BL=docs)
    doubled = BlockDiffusionMask(length=length, block_size=k, documents_BL=docs).dense()
    assert torch.equal(spec.dense(), doubled[..., :length, :length])
    assert torch.equal(joined_parts(spec), spec.dense())
    assert spec.num_allowed_pairs() == BlockCausalMask(length=length, block_size=k).dense().sum()


@pytest.mark.parametrize(("num_finished", "num_current"), [(5, 0), (0, 4), (3, 3), (4, 2)])
def test_cached_block_dense_equals_loops(num_finished, num_current):
    lengths = [0, 3, 6]
    spec = CachedBlockMask(
        cache_lengths_B=torch.tensor(lengths), cache_width=6, num_finished=num_finished, num_current=num_current
    )
    expected = torch.stack([brute_cached_block(n, 6, num_finished, num_current) for n in lengths])[:, None]
    assert torch.equal(spec.dense(), expected)
    assert torch.equal(joined_parts(spec), expected)
    assert spec.num_allowed_pairs() == expected[2].sum()


def test_a_cached_block_sees_what_a_noised_block_sees_in_training():
    k, b = 4, 2
    trained = BlockDiffusionMask(length=12, block_size=k).dense()[0, 0]
    behind_cache = CachedBlockMask(
        cache_lengths_B=torch.tensor([(b - 1) * k]), cache_width=(b - 1) * k, num_finished=k, num_current=k
    ).dense()[0, 0]
    noised, clean = slice(12 + b * k, 12 + (b + 1) * k), slice((b - 1) * k, b * k)
    keys = [*range(b * k), *range(noised.start, noised.stop)]
    assert torch.equal(behind_cache[k:], trained[noised][:, keys])
    assert torch.equal(behind_cache[:k], trained[clean][:, keys])


@pytest.mark.parametrize(("num_causal", "num_block"), [(5, 0), (0, 4), (3, 4), (1, 0)])
def test_cached_dense_equals_loops(num_causal, num_block):
    lengths = [0, 3, 6]
    spec = CachedMask(cache_lengths_B=torch.tensor(lengths), cache_width=6, num_causal=num_causal, num_block=num_block)
    expected = torch.stack([brute_cached(n, 6, num_causal, num_block) for n in lengths])[:, None]
    assert torch.equal(spec.dense(), expected)
    assert torch.equal(joined_parts(spec), expected)
    assert spec.num_allowed_pairs() == expected[2].sum()


@pytest.mark.parametrize(
    "spec",
    [
        CausalMask(length=600),
        SetBlockMask(length=600, block_size=7),
        FullMask(length=600),
        BlockDiffusionMask(length=600, block_size=7),
    ],
)
def test_parts_of_long_rows_equal_dense(spec):
    assert torch.equal(joined_parts(spec), spec.dense())


def test_parts_of_long_rows_with_documents_equal_dense():
    docs = documents([[100, 400, 100], [599, 1]])
    for spec in (
        CausalMask(length=600, documents_BL=docs),
        SetBlockMask(length=600, block_size=9, documents_BL=docs),
        BlockDiffusionMask(length=600, block_size=9, documents_BL=docs),
    ):
        assert len(spec.parts(device=torch.device("cpu"), dtype=torch.float32)) > 1
        assert torch.equal(joined_parts(spec), spec.dense())


@given(length=st.integers(1, 60), k=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_pair_counts_in_closed_form(length, k):
    causal, doubled = CausalMask(length=length), SetBlockMask(length=length, block_size=k)
    assert causal.num_allowed_pairs() == causal.dense().sum()
    assert doubled.num_allowed_pairs() == doubled.dense().sum()
    for spec in (FullMask(length=length), BlockDiffusionMask(length=length, block_size=k)):
        assert spec.num_allowed_pairs() == spec.dense().sum()
    if length % k == 0:
        assert doubled.num_allowed_pairs() == length * (length + 1) // 2 + length * k + length * (length - k) // 2


def test_every_query_sees_itself():
    for kind in (SetBlockMask, BlockDiffusionMask):
        spec = kind(length=15, block_size=4, documents_BL=documents(ROWS))
        assert spec.dense().diagonal(dim1=-2, dim2=-1).all()


def test_renderings_are_shared_and_moving_forgets_them():
    spec = CausalMask(length=15, documents_BL=documents(ROWS))
    cpu = torch.device("cpu")
    assert spec.parts(device=cpu, dtype=torch.float32) is spec.parts(device=cpu, dtype=torch.float32)
    assert spec.parts(device=cpu, dtype=torch.bfloat16)[0].bias.dtype == torch.bfloat16
    assert spec.flex_block_mask(device="cpu") is spec.flex_block_mask(device="cpu")
    moved = spec.to("meta")
    assert isinstance(moved, CausalMask)
    assert moved.documents_BL.device.type == "meta"
    assert moved.parts(device=torch.device("meta"), dtype=torch.float32)[0].bias.device.type == "meta"


@pytest.mark.parametrize("rows", [None, [[100, 100, 56], [255, 1]]])
def test_flex_block_mask_equals_dense(rows):
    docs = None if rows is None else documents(rows)
    for spec in (
        CausalMask(length=256, documents_BL=docs),
        SetBlockMask(length=256, block_size=16, documents_BL=docs),
        FullMask(length=256, documents_BL=docs),
        BlockDiffusionMask(length=256, block_size=16, documents_BL=docs),
    ):
        block_mask = spec.flex_block_mask(device="cpu")
        blocks = block_mask.to_dense()
        dense = spec.dense()
        any_allowed = dense.unflatten(-1, (-1, 128)).any(-1).unflatten(-2, (-1, 128)).any(-2)
        assert torch.equal(blocks.bool(), any_allowed)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_positions_restart_with_each_document(lengths):
    expected = [position for n in lengths for position in range(n)]
    assert document_positions(documents([lengths])).tolist() == [expected]

"""The Set Block Decoding loss. Numbers in test names are those of the invariants of arXiv 2509.04185 in our sheet."""

import pytest
import torch
from torch.nn import functional as F

from raydist.config.registries import OBJECTIVES
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import CachedMask, CausalMask
from raydist.objectives.next_token import NextTokenConfig
from raydist.objectives.set_block import SetBlockConfig
from raydist.sampling.kv_cache import KvCache
from tests.sampling.decoders import MASK_ID, tiny_decoder

IDS = TokenIds(vocab_size=12, bos=None, eos=None, mask=MASK_ID, pad=None)
LENGTH = 13


def random_rows(num_rows, *, length=LENGTH, step=3, first_row=0, documents=None, loss_mask=None):
    generator = torch.Generator().manual_seed(1)
    shape = (num_rows, length + 1)
    return Rows(
        step=step,
        tokens_BS=torch.randint(0, MASK_ID, shape, generator=generator),
        documents_BS=torch.zeros(shape, dtype=torch.int32) if documents is None else documents,
        loss_mask_BS=loss_mask,
        rows_B=torch.arange(first_row, first_row + num_rows),
        epochs_B=torch.zeros(num_rows, dtype=torch.int64),
    )


def rng_of(rows, *, seed=0):
    return RowRng(seed=seed, step=rows.step, epochs_B=rows.epochs_B, rows_B=rows.rows_B)


def objective_of(*, block_size=None, **fields):
    if block_size is not None:
        fields = {"block_size_min": block_size, "block_size_max": block_size}
    return SetBlockConfig(**fields).build(IDS)


def corrupted(rows, **fields):
    objective = objective_of(**fields)
    return objective, objective.corrupt(rows, rng_of(rows))


def test_loss_equals_the_paper_written_plainly():
    """One cross entropy over [B, 2L] targets with an ignore index where a noised token is not masked (eq. 14)."""
    rows = random_rows(3)
    objective, noised = corrupted(rows, block_size=4)
    decoder = tiny_decoder()
    tokens_BL = noised.inputs["tokens_BL"]
    targets = torch.full_like(tokens_BL, -100)
    targets[:, :LENGTH] = rows.tokens_BS[:, 1:]
    is_mask = tokens_BL[:, LENGTH:] == MASK_ID
    targets[:, LENGTH:][is_mask] = rows.tokens_BS[:, :-1][is_mask]
    expected = F.cross_entropy(decoder.logits(**noised.inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
    assert 0 < is_mask.sum() < is_mask.numel()
    assert (loss.sums["targets"] / noised.counts["targets"]).item() == pytest.approx(expected.item(), rel=1e-6)
    assert noised.counts["targets"] == (targets >= 0).sum().item()
    share = loss.metrics["masked_per_ntp"]
    assert (share.total / share.count).item() == pytest.approx(is_mask.sum().item() / (3 * LENGTH))


def test_the_masked_weight_weighs_sum_and_count_but_no_metric():
    rows = random_rows(3)
    plain, plain_noised = corrupted(rows)
    weighed, noised = corrupted(rows, masked_weight=0.25)
    decoder = tiny_decoder()
    before = plain.combine(decoder(**plain_noised.inputs, terms=plain.terms(plain_noised)))
    after = weighed.combine(decoder(**noised.inputs, terms=weighed.terms(noised)))
    ntp, matp = before.metrics["loss/ntp"], before.metrics["loss/matp"]
    assert noised.counts["targets"] == (ntp.count + 0.25 * matp.count).item()
    assert after.sums["targets"].item() == pytest.approx((ntp.total + 0.25 * matp.total).item(), rel=1e-6)
    for name in ("loss/ntp", "loss/matp"):
        assert after.metrics[name].total.item() == pytest.approx(before.metrics[name].total.item(), rel=1e-6)


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_01_clean_half_is_the_plain_causal_model(block_size):
    rows = random_rows(2)
    objective, noised = corrupted(rows, block_size=block_size)
    decoder = tiny_decoder()
    plain = NextTokenConfig().build(IDS)
    plain_noised = plain.corrupt(rows, rng_of(rows))
    clean = decoder.logits(**noised.inputs)[:, :LENGTH]
    torch.testing.assert_close(clean, decoder.logits(**plain_noised.inputs), rtol=1e-10, atol=1e-10)
    gradients = []
    for one, batch in ((objective, noised), (plain, plain_noised)):
        decoder.zero_grad()
        decoder(**batch.inputs, terms=one.terms(batch)[:1])[0].loss_sum.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in decoder.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_02_no_leakage():
    block_size = 4
    _, noised = corrupted(random_rows(1), block_size=block_size)
    decoder = tiny_decoder()
    tokens_BL = noised.inputs["tokens_BL"]
    before = decoder.logits(**noised.inputs)
    block_of = torch.arange(LENGTH) // block_size
    for changed in range(2 * LENGTH):
        other = tokens_BL.clone()
        other[0, changed] = (other[0, changed] + 1) % MASK_ID
        after = decoder.logits(**{**noised.inputs, "tokens_BL": other})
        moved = (after - before).abs().amax(dim=-1)[0] > 1e-12
        position = changed % LENGTH
        if changed < LENGTH:
            may_move = torch.cat([torch.arange(LENGTH) >= position, block_of > block_of[position]])
        else:
            may_move = torch.cat([torch.zeros(LENGTH, dtype=torch.bool), block_of == block_of[position]])
        assert torch.equal(moved, may_move)


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_03_training_and_decoding_see_the_same(block_size):
    _, noised = corrupted(random_rows(2), block_size=block_size)
    decoder = tiny_decoder()
    clean, copy = noised.inputs["tokens_BL"].split(LENGTH, dim=1)
    trained = decoder.logits(**noised.inputs)[:, LENGTH:]
    for start in range(0, LENGTH, block_size):
        stop = min(start + block_size, LENGTH)
        positions = torch.arange(stop)[None]
        lengths_B = torch.zeros(2, dtype=torch.int64)
        fed = torch.cat([clean[:, :start], copy[:, start:stop]], dim=1)
        mask = CachedMask(cache_lengths_B=lengths_B, cache_width=0, num_causal=start, num_block=stop - start)
        uncached = decoder.logits(fed, positions, mask)[:, start:]
        torch.testing.assert_close(trained[:, start:stop], uncached, rtol=1e-10, atol=1e-10)
        if start == 0:
            continue
        cache = KvCache(batch_size=2, capacity=stop)
        with torch.no_grad():
            decoder.logits(clean[:, :start], positions[:, :start], CausalMask(length=start), cache)
            cache.commit(lengths_B + start)
            mask = CachedMask(cache_lengths_B=cache.lengths_B, cache_width=start, num_causal=0, num_block=stop - start)
            cached = decoder.logits(copy[:, start:stop], positions[:, start:], mask, cache)
        torch.testing.assert_close(trained[:, start:stop], cached, rtol=1e-10, atol=1e-10)


class NeverMasks(RowRng):
    eta = 0.0

    def uniform(self, purpose, num_positions):
        draws = super().uniform(purpose, num_positions)
        return torch.full_like(draws, self.eta) if purpose == "set_block/eta" else draws


class AlwaysMasks(NeverMasks):
    eta = 1.0


def test_04_mask_probability_zero_and_one():
    rows, objective = random_rows(4), objective_of(block_size=4)
    for kind, num_masked in ((NeverMasks, 0), (AlwaysMasks, 4 * LENGTH)):
        noised = objective.corrupt(rows, kind(0, rows.step, rows.epochs_B, rows.rows_B))
        _, matp = objective.terms(noised)
        assert matp.targets_T.numel() == num_masked
        assert noised.counts["targets"] == 4 * LENGTH + num_masked
    decoder = tiny_decoder()
    all_masked = decoder.logits(**noised.inputs)[:, LENGTH:]
    other_tokens = noised.inputs["tokens_BL"].clone()
    other_tokens[:, 8:LENGTH] = (other_tokens[:, 8:LENGTH] + 1) % MASK_ID
    other = decoder.logits(**{**noised.inputs, "tokens_BL": other_tokens})[:, LENGTH:]
    assert torch.equal(all_masked[:, :12], other[:, :12])
    assert not torch.equal(all_masked[:, 12:], other[:, 12:])


def test_06_masked_counts_are_uniform():
    num_rows, length, block = 22_000, 10, 4
    rows = random_rows(num_rows, length=length)
    _, noised = corrupted(rows, block_size=block)
    masked = noised.inputs["tokens_BL"][:, length:] == MASK_ID
    for counts_B, most in ((masked.sum(-1), length), (masked[:, 4:8].sum(-1), block)):
        counts = torch.bincount(counts_B, minlength=most + 1).double()
        expected = num_rows / (most + 1)
        assert ((counts - expected) ** 2 / expected).sum() < most + 4 * (2 * most) ** 0.5
    assert masked.double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_07_block_size_one_sees_the_next_token_conditioning():
    """With k = 1 a noised position depends on exactly the clean tokens before it and on itself."""
    _, noised = corrupted(random_rows(1), block_size=1)
    seen = noised.inputs["mask"].dense()[0, 0, LENGTH:]
    before = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)
    assert torch.equal(seen, torch.cat([before, torch.eye(LENGTH, dtype=torch.bool)], dim=1))


def test_noise_is_the_same_for_every_slicing_of_the_batch():
    rows = random_rows(8)
    objective, whole = corrupted(rows)
    for pieces in ([(0, 4), (4, 8)], [(0, 1), (1, 3), (3, 8)]):
        parts = [objective.corrupt(rows.narrow(a, b), rng_of(rows).narrow(a, b)) for a, b in pieces]
        assert torch.equal(torch.cat([part.inputs["tokens_BL"] for part in parts]), whole.inputs["tokens_BL"])
        assert {part.inputs["mask"].block_size for part in parts} == {whole.inputs["mask"].block_size}
        assert sum(part.counts["targets"] for part in parts) == whole.counts["targets"]


def test_one_block_size_per_step_over_the_whole_range():
    sizes = [corrupted(random_rows(1, step=step))[1].inputs["mask"].block_size for step in range(400)]
    assert set(sizes) == set(range(2, 17))


def test_noise_changes_with_the_epoch_and_the_seed():
    rows, objective = random_rows(4), objective_of()
    first = objective.corrupt(rows, rng_of(rows)).inputs["tokens_BL"]
    later = RowRng(seed=0, step=rows.step, epochs_B=rows.epochs_B + 1, rows_B=rows.rows_B)
    assert not torch.equal(first, objective.corrupt(rows, later).inputs["tokens_BL"])
    assert not torch.equal(first, objective.corrupt(rows, rng_of(rows, seed=1)).inputs["tokens_BL"])


def test_excluded_tokens_are_neither_masked_nor_targets():
    loss_mask = torch.ones(6, LENGTH + 1, dtype=torch.bool)
    loss_mask[:, :5] = False
    rows = random_rows(6, loss_mask=loss_mask)
    objective, noised = corrupted(rows, block_size=4)
    copy = noised.inputs["tokens_BL"][:, LENGTH:]
    assert torch.equal(copy[:, :5], rows.tokens_BS[:, :5])
    ntp, matp = objective.terms(noised)
    assert set((ntp.positions_T % (2 * LENGTH)).tolist()) == set(range(4, LENGTH))
    assert (matp.positions_T % (2 * LENGTH)).min() >= LENGTH + 5
    assert matp.targets_T.numel() == (copy == MASK_ID).sum() > 0


def test_documents_restart_positions_and_do_not_see_each_other():
    documents = torch.zeros(1, LENGTH + 1, dtype=torch.int32)
    documents[:, 6:] = 1
    rows = random_rows(1, documents=documents)
    objective, noised = corrupted(rows, block_size=4)
    expected = [*range(6), *range(LENGTH - 6)]
    assert noised.inputs["positions_BL"].tolist() == [expected * 2]
    ntp, _ = objective.terms(noised)
    assert 5 not in ntp.positions_T.tolist()
    assert 6 in ntp.positions_T.tolist()
    decoder = tiny_decoder()
    other = noised.inputs["tokens_BL"].clone()
    first = torch.cat([documents[0, :-1] == 0] * 2)
    other[0, first] = (other[0, first] + 1) % MASK_ID
    changed = (decoder.logits(**{**noised.inputs, "tokens_BL": other}) - decoder.logits(**noised.inputs))[0]
    assert torch.equal(changed.abs().amax(-1) > 0, first)


def test_mask_id_missing_is_refused_with_a_fix():
    with pytest.raises(ConfigError) as caught:
        SetBlockConfig().build(TokenIds(vocab_size=12, bos=None, eos=None, mask=None, pad=None))
    assert "mask id missing" in str(caught.value)
    assert caught.value.fix


def test_empty_range_of_block_sizes_is_refused():
    with pytest.raises(ConfigError, match="block_size_min=9 is above block_size_max=3"):
        OBJECTIVES.parse({"name": "set_block", "block_size_min": 9, "block_size_max": 3})

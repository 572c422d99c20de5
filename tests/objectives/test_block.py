"""The loss of block diffusion (arXiv 2503.09573) against next-token prediction, brute force and closed forms."""

import itertools
import math

import pytest
import torch

from raydist.config.registries import OBJECTIVES
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import BlockCausalMask, BlockDiffusionMask
from raydist.objectives.block import BlockConfig
from raydist.objectives.next_token import NextTokenConfig
from tests.objectives.masked_cases import (
    IDS,
    LENGTH,
    Posterior,
    all_patterns,
    check_slicing,
    forced,
    gauss_legendre,
    random_rows,
    rng_of,
    rows_of,
)
from tests.sampling.decoders import MASK_ID, tiny_decoder
from tests.sampling.oracle import entropy, random_law


def objective_of(**fields):
    return OBJECTIVES.parse({"name": "block", **fields}).build(IDS)


def corrupted(rows, **fields):
    objective = objective_of(**fields)
    return objective, objective.corrupt(rows, rng_of(rows))


def loss_and_gradients(objective, rows, decoder):
    noised = objective.corrupt(rows, rng_of(rows))
    decoder.zero_grad()
    loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
    (loss.sums["targets"] / noised.counts["targets"]).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    return loss.sums["targets"].item(), noised.counts["targets"], gradients


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_block_size_one_with_all_masked_and_shifted_is_next_token_prediction(family):
    documents = torch.zeros(3, LENGTH + 1, dtype=torch.int32)
    documents[1, 5:] = 1
    loss_mask = torch.ones(3, LENGTH + 1, dtype=torch.bool)
    loss_mask[2, :4] = False
    rows = random_rows(3, documents=documents, loss_mask=loss_mask)
    decoder = tiny_decoder(family=family)
    block = objective_of(block_size=1, mask_rate_min=1.0, mask_rate_max=1.0, shift=True)
    found = loss_and_gradients(block, rows, decoder)
    shorter = rows_of(rows.tokens_BS[:, :-1], documents=documents[:, :-1], loss_mask=loss_mask[:, :-1])
    expected = loss_and_gradients(NextTokenConfig().build(IDS), shorter, decoder)
    assert found[:2] == (pytest.approx(expected[0], rel=1e-12), expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-7, atol=1e-9)


def test_block_size_one_unshifted_has_the_conditioning_of_next_token_prediction():
    _, noised = corrupted(random_rows(1), block_size=1, mask_rate_min=1.0)
    assert (noised.inputs["tokens_BL"][:, LENGTH:] == MASK_ID).all()
    seen = noised.inputs["mask"].dense()[0, 0, LENGTH:]
    before = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)
    assert torch.equal(seen, torch.cat([before, torch.eye(LENGTH, dtype=torch.bool)], dim=1))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weighting", ["jump_rate", "none"])
def test_loss_equals_the_formula_on_dense_logits(weighting, shift):
    rows = random_rows(4)
    objective, noised = corrupted(rows, block_size=4, weighting=weighting, shift=shift, mask_rate_min=0.2)
    decoder, block_size = tiny_decoder(), 4
    assert isinstance(noised.inputs["mask"], BlockDiffusionMask)
    clean_BL, copy_BL = noised.inputs["tokens_BL"].split(LENGTH, dim=1)
    assert torch.equal(clean_BL, rows.tokens_BS[:, :-1])
    rates = objective.mask_rates(rng_of(rows), length=LENGTH).double()
    assert torch.equal(rates[:, 0:4], rates[:, :1].expand(-1, 4))
    assert rates.min() > 0.2
    log_probs, masked, total = decoder.logits(**noised.inputs).log_softmax(-1), copy_BL == MASK_ID, 0.0
    for row, i in masked.nonzero().tolist():
        read_at = LENGTH + i
        if shift:
            read_at = i - 1 if i % block_size == 0 else LENGTH + i - 1
        weight = 1 / rates[row, i] if weighting == "jump_rate" else 1.0
        total = total - weight * log_probs[row, read_at, clean_BL[row, i]].detach()
    assert 0 < masked.sum() < masked.numel()
    loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
    assert loss.sums["targets"].item() == pytest.approx(float(total), rel=1e-6)
    count = 4 * (LENGTH - shift) if weighting == "jump_rate" else int(masked.sum())
    assert noised.counts == {"targets": float(count)}


def enumerated(clean, *, block_size, ids, num_nodes=8, **fields):
    """All mask patterns at all quadrature nodes, as one batch: objective, batch, and each row's probability mass."""
    length = len(clean)
    objective = BlockConfig(block_size=block_size, rates="uniform", mask_rate_min=0.0, **fields).build(ids)
    patterns, (nodes, node_weights) = all_patterns(length), gauss_legendre(num_nodes)
    pattern_R, rate_R = patterns.repeat(num_nodes, 1), nodes.repeat_interleave(len(patterns))
    rows = rows_of(torch.tensor([[*clean, 0]]).expand(len(pattern_R), -1))
    draws = forced(rows, rate=1 - rate_R[:, None], mask=torch.where(pattern_R, 0.0, 1.0))
    noised = objective.corrupt(rows, draws)
    num_masked = pattern_R.sum(-1)
    mass_R = node_weights.repeat_interleave(len(patterns)) * rate_R**num_masked * (1 - rate_R) ** (length - num_masked)
    return objective, noised, mass_R


def test_mean_loss_equals_brute_force():
    """Each block alone behind its clean past: the mean over rates of r^(m-1) (1-r)^(n-m) is B(m, n - m + 1)."""
    decoder, block_size, clean = tiny_decoder(), 2, [3, 1, 4, 1, 5]
    objective, noised, mass_R = enumerated(clean, block_size=block_size, ids=IDS)
    (result,) = decoder(**noised.inputs, terms=objective.terms(noised))
    row_T = result.term.positions_T // (2 * len(clean))
    found = float((mass_R[row_T] * result.term.weights_T * result.losses_T).sum())
    expected = 0.0
    for start in range(0, len(clean), block_size):
        block = clean[start : start + block_size]
        for pattern in all_patterns(len(block)).tolist():
            if not any(pattern):
                continue
            size, num_masked = len(block), sum(pattern)
            noised_block = [MASK_ID if is_masked else token for token, is_masked in zip(block, pattern, strict=True)]
            text = torch.tensor([clean[:start] + noised_block])
            stop = text.shape[1]
            mask = BlockCausalMask(length=stop, block_size=block_size)
            log_probs = decoder.logits(text, torch.arange(stop)[None], mask)[0].detach().log_softmax(-1)
            beta = math.gamma(num_masked) * math.gamma(size - num_masked + 1) / math.gamma(size + 1)
            expected -= beta * sum(
                float(log_probs[start + i, block[i]]) for i, is_masked in enumerate(pattern) if is_masked
            )
    assert found == pytest.approx(expected, rel=1e-5)


def mean_bound(clean, *, law, block_size, smoothing=0.0):
    """The mean loss of a text whose tokens are answered with the conditionals of a law over binary tokens."""
    length, mask_id = law.ndim, 2
    ids = TokenIds(vocab_size=3, bos=None, eos=None, mask=mask_id, pad=None)
    objective, noised, mass_R = enumerated(clean, block_size=block_size, ids=ids, num_nodes=4)
    assert objective.is_bound
    (term,) = objective.terms(noised)
    oracle, total = Posterior(law, mask_id=mask_id, smoothing=smoothing), 0.0
    copies = noised.inputs["tokens_BL"][:, length:].tolist()
    for position, target, weight in zip(term.positions_T.tolist(), term.targets_T, term.weights_T, strict=True):
        row, i = position // (2 * length), position % (2 * length) - length
        start = i // block_size * block_size
        shown = [*clean[:start], *copies[row][start : start + block_size], *[mask_id] * length]
        total += float(mass_R[row] * weight) * oracle.cost(shown[:length], i, int(target))
    return total


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_with_exact_conditionals_the_bound_is_tight_for_every_block_size(block_size):
    law = random_law((2, 2, 2, 2), seed=1, sharpness=2.0)
    for clean in ((1, 0, 1, 1), (0, 0, 1, 0)):
        assert mean_bound(clean, law=law, block_size=block_size) == pytest.approx(-float(law[clean].log()), rel=1e-5)


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_mean_bound_is_the_entropy_with_exact_conditionals_and_above_it_with_others(block_size):
    law = random_law((2, 2, 2), seed=2, sharpness=2.0)
    means = [
        sum(
            float(law[clean]) * mean_bound(clean, law=law, block_size=block_size, smoothing=smoothing)
            for clean in itertools.product(range(2), repeat=3)
        )
        for smoothing in (0.0, 0.3)
    ]
    assert means[0] == pytest.approx(entropy(law), rel=1e-5)
    assert means[1] > entropy(law) + 0.01


def test_for_blocks_of_one_token_every_range_of_rates_has_the_same_mean():
    """At rate r a token is masked with probability r and weighted by 1 / r."""
    objective = objective_of(block_size=1, mask_rate_min=0.4, mask_rate_max=0.7)
    assert objective.is_bound
    assert not objective_of(block_size=2, mask_rate_min=0.4, mask_rate_max=0.7).is_bound
    rows = random_rows(4000, length=3)
    (term,) = objective.terms(objective.corrupt(rows, rng_of(rows)))
    assert float(term.weights_T.sum()) / (4000 * 3) == pytest.approx(1.0, abs=4 * (0.9 / 12_000) ** 0.5)
    assert 1 / 0.7 - 1e-6 <= term.weights_T.min() < term.weights_T.max() <= 1 / 0.4


@pytest.mark.parametrize("kind", ["uniform", "antithetic", "stratified"])
def test_the_number_of_masks_of_a_block_is_uniform(kind):
    num_rows, block_size = 10_000, 4
    rows = random_rows(num_rows, length=8)
    _, noised = corrupted(rows, block_size=block_size, rates=kind, mask_rate_min=0.0)
    masked = noised.inputs["tokens_BL"][:, 8:] == MASK_ID
    for block in (masked[:, :4], masked[:, 4:]):
        counts = torch.bincount(block.sum(-1), minlength=block_size + 1).double()
        expected = num_rows / (block_size + 1)
        assert ((counts - expected) ** 2 / expected).sum() < block_size + 4 * (2 * block_size) ** 0.5


def test_noise_is_the_same_for_every_slicing_of_the_batch():
    check_slicing(objective_of(block_size=4), random_rows(8))


@pytest.mark.parametrize("shift", [False, True])
def test_excluded_tokens_and_borders_of_documents(shift):
    documents, loss_mask = torch.zeros(6, LENGTH + 1, dtype=torch.int32), torch.ones(6, LENGTH + 1, dtype=torch.bool)
    documents[:, 6:], loss_mask[:, :3] = 1, False
    rows = random_rows(6, documents=documents, loss_mask=loss_mask)
    objective = objective_of(block_size=4, shift=shift)
    noised = objective.corrupt(rows, forced(rows, mask=torch.zeros(6, 1)))
    copy = noised.inputs["tokens_BL"][:, LENGTH:]
    never = [0, 1, 2, 6] if shift else [0, 1, 2]
    assert (copy[0] != MASK_ID).nonzero()[:, 0].tolist() == never
    assert noised.counts["targets"] == 6 * (LENGTH - len(never))
    assert noised.inputs["positions_BL"].tolist() == [[*range(6), *range(LENGTH - 6)] * 2] * 6
    (term,) = objective.terms(noised)
    read_in_clean_half = (term.positions_T[term.positions_T < 2 * LENGTH] < LENGTH).nonzero().numel()
    assert read_in_clean_half == (3 if shift else 0)  # tokens 4, 8 and 12, the first of their blocks


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="mask id missing"):
        BlockConfig().build(TokenIds(vocab_size=12, bos=None, eos=None, mask=None, pad=None))
    with pytest.raises(ConfigError, match=r"mask_rate_min=0\.8 is above mask_rate_max=0\.3"):
        OBJECTIVES.parse({"name": "block", "mask_rate_min": 0.8, "mask_rate_max": 0.3})

"""What resampling a window of two does to its law, on matrices, and what training makes of the two conditionals.

Numbers in test names are those of the invariants of arXiv 2506.06215 in our sheet.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.target_offsets import TargetOffsets
from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.objectives.resample import ResampleConfig
from tests.sampling.oracle import random_law


def conditionals(joint):
    """``p(b | a)`` as ``[a, b]`` and ``p(a | b)`` as ``[b, a]``."""
    return joint / joint.sum(dim=1, keepdim=True), (joint / joint.sum(dim=0)).T


def transition(next_ab, previous_ba):
    """``P[(a, b), (a', b')] = r(a' | b) c(b' | a')``, ``[V^2, V^2]``."""
    size = len(next_ab)
    steps = previous_ba[:, :, None] * next_ab[None]
    return steps[None].expand(size, -1, -1, -1).reshape(size * size, size * size)


def total_variation(p, q):
    return float((p - q).abs().sum(dim=-1).max() / 2)


def perturbed(p, *, error, seed):
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
    return p * torch.exp(error * noise) / (p * torch.exp(error * noise)).sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_05_the_joint_law_is_stationary(size):
    joint = random_law((size, size), seed=size)
    moved = joint.flatten() @ transition(*conditionals(joint))
    torch.testing.assert_close(moved, joint.flatten(), rtol=1e-12, atol=1e-15)


def test_05_not_when_proposals_are_greedy():
    joint = random_law((3, 3), seed=0)
    next_ab, previous_ba = conditionals(joint)
    greedy_ba = torch.zeros_like(previous_ba).scatter(1, previous_ba.argmax(dim=1, keepdim=True), 1.0)
    assert total_variation(joint.flatten() @ transition(next_ab, greedy_ba), joint.flatten()) > 0.05


def test_06_the_initial_error_is_forgotten_geometrically():
    """20 symbols, 20 % noise on p(a): the sheet's errors are 0.079, 0.0106, 0.0024, 0.0006, 0.0002."""
    rows = []
    for seed in range(10):
        joint = random_law((20, 20), seed=seed, sharpness=1.0)
        next_ab, previous_ba = conditionals(joint)
        law = (perturbed(joint.sum(dim=1), error=0.2, seed=seed)[:, None] * next_ab).flatten()
        step, errors = transition(next_ab, previous_ba), []
        for _ in range(5):
            errors.append(total_variation(law, joint.flatten()))
            law = law @ step
        rows.append(errors)
    means = torch.tensor(rows).mean(dim=0)
    assert 0.06 < means[0] < 0.1
    assert all(later < 0.35 * earlier for earlier, later in itertools.pairwise(means.tolist()))
    assert means[4] < 3e-4


def test_06_the_fixed_point_knows_nothing_of_the_first_law():
    joint = random_law((5, 5), seed=3)
    steps = torch.linalg.matrix_power(transition(*conditionals(joint)), 400)
    torch.testing.assert_close(steps, joint.flatten().expand_as(steps), rtol=1e-8, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 20), st.integers(0, 10_000), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_07_the_stationary_error_is_bounded(size, seed, next_error, previous_error):
    """``TV <= (e_c + e_r) / (1 - delta)`` with delta the Dobrushin coefficient of a -> b -> a'."""
    joint = random_law((size, size), seed=seed, sharpness=1.0)
    next_ab, previous_ba = conditionals(joint)
    c, r = (
        perturbed(next_ab, error=next_error, seed=seed + 1),
        perturbed(previous_ba, error=previous_error, seed=seed + 2),
    )
    kernel = c @ r
    stationary = torch.linalg.matrix_power(kernel, 4096)[0]
    delta = float((kernel[:, None] - kernel[None]).abs().sum(dim=-1).max() / 2)
    bound = (total_variation(c, next_ab) + total_variation(r, previous_ba)) / (1 - delta)
    assert total_variation(stationary, joint.sum(dim=1)) <= bound + 1e-9


NUM_SYMBOLS, ROW_TOKENS = 6, 25


def chain_rows(step_law, *, step, num_rows=32):
    generator = torch.Generator().manual_seed(step)
    columns = [torch.randint(0, NUM_SYMBOLS, (num_rows,), generator=generator)]
    for _ in range(ROW_TOKENS - 1):
        columns.append(torch.multinomial(step_law[columns[-1]], 1, generator=generator)[:, 0])
    tokens_BS = torch.stack(columns, dim=1)
    rows_B = torch.arange(num_rows)
    zeros_BS = torch.zeros_like(tokens_BS, dtype=torch.int32)
    return Rows(step, tokens_BS, zeros_BS, None, rows_B, torch.full_like(rows_B, step))


def chain_entropies(step_law):
    """Nats of the next token given the one before, and of the token between two, in the chain's stationary law."""
    law = step_law.double()
    stationary = torch.linalg.matrix_power(law, 200)[0]
    triples = stationary[:, None, None] * law[:, :, None] * law[None]
    between = triples / triples.sum(dim=1, keepdim=True)
    return (
        float(-(stationary[:, None] * law * law.log()).sum()),
        float(-(triples * between.log()).sum()),
    )


def test_statistical_previous_tokens_are_easier_than_next_ones():
    """On held-out rows of a Markov chain both learned cross entropies come near their entropies."""
    step_law = torch.softmax(
        2.0 * torch.randn(NUM_SYMBOLS, NUM_SYMBOLS, generator=torch.Generator().manual_seed(1)), dim=1
    )
    settings = ResampleConfig()
    objective = settings.build(TokenIds(vocab_size=NUM_SYMBOLS, bos=None, eos=None, mask=None, pad=None))
    config = DecoderConfig(
        family="llama",
        vocab_size=NUM_SYMBOLS,
        num_layers=1,
        width=24,
        hidden_width=48,
        num_heads=2,
        num_kv_heads=2,
        head_dim=12,
        rope_theta=10_000.0,
        input_features={"offset": TargetOffsets(settings.window).num_values},
    )
    decoder = Decoder(config)
    initialize(decoder, 0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-2, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for step in range(150):
        loss, count = evaluated(decoder, objective, chain_rows(step_law, step=step))
        optimizer.zero_grad()
        (loss.sums["targets"] / count).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        loss, _ = evaluated(decoder, objective, chain_rows(step_law, step=1000, num_rows=1000))
    ntp, ptp = ((m := loss.metrics[f"loss/{name}"]).total.item() / m.count.item() for name in ("ntp", "ptp"))
    next_nats, between_nats = chain_entropies(step_law)
    assert ptp < ntp - 0.2
    assert next_nats - 0.03 < ntp < next_nats + 0.1
    assert between_nats - 0.05 < ptp < between_nats + 0.2


def evaluated(decoder, objective, rows):
    noised = objective.corrupt(rows, RowRng(0, rows.step, rows.epochs_B, rows.rows_B))
    return objective.combine(decoder(**noised.inputs, terms=objective.terms(noised))), noised.counts["targets"]

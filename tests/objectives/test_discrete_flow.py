"""The Discrete Flow Matching loss. Numbers in test names are those of the invariants of arXiv 2407.15595 in our sheet; those
with a G prefix are of arXiv 2412.03487.
"""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from raydist.config.registries import OBJECTIVES, PATHS
from raydist.core.errors import ConfigError
from raydist.core.rows import Rows
from raydist.core.terms import CrossEntropyTerm, ElboTerm, PathElboTerm
from raydist.core.token_ids import TokenIds
from raydist.models.heads import evaluate_terms
from tests.objectives.test_set_block import IDS, LENGTH, random_rows, rng_of
from tests.sampling.decoders import MASK_ID, tiny_decoder
from tests.sampling.flow_oracle import MASK_SOURCE, UNIFORM_SOURCE, ids_of, path_of, posteriors
from tests.sampling.oracle import entropy, random_law

METRIC = {"name": "metric", "metric": {"name": "values"}}
PREFIX = {"coupling": {"name": "prefix"}}


def objective_of(path=MASK_SOURCE, *, ids=IDS, **fields):
    return OBJECTIVES.parse({"name": "discrete_flow", "path": path, **fields}).build(ids)


def corrupted(rows, path=MASK_SOURCE, **fields):
    objective = objective_of(path, **fields)
    return objective, objective.corrupt(rows, rng_of(rows))


def rows_of_law(law, num_rows, *, seed=0):
    """Rows ``[x_1 .. x_N, padding token]`` drawn from a law; the objective drops a row's last token."""
    picked = torch.multinomial(law.flatten(), num_rows, replacement=True, generator=torch.Generator().manual_seed(seed))
    clean_BN = torch.tensor(list(itertools.product(range(law.shape[0]), repeat=law.ndim)))[picked]
    tokens_BS = torch.cat([clean_BN, clean_BN[:, :1]], dim=1)
    return Rows(
        step=0,
        tokens_BS=tokens_BS,
        documents_BS=torch.zeros(tokens_BS.shape, dtype=torch.int32),
        loss_mask_BS=None,
        rows_B=torch.arange(num_rows),
        epochs_B=torch.zeros(num_rows, dtype=torch.int64),
    )


def test_loss_equals_the_paper_written_plainly():
    """Eq. 28 with a copy loss: cross entropy to x1 at every position; without it, at the masks."""
    rows, decoder = random_rows(4), tiny_decoder()
    for copy_loss in (True, False):
        objective, noised = corrupted(rows, copy_loss=copy_loss)
        targets = rows.tokens_BS[:, :-1].clone()
        if not copy_loss:
            targets[noised.inputs["tokens_BL"] != MASK_ID] = -100
        expected = F.cross_entropy(decoder.logits(**noised.inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
        assert (loss.sums["targets"] / noised.counts["targets"]).item() == pytest.approx(expected.item(), rel=1e-6)
        assert noised.counts["targets"] == (targets >= 0).sum()
        assert "bound_nats_per_token" not in loss.metrics


@pytest.mark.parametrize("path", [MASK_SOURCE, UNIFORM_SOURCE, METRIC], ids=["mask", "uniform", "metric"])
def test_03_ends_of_the_path(path):
    """p_0 is the source, p_1 the data."""
    rows = random_rows(200)
    early = corrupted(rows, path, time={"low": 0.0, "high": 1e-9})[1].inputs["tokens_BL"]
    late = corrupted(rows, path, time={"low": 1 - 1e-7, "high": 1.0})[1].inputs["tokens_BL"]
    assert (late == rows.tokens_BS[:, :-1]).double().mean() > 0.999
    if path is MASK_SOURCE:
        assert (early == MASK_ID).all()
    else:
        counts = torch.bincount(early.flatten(), minlength=12).double()
        assert counts[MASK_ID] == 0
        expected = counts.sum() / MASK_ID
        assert ((counts[:MASK_ID] - expected) ** 2 / expected).sum() < MASK_ID + 4 * (2 * MASK_ID) ** 0.5


@pytest.mark.parametrize("path", [MASK_SOURCE, UNIFORM_SOURCE], ids=["mask", "uniform"])
@pytest.mark.parametrize("loss", ["ce", "elbo"])
def test_10_the_minimum_is_the_posterior(path, loss):
    """Tabular logits, one row of them per state, trained at one time on the exact law of (x1, x_t): both losses."""
    law, time = random_law((3, 3), seed=1), 0.5
    flow, ids = path_of(path, 3)
    states = torch.tensor(list(itertools.product(range(ids.vocab_size), repeat=2)))
    exact = posteriors(law, flow, states, time).nan_to_num(0.0)
    rows = rows_of_law(law, 40_000)
    objective = objective_of(path, ids=ids, loss=loss, time={"low": time, "high": time + 1e-6})
    noised = objective.corrupt(rows, rng_of(rows))
    (term,) = objective.terms(noised)
    state_of_row = noised.inputs["tokens_BL"] @ torch.tensor([ids.vocab_size, 1])
    weight_VD = torch.eye(ids.vocab_size, dtype=torch.float64)

    def gradient(table):
        hidden_BLD = table[state_of_row]
        result = evaluate_terms(hidden_BLD, terms=[term], heads={"lm": weight_VD})[0]
        return torch.autograd.grad(result.loss_sum / len(rows), table)[0]

    logits = torch.full((len(states), 2, ids.vocab_size), -30.0, dtype=torch.float64)
    logits[..., :3] = exact.clamp(min=1e-13).log()
    at_minimum = gradient(logits.requires_grad_()).abs().max()
    away = gradient(torch.zeros_like(logits).requires_grad_()).abs().max()
    assert at_minimum < 0.01
    assert away > 5 * at_minimum


def test_G5_the_bound_of_the_mask_source_is_the_entropy():
    """With the exact posterior and times spread evenly over [0, 1)."""
    law = random_law((3, 3), seed=2)
    bound = bound_of(law, MASK_SOURCE)
    assert bound == pytest.approx(entropy(law), rel=0.02)
    assert bound_of(law, {**MASK_SOURCE, "schedule": {"name": "cosine"}}) == pytest.approx(bound, rel=0.02)  # G8
    assert bound_of(law, MASK_SOURCE, weighted=True) == pytest.approx(bound, rel=1e-5)
    assert bound_of(law, MASK_SOURCE, sharpness=0.6) > 1.02 * entropy(law)


def test_G5_G8_the_bound_of_a_uniform_source_is_above_the_entropy_whatever_the_schedule():
    """The flat source makes the token-dependent schedule the same for all tokens, so that both are changes of time."""
    law = random_law((3, 3), seed=2)
    path = {**UNIFORM_SOURCE, "schedule": {"name": "kinetic_optimal"}}
    bound = bound_of(law, path)
    assert bound > 1.2 * entropy(law)
    assert bound_of(law, path, sharpness=0.6) > 1.02 * bound
    token_dependent = {**UNIFORM_SOURCE, "schedule": {"name": "source_kinetic_optimal"}}
    assert bound_of(law, token_dependent) == pytest.approx(bound, rel=0.01)
    # rare events near t = 1 carry more of the linear schedule's bound, whose mean is therefore rougher
    assert bound_of(law, UNIFORM_SOURCE) == pytest.approx(bound, rel=0.05)


def bound_of(law, path, *, sharpness=1.0, weighted=False, num_rows=120_000):
    """Mean bound of a sequence in nats, from the objective's own draws and its own metric."""
    flow, ids = path_of(path, law.shape[0])
    settings = {"loss": "ce", "weighting": "jump_rate"} if weighted else {"loss": "elbo"}
    objective = objective_of(path, ids=ids, time={"low": 0.0, "high": 0.99999}, **settings)
    rows = rows_of_law(law, num_rows)
    noised = objective.corrupt(rows, rng_of(rows))
    (term,) = objective.terms(noised)
    tokens_BL = noised.inputs["tokens_BL"]
    if flow.absorbing_id is not None:
        answers_BLK = posteriors(law, flow, tokens_BL, 0.5)
    else:
        times_B = noised.inputs["time_BL"][:, 0].double()
        answers_BLK = torch.cat(
            [
                posterior_at_own_time(law, flow, part, times)
                for part, times in zip(tokens_BL.split(10_000), times_B.split(10_000), strict=True)
            ]
        )
    logits_BLV = torch.full((*tokens_BL.shape, ids.vocab_size), -1e4, dtype=torch.float64)
    logits_BLV[..., : law.shape[0]] = sharpness * answers_BLK.clamp(min=1e-300).log()
    heads = {"lm": torch.eye(ids.vocab_size, dtype=torch.float64)}
    loss = objective.combine(evaluate_terms(logits_BLV, terms=[term], heads=heads))
    metric = loss.metrics["bound_nats_per_token"]
    assert metric.count == noised.counts["targets"] == tokens_BL.numel()
    return float(metric.total / metric.count) * law.ndim


def posterior_at_own_time(law, flow, states_BN, times_B):
    """Like ``posteriors`` with another time in each row."""
    num_symbols = law.shape[0]
    symbols = torch.arange(num_symbols)[None].expand(len(times_B), -1)
    table_BKV = flow.probabilities(symbols, times_B[:, None].expand(-1, num_symbols))
    first, second = (
        table_BKV.gather(2, states_BN[:, i, None, None].expand(-1, num_symbols, 1))[..., 0] for i in range(2)
    )
    joint = law * first[:, :, None] * second[:, None, :]
    joint = joint / joint.sum((1, 2), keepdim=True)
    return torch.stack([joint.sum(2), joint.sum(1)], dim=1)


def test_G6_the_bound_is_a_weighted_cross_entropy_for_the_mask_source():
    rows, decoder = random_rows(4), tiny_decoder()
    schedule = {**MASK_SOURCE, "schedule": {"name": "polynomial", "power": 2}}
    objective, noised = corrupted(rows, schedule, loss="elbo")
    plain, plain_noised = corrupted(rows, schedule, weighting="jump_rate")
    assert torch.equal(noised.inputs["tokens_BL"], plain_noised.inputs["tokens_BL"])
    (elbo,), (ce,) = objective.terms(noised), plain.terms(plain_noised)
    times = noised.targets["times_T"]
    torch.testing.assert_close(ce.weights_T, 2 * times / (1 - times**2))
    # a model that gives the mask no probability
    logits = decoder.logits(**noised.inputs).detach()
    logits[..., MASK_ID] = -1e4
    heads = {"lm": torch.eye(12, dtype=torch.float64)}
    sums = [evaluate_terms(logits, terms=[term], heads=heads)[0].loss_sum for term in (elbo, ce)]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [MASK_SOURCE | PREFIX, UNIFORM_SOURCE | PREFIX, METRIC | PREFIX])
def test_given_positions_are_never_noised_and_carry_no_loss(path):
    loss_mask = torch.ones(50, LENGTH + 1, dtype=torch.bool)
    loss_mask[:, 6] = False
    rows = random_rows(50, loss_mask=loss_mask)
    objective, noised = corrupted(rows, path, time={"low": 0.0, "high": 0.01})
    given = PATHS.parse(path).coupling.given(rows.tokens_BS[:, :-1], rng_of(rows)) | ~loss_mask[:, :-1]
    assert 0 < given.double().mean() < 1
    tokens_BL = noised.inputs["tokens_BL"]
    assert torch.equal(tokens_BL[given], rows.tokens_BS[:, :-1][given])
    assert (tokens_BL[~given] != rows.tokens_BS[:, :-1][~given]).double().mean() > 0.7
    (term,) = objective.terms(noised)
    carries = torch.zeros(given.numel(), dtype=torch.bool)
    carries[term.positions_T] = True
    assert not (carries.view_as(given) & given).any()


def test_dropped_conditions_are_source_tokens_without_loss():
    rows = random_rows(400)
    _, kept = corrupted(rows, MASK_SOURCE | PREFIX)
    objective, noised = corrupted(rows, MASK_SOURCE | PREFIX, condition_dropout=0.25)
    given = PATHS.parse(MASK_SOURCE | PREFIX).coupling.given(rows.tokens_BS[:, :-1], rng_of(rows))
    tokens_BL, kept_BL = noised.inputs["tokens_BL"], kept.inputs["tokens_BL"]
    assert torch.equal(tokens_BL[~given], kept_BL[~given])
    with_condition = given.any(1)
    dropped = ((tokens_BL == MASK_ID) & given).any(1)
    assert torch.equal(((tokens_BL == MASK_ID) | ~given).all(1)[with_condition], dropped[with_condition])
    share, num = dropped[with_condition].double().mean().item(), int(with_condition.sum())
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / num)
    assert torch.equal(
        objective.terms(noised)[0].positions_T, objective_of(MASK_SOURCE | PREFIX).terms(kept)[0].positions_T
    )


@pytest.mark.parametrize("path", [MASK_SOURCE, UNIFORM_SOURCE], ids=["mask", "uniform"])
def test_shift_reads_the_position_before_and_spares_the_first_of_each_document(path):
    documents = torch.zeros(6, LENGTH + 1, dtype=torch.int32)
    documents[:, 6:] = 1
    rows = random_rows(6, documents=documents)
    objective, noised = corrupted(rows, path, shift=True, copy_loss=True)
    (term,) = objective.terms(noised)
    assert torch.equal(noised.inputs["tokens_BL"][:, [0, 6]], rows.tokens_BS[:, [0, 6]])
    predicted = term.positions_T + 1
    assert torch.equal(rows.tokens_BS[:, :-1].flatten()[predicted], term.targets_T)
    expected = {b * LENGTH + i for b in range(6) for i in range(LENGTH) if i not in (0, 6)}
    assert set(predicted.tolist()) == expected
    plain, plain_noised = corrupted(rows, path, copy_loss=True)
    (plain_term,) = plain.terms(plain_noised)
    assert torch.equal(plain_term.targets_T, rows.tokens_BS[:, :-1].flatten())


@pytest.mark.parametrize("path", [MASK_SOURCE, UNIFORM_SOURCE, METRIC], ids=["mask", "uniform", "metric"])
@pytest.mark.parametrize("loss", ["ce", "elbo"])
def test_rows_in_which_nothing_is_generated_cost_nothing(path, loss):
    """Prompts alone, and, with a shifted reading, documents of one token: no position carries loss, no gradient is NaN."""
    prompts = random_rows(3, loss_mask=torch.zeros(3, LENGTH + 1, dtype=torch.bool))
    single = random_rows(3, documents=torch.arange(LENGTH + 1, dtype=torch.int32).expand(3, -1).contiguous())
    for rows, shift in ((prompts, False), (single, True)):
        objective, noised = corrupted(rows, path, loss=loss, shift=shift)
        assert torch.equal(noised.inputs["tokens_BL"], rows.tokens_BS[:, :-1])
        assert noised.counts["targets"] == 0
        decoder = tiny_decoder(time_input=objective.needs.time)
        loss_terms = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
        assert loss_terms.sums["targets"].item() == 0.0
        loss_terms.sums["targets"].backward()
        assert all((parameter.grad == 0).all() for parameter in decoder.parameters() if parameter.grad is not None)


def test_documents_do_not_see_each_other():
    documents = torch.zeros(1, LENGTH + 1, dtype=torch.int32)
    documents[:, 6:] = 1
    _, noised = corrupted(random_rows(1, documents=documents))
    assert noised.inputs["positions_BL"].tolist() == [[*range(6), *range(LENGTH - 6)]]
    decoder, first = tiny_decoder(), documents[0, :-1] == 0
    other = noised.inputs["tokens_BL"].clone()
    other[0, first] = (other[0, first] + 1) % MASK_ID
    changed = (decoder.logits(**{**noised.inputs, "tokens_BL": other}) - decoder.logits(**noised.inputs))[0]
    assert torch.equal(changed.abs().amax(-1) > 0, first)


@pytest.mark.parametrize("path", [MASK_SOURCE | PREFIX, UNIFORM_SOURCE, METRIC], ids=["mask", "uniform", "metric"])
def test_noise_is_the_same_for_every_slicing_of_the_batch(path):
    rows = random_rows(8)
    objective, whole = corrupted(rows, path)
    for pieces in ([(0, 4), (4, 8)], [(0, 1), (1, 3), (3, 8)]):
        parts = [objective.corrupt(rows.narrow(a, b), rng_of(rows).narrow(a, b)) for a, b in pieces]
        assert torch.equal(torch.cat([part.inputs["tokens_BL"] for part in parts]), whole.inputs["tokens_BL"])
        assert sum(part.counts["targets"] for part in parts) == whole.counts["targets"]


def test_needs():
    assert not objective_of(MASK_SOURCE).needs.time
    assert objective_of(MASK_SOURCE, time_input=True).needs.time
    assert objective_of(UNIFORM_SOURCE).needs.time
    assert not objective_of(UNIFORM_SOURCE, time_input=False).needs.time
    _, timed = corrupted(random_rows(3), UNIFORM_SOURCE)
    assert timed.inputs["time_BL"].shape == (3, 1)
    _, untimed = corrupted(random_rows(3), MASK_SOURCE)
    assert "time_BL" not in untimed.inputs


def test_rows_of_the_head_beyond_the_vocabulary_have_no_rate(tmp_path):
    """A model has more rows than ids; with rates that differ per token those rows are no tokens of the path."""
    weights = tmp_path / "weights.json"
    weights.write_text(str([float(1 + v) for v in range(11)]))
    source = {"name": "given", "path": str(weights)}
    path = {"name": "mixture", "source": source, "schedule": {"name": "source_kinetic_optimal"}}
    rows = random_rows(3)
    objective = objective_of(path, ids=ids_of(11, with_mask=False), loss="elbo")
    noised = objective.corrupt(rows, rng_of(rows))
    (term,) = objective.terms(noised)
    generator = torch.Generator().manual_seed(4)
    logits_BLV = torch.randn(3, LENGTH, 16, generator=generator, dtype=torch.float64)
    wide = evaluate_terms(logits_BLV, terms=[term], heads={"lm": torch.eye(16, dtype=torch.float64)})[0]
    probs_TV = torch.softmax(logits_BLV.flatten(0, 1)[term.positions_T], dim=-1)
    rates_TV = objective.path.rates.at(term.times_T.double())
    x_T1, y_T1 = term.current_T[:, None], term.targets_T[:, None]
    moved_T = (x_T1 != y_T1)[:, 0]
    expected_T = (rates_TV * probs_TV[:, :11]).sum(-1) - (rates_TV.gather(1, x_T1) * probs_TV.gather(1, x_T1))[:, 0]
    expected_T -= moved_T * rates_TV.gather(1, y_T1)[:, 0] * (1 + probs_TV.gather(1, y_T1)[:, 0].log())
    torch.testing.assert_close(wide.losses_T, expected_T, rtol=1e-5, atol=1e-5)


def test_kinds_of_terms_and_refusals():
    _, noised = corrupted(random_rows(2), UNIFORM_SOURCE, loss="elbo")
    assert isinstance(objective_of(UNIFORM_SOURCE, loss="elbo").terms(noised)[0], ElboTerm)
    objective, noised = corrupted(random_rows(2), METRIC)
    assert isinstance(objective.terms(noised)[0], CrossEntropyTerm)
    assert isinstance(objective_of(METRIC, loss="elbo").terms(noised)[0], PathElboTerm)
    with pytest.raises(ConfigError, match="rates between all pairs of tokens"):
        objective_of(METRIC, loss="elbo", ids=ids_of(2000, with_mask=False))
    with pytest.raises(ConfigError, match="no jump rates"):
        objective_of(METRIC, weighting="jump_rate")
    with pytest.raises(ConfigError, match="no mask token"):
        objective_of(MASK_SOURCE, ids=TokenIds(vocab_size=12, bos=None, eos=None, mask=None, pad=None))
    assert ids_of(3, with_mask=False).mask is None

"""The loss of masked diffusion (arXiv 2406.07524, 2502.09992) against closed forms and dense logits."""

import itertools

import pytest
import torch

from raydist.config.registries import OBJECTIVES, SCHEDULES
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.models.mask_spec import FullMask
from raydist.objectives.masked import MaskedConfig
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

WHOLE = {"kind": "uniform", "low": 0.0, "high": 1.0}


def objective_of(**fields):
    return OBJECTIVES.parse({"name": "masked", **fields}).build(IDS)


def corrupted(rows, **fields):
    objective = objective_of(**fields)
    return objective, objective.corrupt(rows, rng_of(rows))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weighting", ["jump_rate", "none"])
def test_loss_equals_the_formula_on_dense_logits(weighting, shift):
    """LLaDA's form: cross entropy over mask probability, summed over masks, over the number of tokens."""
    rows = random_rows(4)
    objective, noised = corrupted(rows, weighting=weighting, shift=shift)
    decoder = tiny_decoder()
    assert isinstance(noised.inputs["mask"], FullMask)
    time_B1 = objective.config.time.per_row(rng_of(rows), purpose="masked/time").double()
    tokens_BL, clean_BL = noised.inputs["tokens_BL"], rows.tokens_BS[:, :-1]
    log_probs = decoder.logits(**noised.inputs).log_softmax(-1)
    masked, total = tokens_BL == MASK_ID, 0.0
    assert torch.equal(tokens_BL[~masked], clean_BL[~masked])
    for row, i in masked.nonzero().tolist():
        weight = 1 / (1 - time_B1[row, 0]) if weighting == "jump_rate" else 1.0
        total = total - weight * log_probs[row, i - shift, clean_BL[row, i]].detach()
    count = 4 * (LENGTH - shift) if weighting == "jump_rate" else int(masked.sum())
    assert 0 < masked.sum() < masked.numel()
    assert not (shift and masked[:, 0].any())
    loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
    assert noised.counts == {"targets": float(count)}
    assert loss.sums["targets"].item() == pytest.approx(float(total), rel=1e-6)
    share = loss.metrics["masked_share"]
    assert float(share.total / share.count) == pytest.approx(float(masked.sum()) / (4 * (LENGTH - shift)))
    assert ("bound_nats_per_token" in loss.metrics) == (weighting == "jump_rate")
    if weighting == "jump_rate":
        bound = loss.metrics["bound_nats_per_token"]
        assert float(bound.total / bound.count) == pytest.approx(float(total) / count, rel=1e-6)


def expected_loss(clean, *, law, schedule, num_nodes=48, smoothing=0.0):
    """The mean of the objective's loss sum over mask patterns and times, by quadrature over forced noise."""
    length, mask_id = law.ndim, law.shape[0]
    ids = TokenIds(vocab_size=mask_id + 1, bos=None, eos=None, mask=mask_id, pad=None)
    objective = MaskedConfig(schedule=schedule, time=WHOLE).build(ids)
    patterns, (nodes, node_weights) = all_patterns(length), gauss_legendre(num_nodes)
    pattern_R = patterns.repeat(num_nodes, 1)
    time_R1 = nodes.repeat_interleave(len(patterns))[:, None]
    rows = rows_of(torch.tensor([[*clean, 0]]).expand(len(pattern_R), -1))
    noised = objective.corrupt(rows, forced(rows, time=time_R1, mask=torch.where(pattern_R, 0.0, 1.0)))
    shown = noised.inputs["tokens_BL"]
    assert torch.equal(shown == mask_id, pattern_R)
    (term,) = objective.terms(noised)
    oracle = Posterior(law, mask_id=mask_id, smoothing=smoothing)
    places = [divmod(position, length) for position in term.positions_T.tolist()]
    losses_T = torch.tensor(
        [oracle.cost(shown[row].tolist(), i, target) for (row, i), target in zip(places, term.targets_T, strict=True)]
    )
    remaining, num_masked = objective.config.schedule.remaining(time_R1)[:, 0], pattern_R.sum(-1)
    probability_R = remaining**num_masked * (1 - remaining) ** (length - num_masked)
    row_T = torch.tensor([row for row, _ in places])
    importance_T = (probability_R * node_weights.repeat_interleave(len(patterns)))[row_T]
    return float((importance_T * term.weights_T.double() * losses_T).sum())


@pytest.mark.parametrize("name", ["linear", "cosine", "sine", "kinetic_optimal", "polynomial", "cubic"])
def test_with_exact_conditionals_the_bound_is_tight_for_every_text_and_schedule(name):
    law = random_law((3, 3, 3), seed=1, sharpness=2.0)
    schedule = SCHEDULES.parse({"name": name})
    for clean in ((0, 1, 2), (2, 2, 0)):
        value = expected_loss(clean, law=law, schedule=schedule)
        assert value == pytest.approx(-float(law[clean].log()), rel=2e-4)


def test_the_mean_bound_is_the_entropy_with_exact_conditionals_and_above_it_with_others():
    law, linear = random_law((3, 3), seed=2, sharpness=2.0), SCHEDULES.parse("linear")
    means = [
        sum(
            float(law[clean]) * expected_loss(clean, law=law, schedule=linear, num_nodes=8, smoothing=smoothing)
            for clean in itertools.product(range(3), repeat=2)
        )
        for smoothing in (0.0, 0.2)
    ]
    assert means[0] == pytest.approx(entropy(law), rel=1e-5)
    assert means[1] > entropy(law) + 0.01


@pytest.mark.parametrize("name", ["cosine", "polynomial", "log_linear"])
def test_the_bound_does_not_depend_on_the_schedule(name):
    """Also for wrong conditionals; a schedule that stops before 1 misses the rest, which its default makes small."""
    law = random_law((2, 2, 2), seed=3, sharpness=2.0)
    settings = {"law": law, "smoothing": 0.3}
    expected = expected_loss((1, 0, 1), schedule=SCHEDULES.parse("linear"), **settings)
    found = expected_loss((1, 0, 1), schedule=SCHEDULES.parse({"name": name}), **settings)
    assert found == pytest.approx(expected, rel=5e-3)


def test_the_number_of_masks_is_uniform():
    num_rows, length = 11_000, 10
    rows = random_rows(num_rows, length=length)
    _, noised = corrupted(rows, time=WHOLE)
    counts = torch.bincount((noised.inputs["tokens_BL"] == MASK_ID).sum(-1), minlength=length + 1).double()
    expected = num_rows / (length + 1)
    assert ((counts - expected) ** 2 / expected).sum() < length + 4 * (2 * length) ** 0.5


def test_noise_is_the_same_for_every_slicing_of_the_batch():
    check_slicing(objective_of(random_length=0.5), random_rows(8))


def test_excluded_tokens_are_neither_masked_nor_counted():
    loss_mask = torch.ones(6, LENGTH + 1, dtype=torch.bool)
    loss_mask[:, :5] = False
    rows = random_rows(6, loss_mask=loss_mask)
    objective, noised = corrupted(rows)
    assert torch.equal(noised.inputs["tokens_BL"][:, :5], rows.tokens_BS[:, :5])
    assert noised.counts["targets"] == 6 * (LENGTH - 5)
    (term,) = objective.terms(noised)
    assert (term.positions_T % LENGTH).min() == 5


@pytest.mark.parametrize("shift", [False, True])
def test_documents_restart_positions_and_do_not_see_each_other(shift):
    documents = torch.zeros(3, LENGTH + 1, dtype=torch.int32)
    documents[:, 6:] = 1
    rows = random_rows(3, documents=documents)
    objective = objective_of(shift=shift)
    noised = objective.corrupt(rows, forced(rows, mask=torch.zeros(3, 1)))
    tokens_BL = noised.inputs["tokens_BL"]
    assert noised.inputs["positions_BL"].tolist() == [[*range(6), *range(LENGTH - 6)]] * 3
    assert (tokens_BL != MASK_ID).nonzero()[:, 1].tolist() == ([0, 6] * 3 if shift else [])
    decoder = tiny_decoder()
    other = tokens_BL.clone()
    other[:, :6] = 3
    changed = decoder.logits(**{**noised.inputs, "tokens_BL": other}) - decoder.logits(**noised.inputs)
    assert torch.equal(changed.abs().amax(-1) > 0, (documents[:, :-1] == 0))


def test_rows_of_random_length_end_where_they_end():
    rows = random_rows(200)
    _, noised = corrupted(rows, random_length=1.0)
    starts = [row.index(0, 1) if 0 in row[1:] else LENGTH for row in noised.inputs["positions_BL"].tolist()]
    assert set(starts) == set(range(1, LENGTH + 1))
    assert noised.counts["targets"] == sum(starts)
    for row, end in enumerate(starts):
        assert torch.equal(noised.inputs["tokens_BL"][row, end:], rows.tokens_BS[row, end:-1])
    shown = noised.inputs["mask"].dense()[:, 0]
    assert all(not shown[row, :end, end:].any() for row, end in enumerate(starts))


def test_mask_id_missing_is_refused_with_a_fix():
    with pytest.raises(ConfigError, match="mask id missing") as caught:
        MaskedConfig().build(TokenIds(vocab_size=12, bos=None, eos=None, mask=None, pad=None))
    assert caught.value.fix


def test_a_clipped_range_of_times_is_no_bound():
    assert objective_of().is_bound
    assert not objective_of(time={"low": 0.3}).is_bound
    assert not objective_of(weighting="none").is_bound

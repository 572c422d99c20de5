"""Window permutation training. Numbers in test names are those of the invariants of arXiv 2506.06215 in our sheet."""

import pytest
import torch
from torch.nn import functional as F

from raydist.config.registries import OBJECTIVES
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.target_offsets import TargetOffsets
from raydist.core.token_ids import TokenIds
from raydist.objectives.next_token import NextTokenConfig
from raydist.objectives.resample import ResampleConfig, target_kinds
from tests.sampling.decoders import MASK_ID, VOCAB_SIZE, tiny_decoder

BOS, PAD = 9, 10
IDS = TokenIds(vocab_size=VOCAB_SIZE, bos=BOS, eos=None, mask=MASK_ID, pad=PAD)
NUM_TOKENS = 33


def random_rows(num_rows, *, documents=None, loss_mask=None, first_row=0, most=BOS):
    shape = (num_rows, NUM_TOKENS)
    return Rows(
        step=3,
        tokens_BS=torch.randint(0, most, shape, generator=torch.Generator().manual_seed(1)),
        documents_BS=torch.zeros(shape, dtype=torch.int32) if documents is None else documents,
        loss_mask_BS=loss_mask,
        rows_B=torch.arange(first_row, first_row + num_rows),
        epochs_B=torch.zeros(num_rows, dtype=torch.int64),
    )


def rng_of(rows, *, seed=0):
    return RowRng(seed=seed, step=rows.step, epochs_B=rows.epochs_B, rows_B=rows.rows_B)


def objective_of(**fields):
    base = {"row_probability": 0.9, "window_probability": 0.5, "rotary_positions": "content"}
    return ResampleConfig(**{**base, **fields}).build(IDS)


def decoder_with_table(window, *, dtype=torch.float64):
    return tiny_decoder(dtype=dtype, input_features={"offset": TargetOffsets(window).num_values})


def loss_and_gradients(decoder, objective, noised):
    decoder.zero_grad()
    loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised))).sums["targets"]
    loss.backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if not name.startswith("input_features")}
    return loss.detach(), gradients


@pytest.mark.parametrize("off", [{"row_probability": 0.0}, {"window_probability": 0.0}])
def test_01_without_windows_it_is_next_token_training_bit_for_bit(off):
    """Loss and gradients of all shared weights, while E_offset[+1] = 0."""
    rows = random_rows(4)
    objective, plain = objective_of(**off), NextTokenConfig().build(IDS)
    noised, plain_noised = objective.corrupt(rows, rng_of(rows)), plain.corrupt(rows, rng_of(rows))
    assert noised.counts == plain_noised.counts
    for name in ("tokens_BL", "positions_BL"):
        assert torch.equal(noised.inputs[name], plain_noised.inputs[name])
    assert (noised.inputs["features"]["offset"] == objective.offsets.next_token_row).all()
    loss, gradients = loss_and_gradients(decoder_with_table(2, dtype=torch.float32), objective, noised)
    expected, expected_gradients = loss_and_gradients(tiny_decoder(dtype=torch.float32), plain, plain_noised)
    assert torch.equal(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


@pytest.mark.parametrize("fields", [{"window": 2}, {"window": 3}, {"window": 5, "permutation": "random"}])
def test_02_every_row_is_a_permutation(fields):
    rows, objective = random_rows(64), objective_of(**fields)
    order = objective.order(rows, rng_of(rows))
    noised = objective.corrupt(rows, rng_of(rows))
    assert (order != torch.arange(NUM_TOKENS)).any(dim=1).sum() > 40
    for row in range(64):
        sigma, tokens = order[row].tolist(), rows.tokens_BS[row]
        assert sorted(sigma) == list(range(NUM_TOKENS))
        inputs = noised.inputs["tokens_BL"][row]
        assert torch.equal(inputs, tokens[sigma[:-1]])
        tau = (objective.offsets.rows(order[row, 1:] - order[row, :-1]), noised.inputs["features"]["offset"][row])
        assert torch.equal(*tau)
        labels = tokens[sigma[1:]].tolist()
        assert sorted([tokens[0].item(), *labels]) == sorted([*inputs.tolist(), labels[-1]])
        assert noised.inputs["positions_BL"][row].tolist() == sigma[:-1]
    assert noised.inputs["features"]["offset"].min() >= 0
    assert noised.inputs["features"]["offset"].max() < objective.offsets.num_values


@pytest.mark.parametrize("window", [2, 3, 4])
def test_02_every_row_of_the_offset_table_can_be_reached(window):
    rows = random_rows(512)
    objective = objective_of(window=window, permutation="random", row_probability=1.0, window_probability=0.9)
    reached = objective.corrupt(rows, rng_of(rows)).inputs["features"]["offset"].unique()
    offsets = torch.tensor([offset for offset in range(1 - window, 2 * window) if offset != 0])
    assert torch.equal(reached, objective.offsets.rows(offsets))


def test_a_swapped_window_teaches_what_the_paper_says():
    """(x_1, x_3, x_2, x_4): skip-ahead, previous and next token, with offsets +2, -1 and +2."""
    order = torch.tensor([[0, 1, 3, 2, 4, 5]])
    assert target_kinds(order).tolist() == [[0, 2, 1, 0, 0]]
    assert (order[:, 1:] - order[:, :-1]).tolist() == [[1, 2, -1, 2, 1]]


def test_kinds_follow_from_what_was_seen():
    rows, objective = random_rows(32), objective_of(window=4, permutation="random")
    order = objective.order(rows, rng_of(rows))
    kinds = target_kinds(order)
    for sigma, row_kinds in zip(order.tolist(), kinds.tolist(), strict=True):
        for slot, kind in enumerate(row_kinds):
            seen, target = set(sigma[: slot + 1]), sigma[slot + 1]
            exact = seen == set(range(target))
            assert kind == (1 if max(seen) > target else 0 if exact else 2)
    assert set(kinds.flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("rotary_positions", ["content", "slots"])
def test_loss_equals_the_paper_written_plainly(rotary_positions):
    rows = random_rows(3)
    objective, decoder = objective_of(rotary_positions=rotary_positions), decoder_with_table(2)
    noised = objective.corrupt(rows, rng_of(rows))
    targets = rows.tokens_BS.gather(1, objective.order(rows, rng_of(rows)))[:, 1:]
    expected = F.cross_entropy(decoder.logits(**noised.inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
    assert loss.sums["targets"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert noised.counts["targets"] == targets.numel()
    assert {"loss/ntp", "loss/ptp", "loss/skip"} <= loss.metrics.keys()
    assert sum(loss.metrics[f"loss/{kind}"].count.item() for kind in ("ntp", "ptp", "skip")) == targets.numel()
    slots = torch.arange(NUM_TOKENS - 1).expand(3, -1)
    assert torch.equal(noised.inputs["positions_BL"], slots) == (rotary_positions == "slots")


def test_windows_stay_inside_documents_and_off_fixed_tokens():
    rows_count = 200
    documents = torch.zeros(rows_count, NUM_TOKENS, dtype=torch.int32)
    documents[:, 5:] = 1
    documents[:, 18:] = 2
    loss_mask = torch.ones(rows_count, NUM_TOKENS, dtype=torch.bool)
    loss_mask[:, 7:11] = False
    rows = random_rows(rows_count, documents=documents, loss_mask=loss_mask, most=MASK_ID)
    objective = objective_of(window=3, permutation="random", row_probability=1.0, window_probability=0.8)
    order = objective.order(rows, rng_of(rows))
    moved = order != torch.arange(NUM_TOKENS)
    assert torch.equal(documents, documents.gather(1, order))
    assert not moved[:, [0, 5, 18]].any()
    assert not moved[~loss_mask].any()
    assert not moved[(rows.tokens_BS == BOS) | (rows.tokens_BS == PAD)].any()
    assert moved[:, [1, 6 + 5, 19, NUM_TOKENS - 1]].any(dim=0).all()
    noised = objective.corrupt(rows, rng_of(rows))
    starts = torch.tensor([0] * 5 + [5] * 13 + [18] * (NUM_TOKENS - 18))
    assert torch.equal(noised.inputs["positions_BL"], order[:, :-1] - starts[:-1])
    targets = torch.cat([term.positions_T for term in objective.terms(noised)])
    valid = torch.ones(NUM_TOKENS - 1, dtype=torch.bool)
    valid[[4, 17, 6, 7, 8, 9]] = False
    expected = torch.arange(rows_count * (NUM_TOKENS - 1)).view(rows_count, -1)[:, valid].flatten()
    assert torch.equal(targets.sort().values, expected)


def test_a_padding_token_that_ends_texts_may_move():
    """Many tokenizers pad with the end-of-text token, and the sampler asks what comes before it."""
    ids = TokenIds(vocab_size=VOCAB_SIZE, bos=BOS, eos=PAD, mask=MASK_ID, pad=PAD)
    rows = random_rows(100, most=MASK_ID)
    objective = ResampleConfig(row_probability=1.0, window_probability=0.8).build(ids)
    moved = objective.order(rows, rng_of(rows)) != torch.arange(NUM_TOKENS)
    assert moved[rows.tokens_BS == PAD].any()
    assert not moved[rows.tokens_BS == BOS].any()


def test_shares_of_targets_follow_the_two_probabilities():
    """A window of 2 opens per 1 + s tokens of a permuted row: q s / (1 + s) targets are previous tokens."""
    rows = random_rows(4000)
    objective = objective_of(row_probability=0.6, window_probability=0.5)
    moved = (objective.order(rows, rng_of(rows)) != torch.arange(NUM_TOKENS)).float()
    permuted = moved.any(dim=1)
    assert abs(permuted.float().mean().item() - 0.6) < 4 * (0.24 / 4000) ** 0.5
    assert moved[permuted][:, 8:-8].mean().item() == pytest.approx(2 * 0.5 / 1.5, abs=0.02)


def test_noise_belongs_to_the_row():
    objective, rows = objective_of(), random_rows(8)
    whole = objective.order(rows, rng_of(rows))
    part = objective.order(rows.narrow(3, 5), rng_of(rows).narrow(3, 5))
    assert torch.equal(whole[3:5], part)
    assert not torch.equal(whole, objective.order(rows, rng_of(rows, seed=1)))


def test_step_zero_is_the_pretrained_model_on_rows_in_order():
    """A zero table: any offsets give the plain decoder's logits on the same tokens and positions."""
    rows, objective = random_rows(3), objective_of()
    inputs = objective.corrupt(rows, rng_of(rows)).inputs
    with_table = decoder_with_table(2).logits(**inputs)
    features = inputs.pop("features")
    assert features["offset"].unique().numel() > 2
    assert torch.equal(with_table, tiny_decoder().logits(**inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_validation_measures_next_token_prediction_on_the_rows_in_order(packed):
    """Whatever the windows it is next_token's loss on the same rows; the table's rows other than that of offset +1 are noise.

    The loss of validation stays that of training, with the same draws.
    """
    documents = torch.zeros(8, NUM_TOKENS, dtype=torch.int32)
    documents[1, 9:] = packed
    loss_mask = torch.ones(8, NUM_TOKENS, dtype=torch.bool)
    loss_mask[2, 3:7] = not packed
    rows = random_rows(8, documents=documents, loss_mask=loss_mask)
    plain = NextTokenConfig().build(IDS)
    plain_noised = plain.corrupt(rows, rng_of(rows))
    decoder = tiny_decoder(dtype=torch.float64)
    expected = plain.combine(decoder(**plain_noised.inputs, terms=plain.terms(plain_noised))).metrics["loss/ntp"]
    losses = set()
    for fields in (
        {"window": 2, "row_probability": 0.5},
        {"window": 4, "row_probability": 1.0, "permutation": "random"},
    ):
        objective = objective_of(**fields)
        decoder = decoder_with_table(objective.config.window)
        table = dict(decoder.named_parameters())["input_features.offset.weight"]
        with torch.no_grad():
            table.normal_(generator=torch.Generator().manual_seed(2))
            table[objective.offsets.next_token_row] = 0.0
        results = []
        for one in (objective, objective.for_validation()):
            noised = one.corrupt(rows, rng_of(rows))
            results.append(one.combine(decoder(**noised.inputs, terms=one.terms(noised))))
            assert noised.counts == plain_noised.counts
        trained, measured = results
        assert measured.metrics["loss/ntp"].count == expected.count
        assert measured.metrics["loss/ntp"].total.item() == pytest.approx(expected.total.item(), rel=1e-9)
        assert trained.metrics["loss/ntp"].count < expected.count
        assert measured.sums["targets"].item() == pytest.approx(trained.sums["targets"].item(), rel=1e-9)
        for kind in ("ptp", "skip"):
            assert measured.metrics[f"loss/{kind}"].count == trained.metrics[f"loss/{kind}"].count > 0
        losses.add(round(measured.sums["targets"].item(), 3))
    assert len(losses) == 2


def test_needs_declare_the_table():
    assert objective_of(window=3).needs.input_features == {"offset": 8}


def test_swap_of_three_is_refused():
    with pytest.raises(ConfigError, match="permutation=swap is for window=2, not 3"):
        OBJECTIVES.parse({"name": "resample", "window": 3, "permutation": "swap"})

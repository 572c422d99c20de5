"""The Edit Flow objective. Numbers in test names are those of the invariants of arXiv 2506.09018 in our sheet."""

import math

import pytest
import torch
from torch.nn import functional as F

from raydist.config.registries import OBJECTIVES
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.heads import evaluate_terms
from raydist.models.init import initialize
from raydist.objectives.edit_flow import EditFlowConfig
from raydist.objectives.flips import localised_flips, poisson
from raydist.objectives.packing import pack
from raydist.paths.schedules import PolynomialSchedule

IDS = TokenIds(vocab_size=12, bos=8, eos=9, mask=11, pad=10)
NOTHING_GIVEN = {"condition_power": 1e9, "condition_dropout": 0.0}
CUBIC = PolynomialSchedule(power=3.0)


def rows_of(tokens_BS, *, documents=None, loss_mask=None, first_row=0):
    tokens_BS = torch.as_tensor(tokens_BS)
    num_rows = len(tokens_BS)
    return Rows(
        step=2,
        tokens_BS=tokens_BS,
        documents_BS=torch.zeros_like(tokens_BS, dtype=torch.int32) if documents is None else documents,
        loss_mask_BS=loss_mask,
        rows_B=torch.arange(first_row, first_row + num_rows),
        epochs_B=torch.zeros(num_rows, dtype=torch.int64),
    )


def random_rows(num_rows, *, length=20, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    return rows_of(torch.randint(0, 8, (num_rows, length + 1), generator=generator), **fields)


def at_time(time):
    return {"kind": "uniform", "low": time, "high": time + 1e-6}


def corrupted(rows, **fields):
    objective = EditFlowConfig(**fields).build(IDS)
    rng = RowRng(seed=0, step=rows.step, epochs_B=rows.epochs_B, rows_B=rows.rows_B)
    return objective, objective.corrupt(rows, rng)


def texts_of(noised, num_sequences):
    """Each packed sequence as a list, by row and document; padding bears the number of sequences."""
    tokens_BL, documents_BL = noised.inputs["tokens_BL"], noised.inputs["mask"].documents_BL
    texts = {}
    for row in range(len(tokens_BL)):
        for token, document in zip(tokens_BL[row].tolist(), documents_BL[row].tolist(), strict=True):
            texts.setdefault((row, document), []).append(token)
    return [text for key, text in sorted(texts.items()) if key[1] < num_sequences]


def decoder_for(objective):
    config = DecoderConfig(
        family="llama",
        vocab_size=12,
        num_layers=1,
        width=16,
        hidden_width=24,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
        time_input=objective.needs.time,
        extra_heads=dict(objective.needs.extra_heads),
        input_features=dict(objective.needs.input_features),
    )
    decoder = Decoder(config)
    initialize(decoder, 0)
    return decoder.double()


def test_11_lengths_begin_tokens_and_targets():
    rows = random_rows(6)
    _, noised = corrupted(rows, **NOTHING_GIVEN)
    starts = noised.inputs["positions_BL"] == 0
    real = noised.inputs["mask"].documents_BL < int(noised.inputs["mask"].documents_BL.max())
    assert (noised.inputs["tokens_BL"][starts & real] == IDS.bos).all()
    num_present = int(real.sum()) - 6
    assert noised.counts["targets"] == 6 * 20
    assert noised.targets["insert/targets_T"].numel() == 6 * 20 - num_present
    assert noised.targets["rates/counts_TK"][:, 0].sum() == 6 * 20 - num_present
    assert noised.inputs["tokens_BL"].shape[1] == 21


def test_04_lengths_follow_the_binomial_law_and_the_missing_tokens_are_the_rest():
    time, num, length = 0.7, 3000, 4
    rows = rows_of([[0, 1, 2, 3, 0]] * num)
    _, noised = corrupted(rows, time=at_time(time), max_length=5, **NOTHING_GIVEN)
    assert noised.inputs["tokens_BL"].shape[1] == 5
    texts = texts_of(noised, num)
    assert len(texts) == num
    counts = torch.tensor([sum(len(text) - 1 == k for text in texts) for k in range(length + 1)], dtype=torch.float64)
    kappa = time**3
    law = torch.tensor([math.comb(length, k) * kappa**k * (1 - kappa) ** (length - k) for k in range(length + 1)])
    statistic = ((counts - num * law) ** 2 / (num * law)).sum()
    assert statistic < length + 4 * (2 * length) ** 0.5
    for text in texts:
        assert text[1:] == sorted(text[1:])


def test_03_single_datum_asks_for_both_letters_of_an_empty_text():
    """At "" two insertions behind the begin token, at "a" a b behind a, at "b" an a behind the begin token, at "ab" none."""
    _, noised = corrupted(rows_of([[0, 1, 0]] * 200), time=at_time(0.75), **NOTHING_GIVEN)
    expected = {(8,): [2], (8, 0): [0, 1], (8, 1): [1, 0], (8, 0, 1): [0, 0, 0]}
    counts = dict(
        zip(noised.targets["rates/positions_T"].tolist(), noised.targets["rates/counts_TK"][:, 0].tolist(), strict=True)
    )
    tokens_BL, documents_BL = noised.inputs["tokens_BL"], noised.inputs["mask"].documents_BL
    seen = set()
    for row in range(len(tokens_BL)):
        for document in documents_BL[row].unique().tolist():
            places = (documents_BL[row] == document).nonzero()[:, 0].tolist()
            text = tuple(tokens_BL[row, places].tolist())
            flat = [row * tokens_BL.shape[1] + place for place in places]
            if flat[0] in counts:
                assert [counts[place] for place in flat] == expected[text]
                seen.add(text)
    assert seen == set(expected)
    weight = CUBIC.jump_rate(torch.tensor(0.75))
    torch.testing.assert_close(
        noised.targets["rates/weights_T"], weight.expand_as(noised.targets["rates/weights_T"]), rtol=1e-4, atol=0
    )


def test_02_equal_sides_leave_only_the_sum_of_rates():
    """x0 = x1 = masks, paired index by index: no logarithms remain, and zero rates give zero loss."""
    rows = rows_of([[IDS.mask] * 7] * 3)
    objective, noised = corrupted(rows, noise_length=6, source={"name": "mask"}, alignment="padded", **NOTHING_GIVEN)
    assert noised.targets["rates/counts_TK"].sum() == 0
    decoder = decoder_for(objective)
    results = decoder(**noised.inputs, terms=objective.terms(noised))
    allowed = noised.targets["rates/exposure_TK"].sum(dim=1)
    total = objective.combine(results).sums["targets"]
    assert total.item() == pytest.approx((noised.targets["rates/weights_T"] * allowed).sum().item())
    with torch.no_grad():
        decoder.extra_heads["rates"].weight.copy_(-1e4 * torch.ones(3, 16))
    hidden = torch.ones(1, noised.inputs["tokens_BL"].numel(), 16, dtype=torch.float64)
    results = evaluate_terms(hidden, terms=objective.terms(noised), heads=decoder.head_weights())
    assert objective.combine(results).sums["targets"].item() == 0


def test_06_mask_special_case_is_the_masked_cross_entropy():
    """With insertions and deletions off and substitutions at rate r_t: a constant and r_t times the masked cross entropy."""
    rows = random_rows(5, length=9)
    objective, noised = corrupted(
        rows,
        noise_length=9,
        source={"name": "mask"},
        alignment="padded",
        max_weight=1e9,
        max_length=10,
        **NOTHING_GIVEN,
    )
    decoder = decoder_for(objective)
    terms = {term.name: term for term in objective.terms(noised)}
    tokens_BL = noised.inputs["tokens_BL"]
    assert tokens_BL.shape == (5, 10)
    assert terms["insert"].positions_T.numel() == 0
    is_mask = tokens_BL == IDS.mask
    assert 0 < is_mask.sum() < 45
    assert torch.equal(terms["substitute"].positions_T.sort().values, is_mask.flatten().nonzero()[:, 0])
    assert torch.equal(terms["rates"].counts_TK[:, 2] > 0, is_mask.flatten()[terms["rates"].positions_T])
    assert terms["rates"].counts_TK[:, :2].sum() == 0
    logits = F.linear(decoder.hidden(**noised.inputs), decoder.extra_heads["substitute"].weight)
    expected = 0.0
    for row in range(5):
        clean = rows.tokens_BS[row, :-1]
        assert ((tokens_BL[row, 1:] == clean) | is_mask[row, 1:]).all()
        rate = CUBIC.jump_rate(noised.inputs["time_BL"][row, 0])
        loss = F.cross_entropy(logits[row, 1:], clean, reduction="none")
        expected += (rate * loss * is_mask[row, 1:]).sum().item()
    (result,) = decoder(**noised.inputs, terms=[terms["substitute"]])
    assert result.loss_sum.item() == pytest.approx(expected, rel=1e-5)


def test_a_sequence_does_not_depend_on_the_batch():
    documents = torch.zeros(4, 21, dtype=torch.int32)
    documents[1, 8:] = 1
    fields = {"noise_length": 5, "alignment": "shuffled", "spread_rate": 2.0, "time": {"kind": "uniform"}}
    rows = random_rows(4, documents=documents)
    _, together = corrupted(rows, **fields)
    alone = [
        text
        for row in range(4)
        for text in texts_of(corrupted(rows.narrow(row, row + 1), **fields)[1], 2 if row == 1 else 1)
    ]
    assert sorted(texts_of(together, 5)) == sorted(alone)
    parts = [corrupted(rows.narrow(row, row + 1), **fields)[1] for row in range(4)]
    assert together.counts["targets"] == sum(part.counts["targets"] for part in parts)
    for name in ("rates/weights_T", "rates/counts_TK", "insert/weights_T", "substitute/targets_T"):
        whole, pieces = together.targets[name], torch.cat([part.targets[name] for part in parts])
        assert torch.equal(whole.flatten().sort().values, pieces.flatten().sort().values)


def test_a_start_of_previous_tokens_without_any():
    """Where nothing is given there are no previous tokens; the source falls back to its uniform law."""
    rows = random_rows(2)
    fields = {"noise_length": 3, "source": {"name": "previous"}, "time": at_time(0.0), "alignment": "replace"}
    _, noised = corrupted(rows, **fields, **NOTHING_GIVEN)
    assert [len(text) for text in texts_of(noised, 2)] == [4, 4]
    loss_mask = torch.ones(2, 21, dtype=torch.bool)
    loss_mask[:, :2] = False
    rows = rows_of([[0] * 2 + [5] * 19, [1] * 2 + [5] * 19], loss_mask=loss_mask)
    _, noised = corrupted(rows, **fields, **NOTHING_GIVEN)
    assert sorted(texts_of(noised, 2)) == [[8, *[0] * 5], [8, *[1] * 5]]


def test_spreading_flips_at_the_first_moment_have_finite_weights():
    """r_t underflows to 0 there, and no column has flipped."""
    steep = {"name": "polynomial", "power": 20.0}
    _, noised = corrupted(random_rows(3), spread_rate=50.0, schedule=steep, time=at_time(0.0))
    assert all(torch.isfinite(value).all() for value in noised.targets.values())
    assert noised.targets["rates/counts_TK"].sum() > 0


def test_documents_are_sequences_of_their_own_and_own_begin_tokens_are_not_doubled():
    rows = rows_of([[8, 1, 1, 8, 2, 2, 2, 0]], documents=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32))
    _, noised = corrupted(rows, time=at_time(0.999), **NOTHING_GIVEN)
    assert noised.counts["targets"] == 5
    for text in texts_of(noised, 2):
        assert text[0] == 8
        assert set(text[1:]) in ({1}, {2})


def test_the_loss_mask_and_the_prefix_are_given():
    loss_mask = torch.ones(50, 21, dtype=torch.bool)
    loss_mask[:, 5:8] = False
    rows = random_rows(50, loss_mask=loss_mask)
    _, noised = corrupted(rows, time=at_time(0.0), condition_power=1e9, condition_dropout=0.0)
    for text in texts_of(noised, 50):
        assert any(text == [8, *row[5:8]] for row in rows.tokens_BS.tolist())
    assert noised.counts["targets"] == 50 * 17
    assert set(noised.inputs["features"]["context"].flatten().tolist()) == {0, 1, 2}
    _, dropped = corrupted(rows, time=at_time(0.0), condition_dropout=1.0)
    assert all(text == [8] for text in texts_of(dropped, 50))


@pytest.mark.parametrize("condition", ["prefix", "ends"])
def test_the_given_part_is_the_beginning_or_both_ends(condition):
    rows = rows_of([[*range(8), 0]] * 400)
    _, noised = corrupted(rows, time=at_time(0.0), condition=condition, condition_dropout=0.0)
    seen = set()
    for text in texts_of(noised, 400):
        given = text[1:]
        lead = next((i for i, token in enumerate(given) if token != i), len(given))
        assert given == [*range(lead), *range(8 - (len(given) - lead), 8)]
        seen.add((lead, len(given) - lead))
    assert (len(seen) > 12) if condition == "ends" else all(last == 0 for _, last in seen)
    fraction = sum(len(text) - 1 for text in texts_of(noised, 400)) / 400 / 8
    expected = sum(1 - (k / 8) ** (1 / 3) for k in range(1, 8)) / 8
    assert fraction == pytest.approx(expected, abs=0.03)


def test_weights_are_clipped_and_reverse_weights_too():
    rows = random_rows(64)
    _, noised = corrupted(rows, noise_length=4, reverse=True, max_weight=5.0, time={"kind": "uniform"})
    for name in ("rates", "reverse_rates"):
        assert noised.targets[f"{name}/weights_T"].max() == 5.0
        assert noised.targets[f"{name}/weights_T"].min() < 5.0


def test_reverse_edits_lead_back_to_the_start():
    """At t near 1 the reverse process wants the noise back: as many edits as the alignment has, and never a given token."""
    rows = random_rows(8)
    objective, noised = corrupted(
        rows, noise_length=4, reverse=True, alignment="replace", time=at_time(0.99999), **NOTHING_GIVEN
    )
    counts = noised.targets["reverse_rates/counts_TK"].sum(dim=0)
    assert counts.tolist() == [8 * 4, 8 * 20, 0]
    assert {term.head for term in objective.terms(noised)} == {"lm", *objective.needs.extra_heads}
    assert noised.targets["rates/counts_TK"].sum() == 0


def test_09_without_spreading_flips_are_independent():
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(50, 9, 3, generator=generator)
    time = torch.full((50, 1), 0.6)
    everywhere = torch.ones(50, 9, dtype=torch.bool)
    flips = localised_flips(uniforms, time_S1=time, schedule=CUBIC, spread_rate=0.0, origins_SN=everywhere)
    assert torch.equal(flips.flipped_SN, 1 - uniforms[..., 0] <= CUBIC.value(time))
    done = localised_flips(uniforms, time_S1=torch.ones(50, 1), schedule=CUBIC, spread_rate=3.0, origins_SN=everywhere)
    assert done.flipped_SN.all()


@pytest.mark.parametrize(
    ("spread_rate", "probability", "correlation"), [(0.0, 0.125, 0.0), (2.0, 0.18, 0.30), (10.0, 0.35, 0.67)]
)
def test_09_spreading_correlates_neighbours(spread_rate, probability, correlation):
    """The numbers of the sheet for t = 0.5, kappa = t^3 and nine columns."""
    num = 40_000
    uniforms = torch.rand(num, 9, 3, generator=torch.Generator().manual_seed(3))
    flips = localised_flips(
        uniforms,
        time_S1=torch.full((num, 1), 0.5),
        schedule=CUBIC,
        spread_rate=spread_rate,
        origins_SN=torch.ones(num, 9, dtype=torch.bool),
    )
    middle = flips.flipped_SN[:, 4:6].double()
    assert middle.mean().item() == pytest.approx(probability, abs=0.01)
    assert torch.corrcoef(middle.T)[0, 1].item() == pytest.approx(correlation, abs=0.02)


def test_09_effective_rate_counts_the_origins_that_reach_a_neighbour():
    """Against the boolean matrix of the sheet, written plainly."""
    num, columns, rate = 30, 7, 4.0
    uniforms = torch.rand(num, columns, 3, generator=torch.Generator().manual_seed(4))
    time = torch.full((num, 1), 0.7)
    flips = localised_flips(
        uniforms, time_S1=time, schedule=CUBIC, spread_rate=rate, origins_SN=torch.ones(num, columns, dtype=torch.bool)
    )
    for row in range(num):
        on = [[False] * columns for _ in range(columns)]
        for i in range(columns):
            born = (1 - uniforms[row, i, 0].item()) ** (1 / 3)
            if born > 0.7:
                continue
            reach = [_poisson_plain(uniforms[row, i, side].item(), rate * (0.7 - born)) for side in (1, 2)]
            for j in range(columns):
                on[i][j] = i - reach[0] <= j <= i + reach[1]
        flipped = [any(on[i][j] for i in range(columns)) for j in range(columns)]
        assert flips.flipped_SN[row].tolist() == flipped
        for j in range(columns):
            if not flipped[j]:
                beside = sum((j > 0 and on[i][j - 1]) or (j + 1 < columns and on[i][j + 1]) for i in range(columns))
                assert flips.neighbours_SN[row, j] == beside


def test_09_columns_flip_at_the_effective_rate():
    """d P(flipped) / dt, from the law of the flips shortly before and after, is the mean rate of the columns that are left."""
    num, rate, time, h = 40_000, 4.0, 0.5, 0.02
    uniforms = torch.rand(num, 9, 3, generator=torch.Generator().manual_seed(5))

    def flips_at(t):
        origins = torch.ones(num, 9, dtype=torch.bool)
        times = torch.full((num, 1), t)
        return localised_flips(uniforms, time_S1=times, schedule=CUBIC, spread_rate=rate, origins_SN=origins)

    slope = (flips_at(time + h).flipped_SN.double() - flips_at(time - h).flipped_SN.double()).mean(dim=0) / (2 * h)
    now = flips_at(time)
    left = (CUBIC.jump_rate(torch.tensor(time)) + rate * now.neighbours_SN) * ~now.flipped_SN
    torch.testing.assert_close(left.double().mean(dim=0), slope, rtol=0.05, atol=0)


def _poisson_plain(u, mean):
    k, total, probability = 0, math.exp(-mean), math.exp(-mean)
    while u >= total:
        k += 1
        probability *= mean / k
        total += probability
    return k


def test_poisson_numbers_have_their_law():
    uniforms = (torch.arange(20_000) + 0.5).double() / 20_000
    numbers = poisson(uniforms, mean=torch.full_like(uniforms, 2.5), most=50)
    for k in range(6):
        expected = math.exp(-2.5) * 2.5**k / math.factorial(k)
        assert (numbers == k).double().mean().item() == pytest.approx(expected, abs=1e-4)
    assert poisson(uniforms, mean=torch.full_like(uniforms, 2.5), most=2).max() == 2


def test_packing_puts_every_token_in_a_place_of_its_own():
    lengths = torch.tensor([3, 7, 1, 4, 8, 2])
    packing = pack(lengths, width=8)
    values = torch.arange(6)[:, None].expand(6, 8)
    placed = packing.place(values, fill=-1)
    assert packing.num_rows == 4
    assert torch.bincount(placed.flatten() + 1, minlength=7).tolist() == [32 - 25, *lengths.tolist()]
    for row in placed.tolist():
        runs = [token for i, token in enumerate(row) if i == 0 or token != row[i - 1]]
        assert len(runs) == len(set(runs))


def test_unwanted_settings_are_refused():
    for fields in ({"reverse": True}, {"reverse": True, "noise_length": 3, "spread_rate": 1.0}):
        with pytest.raises(ConfigError, match="reverse"):
            OBJECTIVES.parse({"name": "edit_flow", **fields})
    nameless = TokenIds(vocab_size=12, bos=None, eos=None, mask=11, pad=None)
    with pytest.raises(ConfigError, match="begin token"):
        EditFlowConfig().build(nameless)
    assert EditFlowConfig().build(TokenIds(vocab_size=12, bos=None, eos=7, mask=11, pad=None)).begin_id == 7


def test_the_model_gets_only_heads_that_the_start_can_train():
    assert EditFlowConfig().build(IDS).needs.extra_heads == {"rates": 3}
    assert EditFlowConfig(noise_length=3).build(IDS).needs.extra_heads == {"rates": 3, "substitute": 0}
    _, noised = corrupted(random_rows(3))
    assert noised.targets["rates/exposure_TK"][:, 1:].sum() == 0

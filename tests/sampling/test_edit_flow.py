"""The Edit Flow sampler against enumeration. Test numbers: the invariants of arXiv 2506.09018 in our sheet."""

import itertools
import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raydist.config.registries import OBJECTIVES
from raydist.core.errors import ConfigError
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.paths.schedules import PolynomialSchedule
from raydist.sampling.base import Trained
from raydist.sampling.edit_flow import EditFlowSamplerConfig
from raydist.sampling.edit_rates import EditHeads, Guidance, edit_rates, event_probability, token_logits
from raydist.sampling.edit_state import EditState
from tests.sampling.oracle import chi_square

A, B, BOS, EOS, MASK = range(5)
IDS = TokenIds(vocab_size=5, bos=BOS, eos=EOS, mask=MASK, pad=None)
EMPTY = {
    "name": "edit_flow",
    "schedule": {"name": "linear"},
    "noise_length": 0,
    "source": {"name": "uniform"},
    "reverse": False,
    "condition": "prefix",
    "spread_rate": 0.0,
}
NOISY = {**EMPTY, "noise_length": 2}
NEVER = -math.inf


class TabularModel(nn.Module):
    """Speaks the decoder's interface; a function of (text, time) answers for each place of the text.

    The answer of a place is ``(log rates of insert, delete, substitute; logits of insert; logits of substitute)``. A text is
    what lies between the begin token and the padding.
    """

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.config = SimpleNamespace(max_positions=1000)
        self.register_parameter("device_marker", nn.Parameter(torch.zeros(())))
        self.num_forwards = 0
        self.watch = lambda text: None
        self._known = {}

    def hidden(self, tokens_BL, positions_BL, mask, *, time_BL, features):
        self.num_forwards += 1
        rows = []
        for row, padding, time in zip(tokens_BL.tolist(), mask.documents_BL.tolist(), time_BL.tolist(), strict=True):
            text = tuple(token for token, pad in zip(row, padding, strict=True) if not pad)
            self.watch(text)
            key = text, time[0]
            if key not in self._known:
                places = [[*chain(*self.answer(text[1:], place, time[0]))] for place in range(len(text))]
                self._known[key] = torch.tensor(places, dtype=torch.float64)
            rows.append(nn.functional.pad(self._known[key], (0, 0, 0, len(row) - len(text))))
        return torch.stack(rows)

    def head_logits(self, hidden, head):
        parts = {"rates": (0, 3), "lm": (3, 8), "insert": (3, 8), "substitute": (8, 13)}
        start, stop = parts[head.removeprefix("reverse_")]
        return hidden[..., start:stop].clone()


def logits_of(probability_of_a):
    return [math.log(probability_of_a), math.log(1 - probability_of_a), -50.0, -50.0, -50.0]


def sampler_of(objective=EMPTY, *, seed=0, stop_ids=(), **fields):
    return EditFlowSamplerConfig(**fields).build(Trained(ids=IDS, stop_ids=stop_ids, objective=objective, seed=seed))


def hashed(*key):
    """A number in [0, 1) that looks random."""
    return (hash(key) % 9973) / 9973


def random_answer(text, place, time):
    logs = [3 * hashed(text, place, time, k) - 2 for k in range(3)]
    return logs, logits_of(0.1 + 0.8 * hashed(text, place, 7)), logits_of(0.1 + 0.8 * hashed(text, place, 8))


def single_datum(text, place, time):
    """The optimal rates for the one text AB from nothing, relative to the schedule's rate."""
    missing = {(): {0: [A, B]}, (A,): {1: [B]}, (B,): {0: [A]}}.get(text, {}).get(place, [])
    law = [0.5, 0.5] if len(missing) == 2 else [float(token in missing) for token in (A, B)]
    log_rate = math.log(len(missing)) if missing else NEVER
    return [log_rate, NEVER, NEVER], [*(math.log(p) if p else -50.0 for p in law), -50.0, -50.0, -50.0], logits_of(0.5)


def leap_law(answer, text, time, jump, *, limit, operations=3):
    """Enumerates one leap: every combination of events, written from the sampler's documentation."""

    def chance(x):
        return jump * x if x <= 1 else 1 - (1 - jump) ** x

    choices = []
    for place in range(len(text) + 1):
        logs, insert, substitute = answer(text, place, time)
        rates = [math.exp(value) for value in logs]
        inserts = [(None, 1 - chance(rates[0]))]
        weights = torch.softmax(torch.tensor(insert, dtype=torch.float64)[:2], 0).tolist()
        inserts += [(token, chance(rates[0]) * weights[token]) for token in (A, B)]
        changes = [("keep", 1.0)]
        if place > 0 and operations == 3:
            total = rates[1] + rates[2]
            weights = torch.softmax(torch.tensor(substitute, dtype=torch.float64)[:2], 0).tolist()
            changes = [("keep", 1 - chance(total)), ("delete", chance(total) * rates[1] / total)]
            changes += [(token, chance(total) * rates[2] / total * weights[token]) for token in (A, B)]
        choices.append([(change, inserted, p * q) for change, p in changes for inserted, q in inserts])
    law = {}
    for combination in itertools.product(*choices):
        room = limit - sum(change != "delete" for change, _, _ in combination[1:])
        result, probability = [], 1.0
        for place, (change, inserted, p) in enumerate(combination):
            probability *= p
            if place > 0 and change != "delete":
                result.append(text[place - 1] if change == "keep" else change)
            if inserted is not None and room > 0:
                result.append(inserted)
                room -= 1
        if probability > 0:
            law[tuple(result)] = law.get(tuple(result), 0.0) + probability
    return law


def chain_law(answer, start, *, num_steps, limit, operations=3, correction=0.0):
    """Linear schedule; with a correction each step but the last overshoots and goes back with the same table of rates."""
    law = {start: 1.0}

    def leapt(law, time, jump):
        after = {}
        for text, weight in law.items():
            for target, p in leap_law(answer, text, time, jump, limit=limit, operations=operations).items():
                after[target] = after.get(target, 0.0) + weight * p
        return after

    for step in range(num_steps):
        time, stop = step / num_steps, (step + 1) / num_steps
        reach = min(1.0, stop + correction / num_steps) if step + 1 < num_steps else stop
        law = leapt(law, time, (reach - time) / (1 - time))
        if reach > stop:
            law = leapt(law, reach, 1 - stop / reach)
    return law


def assert_follows(texts, law):
    outcomes = sorted(law, key=law.get, reverse=True)
    assert set(texts) <= set(outcomes)
    counts = torch.tensor([texts.count(text) for text in outcomes], dtype=torch.float64)
    expected = torch.tensor([law[text] for text in outcomes], dtype=torch.float64)
    common = expected * len(texts) >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic, degrees = chi_square(counts, expected)
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("limit", [2, 3])
def test_sampler_follows_the_enumerated_law_of_all_three_operations(limit):
    model = TabularModel(random_answer)
    drafts = [[A, B]] * 3000
    generations = sampler_of(NOISY, num_steps=2).revise(
        model, [[BOS]] * 3000, drafts, max_new_tokens=limit, start_time=0.0
    )
    law = chain_law(random_answer, (A, B), num_steps=2, limit=limit)
    assert len(law) > 5
    assert max(map(len, law)) == limit
    assert_follows([tuple(generation.tokens) for generation in generations], law)
    assert model.num_forwards == generations[0].num_forwards == 2


def test_08_trained_reverse_rates_are_applied_backward():
    """Over to t + h (1 + a), back to t + h: the enumerated law of both leaps."""
    model = TabularModel(random_answer)
    sampler = sampler_of(
        {**NOISY, "reverse": True}, num_steps=2, correction_scale=0.5, correction_power=0, correction_remaining_power=0
    )
    generations = sampler.revise(model, [[BOS]] * 3000, [[A]] * 3000, max_new_tokens=2, start_time=0.0)
    law = chain_law(random_answer, (A,), num_steps=2, limit=2, correction=0.5)
    assert_follows([tuple(generation.tokens) for generation in generations], law)
    assert model.num_forwards == generations[0].num_forwards == 3


def test_sampler_from_nothing_only_inserts():
    model = TabularModel(random_answer)
    generations = sampler_of(num_steps=2).generate(model, [[BOS]] * 2000, max_new_tokens=6)
    law = chain_law(random_answer, (), num_steps=2, limit=6, operations=1)
    assert_follows([tuple(generation.tokens) for generation in generations], law)
    assert all(len(a) <= len(b) for g in generations for a, b in itertools.pairwise(g.states))


def test_03_single_datum_grows_through_the_closed_form():
    """p_t: "" (1 - k)^2, "a" and "b" k (1 - k), "ab" k^2; small steps, and the end is the datum."""
    num, num_steps = 800, 64
    sampler = sampler_of(num_steps=num_steps)
    generations = sampler.generate(TabularModel(single_datum), [[BOS]] * num, max_new_tokens=6)
    for step in (num_steps // 4, num_steps // 2):
        k = step / num_steps
        law = {(): (1 - k) ** 2, (A,): k * (1 - k), (B,): k * (1 - k), (A, B): k * k}
        assert_follows([tuple(generation.states[step - 1]) for generation in generations], law)
    assert sum(generation.tokens == [A, B] for generation in generations) >= 0.98 * num
    exact = chain_law(single_datum, (), num_steps=16, limit=6, operations=1)
    assert exact[A, B] > 0.98


def test_02_without_rates_the_draft_is_returned():
    def still(text, place, time):
        return [NEVER] * 3, logits_of(0.5), logits_of(0.5)

    drafts = [[A, B, A], [], [B]]
    generations = sampler_of(NOISY, num_steps=5).revise(
        TabularModel(still), [[BOS, A], [B], [A]], drafts, max_new_tokens=4, start_time=0.25
    )
    assert [generation.tokens for generation in generations] == drafts
    assert generations[0].revealed_at == [0, 0, 0]
    assert generations[0].states == [drafts[0]] * 5


def test_07_insertions_at_the_right_end_alone_are_an_autoregressive_model():
    def rightmost(text, place, time):
        return [50.0 if place == len(text) else NEVER, NEVER, NEVER], logits_of(0.3), logits_of(0.5)

    (generation,) = sampler_of(num_steps=7).generate(TabularModel(rightmost), [[A, B]], max_new_tokens=9)
    assert [len(state) for state in generation.states] == list(range(1, 8))
    assert all(after[:-1] == before for before, after in itertools.pairwise(generation.states))
    assert generation.revealed_at == list(range(1, 8))
    (full,) = sampler_of(num_steps=7).generate(TabularModel(rightmost), [[A, B]], max_new_tokens=3)
    assert full.tokens == generation.tokens[:3]


def test_08_the_known_reverse_rate_keeps_the_law_of_the_process():
    """With a correction, texts at each time follow the same closed form as without one."""
    num, num_steps = 800, 64
    sampler = sampler_of(
        num_steps=num_steps, correction_scale=8.0, correction_power=0.5, correction_remaining_power=0.5
    )
    model = TabularModel(single_datum)
    generations = sampler.generate(model, [[BOS]] * num, max_new_tokens=6)
    k = 0.5
    law = {(): (1 - k) ** 2, (A,): k * (1 - k), (B,): k * (1 - k), (A, B): k * k}
    assert_follows([tuple(generation.states[num_steps // 2 - 1]) for generation in generations], law)
    assert generations[0].num_forwards == model.num_forwards == num_steps
    shrunk = sum(len(b) < len(a) for g in generations for a, b in itertools.pairwise(g.states))
    assert shrunk > num / 10


def test_11_prompts_and_begin_tokens_are_never_edited():
    def wild(text, place, time):
        return [5.0, 5.0, 5.0], logits_of(0.5), logits_of(0.5)

    model = TabularModel(wild)
    seen = []
    model.watch = lambda text: seen.append(text)
    objective = {**NOISY, "condition": "ends"}
    generations = sampler_of(objective, num_steps=6).infill(model, [[A, A, B], []], [[B, A], [A]], num_new_tokens=5)
    for text in seen:
        assert (text[:4] == (BOS, A, A, B) and text[-2:] == (B, A)) or (text[0] == BOS and text[-1] == A)
    assert any(text[:4] == (BOS, A, A, B) for text in seen)
    assert len(seen) > 6
    assert all(len(state) <= 5 for generation in generations for state in generation.states)
    assert {token for generation in generations for token in generation.tokens} <= {A, B, EOS}


def test_event_probability_is_exact_for_one_missing_edit_and_agrees_to_first_order():
    x = torch.linspace(0, 5, 101, dtype=torch.float64)
    for jump in (0.0, 0.3, 1.0):
        p = event_probability(x, jump=jump)
        assert ((p >= 0) & (p <= 1)).all()
        assert (p.diff() >= -1e-15).all()
    torch.testing.assert_close(event_probability(x, jump=1e-6), 1e-6 * x, rtol=1e-5, atol=0)
    torch.testing.assert_close(event_probability(x[:21], jump=1.0), x[:21])
    assert event_probability(torch.tensor([torch.inf]), jump=0.2) == 1


def tiny_model(*, condition="ends", noise_length=3, reverse=True):
    objective = {
        **EMPTY,
        "schedule": {"name": "polynomial", "power": 3.0},
        "noise_length": noise_length,
        "reverse": reverse,
        "condition": condition,
    }
    heads = {"rates": 3}
    if noise_length:
        heads["substitute"] = 0
    if reverse:
        heads.update({"reverse_rates": 3, "reverse_insert": 0, "reverse_substitute": 0})
    config = DecoderConfig(
        family="llama",
        vocab_size=5,
        num_layers=1,
        width=16,
        hidden_width=24,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
        time_input=True,
        extra_heads=heads,
        input_features={"context": 3},
    )
    decoder = Decoder(config)
    initialize(decoder, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "heads" in name or "features" in name or name == "head.weight":
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return decoder.double().eval(), objective


@pytest.mark.parametrize("rule", ["naive", "fixed", "weighted"])
def test_a_prompt_does_not_depend_on_the_batch(rule):
    model, objective = tiny_model()
    fields = {"num_steps": 6, "guidance": 0.5, "guidance_rule": rule, "correction_scale": 2.0, "top_p": 0.9}
    sampler = sampler_of(objective, seed=3, **fields)
    prompts = [[A, B, A], [B], [A] * 7]
    together = sampler.generate(model, prompts, max_new_tokens=10)
    alone = [sampler.generate(model, [prompt], max_new_tokens=10)[0] for prompt in prompts]
    assert together == alone
    assert together[0].num_forwards == 2 * (6 + 4)
    assert len({tuple(g.tokens) for g in together}) == 3
    assert {at % 2 for generation in together for at in generation.revealed_at} == {0}


def test_a_gap_does_not_depend_on_the_batch():
    """Texts that are equal but for the place of their gap are different keys of the noise."""
    model, objective = tiny_model()
    sampler = sampler_of(objective, num_steps=4)
    gaps = [([A, B], []), ([A], [B]), ([], [A, B])]
    together = sampler.infill(model, *map(list, zip(*gaps, strict=True)), num_new_tokens=8)
    assert together == [sampler.infill(model, [first], [last], num_new_tokens=8)[0] for first, last in gaps]


def test_logits_are_read_in_chunks(monkeypatch):
    model, objective = tiny_model()
    sampler = sampler_of(objective, num_steps=4, guidance=0.5, guidance_rule="weighted")
    whole = sampler.generate(model, [[A], [B]], max_new_tokens=10)
    monkeypatch.setattr("raydist.sampling.edit_rates._CHUNK_LOGITS", 10)
    sizes = []
    head_logits = model.head_logits
    monkeypatch.setattr(
        model,
        "head_logits",
        lambda hidden, head: sizes.append(hidden.shape[0]) or head_logits(hidden, head),
    )
    assert sampler.generate(model, [[A], [B]], max_new_tokens=10) == whole
    assert max(sizes) == 2


@pytest.mark.parametrize("condition", ["prefix", "ends"])
def test_training_and_sampling_show_the_model_the_same(condition):
    """Packed sequences of a training batch, one by one as the sampler's texts: the same log rates."""
    model, objective = tiny_model(condition=condition)
    config = OBJECTIVES.parse(objective)
    tokens_BS = torch.randint(0, 2, (6, 13), generator=torch.Generator().manual_seed(1))
    numbers_B = torch.arange(6)
    rows = Rows(0, tokens_BS, torch.zeros_like(tokens_BS), None, numbers_B, torch.zeros_like(numbers_B))
    noised = config.build(IDS).corrupt(rows, RowRng(0, 0, rows.epochs_B, rows.rows_B))
    inputs = noised.inputs
    trained = model.head_logits(model.hidden(**inputs), head="rates")
    checked = 0
    for row in range(len(trained)):
        for document in range(6):
            places = (inputs["mask"].documents_BL[row] == document).nonzero()[:, 0]
            if len(places) == 0:
                continue
            text, context = (
                inputs["tokens_BL"][row, places].tolist(),
                inputs["features"]["context"][row, places].tolist(),
            )
            free = [place for place, value in enumerate(context) if value == 0]
            first = context.index(2) + 1
            last = first + len(free)
            state = EditState.of(
                [text[:first]], [text[first:last]], [text[last:]], limit=20, fill=BOS, device=torch.device("cpu")
            )
            rates = edit_rates(
                model,
                state,
                time=inputs["time_BL"][row, places[0]].item(),
                heads=EditHeads("rates", "lm", "substitute"),
                guidance=Guidance(0.0, "naive", 1.0),
            )
            torch.testing.assert_close(rates.log_rates_BL3[0], trained[row, places], rtol=1e-9, atol=1e-9)
            checked += 1
    assert checked == 6


def test_guidance_joins_the_two_models_as_documented():
    """log rates and laws of both models are known, so the guided ones are too."""
    model, _ = tiny_model()
    heads = EditHeads("rates", "lm", "substitute")
    state = EditState.of([[BOS, A, B]], [[B, B]], [[A]], limit=5, fill=BOS, device=torch.device("cpu"))
    plain = edit_rates(model, state, time=0.4, heads=heads, guidance=Guidance(0.0, "naive", 9.0))
    alone = edit_rates(model, state.without_given(), time=0.4, heads=heads, guidance=Guidance(0.0, "naive", 9.0))
    w = 0.7
    chosen = torch.tensor([0, 0]), torch.tensor([2, 3])
    lm_c = torch.log_softmax(token_logits(model, plain, chosen, head="lm", guidance=Guidance(0.0, "naive", 9.0)), -1)
    chosen_alone = torch.tensor([0, 0]), torch.tensor([0, 1])
    lm_u = torch.log_softmax(
        token_logits(model, alone, chosen_alone, head="lm", guidance=Guidance(0.0, "naive", 9.0)), -1
    )
    guided_law = (1 + w) * lm_c - w * lm_u
    log_c, log_u = plain.log_rates_BL3[0, 2:4, 0], alone.log_rates_BL3[0, 0:2, 0]
    naive = (1 + w) * log_c - w * log_u
    expected = {"naive": naive, "fixed": log_c, "weighted": naive + guided_law.logsumexp(-1)}
    for rule, value in expected.items():
        guidance = Guidance(w, rule, 9.0)
        rates = edit_rates(model, state, time=0.4, heads=heads, guidance=guidance)
        torch.testing.assert_close(rates.log_rates_BL3[0, 2:4, 0], value)
        torch.testing.assert_close(token_logits(model, rates, chosen, head="lm", guidance=guidance), guided_law)
    held = edit_rates(model, state, time=0.4, heads=heads, guidance=Guidance(w, "naive", 0.01))
    assert (held.log_rates_BL3[0, 2:4, 0] - log_c).abs().max() <= 0.01 + 1e-12


def test_stop_ids_cut_the_text_and_special_tokens_are_never_drawn():
    def specials(text, place, time):
        logits = [-9.0, -1.0, 9.0, 0.0, 9.0]
        return [1.0, NEVER, NEVER], logits, logits

    generations = sampler_of(num_steps=8, stop_ids=(EOS,)).generate(
        TabularModel(specials), [[A]] * 30, max_new_tokens=12
    )
    for generation in generations:
        assert set(generation.tokens) <= {A, B, EOS}
        assert EOS not in generation.tokens[:-1]
        assert generation.stopped == (EOS in generation.tokens)
        assert len(generation.revealed_at) == len(generation.tokens)
    assert any(generation.stopped for generation in generations)
    gaps = sampler_of({**EMPTY, "condition": "ends"}, num_steps=8, stop_ids=(EOS,)).infill(
        TabularModel(specials), [[A]] * 30, [[B]] * 30, num_new_tokens=12
    )
    assert any(EOS in gap.tokens[:-1] for gap in gaps)
    assert not any(gap.stopped for gap in gaps)


def test_rows_beyond_the_vocabulary_are_never_drawn():
    def beyond(text, place, time):
        logits = [0.0, 0.0, 0.0, 0.0, 9.0]
        return [1.0, NEVER, NEVER], logits, logits

    ids = TokenIds(vocab_size=4, bos=BOS, eos=EOS, mask=None, pad=None)
    sampler = EditFlowSamplerConfig(num_steps=8).build(Trained(ids=ids, objective=EMPTY))
    generations = sampler.generate(TabularModel(beyond), [[A]] * 30, max_new_tokens=12)
    assert {token for generation in generations for token in generation.tokens} == {A, B, EOS}


def test_a_start_of_previous_tokens_comes_from_both_sides():
    def still(text, place, time):
        return [NEVER] * 3, logits_of(0.5), logits_of(0.5)

    objective = {**NOISY, "noise_length": 8, "source": {"name": "previous"}, "condition": "ends"}
    generations = sampler_of(objective, num_steps=1).infill(
        TabularModel(still), [[A], [BOS, A], []], [[B], [A], [B]], num_new_tokens=8
    )
    assert [set(generation.tokens) for generation in generations] == [{A, B}, {A}, {B}]


def test_what_is_left_of_a_start_of_masks_is_not_returned():
    def still(text, place, time):
        return [NEVER] * 3, logits_of(0.5), logits_of(0.5)

    (generation,) = sampler_of({**NOISY, "source": {"name": "mask"}}, num_steps=2).generate(
        TabularModel(still), [[A]], max_new_tokens=4
    )
    assert generation.states == [[MASK, MASK]] * 2
    assert (generation.tokens, generation.revealed_at) == ([], [])


def test_temperature_goes_from_one_end_to_the_other():
    config = EditFlowSamplerConfig(temperature=0.8, start_temperature=1.0)
    assert [config.temperature_at(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.9, 0.8])
    assert EditFlowSamplerConfig(temperature=0.3).temperature_at(0.0) == 0.3
    sampler = sampler_of(num_steps=4, temperature=0.0)
    generations = sampler.generate(TabularModel(single_datum), [[BOS]] * 40, max_new_tokens=4)
    assert {tuple(state) for g in generations for state in g.states} <= {(), (A,), (B,), (A, B)}


def test_correction_reaches_beyond_the_step_and_never_beyond_the_end():
    config = EditFlowSamplerConfig(correction_scale=60.0, correction_power=1.5, correction_remaining_power=0.5)
    assert config.correction(0.5) == pytest.approx(60 * 0.5**2)
    assert config.correction(0.0) == 0
    model, objective = tiny_model()
    sampler = sampler_of(objective, num_steps=4, correction_scale=60.0)
    (generation,) = sampler.generate(model, [[A]], max_new_tokens=6)
    assert generation.num_forwards == 4 + 2
    for num_steps in range(1, 30):  # the last step has nowhere to overshoot to, wherever the grid starts
        sampler = sampler_of(
            objective, num_steps=num_steps, correction_scale=1.0, correction_power=0, correction_remaining_power=0
        )
        (generation,) = sampler.revise(model, [[A]], [[B]], max_new_tokens=2, start_time=0.1)
        assert generation.num_forwards == 2 * num_steps - 1


def test_users_mistakes_are_named():
    with pytest.raises(ConfigError, match="no rates of edits"):
        sampler_of({"name": "next_token"})
    with pytest.raises(ConfigError, match="reverse rates"):
        sampler_of(NOISY, correction_scale=1.0)
    with pytest.raises(ConfigError, match="reverse rates"):
        sampler_of({**EMPTY, "spread_rate": 1.0}, correction_scale=1.0)
    sampler = sampler_of()
    model = TabularModel(single_datum)
    with pytest.raises(ConfigError, match="behind a gap"):
        sampler.infill(model, [[A]], [[B]], num_new_tokens=3)
    with pytest.raises(ConfigError, match="no time"):
        sampler.revise(model, [[A]], [[B]], max_new_tokens=3, start_time=1.0)
    with pytest.raises(ConfigError, match="longer than its limit"):
        sampler.revise(model, [[A]], [[B, B]], max_new_tokens=1, start_time=0.0)
    with pytest.raises(ConfigError, match="positions"):
        sampler.generate(model, [[A] * 10], max_new_tokens=1000)
    assert sampler.generate(model, [], max_new_tokens=3) == []


def test_noisy_starts_belong_to_the_prompt():
    def still(text, place, time):
        return [NEVER] * 3, logits_of(0.5), logits_of(0.5)

    sampler = sampler_of({**NOISY, "noise_length": 6}, num_steps=1)
    first, second = sampler.generate(TabularModel(still), [[A], [A]], max_new_tokens=9)
    (again,) = sampler.generate(TabularModel(still), [[A]], max_new_tokens=9)
    assert first == again
    assert len(first.states[0]) == 6
    assert first.states != second.states
    (short,) = sampler.generate(TabularModel(still), [[A]], max_new_tokens=4)
    assert short.states[0] == first.states[0][:4]


def test_schedule_of_the_training_is_used():
    """Of two steps under t^3 the first reaches kappa = 1/8; an edit wanted at t = 0 alone comes with that chance."""
    _, objective = tiny_model(noise_length=0, reverse=False)
    sampler = sampler_of(objective, num_steps=2)
    assert sampler.process.schedule == PolynomialSchedule(power=3.0)

    def one_a(text, place, time):
        return [0.0 if time == 0 and place == 0 else NEVER, NEVER, NEVER], logits_of(0.999999999), logits_of(0.5)

    generations = sampler.generate(TabularModel(one_a), [[BOS]] * 2000, max_new_tokens=4)
    assert_follows([tuple(generation.tokens) for generation in generations], {(): 0.875, (A,): 0.125})

"""Resample-Previous-Tokens. Numbers in test names are those of the invariants of arXiv 2506.06215 in our sheet."""

import itertools

import pytest
import torch

from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.core.target_offsets import TargetOffsets
from raydist.models.mask_spec import CausalMask
from raydist.sampling.drawing import PromptNoise, draw_tokens
from tests.sampling.decoders import MASK_ID, tiny_decoder, trained
from tests.sampling.oracle import OracleDecoder, chi_square, conditional, empirical_law, marginal, random_law

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [3, 3]]
TRAINED_WINDOW = 4


def objective(*, window=TRAINED_WINDOW, rotary_positions="content"):
    return {"name": "resample", "window": window, "rotary_positions": rotary_positions}


def sampler_of(*, stop_ids=(), mask_id=MASK_ID, seed=0, rotary_positions="content", **fields):
    config = SAMPLERS.parse({"name": "resample", **fields})
    return config.build(
        trained(stop_ids=stop_ids, mask_id=mask_id, seed=seed, objective=objective(rotary_positions=rotary_positions))
    )


def autoregressive(*, stop_ids=(), mask_id=MASK_ID, **fields):
    return SAMPLERS.parse({"name": "autoregressive", **fields}).build(trained(stop_ids=stop_ids, mask_id=mask_id))


def decoder_with_table(*, scale=0.5, **fields):
    decoder = tiny_decoder(input_features={"offset": TargetOffsets(TRAINED_WINDOW).num_values}, **fields)
    with torch.no_grad():
        table = decoder.input_features["offset"].weight
        table.copy_(
            scale
            * decoder.embedding.weight.std()
            * torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
        )
    return decoder


def decoder_with_next_token_offset(decoder):
    """The plain decoder of the same weights, offset +1 added to its token embeddings."""
    plain = tiny_decoder(family=decoder.config.family)
    with torch.no_grad():
        row = decoder.input_features["offset"].weight[TargetOffsets(TRAINED_WINDOW).next_token_row]
        plain.embedding.weight.copy_(decoder.embedding.weight + row)
    return plain


class Reference:
    """The algorithm for one prompt, written plainly, without a cache; only its count of forwards knows of one."""

    def __init__(self, sampler, decoder, prompt, *, max_new_tokens):
        self.sampler, self.decoder, self.prompt = sampler, decoder, prompt
        self.noise = PromptNoise([prompt], seed=sampler.seed, device=torch.device("cpu"))
        self.most = len(prompt) + max_new_tokens
        self.text, self.cached, self.forwards = list(prompt), 0, 0
        self.states, self.fixed_at, self.stopped = {}, {}, False

    def logits(self, sources, target):
        """Answer of the last of the tokens at these places, in this order, when the last one's target is given."""
        offsets = [after - before for before, after in itertools.pairwise([*sources, target])]
        slots = self.sampler.rotary_positions == "slots"
        positions = range(len(sources)) if slots else sources
        out = self.decoder.logits(
            torch.tensor([[self.text[place] for place in sources]]),
            torch.tensor([list(positions)]),
            CausalMask(length=len(sources)),
            features={"offset": torch.tensor([offsets]) + TRAINED_WINDOW - 1},
        )[0, -1].detach()
        out[MASK_ID] = -torch.inf
        return out

    def draw(self, logits, purpose, place):
        config = self.sampler.config
        uniforms = self.noise.uniforms(purpose, self.most - len(self.prompt))[:, place - len(self.prompt)]
        options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        return int(draw_tokens(logits[None, None], uniforms_BN=uniforms[:, None], **options))

    def put(self, place, token):
        if place not in self.fixed_at or self.text[place] != token:
            self.fixed_at[place] = self.forwards
        self.text[place] = token

    def record(self):
        self.states[self.forwards] = self.text[len(self.prompt) :]

    def next(self, purpose, place, old=None):
        if self.cached < len(self.text):
            self.cached, self.forwards = len(self.text), self.forwards + 1
        end = len(self.text)
        token = self.draw(self.logits(list(range(end)), end), purpose, place)
        self.text.append(token if old is None else old)
        self.put(end, token)
        self.record()
        return token

    def previous(self, half, start):
        accepted, config = False, self.sampler.config
        for offset in range(min(config.window, len(self.text) - start) - 1):
            place, end = start + offset, len(self.text)
            self.forwards += 1
            logits = self.logits([other for other in range(end) if other != place], place)
            greedy = config.previous == "greedy"
            token = int(logits.argmax()) if greedy else self.draw(logits, f"previous/{half}/{offset}", start)
            if torch.softmax(logits, dim=-1)[token] > config.confidence_threshold:
                accepted = True
                if token != self.text[place]:
                    self.cached = min(self.cached, place)
                self.put(place, token)
            self.record()
        return accepted

    @torch.inference_mode()
    def run(self):
        config, stops, start = self.sampler.config, self.sampler.stop_ids.tolist(), len(self.prompt)
        while True:
            stopped = False
            while len(self.text) < min(start + config.window, self.most) and not stopped:
                stopped = self.next("token", len(self.text)) in stops
            accepted = False
            for half in range(round(2 * config.iterations)):
                if half % 2 == 0:
                    accepted = self.previous(half, start)
                elif len(self.text) - start > 1 and (accepted or config.refresh == "always"):
                    old = self.text.pop()
                    self.cached = min(self.cached, len(self.text))
                    self.next(f"next/{half}", start, old)
            generated = self.text[len(self.prompt) :]
            ends = [index + 1 for index, token in enumerate(generated) if token in stops]
            if ends or len(self.text) == self.most:
                self.stopped = bool(ends)
                return generated[: min(ends, default=len(generated))]
            start = min(start + config.stride, len(self.text))


SETTINGS = [
    {"window": 2, "iterations": 1, "confidence_threshold": 0.3, "refresh": "accepted"},
    {"window": 2, "iterations": 0.5, "confidence_threshold": 0.2},
    {"window": 2, "iterations": 1.5, "confidence_threshold": 0.4, "temperature": 0.8, "stride": 2},
    {"window": 3, "iterations": 2, "confidence_threshold": 0.0, "temperature": 1.1, "previous": "sampled"},
    {"window": 3, "iterations": 1, "confidence_threshold": 0.5, "temperature": 1.0, "top_k": 5},
    {"window": 4, "iterations": 1.5, "confidence_threshold": 0.35, "rotary_positions": "slots"},
    {"window": 4, "iterations": 1, "confidence_threshold": 0.3, "stride": 3, "temperature": 0.9, "top_p": 0.9},
]


@pytest.mark.parametrize("stop_ids", [(), (0, 3)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_cached_batch_equals_the_uncached_reference(settings, stop_ids):
    decoder, sampler = decoder_with_table(), sampler_of(stop_ids=stop_ids, **settings)
    generations = sampler.generate(decoder, PROMPTS[:3], max_new_tokens=10)
    for prompt, generation in zip(PROMPTS[:3], generations, strict=True):
        reference = Reference(sampler, decoder, prompt, max_new_tokens=10)
        assert generation.tokens == reference.run()
        assert generation.num_forwards == reference.forwards
        fixed_at = [reference.fixed_at[len(prompt) + index] for index in range(len(generation.tokens))]
        assert generation.revealed_at == fixed_at
        assert generation.states == [reference.states[forward] for forward in range(1, reference.forwards + 1)]
        assert generation.stopped == reference.stopped
    assert any(state != one.tokens[: len(state)] for one in generations for state in one.states)
    assert any(generation.stopped for generation in generations) == bool(stop_ids)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]])
def test_a_prompt_does_not_feel_its_batch(settings):
    decoder, sampler = decoder_with_table(family="qwen3"), sampler_of(stop_ids=[0, 3], **settings)
    together = sampler.generate(decoder, PROMPTS, max_new_tokens=15)
    assert together == [sampler.generate(decoder, [prompt], max_new_tokens=15)[0] for prompt in PROMPTS]
    assert together[::-1] == sampler.generate(decoder, PROMPTS[::-1], max_new_tokens=15)


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_k": 9, "top_p": 0.95}])
def test_03_no_iterations_are_autoregressive_sampling(options, window):
    """Token by token and forward by forward, with the same seed."""
    decoder = decoder_with_table()
    plain = autoregressive(stop_ids=[0, 3], **options)
    expected = plain.generate(decoder_with_next_token_offset(decoder), PROMPTS, max_new_tokens=14)
    sampler = sampler_of(stop_ids=[0, 3], window=window, iterations=0, **options)
    assert sampler.generate(decoder, PROMPTS, max_new_tokens=14) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_04_threshold_one_accepts_nothing(temperature):
    decoder = decoder_with_table()
    options = {"temperature": temperature, "stop_ids": [3]}
    plain = autoregressive(**options).generate(decoder_with_next_token_offset(decoder), PROMPTS, max_new_tokens=12)
    sampler = sampler_of(confidence_threshold=1.0, iterations=2, refresh="accepted", **options)
    never = sampler.generate(decoder, PROMPTS, max_new_tokens=12)
    for one, other in zip(plain, never, strict=True):
        assert one.tokens == other.tokens
        windows = len(one.tokens) - 1
        assert other.num_forwards == one.num_forwards + 2 * windows


def test_04_threshold_zero_accepts_every_greedy_proposal():
    """The last sweep of each window leaves its token at the argmax of the previous-token prediction."""
    decoder, sampler = decoder_with_table(), sampler_of(confidence_threshold=0.0, iterations=0.5)
    for prompt, generation in zip(PROMPTS, sampler.generate(decoder, PROMPTS, max_new_tokens=10), strict=True):
        reference = Reference(sampler, decoder, prompt, max_new_tokens=10)
        drawn = [generation.states[forward - 1][-1] for forward in [2, *range(4, 20, 2)]]
        for index, later in enumerate(drawn):
            place = len(prompt) + index
            reference.text = [*prompt, *generation.tokens[:index], 0, later]
            assert generation.tokens[index] == int(reference.logits([*range(place), place + 1], place).argmax())


class PairOracle(OracleDecoder):
    """Answers with the law of the token that the offset asks for, given the tokens seen and the places they are at.

    With ``first_law``, the first variable is answered with it where nothing is known: a wrong next-token prediction.
    """

    def __init__(self, law, *, first_law=None):
        super().__init__(law)
        self.first_law = first_law

    def hidden(self, tokens_BL, positions_BL, mask, cache, features):
        self.offsets_BL = features["offset"] - (TRAINED_WINDOW - 1)
        marked = positions_BL + 100 * self.offsets_BL
        shown, places = cache.extend(0, tokens_BL[:, None, :, None].double(), positions_BL[:, None, :, None].double())
        shown_BW, places_BW = shown[:, 0, :, 0].long().tolist(), places[:, 0, :, 0].long().tolist()
        seen_BLW = mask.dense()[:, 0].expand(len(shown_BW), -1, -1).tolist()
        rows = [
            torch.stack([self.answer(*row[:2], marked=mark, seen=seen) for mark, seen in zip(*row[2:], strict=True)])
            for row in zip(shown_BW, places_BW, marked.tolist(), seen_BLW, strict=True)
        ]
        return torch.stack(rows)

    def answer(self, shown, places, *, marked, seen):
        known = {
            place - 1: value
            for value, place, visible in zip(shown, places, seen, strict=True)
            if visible and value < self.num_symbols and 1 <= place <= self.law.ndim
        }
        position = (marked + 50) % 100 - 50
        target = position + (marked - position) // 100 - 1
        key = (target, frozenset(known.items()))
        if key not in self._answers:
            logits = torch.full((self.num_symbols + 2,), -50.0, dtype=torch.float64)
            if 0 <= target < self.law.ndim and target not in known:
                law = marginal(conditional(self.law, known), target)
                if self.first_law is not None and target == 0 and not known:
                    law = self.first_law
                logits[: self.num_symbols] = law.log()
            self._answers[key] = logits
        return self._answers[key]


def oracle_counts(law, *, num=2500, first_law=None, **fields):
    oracle = PairOracle(law, first_law=first_law)
    exact = {"confidence_threshold": 0.0, "previous": "sampled", "temperature": 1.0, "record_states": False}
    sampler = sampler_of(mask_id=oracle.mask_id, **{**exact, **fields})
    generations = sampler.generate(oracle, [[oracle.bos]] * num, max_new_tokens=law.ndim)
    return empirical_law([generation.tokens for generation in generations], law.shape)


def assert_drawn_from(counts, law):
    statistic, df = chi_square(counts, law)
    assert statistic < df + 4 * (2 * df) ** 0.5


def swept(law, true, *, iterations):
    """The law of a window of all variables after full or half iterations, by enumeration."""
    for half in range(round(2 * iterations)):
        for variable in range(law.ndim - 1) if half % 2 == 0 else [law.ndim - 1]:
            given = true / true.sum(dim=variable, keepdim=True)
            law = law.sum(dim=variable, keepdim=True) * given
    return law


def started(true, first_law):
    """The law of autoregressive sampling whose first conditional is wrong."""
    rest = true / true.flatten(1).sum(dim=1).reshape(-1, *[1] * (true.ndim - 1))
    return rest * first_law.reshape(-1, *[1] * (true.ndim - 1))


@pytest.mark.parametrize("iterations", [0.5, 1, 2])
def test_05_exact_conditionals_keep_the_law(iterations):
    law = random_law((3, 3), seed=0)
    assert_drawn_from(oracle_counts(law, iterations=iterations), law)


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (2, 2), (3, 1), (4, 1)])
def test_05_exact_conditionals_keep_the_law_of_longer_texts(window, stride):
    law = random_law((2, 2, 2, 2), seed=5)
    assert_drawn_from(oracle_counts(law, window=window, stride=stride, iterations=1), law)


def slow_law(shape):
    """Neighbours are mostly equal, so that a sweep forgets little."""
    values = torch.meshgrid(*[torch.arange(size) for size in shape], indexing="ij")
    equal = sum((one == other).double() for one, other in itertools.pairwise(values))
    weights = random_law(shape, seed=1, sharpness=0.3) * torch.exp(3.0 * equal)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("shape", "iterations"), [((3, 3), 0), ((3, 3), 0.5), ((3, 3), 1), ((3, 3), 1.5), ((2, 2, 2), 1), ((2, 2, 2), 1.5)]
)
def test_06_the_sampler_draws_the_enumerated_law_from_a_wrong_start(shape, iterations):
    law, wrong = slow_law(shape), random_law(shape[:1], seed=2, sharpness=2.0)
    expected = swept(started(law, wrong), law, iterations=iterations)
    counts = oracle_counts(law, first_law=wrong, window=len(shape), iterations=iterations)
    assert_drawn_from(counts, expected)
    assert chi_square(counts, law)[0] > 2 * chi_square(counts, expected)[0] + 50


def test_06_the_initial_error_is_forgotten():
    law, wrong = random_law((3, 3), seed=1, sharpness=1.0), random_law((3,), seed=2, sharpness=2.0)
    assert_drawn_from(oracle_counts(law, first_law=wrong, iterations=4), law)
    errors = [float(abs(swept(started(law, wrong), law, iterations=k) - law).sum() / 2) for k in range(6)]
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors))


def test_a_stop_id_can_be_taken_back_and_ends_the_row_where_it_stays():
    law = torch.zeros(3, 3, dtype=torch.float64)
    law[0, 2], law[1, 1] = 0.5, 0.5
    oracle = PairOracle(law, first_law=torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64))
    sampler = sampler_of(mask_id=oracle.mask_id, temperature=1.0, stop_ids=[2])
    generations = sampler.generate(oracle, [[oracle.bos]] * 40, max_new_tokens=2)
    assert {tuple(generation.tokens): generation.stopped for generation in generations} == {
        (0, 2): True,
        (1, 1): False,
    }


def test_text_shorter_than_the_window():
    decoder = decoder_with_table()
    for generation in sampler_of(window=4, iterations=1).generate(decoder, PROMPTS, max_new_tokens=1):
        assert len(generation.tokens) == generation.num_forwards == 1
    sampler = sampler_of(window=4, iterations=1, confidence_threshold=0.2)
    generations = sampler.generate(decoder, PROMPTS, max_new_tokens=3)
    references = [Reference(sampler, decoder, prompt, max_new_tokens=3) for prompt in PROMPTS]
    assert [generation.tokens for generation in generations] == [reference.run() for reference in references]
    assert sampler.generate(decoder, [], max_new_tokens=4) == []


def test_states_are_the_text_after_each_forward():
    sampler = sampler_of(confidence_threshold=0.2)
    for generation in sampler.generate(decoder_with_table(), PROMPTS, max_new_tokens=12):
        assert len(generation.states) == generation.num_forwards
        assert generation.states[-1] == generation.tokens
        for index, forward in enumerate(generation.revealed_at):
            assert all(state[index] == generation.tokens[index] for state in generation.states[forward - 1 :])
    silent = sampler_of(confidence_threshold=0.2, record_states=False)
    assert silent.generate(decoder_with_table(), PROMPTS, max_new_tokens=12)[0].states is None


def test_mask_token_is_never_drawn():
    decoder = decoder_with_table()
    with torch.no_grad():
        decoder.norm.weight.zero_()
    sampler = sampler_of(temperature=1.0, previous="sampled", confidence_threshold=0.0)
    tokens = [g.tokens for g in sampler.generate(decoder, [[1]] * 20, max_new_tokens=20)]
    assert not any(MASK_ID in text for text in tokens)


def test_rows_beyond_the_vocabulary_are_never_drawn():
    """A decoder of 12 rows for a vocabulary of 6, its mask among them."""
    settings = {"temperature": 1.0, "previous": "sampled", "confidence_threshold": 0.0}
    config = SAMPLERS.parse({"name": "resample", **settings})
    sampler = config.build(trained(mask_id=5, vocab_size=6, objective=objective()))
    generations = sampler.generate(decoder_with_table(), [[1]] * 20, max_new_tokens=20)
    assert {token for generation in generations for token in generation.tokens} == set(range(5))


@pytest.mark.parametrize("trained_for", [None, {"name": "next_token"}])
def test_a_model_without_previous_token_prediction_is_refused(trained_for):
    with pytest.raises(ConfigError, match="cannot predict previous tokens"):
        SAMPLERS.parse("resample").build(trained(objective=trained_for))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="wider than any"):
        sampler_of(window=5)
    with pytest.raises(ConfigError, match=r"a multiple of 0\.5"):
        sampler_of(iterations=0.7)
    with pytest.raises(ConfigError, match="stride=3 is above window=2"):
        sampler_of(stride=3)

"""The byte-token representation on a 5-token BPE with an explicit byte source (sheet, invariants e1, e2, e3, e5, e9)."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from raydist.sampling.text_bytes.covers import END, Covers
from raydist.sampling.text_bytes.likelihood import byte_log_likelihood
from raydist.sampling.text_bytes.reader import ByteReader
from raydist.sampling.text_bytes.segmentation import Tail
from tests.sampling.byte_models import (
    TOY_BOS,
    TOY_LENGTH,
    TOY_TOKENS,
    ConditionalsModel,
    markov_source,
    prefix_probability,
    read_slowly,
    token_conditionals,
    toy_encoder,
    toy_model,
    uncached_law,
)

LAW = markov_source()
STRINGS = ["".join(letters) for n in range(1, TOY_LENGTH + 1) for letters in itertools.product("ab", repeat=n)]
ENCODE = functools.cache(lambda text: tuple(toy_encoder().encode(text).ids))


def brute_force_covers(text):
    """All covers, from the encodings of all strings of the source and of what is longer."""
    found = set()
    for more in itertools.product("ab", repeat=4):
        for rest in range(5):
            ids = ENCODE(text + "".join(more[:rest]))
            lengths = list(itertools.accumulate(len(TOY_TOKENS[token]) for token in ids))
            count = next(place + 1 for place, length in enumerate(lengths) if length >= len(text))
            found.add(ids[:count])
    return found


def covers_of(covers, model):
    ids = model.segmentation.vocabulary.ids_S
    closed = [cover.tokens for cover in covers.closed]
    open_ = [
        (*branch.root.tokens, branch.tokens.low + i)
        for branch in covers.branches
        for i in np.nonzero(branch.probabilities)[0].tolist()
    ]
    return [tuple(ids[list(tokens)].tolist()) for tokens in [*closed, *open_]]


@pytest.mark.parametrize("text", [s for s in STRINGS if len(s) <= 4])
def test_e1_e2_the_covers_are_those_of_brute_force(text):
    """Distinct, reaching the text, minimal, and exactly the beginnings of encodings."""
    model = toy_model(LAW, conditional=lambda prefix: torch.zeros(7, dtype=torch.float64))
    covers = Covers(model.segmentation, tail=Tail(), exact=True)
    for byte in text.encode():
        covers.grow([uncached_law(model, cover.tokens, context=[TOY_BOS]) for cover in covers.closed])
        covers.advance(byte)
    found = covers_of(covers, model)
    assert len(found) == len(set(found))
    assert set(found) == brute_force_covers(text)
    for ids in found:
        strings = [TOY_TOKENS[token] for token in ids]
        assert "".join(strings).startswith(text)
        assert len("".join(strings[:-1])) < len(text)
        assert ENCODE("".join(strings)) == ids


def test_e1_the_sum_over_covers_is_the_probability_of_the_bytes():
    model = toy_model(LAW)
    conditional = token_conditionals(LAW)
    for text in STRINGS:
        by_hand = math.fsum(
            math.exp(sum(float(conditional(ids[:k])[ids[k]]) for k in range(len(ids))))
            for ids in brute_force_covers(text)
        )
        expected = prefix_probability(LAW, text)
        assert by_hand == pytest.approx(expected, abs=1e-15)
        reader = ByteReader(model, [text.encode()], contexts=[[TOY_BOS]], max_new_bytes=0)
        assert math.exp(reader.log_masses()[0]) == pytest.approx(expected, abs=1e-15)


def test_e3_next_bytes_are_ratios_and_the_token_conditioned_guess_is_not():
    model, conditional = toy_model(LAW), token_conditionals(LAW)
    for text in [s for s in STRINGS if len(s) < TOY_LENGTH]:
        law = ByteReader(model, [text.encode()], contexts=[[TOY_BOS]], max_new_bytes=1).next_symbols()[0]
        assert law.sum() == pytest.approx(1.0, abs=1e-14)
        for letter in "ab":
            ratio = prefix_probability(LAW, text + letter) / prefix_probability(LAW, text)
            assert law[ord(letter)] == pytest.approx(ratio, abs=1e-14)
        assert law[END] == 0
    true_a = prefix_probability(LAW, "ba") / prefix_probability(LAW, "b")
    naive = conditional(ENCODE("b")).exp()
    naive_a = sum(float(naive[i]) for i, token in enumerate(TOY_TOKENS) if token.startswith("a"))
    assert naive_a == pytest.approx(1.0)
    assert true_a < 0.95


def test_e5_chain_rule_and_the_end():
    model = toy_model(LAW)
    for text in ["abbabba", "bbbbbbb", "aaabbab", "babaaaa"]:
        _, masses, laws = read_slowly(model, text.encode(), context=[TOY_BOS])
        product = math.fsum(math.log(laws[n][byte]) for n, byte in enumerate(text.encode()))
        assert product == pytest.approx(math.log(LAW[text]), abs=1e-12)
        assert masses[-1] == pytest.approx(math.log(LAW[text]), abs=1e-12)
        assert laws[-1][END] == pytest.approx(1.0)
        score = byte_log_likelihood(model, text.encode(), ends=True)
        assert score.log_prob_nats == pytest.approx(math.log(LAW[text]), abs=1e-12)
        assert score.bits_per_byte == pytest.approx(-math.log2(LAW[text]) / TOY_LENGTH, abs=1e-12)


def test_a_model_without_impossible_tokens_needs_no_truncation():
    for text in ["b", "ab", "abbab", "aab"]:
        exact, fast = (
            ByteReader(toy_model(LAW, exact=mode), [text.encode()], contexts=[[]], max_new_bytes=1)
            for mode in (True, False)
        )
        np.testing.assert_allclose(exact.next_symbols(), fast.next_symbols(), atol=1e-15)


def leaky(conditional):
    """30% of the model's mass lies on all tokens alike, impossible ones included."""
    uniform = torch.tensor([0.2] * 5 + [0.0, 0.0], dtype=torch.float64)
    return functools.cache(lambda prefix: (0.7 * conditional(prefix).exp() + 0.3 * uniform).log())


def test_e9_impossible_mass_is_taken_out_and_the_rest_renormalised():
    """The source's token model has none; after adding some, the exact law is that of the truncated token model."""
    conditional = token_conditionals(LAW)
    for prefix in [(), (1,), (2,), (0, 1), (4,)]:
        possible = [ENCODE("".join(TOY_TOKENS[t] for t in (*prefix, v))) == (*prefix, v) for v in range(5)]
        assert all(conditional(prefix)[v] == -math.inf for v in range(5) if not possible[v])
    leaking = leaky(conditional)

    @functools.cache
    def truncated(prefix):
        possible = [ENCODE("".join(TOY_TOKENS[t] for t in (*prefix, v))) == (*prefix, v) for v in range(5)]
        masked = leaking(prefix).exp() * torch.tensor([*possible, True, False], dtype=torch.float64)
        return (masked / masked.sum()).log()

    changed = 0.0
    for text in [s for s in STRINGS if len(s) <= 4]:
        reader = ByteReader(toy_model(LAW, conditional=leaking), [text.encode()], contexts=[[]], max_new_bytes=1)
        by_hand = math.fsum(
            math.exp(sum(float(truncated(ids[:k])[ids[k]]) for k in range(len(ids))))
            for ids in brute_force_covers(text)
        )
        assert math.exp(reader.log_masses()[0]) == pytest.approx(by_hand, rel=1e-12)
        law = reader.next_symbols()[0]
        assert law.sum() == pytest.approx(1.0, abs=1e-14)
        changed = max(changed, abs(by_hand - prefix_probability(LAW, text)))
    assert changed > 0.01


def test_no_forward_is_spent_where_no_cover_closes():
    """One short forward a byte, none for the answers that are already there."""
    model = toy_model(LAW)
    assert isinstance(model.model, ConditionalsModel)
    reader = ByteReader(model, [b""], contexts=[[]], max_new_bytes=7)
    for byte in b"abbabba":
        reader.advance([byte])
    assert model.model.num_forwards == reader.num_forwards_B[0] == 1 + 1 + 7

"""Covers, laws and likelihoods on a real byte-level BPE, against enumeration and uncached forwards (e1 - e7)."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import pre_tokenizers
from tokenizers.models import BPE as BPEModel

from data_loaders.byte_level_bpe import ByteLevelBpe, byte_characters
from data_loaders.tokenizer import Tokenizer
from data_loaders.tokenizer_sources import byte_tokenizer
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.models.hf import load_decoder
from raydist.models.mask_spec import CausalMask
from raydist.sampling.text_bytes.covers import END, closed_covers
from raydist.sampling.text_bytes.ensemble import ByteEnsemble
from raydist.sampling.text_bytes.likelihood import byte_log_likelihood
from raydist.sampling.text_bytes.reader import ByteModel, ByteReader, Start
from raydist.sampling.text_bytes.segmentation import Segmentation, Tail
from raydist.sampling.text_bytes.utf8 import partial_decode
from raydist.sampling.text_bytes.vocabulary import ByteVocabulary
from tests.models.test_smollm2 import smollm2
from tests.sampling.byte_models import byte_model, decoder_for, python_bpe, read_slowly, segmentation_of, uncached_law

__all__ = ["smollm2"]

BPE = python_bpe()
BOS = BPE.special_ids.bos
DECODER = decoder_for(BPE)
TEXTS = [
    "def __init__(self, ",
    "    return  \n\n    x",
    "naïve café \u2014 中文中国 é",
    "x = 1234567 + 89",
    "don't we'll  ",
]
FOLLOWING = ["", *"aeitrsn0189 .,:=_(#'\n\té中Ж𐎀", " a", "\n ", " \n", "00", "00a", " é", "  ", "ll"]


def oracle_reaches(ids, data):
    """Whether some text among many begins with these tokens: the whole encoder on whole texts."""
    decoded = partial_decode(data)
    if decoded is None:
        return False
    missing = 0
    if decoded[1]:
        lead = decoded[1][0]
        missing = (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) - len(decoded[1])
    for filling in itertools.product(range(0x80, 0xC0), repeat=min(missing, 2)):
        middle = bytes(filling) + b"\x85" * (missing - len(filling))
        for after in FOLLOWING if missing == 0 else [""]:
            try:
                text = (data + middle).decode() + after
            except UnicodeDecodeError:
                continue
            if BPE.encode(text)[: len(ids)] == list(ids):
                return True
    return False


def enumerated_covers(segmentation, data):
    """Every cut of the text into tokens, every last token that passes its end; kept where the oracle agrees."""
    strings, ids_S = segmentation.vocabulary.strings, segmentation.vocabulary.ids_S.tolist()
    known = {string: token_id for string, token_id in zip(strings, ids_S, strict=True)}

    @functools.cache
    def cuts(stop):
        if stop == 0:
            return [()]
        return [(*head, data[start:stop]) for start in range(stop) if data[start:stop] in known for head in cuts(start)]

    candidates = [
        (*head, string)
        for start in range(len(data))
        for head in cuts(start)
        for string in strings
        if string.startswith(data[start:])
    ]
    found = set()
    for cover in candidates:
        ids = tuple(known[string] for string in cover)
        if oracle_reaches(ids, b"".join(cover)):
            found.add(ids)
    return found


def ids_of(model, covers):
    ids_S = model.segmentation.vocabulary.ids_S
    return [tuple(ids_S[list(tokens)].tolist()) for tokens in covers]


@pytest.mark.parametrize(
    "text", ["de", "x  ", " se", "\n  ", "ret", "12", "a.", "é".encode()[:1], "中".encode()[:2], "n'"]
)
def test_e1_e2_covers_equal_brute_force_enumeration(text):
    data = text.encode() if isinstance(text, str) else text
    model = byte_model(BPE)
    covers, masses, _ = read_slowly(model, data[:-1], context=[BOS])
    covers.advance(data[-1])
    found = ids_of(
        model,
        [
            *(cover.tokens for cover in covers.closed),
            *(
                (*branch.root.tokens, branch.tokens.low + i)
                for branch in covers.branches
                for i in np.nonzero(branch.probabilities)[0].tolist()
            ),
        ],
    )
    assert len(set(found)) == len(found) >= 1
    strings = model.segmentation.tokenizer.tokens
    for cover in found:
        assert b"".join(strings[token] for token in cover).startswith(data)
        assert len(b"".join(strings[token] for token in cover[:-1])) < len(data)
    assert set(found) == enumerated_covers(model.segmentation, data)
    assert masses[0] == 0.0


@pytest.mark.parametrize("before", ["", "def", " sel", "x  ", "\n   ", "é", "12", "self."])
def test_followers_are_what_the_encoder_can_produce(before):
    segmentation = segmentation_of(BPE)
    sequence = segmentation.encode(before.encode())
    mask_S = segmentation.followers(segmentation.tail_of(sequence))
    ids_S = segmentation.vocabulary.ids_S
    sampled = range(0, len(ids_S), 3)
    for token in sampled:
        ids = ids_S[[*sequence, token]].tolist()
        data = before.encode() + segmentation.vocabulary.strings[token]
        assert mask_S[token] == oracle_reaches(ids, data), (before, segmentation.vocabulary.strings[token])


@pytest.mark.parametrize("text", TEXTS)
def test_followers_are_can_follow_of_every_token(text):
    segmentation, tail = Segmentation(BPE.byte_level()), Tail()
    for token in [*segmentation.encode(text.encode()), segmentation.encode(b"q")[0]]:
        expected = segmentation.can_follow(tail, range(len(segmentation.vocabulary.strings)))
        np.testing.assert_array_equal(segmentation.followers(tail), expected)
        tail = segmentation.extend(tail, token)


def test_sequences_that_their_own_text_does_not_give_are_reachable():
    """ "x", " ", " " begins the encoding of "x  " and a letter that has no merge with the space."""
    segmentation = segmentation_of(BPE)
    x, space = segmentation.encode(b"x")[0], segmentation.encode(b" ")[0]
    two = segmentation.encode(b"  ")[0]
    assert segmentation.encode(b"x  ") == [x, two]
    assert segmentation.can_follow(segmentation.tail_of([x, space]), [space]).all()
    assert segmentation.encode("x  𐎀".encode())[:3] == [x, space, space]
    assert not segmentation.is_whole(segmentation.tail_of([x, space, space]))
    assert segmentation.is_whole(segmentation.tail_of([x, two]))


def test_a_split_that_depends_on_the_letter_behind_an_apostrophe_is_seen():
    """GPT-2's pattern keeps 'll whole and cuts 'lx; with a token "'l" both cuts of "'l" occur."""
    characters = byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)} | {"'l": 256}
    inner = HfTokenizer(BPEModel(vocab=vocabulary, merges=[("'", "l")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    segmentation = Segmentation(ByteLevelBpe(inner.to_str().encode()))
    a, apostrophe, letter, both = (segmentation.vocabulary.strings.index(text) for text in (b"a", b"'", b"l", b"'l"))
    assert segmentation.encode(b"a'll") == [a, both, letter]
    assert segmentation.encode(b"a'lx")[:3] == [a, apostrophe, letter]
    after_a = segmentation.tail_of([a])
    assert segmentation.can_follow(after_a, [both, apostrophe]).all()
    assert segmentation.can_follow(segmentation.extend(after_a, apostrophe), [letter]).all()


@pytest.mark.parametrize("text", TEXTS)
def test_e4_incremental_equals_fresh_equals_uncached_at_every_byte(text):
    """Bytes read one at a time behind a cache, a fresh cover search, and uncached forwards from the beginning."""
    data = text.encode()
    model = byte_model(BPE)
    _, masses, slow = read_slowly(model, data, context=[BOS])
    start = Start.of(model, data, context=[BOS])
    reader = ByteReader(model, [b""], contexts=[[BOS]], max_new_bytes=len(data))
    for place in range(len(data) + 1):
        np.testing.assert_allclose(reader.next_symbols()[0], slow[place], rtol=1e-9, atol=1e-12)
        assert reader.log_masses()[0] == pytest.approx(masses[place], abs=1e-9)
        fresh = ByteReader(model, [data[:place]], contexts=[[BOS]], max_new_bytes=0)
        np.testing.assert_allclose(fresh.next_symbols()[0], slow[place], rtol=1e-9, atol=1e-12)
        if place < len(data):
            reader.advance([data[place]])
    assert len(start.forced) > 0


@settings(max_examples=12, deadline=None, derandomize=True)
@given(text=st.text(alphabet="abdefnrst 01._(é中\n'😀", min_size=1, max_size=9))
def test_e4_incremental_equals_fresh_on_random_strings(text):
    data, model = text.encode(), byte_model(BPE, decoder=DECODER)
    reader = ByteReader(model, [b""], contexts=[[BOS]], max_new_bytes=len(data))
    for place, byte in enumerate(data):
        reader.advance([byte])
        fresh = ByteReader(model, [data[: place + 1]], contexts=[[BOS]], max_new_bytes=0)
        np.testing.assert_allclose(reader.next_symbols(), fresh.next_symbols(), rtol=1e-9, atol=1e-12)


def test_e5_chain_rule_and_bits_per_byte():
    """The product of all next-byte probabilities is the likelihood; fast and exact both."""
    for text in TEXTS:
        data = text.encode()
        model = byte_model(BPE)
        _, masses, laws = read_slowly(model, data, context=[BOS])
        chain = math.fsum(math.log(laws[n][byte]) for n, byte in enumerate(data))
        score = byte_log_likelihood(model, data)
        assert score.log_prob_nats == pytest.approx(chain, abs=1e-8)
        assert score.log_prob_nats == pytest.approx(masses[-1], abs=1e-8)
        assert score.bits_per_byte == pytest.approx(-chain / math.log(2) / len(data))
        ended = byte_log_likelihood(model, data, ends=True)
        last = laws[-1][END]
        expected = chain + math.log(last) if last > 0 else -math.inf
        assert ended.log_prob_nats == pytest.approx(expected, abs=1e-8)


def test_fast_likelihood_is_the_sum_over_covers_of_the_untouched_model():
    model = byte_model(BPE, exact=False)
    data = b"return"
    found = enumerated_covers(model.segmentation, data)
    by_hand = [token_log_prob(model, cover, context=[BOS]) for cover in found]
    assert byte_log_likelihood(model, data).log_prob_nats == pytest.approx(float(np.logaddexp.reduce(by_hand)))
    own = token_log_prob(model, BPE.encode("return"), context=[BOS])
    assert byte_log_likelihood(model, data).log_prob_nats > own


def token_log_prob(model, ids, *, context):
    tokens = torch.tensor([[*context, *ids]])
    with torch.no_grad():
        logits = model.model.logits(tokens, torch.arange(tokens.shape[1])[None], CausalMask(length=tokens.shape[1]))
    log_probs = torch.log_softmax(logits[0], dim=-1)
    return sum(float(log_probs[len(context) + n - 1, token]) for n, token in enumerate(ids))


def test_e6_with_bytes_as_tokens_it_is_the_model_itself():
    tokenizer = byte_tokenizer()
    model = byte_model(tokenizer, exact=False)
    data = "héllo ".encode()
    reader = ByteReader(model, [data], contexts=[[256]], max_new_bytes=4)
    for byte in b"abc":
        sequence = model.segmentation.encode(data)
        beginnings = [tuple(sequence[:count]) for count in range(len(data) + 1)]
        assert closed_covers(model.segmentation, tail=Tail(), text=data) == beginnings
        law = uncached_law(model, sequence, context=[256])
        expected = np.exp(np.append(law.log_probs_S, law.log_prob_end))
        np.testing.assert_allclose(reader.next_symbols()[0], expected / expected.sum(), atol=1e-12)
        reader.advance([byte])
        data += bytes([byte])


def test_e7_at_a_forced_boundary_bytes_and_tokens_agree():
    """Behind a whole word with a space to come no token crosses: P(space ...) is the sum of the tokens with a space."""
    model = byte_model(BPE, exact=False)
    segmentation = model.segmentation
    text = b"x = 1 +"
    reader = ByteReader(model, [text + b" "], contexts=[[BOS]], max_new_bytes=2)
    law = uncached_law(model, segmentation.encode(text), context=[BOS])
    possible = segmentation.followers(segmentation.tail_of(segmentation.encode(text)))
    masses = np.zeros(257)
    for token, string in enumerate(segmentation.vocabulary.strings):
        if string.startswith(b" ") and len(string) > 1 and possible[token]:
            masses[string[1]] += math.exp(law.log_probs_S[token])
    alone = segmentation.encode(b" ")[0]
    closed = uncached_law(model, [*segmentation.encode(text), alone], context=[BOS])
    weight = math.exp(law.log_probs_S[alone])
    for token, string in enumerate(segmentation.vocabulary.strings):
        masses[string[0]] += weight * math.exp(closed.log_probs_S[token])
    masses[END] = weight * math.exp(closed.log_prob_end)
    np.testing.assert_allclose(reader.next_symbols()[0], masses / masses.sum(), atol=1e-12)


def test_rows_do_not_feel_each_other():
    model = byte_model(BPE)
    texts = [text.encode()[: 7 + 3 * i] for i, text in enumerate(TEXTS[:3])]
    together = ByteReader(model, texts, contexts=[[BOS]] * 3, max_new_bytes=6)
    alone = [ByteReader(model, [text], contexts=[[BOS]], max_new_bytes=6) for text in texts]
    for byte in b"xs  (":
        np.testing.assert_allclose(
            together.next_symbols(), np.concatenate([reader.next_symbols() for reader in alone]), rtol=1e-9, atol=1e-12
        )
        together.advance([byte] * 3)
        for reader in alone:
            reader.advance([byte])
    together.keep_rows([2, 0])
    np.testing.assert_allclose(together.next_symbols()[1], alone[0].next_symbols()[0], rtol=1e-9, atol=1e-12)
    assert together.num_forwards_B == [alone[2].num_forwards_B[0], alone[0].num_forwards_B[0]]


def test_a_byte_costs_one_short_forward_in_a_batch_too(monkeypatch):
    """Only the tokens of the current word are fed, however long the text, also beside rows with several covers."""
    fed, plain = [], DECODER.hidden

    def counted(tokens_BL, *arguments, **keywords):
        fed.append(tokens_BL.shape[1])
        return plain(tokens_BL, *arguments, **keywords)

    monkeypatch.setattr(DECODER, "hidden", counted)
    texts = [b"def self return " * 12, b"x    y    " * 19 + b"ab"]
    reader = ByteReader(byte_model(BPE, decoder=DECODER), [b"", b""], contexts=[[BOS]] * 2, max_new_bytes=192)
    for pair in zip(*texts, strict=True):
        reader.advance(pair)
    longest_word = max(len(BPE.encode(word)) for word in (" return", " self", "def", "x", "    y"))
    assert max(fed) <= longest_word + 2
    assert reader.num_forwards_B == [2 + 192] * 2


def test_long_words_keep_short_tails():
    segmentation = segmentation_of(BPE)
    tail = Tail()
    for token in segmentation.encode(b"abcdefgh" * 100):
        tail = segmentation.extend(tail, token)
    assert 128 <= len(tail.text) < 160
    whole = segmentation.tail_of(segmentation.encode(b"abcdefgh" * 100))
    np.testing.assert_array_equal(segmentation.followers(tail), segmentation.followers(whole))


def test_a_prefix_is_a_range():
    vocabulary = ByteVocabulary.of({5: b"b", 1: b"a", 2: b"ab", 9: b"abc", 7: b"abd", 4: b"ba"})
    ending, rest = vocabulary.narrow(vocabulary.all, ord("a"))
    assert [vocabulary.strings[i] for i in ending] == [b"a"]
    ending, rest = vocabulary.narrow(rest, ord("b"))
    assert [vocabulary.strings[i] for i in ending] == [b"ab"]
    assert [vocabulary.strings[i] for i in range(rest.low, rest.high)] == [b"abc", b"abd"]
    assert bytes(vocabulary.column(rest)) == b"cd"
    ending, rest = vocabulary.narrow(rest, ord("x"))
    assert len(ending) == rest.high - rest.low == 0


def test_what_cannot_be_read_is_refused():
    model = byte_model(BPE)
    with pytest.raises(ConfigError, match="no UTF-8"):
        ByteReader(model, [b"ab\xff"], contexts=[[]], max_new_bytes=1)
    with pytest.raises(ConfigError, match="no text to score"):
        byte_log_likelihood(model, b"")
    small = byte_model(BPE, decoder=decoder_for(BPE, max_positions=8))
    with pytest.raises(ConfigError, match="longer than the model's positions"):
        ByteReader(small, [b"def f(x):"], contexts=[[]], max_new_bytes=10)
    nameless = ByteModel(model=model.model, segmentation=model.segmentation, ids=TokenIds(420, None, None, None, None))
    with pytest.raises(ConfigError, match="nothing stands before"):
        ByteReader(nameless, [b"de"], contexts=[[]], max_new_bytes=1)


@pytest.mark.network
def test_published_weights_finish_a_word(smollm2):
    """SmolLM2 behind half a word: the tokens of the half word mislead it, its covers do not."""
    tokenizer = Tokenizer.load(str(smollm2))
    segmentation = Segmentation(tokenizer.byte_level())
    text = "The capital of France is Paris, and 中文 naïve"
    assert segmentation.vocabulary.ids_S[segmentation.encode(text.encode())].tolist() == tokenizer.encode(text)
    decoder, _ = load_decoder(str(smollm2))
    ids = tokenizer.special_ids
    model = ByteModel(
        model=decoder,
        segmentation=segmentation,
        ids=TokenIds(decoder.config.vocab_size, ids.bos, ids.eos, ids.mask, ids.pad),
        stop_ids=(ids.eos,),
        exact=False,
    )
    reader = ByteReader(
        model, [b"The capital of France is Par", b"The capital of France i"], contexts=[[], []], max_new_bytes=2
    )
    laws = reader.next_symbols()
    assert [chr(law.argmax()) for law in laws] == ["i", "s"]
    assert laws[0].max() > 0.9
    assert laws[1].max() > 0.9
    texts = [b"The capital of France is Par"]
    small = byte_model(BPE, exact=False)
    both = ByteEnsemble([model, small], texts, max_new_bytes=2).next_symbols()
    own = ByteReader(small, texts, contexts=[[]], max_new_bytes=2).next_symbols()
    np.testing.assert_allclose(both[0], (laws[0] + own[0]) / 2, atol=1e-5)

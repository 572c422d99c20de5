"""The byte-level sampler, infilling and ensembles."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_loaders.tokenizer_sources import byte_tokenizer
from raydist.config.registries import SAMPLERS
from raydist.core.errors import ConfigError
from raydist.core.token_ids import TokenIds
from raydist.sampling.base import Trained
from raydist.sampling.text_bytes.covers import END
from raydist.sampling.text_bytes.ensemble import ByteEnsemble
from raydist.sampling.text_bytes.reader import ByteReader
from raydist.sampling.text_bytes.rollout import sample_bytes
from tests.sampling.byte_models import (
    TOY_BOS,
    TOY_EOS,
    byte_model,
    decoder_for,
    markov_source,
    prefix_probability,
    python_bpe,
    toy_encoder,
    toy_model,
)
from tests.sampling.oracle import chi_square
from tests.sampling.test_sample_verb import export

BPE = python_bpe()
IDS = BPE.special_ids
DECODER = decoder_for(BPE)


def trained(*, seed=0, tokenizer=BPE):
    ids = TokenIds(vocab_size=tokenizer.vocab_size, bos=IDS.bos, eos=IDS.eos, mask=IDS.mask, pad=IDS.pad)
    return Trained(ids=ids, stop_ids=(IDS.eos,), seed=seed, tokenizer=tokenizer.byte_level)


def sampler_of(*, seed=0, **fields):
    return SAMPLERS.parse({"name": "byte_level", **fields}).build(trained(seed=seed))


def greedy(prompt, num_bytes, *, context=()):
    """Each byte from a fresh cover search."""
    text = b""
    for _ in range(num_bytes):
        reader = ByteReader(byte_model(BPE, decoder=DECODER), [prompt + text], contexts=[context], max_new_bytes=0)
        symbol = int(reader.next_symbols()[0].argmax())
        if symbol == END:
            return text, True
        text += bytes([symbol])
    return text, False


@pytest.mark.parametrize("prompt", ["def f", "  retu", "x = naïv", "s"])
def test_greedy_bytes_are_those_of_fresh_laws(prompt):
    generation = sampler_of().generate_bytes(DECODER, [prompt.encode()], contexts=[[IDS.bos]], max_new_bytes=10)[0]
    text, stopped = greedy(prompt.encode(), 10, context=[IDS.bos])
    assert (generation.text, generation.stopped) == (text, stopped)
    count = len(text) + stopped
    assert generation.num_forwards == 1 + count
    assert generation.drawn_at == [2 + n for n in range(len(text))]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_prompt_does_not_feel_its_batch(temperature):
    sampler = sampler_of(temperature=temperature, top_p=0.97)
    prompts = [BPE.encode(text) for text in ("def f", "x  ", "class Na", "  # é")]
    together = sampler.generate(DECODER, prompts, max_new_tokens=12)
    assert together == [sampler.generate(DECODER, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together[::-1] == sampler.generate(DECODER, prompts[::-1], max_new_tokens=12)
    for generation in together:
        assert len(generation.tokens) == len(generation.revealed_at) <= 12
        assert generation.num_forwards >= generation.revealed_at[-1]
        assert not {IDS.bos, IDS.mask, IDS.pad} & set(generation.tokens)


def test_equal_prompts_get_different_samples():
    generations = sampler_of(temperature=1.2).generate(DECODER, [BPE.encode("ab")] * 3, max_new_tokens=20)
    assert len({tuple(generation.tokens) for generation in generations}) == 3


def test_how_a_prompt_is_cut_does_not_matter():
    sampler = sampler_of(temperature=1.0)
    whole, pieces = BPE.encode("  return"), [BPE.encode(letter)[0] for letter in "  return"]
    assert whole != pieces
    first, second = (sampler.generate(DECODER, [[IDS.bos, *prompt]], max_new_tokens=15) for prompt in (whole, pieces))
    assert first == second


def test_tokens_are_the_encoding_of_the_new_text_and_a_stop_token_ends_it():
    decoder = decoder_for(BPE, seed=3)
    sampler = sampler_of(temperature=1.0, mode="fast")
    prompts = [[IDS.bos, *BPE.encode(f"a{n}")] for n in range(12)]
    drawn = sampler.generate_bytes(
        decoder, [f"a{n}".encode() for n in range(12)], contexts=[[IDS.bos]] * 12, max_new_bytes=60
    )
    generations = sampler.generate(decoder, prompts, max_new_tokens=60)
    assert any(generation.stopped for generation in generations)
    for generation, bytes_ in zip(generations, drawn, strict=True):
        tokens = generation.tokens[:-1] if generation.stopped else generation.tokens
        assert generation.stopped == bytes_.stopped == (generation.tokens[-1:] == [IDS.eos])
        if (
            bytes_.text[:1]
            and bytes_.text[0] & 0xC0 != 0x80
            and bytes_.text == bytes_.text.decode(errors="ignore").encode()
        ):
            assert tokens == BPE.encode(bytes_.text.decode())
        assert b"".join(sampler.segmentation.tokenizer.tokens[token] for token in tokens) == bytes_.text


def toy_reader(conditionals, *, num_texts):
    """The fast mode on a toy model given by its conditionals, behind "ab"."""

    def conditional(prefix):
        return torch.tensor(conditionals.get(prefix, [1 / 7] * 7), dtype=torch.float64).log()

    model = toy_model(markov_source(), exact=False, conditional=conditional)
    return ByteReader(model, [b"ab"] * num_texts, contexts=[[TOY_BOS]] * num_texts, max_new_bytes=2)


def test_bytes_that_nothing_goes_on_with_are_drawn_anew():
    """Behind "a", "b" nine tenths of the mass lie on a "b" that the encoder would have merged; the rest decides."""
    conditionals = {
        (): [0.9, 0.1, 0, 0, 0, 0, 0],
        (0,): [0.1, 0.9, 0, 0, 0, 0, 0],
        (0, 1): [0.06, 0.9, 0, 0, 0, 0.04, 0],
    }
    reader = toy_reader(conditionals, num_texts=400)
    assert reader.next_symbols()[0, ord("b")] == pytest.approx(0.9)
    drawn = sample_bytes(reader, noise_keys=[[0]] * 400, seed=0, max_new_bytes=1, temperature=1.0)
    counts = torch.tensor([sum(d.text == b"a" for d in drawn), sum(d.stopped for d in drawn)], dtype=torch.float64)
    assert counts.sum() == 400
    statistic, _ = chi_square(counts, torch.tensor([0.6, 0.4], dtype=torch.float64))
    assert statistic < 10
    nowhere = toy_reader({**conditionals, (0, 1): [0, 1.0, 0, 0, 0, 0, 0]}, num_texts=1)
    ended = sample_bytes(nowhere, noise_keys=[[0]], seed=0, max_new_bytes=2)[0]
    assert (ended.text, ended.stopped) == (b"", False)


def test_samples_follow_the_byte_source_and_its_token_law():
    """Statistical (chi-square at fixed draws): bytes drawn from "ab" on follow the source given "ab"."""
    law = markov_source(seed=4)
    model = toy_model(law)
    num_samples = 1500
    reader = ByteReader(model, [b"ab"] * num_samples, contexts=[[TOY_BOS]] * num_samples, max_new_bytes=6)
    drawn = sample_bytes(reader, noise_keys=[[1, 2]] * num_samples, seed=5, max_new_bytes=6, temperature=1.0)
    assert all(generation.stopped and len(generation.text) == 5 for generation in drawn)
    strings = [string for string in law if string.startswith("ab")]
    index = {string: place for place, string in enumerate(strings)}
    counts = torch.zeros(len(strings), dtype=torch.float64)
    for generation in drawn:
        counts[index["ab" + generation.text.decode()]] += 1
    expected = torch.tensor([law[string] for string in strings], dtype=torch.float64) / prefix_probability(law, "ab")
    statistic, degrees = chi_square(counts, expected)
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)
    tokens = torch.zeros(5, dtype=torch.float64)
    token_law = torch.zeros(5, dtype=torch.float64)
    for string, count, probability in zip(strings, counts.tolist(), expected.tolist(), strict=True):
        first = toy_encoder().encode(string).ids[0]
        tokens[first] += count
        token_law[first] += probability
    statistic, degrees = chi_square(tokens, token_law)
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)
    assert (token_law > 0).sum() > 1


def test_infill_puts_the_suffix_first():
    sampler = sampler_of(infill_before_suffix=("<|pad|>",), infill_before_prefix=("<|mask|>", "<|pad|>"))
    prefix, suffix = [IDS.bos, *BPE.encode("def na")], BPE.encode("(self):\n")
    filled = sampler.infill(DECODER, [prefix], [suffix], num_new_tokens=8)[0]
    context = [IDS.bos, IDS.pad, *suffix, IDS.mask, IDS.pad]
    expected = sampler.generate_bytes(DECODER, [b"def na"], contexts=[context], max_new_bytes=8)[0]
    assert b"".join(sampler.segmentation.tokenizer.tokens[token] for token in filled.tokens) == expected.text
    assert expected.text == greedy(b"def na", 8, context=context)[0]
    plain = sampler_of().infill(DECODER, [prefix], [[]], num_new_tokens=8)
    assert plain == sampler_of().generate(DECODER, [prefix], max_new_tokens=8)
    with pytest.raises(ConfigError, match="no such special token"):
        sampler_of(infill_before_suffix=("<|fim_suffix|>",)).infill(DECODER, [prefix], [suffix], num_new_tokens=4)


def test_without_a_tokenizer_there_is_no_byte_level():
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        SAMPLERS.parse("byte_level").build(Trained(ids=trained().ids))


def members():
    """Two models of different vocabularies."""
    return [
        byte_model(BPE, decoder=DECODER),
        byte_model(byte_tokenizer(), decoder=decoder_for(byte_tokenizer(), seed=7)),
    ]


TEXT = "def naïve"


def laws_of(source, text):
    laws = [source.next_symbols()]
    for byte in text:
        source.advance([byte])
        laws.append(source.next_symbols())
    return np.concatenate(laws)


def test_e8_ensemble_identities():
    """One member is the model, two copies are the model, and the order of members does not matter."""
    model, other = members()

    def ensemble(*models, weights=None):
        source = ByteEnsemble(models, [b"x ="], max_new_bytes=20, weights=weights)
        return laws_of(source, TEXT.encode())

    alone = laws_of(ByteReader(model, [b"x ="], contexts=[[]], max_new_bytes=20), TEXT.encode())
    second = laws_of(ByteReader(other, [b"x ="], contexts=[[]], max_new_bytes=20), TEXT.encode())
    np.testing.assert_allclose(ensemble(model), alone, atol=1e-14)
    np.testing.assert_allclose(ensemble(model, model), alone, atol=1e-14)
    np.testing.assert_allclose(ensemble(model, other), ensemble(other, model), atol=1e-14)
    np.testing.assert_allclose(ensemble(model, other), (alone + second) / 2, atol=1e-14)
    np.testing.assert_allclose(ensemble(model, other, weights=[3, 1]), (3 * alone + second) / 4, atol=1e-14)
    assert np.abs(alone - second).max() > 0.1


def test_an_ensemble_generates_one_text_for_all_members():
    source = ByteEnsemble(members(), [b"def f", b"x"], max_new_bytes=12, contexts=[[[IDS.bos]] * 2, [[256]] * 2])
    drawn = sample_bytes(source, noise_keys=[[0], [1]], seed=0, max_new_bytes=12, temperature=0.8, top_p=0.9)
    again = ByteEnsemble(members(), [b"x"], max_new_bytes=12, contexts=[[[IDS.bos]], [[256]]])
    assert sample_bytes(again, noise_keys=[[1]], seed=0, max_new_bytes=12, temperature=0.8, top_p=0.9) == drawn[1:]
    assert drawn[0].num_forwards == 2 * (1 + len(drawn[0].text) + drawn[0].stopped)


def test_ensembles_that_do_not_fit_are_refused():
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ConfigError, match="do not fit"):
            ByteEnsemble(members(), [b"a"], max_new_bytes=1, weights=weights)
    with pytest.raises(ConfigError, match="do not fit"):
        ByteEnsemble([], [b"a"], max_new_bytes=1)


def test_the_end_token_is_the_models_stop_token():
    assert toy_model(markov_source()).stop_ids == (TOY_EOS,)
    law = ByteReader(toy_model(markov_source()), [b"abbabba"], contexts=[[]], max_new_bytes=0).next_symbols()[0]
    assert law[END] == pytest.approx(1.0)


def test_the_example_of_the_document_runs(tmp_path, capsys):
    document = (Path(__file__).parents[2] / "docs" / "byte_level.md").read_text()
    example = document.split("```python\n")[1].split("```")[0]
    names = {"FOLDER": export(tmp_path / "one"), "OTHER_FOLDER": export(tmp_path / "other")}
    exec(compile(example, "byte_level.md", "exec"), names)
    assert names["law"].sum() == pytest.approx(1.0)
    bits, text = capsys.readouterr().out.splitlines()
    assert float(bits) > 0
    assert text.startswith("b'")

"""Byte-level BPE taken apart equals the tokenizer it came from."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.byte_level_bpe import ByteLevelBpe
from data_loaders.tokenizer_sources import byte_tokenizer, make_tokenizer, tiktoken_tokenizer, train_bpe
from raydist.core.errors import TokenizerError
from tests.data_loaders.test_tokenizer import TEXTS, llama3_ranks

__all__ = ["llama3_ranks"]

TRAINED = train_bpe([TEXTS[-1]], vocab_size=700)
PAIRS = [(tokenizer, tokenizer.byte_level()) for tokenizer in (TRAINED, byte_tokenizer())]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_split_and_merge_are_encode(text):
    for tokenizer, parts in PAIRS:
        pieces = parts.split(text)
        assert b"".join(pieces) == text.encode()
        assert [token for piece in pieces for token in parts.merge(piece)] == tokenizer.encode(text)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=40))
def test_merge_takes_any_bytes(data):
    for _, parts in PAIRS:
        assert b"".join(parts.tokens[token] for token in parts.merge(data)) == data


def test_special_tokens_are_named_and_have_no_bytes():
    for tokenizer, parts in PAIRS:
        eos = tokenizer.special_ids.eos
        assert parts.token_id("<|eos|>") == eos
        assert parts.token_id("a") is None
        assert set(parts.tokens) == set(range(tokenizer.vocab_size)) - {
            parts.token_id(name) for name in ("<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>")
        }


def test_a_rank_file_comes_back_byte_for_byte(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"in", b"th", b"the", b" the", "\u00e9".encode(), b"\xe4\xb8"]
    file = tmp_path / "small.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    assert make_tokenizer(str(file)).byte_level().tokens == dict(enumerate(tokens))


@pytest.mark.network
def test_llama3_ranks_come_back_byte_for_byte(llama3_ranks):
    expected = {}
    for line in llama3_ranks.read_bytes().splitlines():
        token, rank = line.split()
        expected[int(rank)] = base64.b64decode(token)
    parts = tiktoken_tokenizer(str(llama3_ranks)).byte_level()
    assert parts.tokens == expected
    assert all(parts.merge(parts.tokens[token]) == [token] for token in range(0, 128_000, 401))


def changed(**parts):
    return json.dumps({**json.loads(TRAINED.to_bytes()), **parts}).encode()


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (changed(normalizer={"type": "Lowercase"}), "normaliser Lowercase"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "plain ByteLevel"),
        (changed(pre_tokenizer=None), "plain ByteLevel"),
        (changed(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), "plain ByteLevel"),
        (changed(model={**json.loads(TRAINED.to_bytes())["model"], "dropout": 0.1}), "with dropout"),
        (
            changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, added_tokens=[]),
            "WordLevel",
        ),
        (
            changed(
                model={**json.loads(TRAINED.to_bytes())["model"], "vocab": {"▁a": 0}, "merges": []}, added_tokens=[]
            ),
            "the token",
        ),
    ],
)
def test_other_kinds_are_refused(content, found):
    with pytest.raises(TokenizerError, match=found):
        ByteLevelBpe(content)
    ByteLevelBpe(changed(normalizer={"type": "NFC"}))

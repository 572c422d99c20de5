"""What a tokenizer can be made from: bytes, a ``tokenizer.json``, a tiktoken rank file, or a corpus (trained BPE)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from data_loaders.byte_level_bpe import byte_characters
from data_loaders.tokenizer import MASK_TOKEN, Tokenizer
from raydist.core import storage
from raydist.core.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfTokenizer

OWN_SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", MASK_TOKEN)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = _WORDS + r"\p{N}{1,3}" + _OTHERS
_QWEN_PATTERN = _WORDS + r"\p{N}" + _OTHERS
_SMALLEST_BPE = 256 + len(OWN_SPECIAL_TOKENS)

_LLAMA3_NUM_RANKS = 128_000
_LLAMA3_NUM_SPECIAL = 256
_LLAMA3_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
_QWEN_NUM_RANKS = 151_643
_QWEN_NAMED = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)


def make_tokenizer(spec: str, *, corpus: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names, with a mask token.

    Args:
        spec: ``bytes``, ``bpe:SIZE`` (trained on ``corpus``), or the path of a ``tokenizer.json``, of a folder that
            holds one, or of a tiktoken rank file.
        corpus: texts to train on; read only for ``bpe:SIZE``.

    Raises:
        TokenizerError: the specification or the file cannot be used.
    """
    kind = tokenizer_kind(spec)
    if kind == "bytes":
        return byte_tokenizer()
    if kind == "bpe":
        return train_bpe(corpus, vocab_size=_bpe_size(spec))
    if not storage.exists(spec):
        raise TokenizerError(
            "there is no such tokenizer",
            where="--tokenizer",
            found=spec,
            expected="bytes, bpe:SIZE, a tokenizer.json, a folder that holds one, or a tiktoken rank file",
        )
    return (Tokenizer.load(spec) if kind == "tokenizer.json" else tiktoken_tokenizer(spec)).with_mask()


def tokenizer_kind(spec: str) -> str:
    """``bytes``, ``bpe``, ``tokenizer.json`` or ``tiktoken``."""
    if spec == "bytes":
        return "bytes"
    if spec.startswith("bpe:"):
        return "bpe"
    return (
        "tokenizer.json"
        if spec.endswith(".json") or storage.exists(storage.join(spec, "tokenizer.json"))
        else "tiktoken"
    )


def byte_tokenizer() -> Tokenizer:
    """Every UTF-8 byte is a token whose id is the byte; special tokens follow from 256 on."""
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers.models import BPE

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    inner = HfTokenizer(BPE(vocab=vocabulary, merges=[]))
    _set_byte_level(inner, pattern=None)
    _add_special(inner, OWN_SPECIAL_TOKENS)
    return Tokenizer(inner, kind="bytes")


def train_bpe(corpus: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly ``vocab_size`` ids at most, special tokens included, trained on texts.

    Deterministic in the texts and their order.

    Raises:
        TokenizerError: the texts are too few for the vocabulary.
    """
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    inner = HfTokenizer(BPE())
    _set_byte_level(inner, pattern=_CL100K_PATTERN)
    num_merged = vocab_size - len(OWN_SPECIAL_TOKENS)
    trainer = BpeTrainer(
        vocab_size=num_merged, min_frequency=2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(corpus, trainer)
    if inner.get_vocab_size() < num_merged:
        raise TokenizerError(
            "the corpus is too small for this vocabulary",
            where="--tokenizer",
            found=f"{inner.get_vocab_size() + len(OWN_SPECIAL_TOKENS)} tokens could be learned",
            expected=f"{vocab_size} tokens",
            fix="ask for a smaller vocabulary, give more text, or use --tokenizer bytes",
        )
    _add_special(inner, OWN_SPECIAL_TOKENS)
    return Tokenizer(inner, kind="bpe")


def tiktoken_tokenizer(path: str) -> Tokenizer:
    """A tiktoken rank file (one ``base64 rank`` a line) as byte-level BPE.

    Llama 3 and Qwen files are recognised by their number of ranks and get their split pattern and special tokens. Any
    other file gets the cl100k pattern, which Llama 3 shares, and ``<|endoftext|>`` after its last rank.

    tiktoken merges any two neighbours whose concatenation has a rank, lowest rank first; so every split of a token into
    two tokens is a merge rule, in the order of the token's rank.

    Raises:
        TokenizerError: not a rank file.
    """
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers.models import BPE

    ranks = read_ranks(path)
    characters = byte_characters()
    vocabulary = {_spell(token, characters): rank for token, rank in ranks.items()}
    inner = HfTokenizer(BPE(vocab=vocabulary, merges=_merges(ranks, characters), ignore_merges=True))
    pattern = _QWEN_PATTERN if len(ranks) == _QWEN_NUM_RANKS else _CL100K_PATTERN
    _set_byte_level(inner, pattern=pattern)
    _add_special(inner, _special_tokens(len(ranks)))
    return Tokenizer(inner, kind="tiktoken")


def read_ranks(path: str) -> dict[bytes, int]:
    """Token bytes -> rank.

    Raises:
        TokenizerError: not a rank file, ranks not 0, 1, 2, ..., or single bytes missing.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in storage.read_bytes(path).splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error, IsADirectoryError) as error:
        raise TokenizerError(
            "not a tiktoken rank file", where=path, found=str(error), expected="lines of 'base64 rank'"
        ) from None
    complete = sorted(ranks.values()) == list(range(len(ranks)))
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if not complete or missing:
        raise TokenizerError(
            "a tiktoken rank file is incomplete",
            where=path,
            found=f"{len(ranks)} ranks, {len(missing)} of the 256 bytes missing",
            expected="ranks 0, 1, 2, ... without gaps, all single bytes among them",
            fix="fetch the file again",
        )
    return ranks


def _merges(ranks: dict[bytes, int], characters: Sequence[str]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges.extend((_spell(left, characters), _spell(right, characters)) for left, right in known)
    return merges


def _special_tokens(num_ranks: int) -> tuple[str, ...]:
    if num_ranks == _LLAMA3_NUM_RANKS:
        num_reserved = _LLAMA3_NUM_SPECIAL - len(_LLAMA3_NAMED)
        return (*_LLAMA3_NAMED, *(f"<|reserved_special_token_{2 + i}|>" for i in range(num_reserved)))
    return _QWEN_NAMED if num_ranks == _QWEN_NUM_RANKS else ("<|endoftext|>",)


def _set_byte_level(inner: HfTokenizer, *, pattern: str | None) -> None:
    """Text is split by a pattern (or not at all), then every byte is written as one printable character."""
    from tokenizers import Regex, decoders, pre_tokenizers

    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        inner.pre_tokenizer = by_byte
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
    inner.decoder = decoders.ByteLevel()


def _add_special(inner: HfTokenizer, names: Sequence[str]) -> None:
    from tokenizers import AddedToken

    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def _spell(token: bytes, characters: Sequence[str]) -> str:
    return "".join(characters[byte] for byte in token)


def _bpe_size(spec: str) -> int:
    text = spec.removeprefix("bpe:")
    if not text.isdecimal() or int(text) < _SMALLEST_BPE:
        raise TokenizerError(
            "not a vocabulary size",
            where="--tokenizer",
            found=spec,
            expected=f"bpe:SIZE with SIZE at least {_SMALLEST_BPE}, for example bpe:4096",
        )
    return int(text)

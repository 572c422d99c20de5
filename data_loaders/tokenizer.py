"""The one tokenizer of the house: a Hugging Face ``tokenizers`` file, whatever it was made from.

Roles (bos, eos, mask, pad) are recognised by name (:func:`find_special_ids`), so a ``tokenizer.json`` alone is enough;
a dataset's manifest fixes them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_loaders.byte_level_bpe import ByteLevelBpe
from data_loaders.manifest import SpecialIds
from raydist.core import storage
from raydist.core.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfTokenizer

MASK_TOKEN = "<|mask|>"
_BOS_NAMES = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|begin▁of▁sentence|>")
_EOS_NAMES = ("<|eos|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|end▁of▁sentence|>")
_MASK_NAMES = (MASK_TOKEN, "<mask>", "[MASK]", "<|mdm_mask|>", "|<MASK>|")
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|▁pad▁|>")
_RESERVED = re.compile(r"^<\|reserved_special_token_(\d+)\|>$")


class Tokenizer:
    """Text to ids and back. Special tokens are never parsed out of text.

    Args:
        inner: the Hugging Face tokenizer; its truncation, padding and templates are turned off.
        kind: where it came from (``bytes``, ``bpe``, ``tokenizer.json``, ``tiktoken``).
        special_ids: roles; recognised by name if None.
    """

    def __init__(
        self, inner: HfTokenizer, *, kind: str = "tokenizer.json", special_ids: SpecialIds | None = None
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._content = inner.to_str().encode()
        inner.encode_special_tokens = True
        self._inner = inner
        self.kind = kind
        self.special_ids = special_ids or find_special_ids(inner)

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """Reads a ``tokenizer.json``, or the one in a folder.

        Raises:
            TokenizerError: there is none, or it cannot be parsed.
        """
        if not path.endswith(".json"):
            path = storage.join(path, "tokenizer.json")
        try:
            content = storage.read_bytes(path)
        except (FileNotFoundError, NotADirectoryError):
            raise TokenizerError("there is no tokenizer here", where=path, expected="a tokenizer.json file") from None
        return cls.from_bytes(content, where=path)

    @classmethod
    def from_bytes(
        cls, content: bytes, *, where: str, special_ids: SpecialIds | None = None, kind: str = "tokenizer.json"
    ) -> Tokenizer:
        """Parses the content of a ``tokenizer.json``; ``where`` names it in errors."""
        from tokenizers import Tokenizer as HfTokenizer

        try:
            inner = HfTokenizer.from_str(content.decode())
        except Exception as error:  # the Rust parser raises plain Exception
            raise TokenizerError(
                "the tokenizer file cannot be read",
                where=where,
                found=str(error),
                expected="a Hugging Face tokenizer.json",
            ) from None
        return cls(inner, kind=kind, special_ids=special_ids)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def sha256(self) -> str:
        """The hash of the file that :meth:`save` writes."""
        return hashlib.sha256(self._content).hexdigest()

    def to_bytes(self) -> bytes:
        """The content of the ``tokenizer.json``."""
        return self._content

    def save(self, path: str) -> None:
        """Writes a ``tokenizer.json``."""
        storage.write_bytes(path, self._content)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the name of a special token inside it is encoded as ordinary text."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in parallel unless TOKENIZERS_PARALLELISM is off."""
        return [item.ids for item in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids. Bytes that are no UTF-8 become the replacement character."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def byte_level(self) -> ByteLevelBpe:
        """The tokenizer taken apart: bytes of each token, split into pieces, merges inside a piece.

        Raises:
            TokenizerError: its tokens are not byte strings (no byte-level BPE).
        """
        return ByteLevelBpe(self._content)

    def with_mask(self) -> Tokenizer:
        """The same tokenizer with a mask token: its own, else a reserved one, else ``<|mask|>`` as a new last id."""
        if self.special_ids.mask is not None:
            return self
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as HfTokenizer

        inner = HfTokenizer.from_str(self._content.decode())
        inner.add_special_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)])
        return Tokenizer(inner, kind=self.kind)


def find_special_ids(inner: HfTokenizer) -> SpecialIds:
    """Roles by the names that the field uses, among the added tokens (a plain vocabulary may well hold ``<s>``).

    The mask falls back to the last ``<|reserved_special_token_N|>`` (Llama 3 leaves about 240 of them unused), the
    padding to the end token.
    """
    added = {token.content: token_id for token_id, token in inner.get_added_tokens_decoder().items()}

    def first(names: Sequence[str]) -> int | None:
        return next((added[name] for name in names if name in added), None)

    eos, mask, pad = first(_EOS_NAMES), first(_MASK_NAMES), first(_PAD_NAMES)
    if mask is None:
        reserved = {
            int(match.group(1)): token_id for name, token_id in added.items() if (match := _RESERVED.match(name))
        }
        mask = reserved[max(reserved)] if reserved else None
    return SpecialIds(bos=first(_BOS_NAMES), eos=eos, mask=mask, pad=eos if pad is None else pad)

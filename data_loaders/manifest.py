"""The manifest: what a dataset directory holds, by name, size and hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from raydist.core import storage
from raydist.core.errors import DataError, RaydistError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class SpecialIds:
    """Ids with a role, fixed when the dataset was prepared; None where the tokenizer has none."""

    bos: int | None = None
    eos: int | None = None
    mask: int | None = None
    pad: int | None = None


@dataclass(frozen=True)
class ShardEntry:
    """One shard file.

    Attributes:
        name: file name inside the dataset directory.
        documents: rows of the Arrow table.
        tokens: length of the token stream.
        compressed_bytes: size in the dataset directory (whole-file zstd).
        raw_bytes: size in the node's cache (plain Arrow).
        compressed_sha256: hash of the file in the dataset directory.
        raw_sha256: hash of the plain Arrow file.
    """

    name: str
    documents: int
    tokens: int
    compressed_bytes: int
    raw_bytes: int
    compressed_sha256: str
    raw_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A dataset directory's table of contents.

    Attributes:
        name: what the dataset is called in reports.
        split: ``"train"`` or ``"validation"``.
        token_dtype: ``"uint16"`` or ``"uint32"``.
        tokenizer_kind: where the tokenizer came from (``bytes``, ``bpe``, ``tokenizer.json``, ``tiktoken``).
        documents_by_log2_tokens: entry k counts the documents of ``[2**k, 2**(k+1))`` tokens.
        has_loss_mask: True where the shards carry a ``loss_mask`` column.
        preparation: the settings and counts of the preparation, for people and for ``nothing to do``.
    """

    name: str
    split: str
    shards: tuple[ShardEntry, ...]
    tokenizer_file: str
    tokenizer_sha256: str
    tokenizer_kind: str
    vocab_size: int
    special_ids: SpecialIds
    token_dtype: str
    has_loss_mask: bool = False
    documents_by_log2_tokens: tuple[int, ...] = ()
    preparation: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    def content(self) -> dict[str, Any]:
        """Everything but the hash, as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def sha256(self) -> str:
        """The hash of the content in canonical JSON; it names the dataset in checkpoints and runs."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Writes the manifest with its own hash, atomically. Written last: a directory without one is not a dataset."""
    storage.write_json(storage.join(folder, FILE_NAME), {**manifest.content(), "sha256": manifest.sha256})


def read_manifest(folder: str) -> Manifest:
    """Reads and checks a dataset's manifest.

    Raises:
        DataError: there is none, it is of another format, or it does not match its own hash.
    """
    path = storage.join(folder, FILE_NAME)
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise _missing(folder) from None
    except (ValueError, RecursionError) as error:
        raise DataError("the manifest is not JSON", where=path, found=str(error), fix=_PREPARE_AGAIN) from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise DataError(
            "the dataset has another format version",
            where=path,
            found=found,
            expected=FORMAT_VERSION,
            fix=_PREPARE_AGAIN,
        )
    stated = content.pop("sha256", None)
    manifest = _parse(content, where=path)
    if manifest.sha256 != stated:
        raise DataError(
            "the manifest does not match its own hash",
            where=path,
            found=manifest.sha256,
            expected=stated,
            fix="it was edited or damaged: restore it or prepare the dataset again",
        )
    return manifest


_PREPARE_AGAIN = "prepare the dataset again: raydist data prepare SOURCE --out DIR --overwrite"


def _missing(folder: str) -> DataError:
    inside = [name for name in ("train", "validation") if storage.exists(storage.join(folder, name, FILE_NAME))]
    fix = (
        f"name one of its parts: {storage.join(folder, inside[0])}"
        if inside
        else "prepare one: raydist data prepare SOURCE --out DIR"
    )
    return DataError(
        "there is no dataset here",
        where=folder,
        found=f"no {FILE_NAME}",
        expected="a prepared dataset directory",
        fix=fix,
    )


def _parse(content: dict[str, Any], *, where: str) -> Manifest:
    try:
        fields = dict(content)
        fields["shards"] = tuple(ShardEntry(**shard) for shard in fields["shards"])
        fields["special_ids"] = SpecialIds(**fields["special_ids"])
        fields["documents_by_log2_tokens"] = tuple(fields["documents_by_log2_tokens"])
        manifest = Manifest(**fields)
        for shard in manifest.shards:
            storage.safe_name(shard.name, where=where)
            for digest in (shard.raw_sha256, shard.compressed_sha256):
                if len(bytes.fromhex(digest)) != 32:
                    raise ValueError(f"{digest!r} is not a SHA-256")
        storage.safe_name(manifest.tokenizer_file, where=where)
        if manifest.token_dtype not in ("uint16", "uint32"):
            raise ValueError(f"token_dtype {manifest.token_dtype!r}")
    except RaydistError as error:
        raise DataError(error.what, where=where, found=error.found, expected=error.expected) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError("the manifest is damaged", where=where, found=repr(error), fix=_PREPARE_AGAIN) from None
    return manifest

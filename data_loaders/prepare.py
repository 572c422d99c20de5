"""Raw text in, a dataset directory out; restartable, with the same result however it was interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from data_loaders.assembly import DocumentTable, ShardTask, collect_documents, make_shard, plan_shards
from data_loaders.manifest import FILE_NAME, Manifest, ShardEntry, read_manifest, write_manifest
from data_loaders.parts import PartRecord, PartTask, document_hash, make_part, read_record, token_dtype
from data_loaders.prepare_settings import PrepareSettings, settings_content, settings_sha256
from data_loaders.sources import InputFile, find_files, read_documents
from data_loaders.tokenizer import Tokenizer
from data_loaders.tokenizer_sources import make_tokenizer, tokenizer_kind
from raydist.core import storage
from raydist.core.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
SPLITS = ("train", "validation")
_TASK_BYTES = 8 << 20
_TRAINING_BYTES = 32 << 20
_SMALLEST_TRAINING_SHARE_BYTES = 1 << 20


class MapTasks(Protocol):
    """An executor: results of a function over tasks, in any order."""

    def __call__(self, function: Callable[[Task], Result], tasks: Sequence[Task], /) -> Iterator[Result]:
        """Runs them."""
        ...


Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation did.

    Attributes:
        manifests: by split; a split without documents is absent.
        nothing_to_do: True if the same dataset was there already.
        num_parts_reused: parts that an interrupted run had left.
    """

    manifests: dict[str, Manifest]
    nothing_to_do: bool
    num_parts_reused: int = 0


def serial_map(function: Callable[[Task], Result], tasks: Sequence[Task], /) -> Iterator[Result]:
    """The executor without parallelism."""
    return map(function, tasks)


def prepare(
    settings: PrepareSettings,
    *,
    out: str,
    map_tasks: MapTasks = serial_map,
    overwrite: bool = False,
    work_dir: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> PrepareReport:
    """Writes ``out/train`` and ``out/validation``.

    Unfinished work is kept in ``work_dir`` and continued by the next call; it is removed at the end.

    Args:
        settings: what to prepare.
        out: local folder or bucket prefix.
        map_tasks: runs tasks; every worker must see ``out``, ``work_dir`` and the sources.
        overwrite: replace a dataset of other settings.
        work_dir: local or shared folder; default ``out/.parts``. Needed where ``out`` is a bucket.
        progress: called with (stage, tasks done, tasks in all).

    Raises:
        DataError: no documents, damaged inputs, or another dataset in the way.
        TokenizerError: the tokenizer cannot be made.
    """
    out = storage.normalize(out)
    files = find_files(settings.sources, include=settings.include, exclude=settings.exclude)
    digest = settings_sha256(settings, files)
    finished = _finished(out, digest, overwrite=overwrite)
    if finished is not None:
        return PrepareReport(finished, nothing_to_do=True)
    work = storage.join(_work_root(out, work_dir), digest[:16])
    tokenizer = _tokenizer(settings, files, storage.join(work, "tokenizer.json"))
    parts, num_reused = _make_parts(settings, files, tokenizer, work, map_tasks, progress)
    table = collect_documents(parts)
    if not len(table.hashes_D):
        raise DataError(
            "the sources hold no text", where=", ".join(settings.sources), fix="check --include and --exclude"
        )
    num_validation = table.split_at(settings.validation_fraction)
    if num_validation == len(table.hashes_D):
        raise DataError(
            "no document is left for training",
            where="--validation-fraction",
            found=f"{settings.validation_fraction} of {len(table.hashes_D)} documents",
            fix="lower --validation-fraction, or set it to 0",
        )
    preparation = {
        "settings": settings_content(settings),
        "settings_sha256": digest,
        "files": len(files),
        "files_skipped": sum(part.num_files_skipped for part in parts),
        "documents_read": sum(part.num_documents for part in parts),
        "duplicates_dropped": table.num_duplicates,
    }
    splits = {"validation": (0, num_validation), "train": (num_validation, len(table.hashes_D))}
    manifests = {}
    for split, (start, stop) in splits.items():
        if stop > start:
            folder, records = storage.join(out, split), storage.join(work, split)
            tasks = _plan(settings, tokenizer, table, (start, stop), parts=parts, folder=folder, records=records)
            shards = _make_shards(tasks, map_tasks, progress)
            manifests[split] = _finish(settings, split, folder, shards, tokenizer, table, (start, stop), preparation)
    storage.remove_tree(_work_root(out, work_dir) if work_dir is None else work)
    return PrepareReport(manifests, nothing_to_do=False, num_parts_reused=num_reused)


def _finished(out: str, digest: str, *, overwrite: bool) -> dict[str, Manifest] | None:
    """The dataset that is there already, if it is the same one. A training split is written last, so it decides."""
    found = {
        split: read_manifest(storage.join(out, split))
        for split in SPLITS
        if storage.exists(storage.join(out, split, FILE_NAME)) and not overwrite
    }
    same = {split: manifest.preparation.get("settings_sha256") == digest for split, manifest in found.items()}
    if same.get("train"):
        return found
    if not all(same.values()):
        raise DataError(
            "another dataset is in the way",
            where=out,
            found="other settings, or other or changed input files",
            expected="an empty folder, or the dataset of these settings",
            fix="choose another --out, or replace it with --overwrite",
        )
    if overwrite:
        for split in SPLITS:
            storage.remove_tree(storage.join(out, split))
    return None


def _work_root(out: str, work_dir: str | None) -> str:
    if work_dir is not None:
        return storage.local_path(work_dir)
    if storage.is_remote(out):
        raise DataError(
            "preparation into a bucket needs a folder for unfinished work",
            where="--work-dir",
            expected="a local folder, or one that all Ray workers share",
            fix="add --work-dir FOLDER",
        )
    return storage.join(out, ".parts")


def _tokenizer(settings: PrepareSettings, files: Sequence[InputFile], path: str) -> Tokenizer:
    """The tokenizer, made once and kept beside the parts; ``path`` is what the workers read."""
    if not storage.exists(path):
        corpus = _training_texts(settings, files) if tokenizer_kind(settings.tokenizer) == "bpe" else ()
        make_tokenizer(settings.tokenizer, corpus=corpus).save(path)
    return Tokenizer.load(path)


def _training_texts(settings: PrepareSettings, files: Sequence[InputFile]) -> Iterator[str]:
    """A sample of the training documents: files in a keyed order, an equal share of each, until there is enough."""
    share_bytes = max(_TRAINING_BYTES // len(files), _SMALLEST_TRAINING_SHARE_BYTES)
    left_bytes = _TRAINING_BYTES
    key = settings.encoding.hash_key
    for file in sorted(files, key=lambda file: hashlib.blake2b(file.name.encode(), key=key.encode()).digest()):
        file_bytes = 0
        for document in read_documents(file, fields=settings.fields):
            if int.from_bytes(document_hash(document, key=key)[:8], "big") < settings.validation_fraction * 2**64:
                continue
            text = (document.prompt + document.text)[: max(0, min(share_bytes - file_bytes, left_bytes))]
            file_bytes += len(text)
            left_bytes -= len(text)
            yield text
            if file_bytes >= share_bytes or left_bytes <= 0:
                break
        if left_bytes <= 0:
            return


def _groups(files: Sequence[InputFile]) -> Iterator[tuple[InputFile, ...]]:
    """Consecutive files in groups of about equal size, at least one file each."""
    group: list[InputFile] = []
    group_bytes = 0
    for file in files:
        group.append(file)
        group_bytes += file.num_bytes
        if group_bytes >= _TASK_BYTES:
            yield tuple(group)
            group, group_bytes = [], 0
    if group:
        yield tuple(group)


def _make_parts(
    settings: PrepareSettings,
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    work: str,
    map_tasks: MapTasks,
    progress: Progress,
) -> tuple[list[PartRecord], int]:
    """Records of all parts in the order of the inputs, and how many of them were there before."""
    path = storage.join(work, "tokenizer.json")
    tasks = [PartTask(group, settings.encoding, path, tokenizer.sha256, work) for group in _groups(files)]
    records = {task.path: record for task in tasks if (record := read_record(task)) is not None}
    num_reused = len(records)
    progress("encode", num_reused, len(tasks))
    for record in map_tasks(make_part, [task for task in tasks if task.path not in records]):
        records[record.path] = record
        progress("encode", len(records), len(tasks))
    return [records[task.path] for task in tasks], num_reused


def _plan(
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    table: DocumentTable,
    documents: tuple[int, int],
    *,
    parts: Sequence[PartRecord],
    folder: str,
    records: str,
) -> list[ShardTask]:
    token_bytes = np.dtype(token_dtype(tokenizer.vocab_size)).itemsize
    return plan_shards(
        table,
        *documents,
        parts=parts,
        folder=folder,
        records=records,
        shard_tokens=max(1, settings.shard_bytes // token_bytes),
        with_loss_mask=settings.fields.prompt is not None,
    )


def _make_shards(tasks: Sequence[ShardTask], map_tasks: MapTasks, progress: Progress) -> tuple[ShardEntry, ...]:
    entries = []
    for entry in map_tasks(make_shard, tasks):
        entries.append(entry)
        progress("write shards", len(entries), len(tasks))
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _finish(
    settings: PrepareSettings,
    split: str,
    folder: str,
    shards: tuple[ShardEntry, ...],
    tokenizer: Tokenizer,
    table: DocumentTable,
    documents: tuple[int, int],
    preparation: dict[str, Any],
) -> Manifest:
    """Writes the tokenizer and, last, the manifest."""
    tokenizer.save(storage.join(folder, "tokenizer.json"))
    manifest = Manifest(
        name=settings.name,
        split=split,
        shards=shards,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_kind=tokenizer_kind(settings.tokenizer),
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        token_dtype=token_dtype(tokenizer.vocab_size),
        has_loss_mask=settings.fields.prompt is not None,
        documents_by_log2_tokens=table.length_histogram(*documents),
        preparation=preparation,
    )
    write_manifest(folder, manifest)
    return manifest

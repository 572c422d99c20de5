"""What a run would get out of a dataset, computed from the manifest alone."""

from __future__ import annotations

from dataclasses import dataclass

from data_loaders.manifest import Manifest


@dataclass(frozen=True)
class Reading:
    """How a dataset is read at one ``seq_len``.

    Attributes:
        num_rows: rows of one epoch.
        tokens_read: tokens that are a target in one epoch.
        tokens_dropped: tokens at the ends of shards that no row reaches.
        shards_too_short: shards without any row.
        epochs: how often each row is read in the run, if its steps and batch are known.
    """

    seq_len: int
    num_rows: int
    tokens_read: int
    tokens_dropped: int
    shards_too_short: int
    epochs: float | None


def describe_reading(
    manifest: Manifest, *, seq_len: int, num_steps: int | None = None, batch_rows: int | None = None
) -> Reading:
    """Rows, what is dropped, and epochs. A row is ``seq_len`` tokens and its successor's first."""
    rows = [max(shard.tokens - 1, 0) // seq_len for shard in manifest.shards]
    num_rows = sum(rows)
    samples = None if num_steps is None or batch_rows is None else num_steps * batch_rows
    return Reading(
        seq_len=seq_len,
        num_rows=num_rows,
        tokens_read=num_rows * seq_len,
        tokens_dropped=sum(
            shard.tokens - count * seq_len - bool(count) for shard, count in zip(manifest.shards, rows, strict=True)
        ),
        shards_too_short=rows.count(0),
        epochs=samples / num_rows if samples is not None and num_rows else None,
    )


def length_histogram(manifest: Manifest, *, width: int = 40) -> list[str]:
    """Tokens per document as lines of text, one a power of two."""
    counts = manifest.documents_by_log2_tokens
    used = [power for power, count in enumerate(counts) if count]
    if not used:
        return []
    largest = max(counts)
    lines = []
    for power in range(used[0], used[-1] + 1):
        bar = "#" * (max(1, round(width * counts[power] / largest)) if counts[power] else 0)
        lines.append(f"{2**power:>9} to {2 ** (power + 1) - 1:<9} {counts[power]:>9} {bar}".rstrip())
    return lines

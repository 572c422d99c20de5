"""The contenders of ``loader.py``, one per process: raydist's loader, numpy, and three loader libraries.

Each makes its files from the same rows and reads them in a random order, in batches of int64 torch tensors.
It takes orders from stdin, one JSON line each:

- ``{"order": "open"}`` is answered by the package's version, or by why the contender is absent;
- ``{"order": "check"}`` reads every row once and is answered by the number of rows and the sum of all tokens;
- ``{"order": "measure"}`` reads every row, again and again for half a second, and is answered by the number of rows and the
  wall and CPU seconds.

Only the standard library is imported before the contender is opened: the file runs where one peer only is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_SHARDS = 8
MIN_MEASURE_S = 0.5
Batches = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Shape:
    """Of a batch."""

    seq_len: int
    batch_rows: int

    @property
    def row_tokens(self) -> int:
        """A row carries one token more than the model sees."""
        return self.seq_len + 1


@dataclass(frozen=True)
class Entry:
    """A contender: its package, what it does in the timed part, and how it is opened on a folder with ``rows.npy``."""

    package: str | None
    work: str
    open: Callable[[Path, Shape], Batches]


def write_rows(folder: Path, shape: Shape, *, num_rows: int) -> None:
    """``tokens.npy``, a stream of uint16; ``rows.npy``, its rows, copied; and the stream as a raydist dataset."""
    import numpy as np

    tokens_T = np.random.default_rng(0).integers(0, 4096, size=num_rows * shape.seq_len + 1, dtype=np.uint16)
    np.save(folder / "tokens.npy", tokens_T)
    np.save(folder / "rows.npy", _rows_of(tokens_T, shape))
    write_dataset(folder / "raydist", tokens_T, seq_len=shape.seq_len)


def write_dataset(folder: Path, tokens_T: Any, *, seq_len: int) -> None:
    """A stream in ``NUM_SHARDS`` equal shards, each with the next one's first token, cut into documents at random."""
    import numpy as np

    from data_loaders.manifest import Manifest, SpecialIds, write_manifest
    from data_loaders.shards import SUFFIX, ShardColumns, write_shard

    rng = np.random.default_rng(1)
    shard_tokens = (len(tokens_T) - 1) // seq_len // NUM_SHARDS * seq_len
    entries = []
    for index in range(NUM_SHARDS):
        part_T = tokens_T[index * shard_tokens : (index + 1) * shard_tokens + 1]
        cuts = np.cumsum(rng.integers(200, 2000, size=len(part_T) // 200))
        offsets_D = np.concatenate([[0], cuts[cuts < len(part_T)], [len(part_T)]]).astype(np.int64)
        columns = ShardColumns(part_T, offsets_D, [str(d) for d in range(len(offsets_D) - 1)])
        entries.append(write_shard(str(folder), name=f"shard-{index:05d}{SUFFIX}", columns=columns))
    manifest = Manifest(
        "bench", "train", tuple(entries), "tokenizer.json", "0" * 64, "bytes", 4096, SpecialIds(), "uint16"
    )
    write_manifest(str(folder), manifest)


def open_mixture(folder: Path, *, seq_len: int) -> Any:
    """The raydist dataset of a folder, its plain shards cached beside it."""
    from data_loaders.cache import NodeCache
    from data_loaders.mixture import DatasetWeight
    from data_loaders.mixture import open_mixture as open_datasets

    cache = NodeCache(str(folder / "cache"))
    return open_datasets([DatasetWeight(str(folder / "raydist"))], cache=cache, seq_len=seq_len, seed=0)


def _raydist(folder: Path, shape: Shape) -> Batches:
    from data_loaders.loader import Loader
    from raydist.core.rows import Rows

    mixture = open_mixture(folder, seq_len=shape.seq_len)

    def batches() -> Iterator[Any]:
        num_steps = mixture.num_rows // shape.batch_rows
        loader: Loader[Rows] = Loader(mixture, batch_rows=shape.batch_rows, num_steps=num_steps, prefetch_steps=0)
        for rows in loader:
            yield rows.tokens_BS

    return batches


def _memmap(folder: Path, shape: Shape) -> Batches:
    import numpy as np
    import torch

    rows_NS: Any = _rows_of(np.load(folder / "tokens.npy", mmap_mode="r"), shape)
    order_N = np.random.default_rng(2).permutation(len(rows_NS))

    def batches() -> Iterator[Any]:
        for start in range(0, len(order_N), shape.batch_rows):
            yield torch.from_numpy(rows_NS[order_N[start : start + shape.batch_rows]].astype(np.int64))

    return batches


def _rows_of(tokens_T: Any, shape: Shape) -> Any:
    import numpy as np

    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens_T), shape.row_tokens)[:: shape.seq_len]


def _datasets_torch(folder: Path, shape: Shape) -> Batches:
    import torch

    table, order = _datasets_table(folder, shape)
    table = table.with_format("torch", dtype=torch.int64)

    def batches() -> Iterator[Any]:
        for start in range(0, len(order), shape.batch_rows):
            yield table[order[start : start + shape.batch_rows]]["tokens"]

    return batches


def _datasets_arrow(folder: Path, shape: Shape) -> Batches:
    import numpy as np
    import torch

    table, order = _datasets_table(folder, shape)
    table = table.with_format("arrow")

    def batches() -> Iterator[Any]:
        for start in range(0, len(order), shape.batch_rows):
            tokens_T = table[order[start : start + shape.batch_rows]]["tokens"].combine_chunks().flatten().to_numpy()
            yield torch.from_numpy(tokens_T.reshape(-1, shape.row_tokens).astype(np.int64))

    return batches


def _datasets_table(folder: Path, shape: Shape) -> tuple[Any, list[int]]:
    import datasets
    import numpy as np

    target = folder / "datasets"
    if not target.exists():
        features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"), length=shape.row_tokens)})
        rows_NS = np.load(folder / "rows.npy")
        datasets.Dataset.from_dict({"tokens": rows_NS}, features=features).save_to_disk(str(target))
    table = datasets.load_from_disk(str(target))
    return table, np.random.default_rng(2).permutation(len(table)).tolist()


def _litdata(folder: Path, shape: Shape) -> Batches:
    import litdata
    import numpy as np
    import torch

    target = folder / "litdata"
    if not target.exists():
        rows_NS = np.load(folder / "rows.npy")
        chunk_tokens = len(rows_NS) // NUM_SHARDS * shape.row_tokens
        writer = litdata.streaming.writer.BinaryWriter(
            str(target), chunk_size=chunk_tokens, item_loader=litdata.TokensLoader()
        )
        for index, row_S in enumerate(rows_NS):
            writer.add_item(index, torch.from_numpy(row_S))
        writer.done()
        writer.merge()
    dataset = litdata.StreamingDataset(
        str(target), item_loader=litdata.TokensLoader(block_size=shape.row_tokens), shuffle=True, drop_last=True
    )
    loader = litdata.StreamingDataLoader(dataset, batch_size=shape.batch_rows, num_workers=0)

    def batches() -> Iterator[Any]:
        for batch in loader:
            yield batch.to(torch.int64)

    return batches


def _streaming(folder: Path, shape: Shape) -> Batches:
    import numpy as np
    import streaming
    import torch

    target = folder / "streaming"
    if not target.exists():
        with streaming.MDSWriter(out=str(target), columns={"tokens": f"ndarray:uint16:{shape.row_tokens}"}) as writer:
            for row_S in np.load(folder / "rows.npy"):
                writer.write({"tokens": row_S})
    dataset = streaming.StreamingDataset(local=str(target), shuffle=True, batch_size=shape.batch_rows)
    loader = torch.utils.data.DataLoader(dataset, batch_size=shape.batch_rows)

    def batches() -> Iterator[Any]:
        for batch in loader:
            yield batch["tokens"].to(torch.int64)

    return batches


ENTRIES = {
    "raydist": Entry(
        None,
        "keyed shuffle computed on the way, 8 shards, documents, row ids and epochs of each batch, 0 workers",
        _raydist,
    ),
    "numpy memmap": Entry("numpy", "rows of one mapped file in an order drawn before; tokens only", _memmap),
    "datasets, torch format": Entry(
        "datasets", "map-style table in torch format, indexed with an order drawn before; tokens only", _datasets_torch
    ),
    "datasets, arrow format": Entry(
        "datasets",
        "the same table in arrow format, each batch flattened, cast and reshaped by hand; tokens only",
        _datasets_arrow,
    ),
    "litdata": Entry("litdata", "StreamingDataset with TokensLoader and shuffle, 0 workers; tokens only", _litdata),
    "streaming": Entry(
        "mosaicml-streaming",
        "StreamingDataset of MDS with shuffle, torch DataLoader, 0 workers; tokens only",
        _streaming,
    ),
}


def _opened(name: str, folder: Path, shape: Shape) -> tuple[Batches | None, dict[str, Any]]:
    entry = ENTRIES[name]
    try:
        import torch

        torch.set_num_threads(1)
        batches = entry.open(folder, shape)
    except Exception as error:
        return None, {"absent": f"{type(error).__name__}: {error}"[:200]}
    return batches, {"version": importlib.metadata.version(entry.package) if entry.package else "this repository"}


def _check(batches: Batches, shape: Shape) -> dict[str, Any]:
    num_rows = checksum = 0
    for tokens_BS in batches():
        assert (str(tokens_BS.dtype), tokens_BS.shape[1]) == ("torch.int64", shape.row_tokens)
        num_rows += len(tokens_BS)
        checksum += int(tokens_BS.sum())
    return {"num_rows": num_rows, "checksum": checksum}


def _measure(batches: Batches) -> dict[str, Any]:
    num_rows = 0
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall_s < MIN_MEASURE_S:
        for tokens_BS in batches():
            num_rows += len(tokens_BS)
    return {
        "num_rows": num_rows,
        "wall_s": time.perf_counter() - wall_s,
        "cpu_s": time.process_time() - cpu_s,
    }


def main() -> None:
    """Takes orders until stdin ends."""
    spec = json.loads(sys.argv[1])
    shape = Shape(**spec["shape"])
    batches, hello = _opened(spec["name"], Path(spec["folder"]), shape)
    for line in sys.stdin:
        order = json.loads(line)["order"]
        if batches is None or order == "open":
            print(json.dumps(hello), flush=True)
        else:
            print(json.dumps(_check(batches, shape) if order == "check" else _measure(batches)), flush=True)


if __name__ == "__main__":
    main()

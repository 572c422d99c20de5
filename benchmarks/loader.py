"""Tokens per second of the loader beside other loaders, on the same rows, in interleaved repeats, one thread each.

    python benchmarks/loader.py [--peer-python PATH] [--repeats 5] [--rows 40000]

Every contender runs in its own process, so that a peer may live in another virtual environment (``--peer-python``). A pass
reads every row once, in batches of int64 torch tensors. numpy memmap reads rows in a random order that was drawn before and
does nothing else: it is the bar, not a loader. The result goes to ``benchmarks/results/loader.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEQ_LEN, BATCH_ROWS = 512, 32
NUM_SHARDS = 8
RESUME_ROW, RESUME_SEQ_LEN = 1_000_000, 16
CONTENDERS = {
    "raydist": None,
    "numpy memmap": "numpy",
    "datasets": "datasets",
    "litdata": "litdata",
    "streaming": "mosaicml-streaming",
}
Pass = Callable[[], int]


def write_tokens(folder: Path, *, num_rows: int) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4096, size=(num_rows, SEQ_LEN), dtype=np.uint16)
    np.save(folder / "rows.npy", tokens)
    _write_raydist(folder / "raydist", tokens.reshape(-1))


def _write_raydist(folder: Path, tokens_T: Any) -> None:
    import numpy as np

    from data_loaders.manifest import Manifest, SpecialIds, write_manifest
    from data_loaders.shards import SUFFIX, ShardColumns, write_shard

    rng = np.random.default_rng(1)
    entries = []
    for index, part_T in enumerate(np.array_split(tokens_T, NUM_SHARDS)):
        part_T = np.append(part_T, part_T[:1])
        cuts = np.cumsum(rng.integers(200, 2000, size=len(part_T) // 200))
        offsets_D = np.concatenate([[0], cuts[cuts < len(part_T)], [len(part_T)]]).astype(np.int64)
        columns = ShardColumns(part_T, offsets_D, [str(d) for d in range(len(offsets_D) - 1)])
        entries.append(write_shard(str(folder), name=f"shard-{index:05d}{SUFFIX}", columns=columns))
    manifest = Manifest(
        "bench", "train", tuple(entries), "tokenizer.json", "0" * 64, "bytes", 4096, SpecialIds(), "uint16"
    )
    write_manifest(str(folder), manifest)


def raydist_pass(folder: Path) -> Pass:
    loader_of = _raydist_loader(folder, seq_len=SEQ_LEN)

    def run() -> int:
        loader, num_rows = loader_of(0)
        return sum(len(rows) for rows in itertools.islice(loader, num_rows // BATCH_ROWS))

    return run


def _raydist_loader(folder: Path, *, seq_len: int) -> Callable[[int], tuple[Any, int]]:
    from data_loaders.cache import NodeCache
    from data_loaders.loader import Loader
    from data_loaders.mixture import DatasetWeight, open_mixture

    def make(start_sample: int) -> tuple[Any, int]:
        cache = NodeCache(str(folder / "cache"))
        mixture = open_mixture([DatasetWeight(str(folder / "raydist"))], cache=cache, seq_len=seq_len, seed=0)
        return Loader(mixture, batch_rows=BATCH_ROWS, start_sample=start_sample, prefetch_steps=8), mixture.num_rows

    return make


def memmap_pass(folder: Path) -> Pass:
    import numpy as np
    import torch

    rows = np.load(folder / "rows.npy", mmap_mode="r")
    order = np.random.default_rng(2).permutation(len(rows))

    def run() -> int:
        count = 0
        for start in range(0, len(rows) - BATCH_ROWS + 1, BATCH_ROWS):
            count += len(torch.from_numpy(rows[order[start : start + BATCH_ROWS]].astype(np.int64)))
        return count

    return run


def datasets_pass(folder: Path) -> Pass:
    import datasets
    import numpy as np
    import torch

    target = folder / "datasets"
    if not target.exists():
        rows = np.load(folder / "rows.npy")
        features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"), length=SEQ_LEN)})
        datasets.Dataset.from_dict({"tokens": rows}, features=features).save_to_disk(str(target))
    table = datasets.load_from_disk(str(target)).with_format("torch", dtype=torch.int64)
    order = np.random.default_rng(2).permutation(len(table))

    def run() -> int:
        starts = range(0, len(table) - BATCH_ROWS + 1, BATCH_ROWS)
        return sum(len(table[order[start : start + BATCH_ROWS]]["tokens"]) for start in starts)

    return run


def litdata_pass(folder: Path) -> Pass:
    import litdata
    import numpy as np
    import torch

    target = folder / "litdata"
    if not target.exists():
        rows = np.load(folder / "rows.npy")
        writer = litdata.streaming.writer.BinaryWriter(str(target), chunk_bytes="64MB")
        for index, row in enumerate(rows):
            writer.add_item(index, torch.from_numpy(row.astype(np.int64)))
        writer.done()
        writer.merge()
    dataset = litdata.StreamingDataset(str(target), shuffle=True, drop_last=True)

    def run() -> int:
        return sum(len(batch) for batch in litdata.StreamingDataLoader(dataset, batch_size=BATCH_ROWS, num_workers=0))

    return run


def streaming_pass(folder: Path) -> Pass:
    import numpy as np
    import streaming
    import torch

    target = folder / "streaming"
    if not target.exists():
        with streaming.MDSWriter(out=str(target), columns={"tokens": f"ndarray:int64:{SEQ_LEN}"}) as writer:
            for row in np.load(folder / "rows.npy"):
                writer.write({"tokens": row.astype(np.int64)})
    dataset = streaming.StreamingDataset(local=str(target), shuffle=True, batch_size=BATCH_ROWS)

    def run() -> int:
        return sum(len(batch["tokens"]) for batch in torch.utils.data.DataLoader(dataset, batch_size=BATCH_ROWS))

    return run


PASSES: dict[str, Callable[[Path], Pass]] = {
    "raydist": raydist_pass,
    "numpy memmap": memmap_pass,
    "datasets": datasets_pass,
    "litdata": litdata_pass,
    "streaming": streaming_pass,
}


def work(name: str, folder: Path) -> None:
    """A contender's process: one pass for each line on stdin, one JSON line each on stdout."""
    import torch

    torch.set_num_threads(1)
    try:
        run = PASSES[name](folder)
    except Exception as error:
        print(json.dumps({"absent": f"{type(error).__name__}: {error}"[:200]}), flush=True)
        return
    package = CONTENDERS[name]
    print(json.dumps({"version": importlib.metadata.version(package) if package else "this repository"}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        num_rows = run()
        print(json.dumps({"tokens_per_s": num_rows * SEQ_LEN / (time.perf_counter() - start)}), flush=True)


class Contender:
    """A contender's process, seen from the outside."""

    def __init__(self, name: str, *, python: str, folder: Path) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
        command = [python, __file__, "--worker", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.hello = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"absent": f"ended with code {self.process.wait()}"}

    def measure(self) -> float:
        """Tokens per second of one pass."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()["tokens_per_s"]

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def resume_ms(folder: Path, *, repeats: int) -> list[float]:
    """Milliseconds from nothing opened to the first batch at row 10^6, shards on the node."""
    import numpy as np

    _write_raydist(folder / "raydist", np.zeros((RESUME_ROW + 100_000) * RESUME_SEQ_LEN, dtype=np.uint16))
    make = _raydist_loader(folder, seq_len=RESUME_SEQ_LEN)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loader, _ = make(RESUME_ROW)
        next(iter(loader))
        times.append(1e3 * (time.perf_counter() - start))
        loader.close()
    return times[1:]


def measure_all(folder: Path, *, python: str, repeats: int) -> Iterator[dict[str, Any]]:
    contenders = {
        name: Contender(
            name, python=python if name not in ("raydist", "numpy memmap") else sys.executable, folder=folder
        )
        for name in CONTENDERS
    }
    present = {name: contender for name, contender in contenders.items() if "absent" not in contender.hello}
    speeds: dict[str, list[float]] = {name: [] for name in present}
    for repeat in range(repeats + 1):
        for name, contender in present.items():
            speed = contender.measure()
            if repeat:
                speeds[name].append(speed)
    for name, contender in contenders.items():
        contender.close()
        if name in speeds:
            middle = statistics.median(speeds[name])
            yield {"name": name, "tokens_per_s": middle, "all_tokens_per_s": speeds[name], **contender.hello}
        else:
            yield {"name": name, **contender.hello}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_tokens(Path(scratch), num_rows=args.rows)
        results = list(measure_all(Path(scratch), python=args.peer_python, repeats=args.repeats))
        resume = resume_ms(Path(scratch) / "resume", repeats=args.repeats)
    ours = results[0]["tokens_per_s"]
    for result in results:
        if "absent" in result:
            print(f"{result['name']:<14} absent: {result['absent']}")
        else:
            ratio = ours / result["tokens_per_s"]
            print(f"{result['name']:<14} {result['tokens_per_s'] / 1e6:9.1f} Mtokens/s   raydist / this = {ratio:.2f}")
    print(f"first batch after resume at row {RESUME_ROW}: {statistics.median(resume):.1f} ms (median of {len(resume)})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "rows": args.rows,
        "seq_len": SEQ_LEN,
        "batch_rows": BATCH_ROWS,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "results": results,
        "resume_row": RESUME_ROW,
        "resume_ms": resume,
    }
    args.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

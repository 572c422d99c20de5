"""Feeds mutated files to the readers, in a process of its own: a reader that crashes the interpreter is a finding too.

    python -m tests.security.fuzz_readers KIND FOLDER NUM_FILES

prints one JSON object a file: its number, and ``refused`` or ``loaded``, or what went wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import yaml

from data_loaders.cache import NodeCache
from data_loaders.loader import Loader
from data_loaders.manifest import FILE_NAME
from data_loaders.mixture import DatasetWeight, open_mixture
from data_loaders.verify import verify_dataset
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.files import record_of_bytes
from raydist.checkpoint.layout import MARKER, METADATA, TRAINER, step_folder
from raydist.checkpoint.state import model_tensors
from raydist.config.load import dump_yaml, load_recipe
from raydist.config.sweep import load_sweep
from raydist.core.dist import Workers, process_group
from raydist.core.errors import RaydistError
from raydist.core.token_ids import TokenIds
from tests.checkpoint.cases import advance, make
from tests.security.mutations import mutated_bytes, mutated_tree
from tests.training.cases import SEQ_LEN, write_dataset

ROOT = Path(__file__).parents[2]
CPU_LIMIT_S = 5.0
WALL_LIMIT_S = 20.0  # for one that waits instead of computing; long enough for a busy machine
_MEMORY_LIMIT_BYTES = 12 * 2**30
_SCREEN_LINES = 30
_SCREEN_CHARS = 4000
BYTES = TokenIds(vocab_size=260, bos=256, eos=257, mask=258, pad=259)


class Hang(BaseException):
    """A reader computed longer than :data:`CPU_LIMIT_S`, or took longer than :data:`WALL_LIMIT_S`."""


class Reader(ABC):
    """One kind of file. ``target`` is the folder that a reader may write to."""

    def __init__(self, target: Path) -> None:
        self.target = target

    @abstractmethod
    def write(self, rng: random.Random) -> None:
        """Writes the mutated file or files."""

    @abstractmethod
    def read(self) -> None:
        """Reads them as the program does; raises AssertionError where damaged content is taken for good."""


class Recipes(Reader):
    def write(self, rng: random.Random) -> None:
        sources = sorted(path for path in (ROOT / "jobs/recipes").rglob("*.yaml"))
        text = _mutated_yaml(rng.choice(sources).read_bytes(), rng)
        (self.target / "base.yaml").write_bytes((ROOT / "jobs/recipes/base.yaml").read_bytes())
        (self.target / "recipe.yaml").write_bytes(text)

    def read(self) -> None:
        recipe = load_recipe(str(self.target / "recipe.yaml"))
        (self.target / "again.yaml").write_text(dump_yaml(recipe.config))
        assert load_recipe(str(self.target / "again.yaml")).config == recipe.config
        recipe.config.objective.build(BYTES)


class Sweeps(Reader):
    def write(self, rng: random.Random) -> None:
        sources = sorted((ROOT / "sweeps").glob("*.yaml"))
        text = _mutated_yaml(rng.choice(sources).read_bytes(), rng)
        (self.target / "sweep.yaml").write_bytes(text)

    def read(self) -> None:
        load_sweep(str(self.target / "sweep.yaml")).validate_trials()


class Manifests(Reader):
    """Edited without their hash, or with the hash of what they say now, as somebody with evil in mind would."""

    def __init__(self, target: Path) -> None:
        super().__init__(target)
        self.whole = Path(write_dataset(_fresh(target.parent / "whole"))) / "train"

    def write(self, rng: random.Random) -> None:
        shutil.copytree(self.whole, self.target / "data")
        path = self.target / "data" / FILE_NAME
        if rng.random() < 0.3:
            path.write_bytes(mutated_bytes(path.read_bytes(), rng))
            return
        content = mutated_tree(json.loads(path.read_bytes()), rng)
        if rng.random() < 0.8:
            content.pop("sha256", None)
            content["sha256"] = canonical_sha256(content)
        path.write_text(json.dumps(content))

    def read(self) -> None:
        read_dataset(self.target)


class Shards(Reader):
    """Damaged in the bucket, or put in their place by somebody who also writes the manifest."""

    def __init__(self, target: Path) -> None:
        super().__init__(target)
        self.whole = Path(write_dataset(_fresh(target.parent / "whole"))) / "train"
        self.is_crafted = False

    def write(self, rng: random.Random) -> None:
        import zstandard

        shutil.copytree(self.whole, self.target / "data")
        manifest_path = self.target / "data" / FILE_NAME
        manifest = json.loads(manifest_path.read_bytes())
        entry = rng.choice(manifest["shards"])
        path = self.target / "data" / entry["name"]
        before = path.read_bytes()
        self.is_crafted = rng.random() < 0.6
        if not self.is_crafted:
            path.write_bytes(_surely_mutated(before, rng))
            return
        raw = mutated_bytes(zstandard.ZstdDecompressor().decompress(before, max_output_size=1 << 26), rng)
        compressed = zstandard.ZstdCompressor().compress(raw)
        path.write_bytes(compressed)
        entry.update(
            compressed_bytes=len(compressed), raw_bytes=len(raw), compressed_sha256=hashlib.sha256(compressed).hexdigest(),
            raw_sha256=hashlib.sha256(raw).hexdigest(),
        )  # fmt: skip
        manifest.pop("sha256")
        manifest_path.write_text(json.dumps({**manifest, "sha256": canonical_sha256(manifest)}))

    def read(self) -> None:
        read_dataset(self.target)
        assert self.is_crafted, "a damaged shard was read as if it were whole"


class Checkpoints(Reader):
    """Any file of a checkpoint, damaged as it lies, or with the marker's hashes made to fit."""

    def __init__(self, target: Path) -> None:
        super().__init__(target)
        self.workers = Workers(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
        self.whole = _fresh(target.parent / "whole")
        model, optimizer = make()
        advance(model, optimizer, num_steps=2)
        with Checkpointer(str(self.whole), keep=1, workers=self.workers) as checkpointer:
            checkpointer.save(2, model=model, optimizer=optimizer, trainer_state={"seed": 1, "samples_consumed": 16})
        self.saved = {name: tensor.detach().clone() for name, tensor in model_tensors(model).items()}
        self.is_crafted = False

    def write(self, rng: random.Random) -> None:
        shutil.copytree(self.whole, self.target / "run")
        folder = Path(step_folder(str(self.target / "run"), 2))
        path = folder / rng.choice((MARKER, MARKER, METADATA, METADATA, TRAINER, "rank-0000.safetensors"))
        before = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.75:
            after = json.dumps(mutated_tree(json.loads(before), rng)).encode()
        elif path.suffix == ".safetensors" and rng.random() < 0.5:
            after = _mutated_safetensors(before, rng)
        else:
            after = mutated_bytes(before, rng)
        path.write_bytes(after)
        self.is_crafted = path.name == MARKER or rng.random() < 0.6
        if self.is_crafted and path.name != MARKER:
            marker = json.loads((folder / MARKER).read_bytes())
            marker["files"][path.name] = record_of_bytes(after).to_json()
            (folder / MARKER).write_text(json.dumps(marker))

    def read(self) -> None:
        model, optimizer = make()
        with Checkpointer(str(self.target / "run"), keep=1, workers=self.workers) as checkpointer:
            state = checkpointer.load_newest(model, optimizer=optimizer)
        if state is not None and not self.is_crafted:
            for name, tensor in model_tensors(model).items():
                assert torch.equal(tensor, self.saved[name]), f"{name} was loaded with damaged values"


def read_dataset(target: Path) -> None:
    """All that the program does with a dataset: verify, open, and read rows to the end."""
    path = str(target / "data")
    mixture = open_mixture(
        [DatasetWeight(path, 1.0)], cache=NodeCache(str(target / "cache")), seq_len=SEQ_LEN, seed=1, window_shards=4
    )
    loader: Loader[Any] = Loader(mixture, batch_rows=8, rank=0, world_size=1)
    for step in range(6):
        loader.rows(first_sample=step * 8, step=step)
    verify_dataset(path)


READERS: dict[str, type[Reader]] = {
    "recipes": Recipes,
    "sweeps": Sweeps,
    "manifests": Manifests,
    "shards": Shards,
    "checkpoints": Checkpoints,
}


def _mutated_yaml(text: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return mutated_bytes(text, rng)
    return yaml.safe_dump(mutated_tree(yaml.safe_load(text), rng)).encode()


def _mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutated_tree(json.loads(data[8 : 8 + length]), rng)).encode()
    stated = len(header) if rng.random() < 0.8 else rng.choice((0, 2**20, 2**40, 2**63, len(header) // 2))
    return stated.to_bytes(8, "little") + header + data[8 + length :]


def _surely_mutated(data: bytes, rng: random.Random) -> bytes:
    while (changed := mutated_bytes(data, rng)) == data:
        pass
    return changed


def canonical_sha256(content: dict[str, Any]) -> str:
    """The hash that a manifest of this content states of itself."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def outcome_of(reader: Reader) -> dict[str, Any]:
    """What reading gave: ``refused`` by our error, ``loaded``, or the fault."""
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)
    try:
        reader.read()
    except RaydistError as error:
        text = str(error)
        if error.exit_code != 2 or len(text.splitlines()) > _SCREEN_LINES or len(text) > _SCREEN_CHARS:
            return {"outcome": "no screen", "detail": text[:2000]}
        return {"outcome": "refused", "detail": text.splitlines()[0][:200]}
    except Hang:
        return {"outcome": "hang", "detail": traceback.format_exc()[-2000:]}
    except BaseException:
        return {"outcome": "traceback", "detail": traceback.format_exc()[-3000:]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"outcome": "loaded", "detail": ""}


def watch_for_hangs() -> None:
    """Makes the limits of :func:`outcome_of` work in this process."""
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, _raise_hang)


def _raise_hang(*unused: object) -> None:
    raise Hang


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=READERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_files", type=int)
    parser.add_argument("--only", type=int, help="one file, to look into a finding")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    torch.set_num_threads(1)
    watch_for_hangs()
    target = args.folder / "target"
    with process_group(timeout_s=60.0):
        reader = READERS[args.kind](target)
        for number in range(args.num_files) if args.only is None else [args.only]:
            _fresh(target)
            reader.write(random.Random(f"{args.kind} {number}"))
            print(json.dumps({"file": number, "outcome": "reading"}), flush=True)
            print(json.dumps({"file": number, **outcome_of(reader)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""How long a save keeps training waiting: ours, ours when waited for, and plain ``dcp.save``, on a fast and a slow store.

One worker, one model with AdamW state. Saves of the three ways take turns, each after the same number of optimizer steps, so
that all meet the same machine. The stall is the time that the training thread cannot train: for ours the plan, and what the
next update waits for the copy to host memory that runs beside the forward and backward before it; for the others the whole
save. The fast store is a local folder,
the slow one an S3 server behind a proxy that lets so many bytes pass per second. What the thread that stores takes from the
steps that run beside it is reported too, as their time against that of steps without a save in flight.

About two minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Ratio, environment, write_result
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.object_store import ObjectStore

GOAL = 0.05
NUM_LAYERS = 12


@dataclass
class Training:
    """A model whose step takes a while, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    width: int

    @classmethod
    def begin(cls, width: int) -> Training:
        """Weights, and moments from one step."""
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(NUM_LAYERS)))
        training = cls(model, torch.optim.AdamW(model.parameters(), lr=1e-4), width)
        training.step()
        return training

    def step(self) -> float:
        """One optimizer step; returns its seconds."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(torch.ones(64, self.width)).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - started

    def num_bytes(self) -> int:
        """Size of weights and moments."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *states])


class Ways:
    """The three ways to save into one place; each has a folder of its own."""

    def __init__(self, training: Training, place: str) -> None:
        from raydist.checkpoint.checkpointer import Checkpointer
        from raydist.core.dist import Workers

        workers = Workers(0, 0, 1, torch.device("cpu"))
        self._training = training
        self._place = place
        self._ours = {way: Checkpointer(f"{place}/{way}", keep=1, workers=workers) for way in ("async", "sync")}
        self._number = 0

    def save(self, way: str) -> float:
        """Saves; returns for how long training could not go on."""
        self._number += 1
        started = time.perf_counter()
        if way == "dcp":
            self._dcp()
        else:
            self._ours[way].save(
                self._number, model=self._training.model, optimizer=self._training.optimizer, trainer_state={}
            )
            if way == "sync":
                self._ours[way].wait()
        return time.perf_counter() - started

    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._ours["async"].busy

    def settle(self) -> None:
        """Ends the save in flight."""
        self._ours["async"].wait()

    def take_held_s(self, way: str) -> float:
        """For how long an update waited for the copies of the saves that ended since the last call."""
        return sum(result.held_s for result in self._ours[way].take_results()) if way == "async" else 0.0

    def _dcp(self) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, save
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        path = f"{self._place}/dcp/{self._number}"
        state = {"model": self._training.model.state_dict(), "optimizer": self._training.optimizer.state_dict()}
        writer: Any = FsspecWriter(path) if "://" in path else FileSystemWriter(path)
        save(state, storage_writer=writer)


def measure(place: str, *, width: int, rounds: int, steps: int) -> dict[str, Any]:
    """Saves by turns; one round before the measured ones fills caches and buffers."""
    training = Training.begin(width)
    ways = Ways(training, place)
    stalls: dict[str, list[float]] = {"async": [], "sync": [], "dcp": []}
    upload_s: list[float] = []
    quiet_s: list[float] = []
    beside_s: list[float] = []
    for number in range(rounds + 1):
        for way, found in stalls.items():
            quiet = [training.step() for _ in range(steps)]
            stall = ways.save(way)
            started = time.perf_counter()
            beside = []
            while ways.busy():
                beside.append(training.step())
            stored_s = time.perf_counter() - started
            ways.settle()
            if number:
                found.append(stall + ways.take_held_s(way))
                quiet_s.extend(quiet)
                beside_s.extend(beside)
                if way == "async":
                    upload_s.append(stored_s)
    return {
        "saved_bytes": training.num_bytes(),
        "stall_s": {way: round(statistics.median(values), 4) for way, values in stalls.items()},
        "async_upload_s": round(statistics.median(upload_s), 3),
        "async_over_sync": Ratio(stalls["async"], stalls["sync"]).as_json(),
        "async_over_dcp": Ratio(stalls["async"], stalls["dcp"]).as_json(),
        "sync_over_dcp": Ratio(stalls["sync"], stalls["dcp"]).as_json(),
        "step_s": {
            "without_save": round(statistics.median(quiet_s), 4),
            "beside_upload": round(statistics.median(beside_s), 4) if beside_s else None,
        },
    }


def with_slow_store(folder: Path, bytes_per_s: float, action: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Calls ``action`` with a bucket behind a throttled proxy."""
    store = ObjectStore(folder)
    store.start()
    try:
        bucket = store.make_bucket("checkpoints")
        with FaultyProxy(store.endpoint) as proxy:
            os.environ.update(store.environment(endpoint=proxy.endpoint))
            proxy.slow(bytes_per_s=bytes_per_s)
            return action(bucket)
    finally:
        store.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024, help=f"of the {NUM_LAYERS} square layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps before each save")
    parser.add_argument("--slow-mib-per-s", type=float, default=40.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="raydist-bench-"))
    try:
        sizes = {"width": args.width, "rounds": args.rounds, "steps": args.steps}
        fast = measure(str(folder / "fast"), **sizes)
        slow = with_slow_store(folder, args.slow_mib_per_s * 2**20, lambda place: measure(place, **sizes))
    finally:
        shutil.rmtree(folder)
    result = {
        "what": __doc__.split("\n")[0],
        "goal": {"async_over_sync": GOAL},
        "fast_store": {"kind": "local folder", **fast},
        "slow_store": {"kind": f"S3 at {args.slow_mib_per_s:g} MiB/s", **slow},
        "environment": environment("torch", "s3fs", "raydist"),
    }
    path = write_result("checkpoint", result)
    for name in ("fast_store", "slow_store"):
        part = result[name]
        assert isinstance(part, dict)
        stalls = ", ".join(f"{way} {seconds:.3f} s" for way, seconds in part["stall_s"].items())
        print(f"{part['kind']}: stall of a save: {stalls}; async/sync {part['async_over_sync']['median']:.3f}")
    print(f"goal async/sync <= {GOAL}; written to {path}")


if __name__ == "__main__":
    main()

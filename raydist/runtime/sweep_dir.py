"""The directory of a sweep: what lies where, who may use a name, and which trials there were.

<output_dir>/<name>/
    sweep.yaml         the resolved sweep
    sweep.json         name, hash, file
    trials.jsonl       a line when a trial starts and a line when it ends; the last line of a trial counts
    <name>-000/        the run directory of the first trial, and so on
    pictures/          the report
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from raydist.config.sweep import Sweep, dump_sweep
from raydist.core import storage
from raydist.core.errors import ConfigError, ResumeError
from raydist.evaluation.sweep_records import TrialRecord, TrialState
from raydist.tracking.jsonl import read_curve
from raydist.training import run_dir as run_layout
from raydist.training.lease import holder_of

SPEC = "sweep.yaml"
RECORD = "sweep.json"
TRIALS = "trials.jsonl"
PICTURES = "pictures"
_DONE: tuple[TrialState, ...] = ("finished", "stopped")


@dataclass(frozen=True)
class TrialEntry:
    """One line of ``trials.jsonl``.

    Attributes:
        index: of the trial in the search, from 0.
        name: of its run.
        parameters: recipe key to value.
        state: how it ended, or ``running``.
        step: optimizer steps done.
        seconds: wall-clock time over all attempts.
        metrics: the last values of the sweep's metrics.
        failure: why it failed, in words.
        stages_s: seconds of the last attempt by stage, :data:`raydist.runtime.trial_stages.STAGES`.
    """

    index: int
    name: str
    parameters: dict[str, Any]
    state: TrialState = "running"
    step: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    stages_s: dict[str, float] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Not to be run again."""
        return self.state in _DONE


class SweepDir:
    """The open directory of a sweep; made by :func:`open_sweep_dir`.

    Opening it changes nothing: a driver that is going to be refused opens it too, while another one writes.

    Attributes:
        path: of the directory.
        name: of the sweep.
        holder: the driver that had the directory's lease when it was opened.
    """

    def __init__(self, path: str, *, name: str) -> None:
        self.path = path
        self.name = name
        self.holder = holder_of(path)
        self._is_mended = False
        self._trials: dict[int, TrialEntry] = {}
        for line in _lines(self.file(TRIALS)):
            entry = TrialEntry(**line)
            self._trials[entry.index] = entry

    @property
    def trials(self) -> list[TrialEntry]:
        """The last line of each trial, by index."""
        return [self._trials[index] for index in sorted(self._trials)]

    def file(self, name: str) -> str:
        """The path of a file in it."""
        return storage.join(self.path, name)

    def trial_name(self, index: int) -> str:
        """The name of a trial's run."""
        return f"{self.name}-{index:03d}"

    def trial_dir(self, index: int) -> str:
        """The run directory of a trial."""
        return self.file(self.trial_name(index))

    def begin(self, index: int, parameters: dict[str, Any]) -> TrialEntry:
        """Notes that a trial starts, or goes on."""
        before = self._trials.get(index)
        entry = (
            TrialEntry(index, self.trial_name(index), parameters)
            if before is None
            else replace(before, state="running", failure="")
        )
        return self.note(entry)

    def note(self, entry: TrialEntry) -> TrialEntry:
        """Appends a line; only the driver that holds the directory does."""
        if not self._is_mended:
            _cut_torn_line(self.file(TRIALS))
            self._is_mended = True
        with open(self.file(TRIALS), "a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(entry)) + "\n")
        self._trials[entry.index] = entry
        return entry

    def record(self, entry: TrialEntry, metrics: Sequence[str]) -> TrialRecord:
        """A trial for ranking and pictures; curves come from its own ``metrics.jsonl``, where there is one."""
        run_dir = self.trial_dir(entry.index)
        all_curves = read_curve(storage.join(run_dir, run_layout.METRICS))
        curves = {key: all_curves[key] for key in metrics if key in all_curves}
        for key in metrics:
            if key not in curves and key in entry.metrics:
                curves[key] = [(entry.step, entry.metrics[key])]
        return TrialRecord(
            name=entry.name,
            parameters=entry.parameters,
            state=entry.state,
            curve=curves,
            run_dir=run_dir if storage.exists(run_dir) else None,
            num_steps=entry.step,
            seconds=entry.seconds,
        )


def open_sweep_dir(sweep: Sweep, *, output_dir: str, resume: bool) -> SweepDir:
    """Makes or re-opens the directory.

    Raises:
        ResumeError: the name is in use and ``resume`` was not asked for; or it was, and there is nothing to resume or the
            sweep is another one.
        ConfigError: ``output_dir`` is a bucket.
    """
    path = storage.join(storage.normalize(output_dir), sweep.name)
    if storage.is_remote(path):
        raise ConfigError(
            "sweeps are kept in a folder, not in a bucket",
            where="output_dir",
            found=output_dir,
            expected="a path that every worker reaches",
        )
    record_path = storage.join(path, RECORD)
    if resume:
        _require_same_sweep(sweep, record_path)
    elif _is_in_use(storage.local_path(path)):
        is_sweep = storage.exists(record_path)
        raise ResumeError(
            "this sweep name is in use" if is_sweep else "this name is in use by something that is no sweep",
            where=path,
            fix=("go on with it: add --resume\nor " if is_sweep else "") + f"start another: name={sweep.name}-2",
        )
    else:
        storage.make_folder(path)
        storage.write_bytes(storage.join(path, SPEC), dump_sweep(sweep).encode())
        storage.write_json(record_path, {"name": sweep.name, "sha256": sweep.sha256, "path": sweep.path})
    return SweepDir(path, name=sweep.name)


def _is_in_use(path: str) -> bool:
    """A folder with no more than the sweep's copy is of a driver that was killed before it had the name."""
    return os.path.exists(path) and not (os.path.isdir(path) and set(os.listdir(path)) <= {SPEC})


def _require_same_sweep(sweep: Sweep, record_path: str) -> None:
    if not storage.exists(record_path):
        raise ResumeError("there is no such sweep to resume", where=record_path, fix="start it without --resume")
    known = storage.read_json(record_path)["sha256"]
    if known != sweep.sha256:
        raise ResumeError(
            "the sweep differs from the one that this directory holds",
            where=sweep.path,
            found=f"hash {sweep.sha256[:12]}",
            expected=f"{known[:12]}, the one in {os.path.join(os.path.dirname(record_path), SPEC)}",
            fix="undo the change, or give the sweep another name: name=...",
        )


def _lines(path: str) -> list[dict[str, Any]]:
    """The whole lines of a file; a torn last one is of a driver that was killed, or that is writing it."""
    if not os.path.exists(path):
        return []
    return [json.loads(line) for line in storage.read_bytes(path).splitlines(keepends=True) if line.endswith(b"\n")]


def _cut_torn_line(path: str) -> None:
    """Takes away what a killed driver left of its last line."""
    if not os.path.exists(path):
        return
    content = storage.read_bytes(path)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)

"""The tracker of the training process: a local file first, MLflow behind it from a thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from raydist.core import storage
from raydist.core.log import get_logger
from raydist.tracking import jsonl
from raydist.tracking.base import Tracker
from raydist.tracking.mirror import Mirror, spool_artifact
from raydist.tracking.run_files import RUN_RECORD, RunFiles
from raydist.tracking.server import short_reason
from raydist.tracking.system import SystemSampler

_POLL_S = 2.0
_PUBLISH_S = 60.0
_LONGEST_WAIT_S = 60.0
_log = get_logger(__name__)


def open_tracker(
    run_dir: str, *, attempt: int | None = None, system_metrics: bool = True, mirrored: bool = True
) -> Tracker:
    """The tracker of rank 0; the other ranks log nothing.

    MLflow is fed if the driver left ``mlflow.json`` (:func:`raydist.tracking.mlflow_runs.start_run`) in the run
    directory; ``metrics.jsonl`` is written always.

    Args:
        run_dir: local or remote.
        attempt: which start of the run this is; by default one more than the last in ``metrics.jsonl``.
        system_metrics: adds ``system/...`` (CPU and memory of this machine and process) to the records.
        mirrored: False leaves MLflow to another process.
    """
    sampler = SystemSampler() if system_metrics else None
    return RunTracker(RunFiles(run_dir), attempt=attempt, sampler=sampler, mirrored=mirrored)


class RunTracker:
    """Writes ``metrics.jsonl`` and keeps MLflow up to date with it.

    Args:
        files: of the run.
        attempt: number of this attempt, or None for the next.
        sampler: source of ``system/...`` metrics, or None.
        mirrored: False leaves MLflow to another process.
    """

    def __init__(
        self,
        files: RunFiles,
        *,
        attempt: int | None = None,
        sampler: SystemSampler | None = None,
        mirrored: bool = True,
    ) -> None:
        self._files = files
        self._jsonl = jsonl.JsonlTracker(files.path(jsonl.FILE_NAME), attempt=attempt)
        self._sampler = sampler
        self._disk_failed = False
        self._mirrored = mirrored and os.path.exists(files.path(RUN_RECORD))
        mirror = Mirror(files, tags={"raydist.attempt": str(self._jsonl.attempt)}) if self._mirrored else None
        self._sender = Sender(files, mirror)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Writes one line; with the machine's load, where a new sample of it is due."""
        values = {**metrics, **(self._sampler.sample() if self._sampler else {})}
        with self._without_disk():
            self._jsonl.log_metrics(values, step=step)

    def log_artifact(self, path: str, *, folder: str = "") -> None:
        """Notes a file or folder for the thread to upload; without an MLflow run it just stays where it is."""
        if self._mirrored:
            spool_artifact(self._files, path, folder=folder)

    def publish(self) -> None:
        """Uploads what the bucket lacks, from whatever thread; a resume on another node then finds every metric."""
        self._files.publish()

    def flush(self, *, timeout_s: float = 30.0) -> bool:
        """Waits until MLflow has all that was logged; False if it had not in time, or is away."""
        return self._sender.flush(timeout_s=timeout_s)

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Flushes and ends the thread; what could not be sent stays in the run directory."""
        self._sender.close(timeout_s=timeout_s)
        with self._without_disk():  # what a full disk did not take is tried once more here
            self._jsonl.close()

    @contextmanager
    def _without_disk(self) -> Iterator[None]:
        """A disk that takes nothing is said once and ends no training."""
        try:
            yield
        except OSError as error:
            if not self._disk_failed:
                _log.warning("metrics cannot be written, training goes on without them: %s", error)
            self._disk_failed = True


class Sender:
    """The thread that sends; daemon, so that a frozen server cannot hold the process.

    Args:
        files: published from this thread where the run directory is remote.
        mirror: None where there is no MLflow run.
    """

    def __init__(self, files: RunFiles, mirror: Mirror | None) -> None:
        self._files = files
        self._mirror = mirror
        self._state = threading.Condition()
        self._rounds = 0
        self._asked_rounds = 0
        self._caught_up = True
        self._closing = False
        self._outages = _Outages()
        self._is_published = True
        self._published_at = time.monotonic()
        self._thread: threading.Thread | None = None
        if mirror is not None or storage.is_remote(files.run_dir):
            self._thread = threading.Thread(target=self._run, name="raydist-tracking", daemon=True)
            self._thread.start()

    def flush(self, *, timeout_s: float) -> bool:
        """Asks for a round that starts from now on, and waits for its end."""
        if self._thread is None:
            return True
        with self._state:
            self._asked_rounds = self._rounds + 2  # the one under way may have begun before the last record
            self._state.notify_all()
            ended = self._state.wait_for(lambda: self._rounds >= self._asked_rounds, timeout_s)
            return ended and self._caught_up

    def close(self, *, timeout_s: float) -> None:
        """One last round, and one line if something is left."""
        if self._thread is None:
            return
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join(timeout_s)
        if self._mirror is not None and (self._thread.is_alive() or not self._caught_up):
            _log.warning(
                "MLflow lacks %d records of this run; they are kept: raydist runs sync %s",
                self._mirror.num_waiting(),
                self._files.run_dir,
            )

    def _run(self) -> None:
        wait_s = _POLL_S
        while True:
            with self._state:
                closing = self._closing
                asked = closing or self._rounds < self._asked_rounds
            caught_up = self._round(asked=asked)
            wait_s = _POLL_S if caught_up else min(2 * wait_s, _LONGEST_WAIT_S)
            with self._state:
                self._rounds += 1
                self._caught_up = caught_up
                self._state.notify_all()
                if closing:
                    return
                self._state.wait_for(lambda: self._closing or self._rounds < self._asked_rounds, wait_s)

    def _round(self, *, asked: bool) -> bool:
        """Publishes and sends once; failures are for the next round.

        The run directory comes first and does not wait for MLflow: it is what a resume on another node goes on from.
        """
        if asked or time.monotonic() - self._published_at >= _PUBLISH_S:
            self._publish()
        sent = self._send()
        return (self._publish() if asked else self._is_published) and sent

    def _publish(self) -> bool:
        self._published_at = time.monotonic()
        try:
            self._files.publish()
        except Exception as error:  # an outage of any kind must not reach the training thread
            self._outages.begin("the run directory", error)
            self._is_published = False
        else:
            self._outages.end("the run directory")
            self._is_published = True
        return self._is_published

    def _send(self) -> bool:
        try:
            if self._mirror is not None:
                self._mirror.send_waiting()
        except Exception as error:  # MLflow lets errors of many libraries through
            self._outages.begin("MLflow", error)
            return False
        self._outages.end("MLflow")
        return True


class _Outages:
    """Warns once when something goes away, and once when it is back."""

    def __init__(self) -> None:
        self._away: set[str] = set()

    def begin(self, what: str, error: Exception) -> None:
        if what not in self._away:
            _log.warning("%s is away (%s); metrics are kept and sent later", what, short_reason(error))
        self._away.add(what)

    def end(self, what: str) -> None:
        if what in self._away:
            _log.warning("%s is back; nothing was lost", what)
        self._away.discard(what)

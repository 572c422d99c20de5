"""``status.json``: what a run is doing, readable from its directory alone, also when the cluster is gone.

The driver writes it every few seconds, so its age is the run's heartbeat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter

from raydist.core import storage
from raydist.core.errors import RaydistError
from raydist.core.log import get_logger
from raydist.tracking.run_files import RUN_RECORD
from raydist.training.hooks import Hook, RunFacts

if TYPE_CHECKING:
    from raydist.training.session import Outcome

STATUS = "status.json"
HEARTBEAT_S = 5.0
_STALE_HEARTBEATS = 6
_JOIN_S = 30.0
# Ray hands a job's driver its configuration, the submission id among it, in this variable.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_log = get_logger(__name__)

State = Literal["starting", "running", "finished", "stopped", "interrupted", "failed"]
ENDED: tuple[State, ...] = ("finished", "stopped", "interrupted", "failed")


@dataclass(frozen=True)
class RunStatus:
    """One reading of a run.

    Attributes:
        name: of the run.
        run_dir: its directory, as the driver names it.
        state: ``stopped``: by a hook, before the last step; ``interrupted``: asked to stop, resumable.
        step: optimizer steps done, as of the last log line.
        num_steps: of the whole run; 0 until the workers have started.
        attempt: how often workers started under this driver.
        world_size: workers of this attempt.
        tokens: read since the run's first step.
        loss: of the last log line.
        tokens_per_s: of the last log line.
        mfu: model FLOP/s over the device's peak; None where the peak is unknown.
        checkpoint_step: the newest checkpoint that is complete on storage, under this driver.
        upload_s: how long that one took to get there.
        saving_step: a checkpoint that was handed over and is not on storage yet.
        saving_since: Unix seconds at which it was handed over.
        failed_step: the last checkpoint that could not be stored; None once a newer one was.
        started_at: Unix seconds at which the driver started.
        updated_at: Unix seconds of the last heartbeat.
        message: how it ended, where there is more to say.
        job_id: Ray's submission id, for a job.
        dashboard_url: of the Ray that it runs on.
        mlflow_uri: where it is tracked.
        mlflow_run_id: None until MLflow has made the run.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)  # of the reader

    name: str
    run_dir: str
    state: State = "starting"
    step: int = 0
    num_steps: int = 0
    attempt: int = 0
    world_size: int = 0
    tokens: float | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    checkpoint_step: int | None = None
    upload_s: float | None = None
    saving_step: int | None = None
    saving_since: float | None = None
    failed_step: int | None = None
    started_at: float = 0.0
    updated_at: float = 0.0
    message: str | None = None
    job_id: str | None = None
    dashboard_url: str | None = None
    mlflow_uri: str | None = None
    mlflow_run_id: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the driver closed the run."""
        return self.state in ENDED

    def heartbeat_age_s(self, now: float) -> float:
        """Seconds since the driver last wrote."""
        return max(0.0, now - self.updated_at)

    def is_stale(self, now: float) -> bool:
        """The driver missed many heartbeats without closing the run: it is dead, cut off, or stopped by a signal."""
        return not self.has_ended and self.heartbeat_age_s(now) > _STALE_HEARTBEATS * HEARTBEAT_S


def read_status(run_dir: str) -> RunStatus | None:
    """The last status of a run; None where there is none.

    Raises:
        RaydistError: the file is damaged, or the storage does not answer.
    """
    path = storage.join(run_dir, STATUS)
    if not storage.exists(path):
        return None
    try:
        return TypeAdapter(RunStatus).validate_python(storage.read_json(path))
    except ValueError as error:
        raise RaydistError(
            "the run's status cannot be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            fix="delete the file; a running driver writes it anew",
        ) from None


class StatusWriter(Hook):
    """Writes ``status.json`` from the driver, from a thread, until the block ends.

    A storage that does not answer costs heartbeats and never the run.

    Args:
        name: of the run.
        run_dir: its directory.
        interval_s: seconds between heartbeats.
    """

    def __init__(self, name: str, *, run_dir: str, interval_s: float = HEARTBEAT_S) -> None:
        self._status = RunStatus(name=name, run_dir=run_dir, started_at=time.time(), job_id=submission_id())
        self._path = storage.join(run_dir, STATUS)
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="raydist-status", daemon=True)

    def __enter__(self) -> StatusWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            if isinstance(error, KeyboardInterrupt):
                self.end("interrupted")
            else:
                self.end("failed", message=_sentence(error))
        elif not self._status.has_ended:
            self.end("finished")
        self._ended.set()
        self._thread.join(_JOIN_S)

    def end(self, state: State, *, message: str | None = None) -> None:
        """How the run ended; written when the block ends."""
        self._change(state=state, message=message)

    def end_with(self, outcome: Outcome) -> None:
        """Like :meth:`end`, by what the attempts reached; they do not end before their last save is on storage."""
        self._change(step=outcome.step)
        if self._status.saving_step is not None:
            self._change(checkpoint_step=self._status.saving_step, saving_step=None, saving_since=None)
        self.end("interrupted" if outcome.interrupted else "stopped" if outcome.stopped else "finished")

    def on_start(self, facts: RunFacts) -> None:
        """Workers start, or start again after a failure."""
        self._change(
            state="running",
            step=facts.start_step,
            num_steps=facts.num_steps,
            world_size=facts.world_size,
            attempt=self._status.attempt + 1,
            checkpoint_step=facts.start_step or self._status.checkpoint_step,
            saving_step=None,
            saving_since=None,
        )

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes over what a log line has."""
        shown = {key: metrics[key] for key in ("tokens", "loss", "tokens_per_s", "mfu") if key in metrics}
        self._change(step=step, **{key: value if math.isfinite(value) else None for key, value in shown.items()})

    def on_checkpoint(self, step: int) -> None:
        """A checkpoint is on its way."""
        self._change(saving_step=step, saving_since=time.time())

    def on_stored(self, step: int, upload_s: float) -> None:
        """It has arrived; a newer one may be on its way already."""
        arrived: dict[str, Any] = {"checkpoint_step": step, "upload_s": upload_s, "failed_step": None}
        if self._status.saving_step == step:
            arrived.update(saving_step=None, saving_since=None)
        self._change(**arrived)

    def on_save_failed(self, step: int) -> None:
        """It will not arrive."""
        gone = {"saving_step": None, "saving_since": None} if self._status.saving_step == step else {}
        self._change(failed_step=step, **gone)

    def _change(self, **changes: Any) -> None:
        with self._lock:
            self._status = dataclasses.replace(self._status, **changes)

    def _beat(self) -> None:
        while True:
            is_last = self._ended.is_set()
            try:
                self._change(updated_at=time.time(), **self._links())
                storage.write_json(self._path, dataclasses.asdict(self._status))
            except Exception as error:  # whatever the storage raises; the next heartbeat may arrive
                _log.warning("the run's status was not written: %s", _sentence(error))
            if is_last:
                return
            self._ended.wait(self._interval_s)

    def _links(self) -> dict[str, str]:
        """Where to look for more; both become known only after the start."""
        links: dict[str, str] = {}
        if self._status.dashboard_url is None and (url := _dashboard_url()):
            links["dashboard_url"] = url
        if self._status.mlflow_run_id is None:
            with contextlib.suppress(Exception):  # no record yet, half a record, or a storage in trouble
                record = storage.read_json(storage.join(self._status.run_dir, RUN_RECORD))
                found = {"mlflow_uri": record.get("uri"), "mlflow_run_id": record.get("run_id")}
                links.update({key: value for key, value in found.items() if value})
        return links


def submission_id() -> str | None:
    """The Ray job that this process is the driver of; None outside of a job."""
    try:
        found = json.loads(os.environ.get(_JOB_CONFIG, "{}"))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)


def _dashboard_url() -> str | None:
    ray = sys.modules.get("ray")  # where nobody imported it, there is none, and the import takes its time
    if ray is None or not ray.is_initialized():
        return None
    url = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else None


def _sentence(error: BaseException) -> str:
    what = error.what if isinstance(error, RaydistError) else " ".join(str(error).split())
    return f"{type(error).__name__}: {what[:300]}"

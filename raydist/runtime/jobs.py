"""The jobs API of a Ray cluster, spoken from outside of it, with bounded waits and our errors."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from raydist.core.errors import ClusterError
from raydist.core.log import quiet_libraries

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RUN_KEY = "raydist_run"
RUN_DIR_KEY = "raydist_run_dir"
CONFIG_HASH_KEY = "raydist_config_hash"
NUMBER_KEY = "raydist_number"
STOP_GRACE_KEY = "raydist_stop_grace_s"
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_TIMEOUT_S = (5.0, 60.0)  # to connect, and between two bytes of the answer
_POLL_S = 0.5
_OUTAGE_S = 60.0  # a port-forward or a head may be away for so long without ending a wait
_RAY_STOP_WAIT_S = 3.0  # Ray's own, for jobs that were not submitted by raydist
# Ray lets these win over the address it is given; a job must never go to another cluster than the one that was named.
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """One job, as the cluster knows it.

    Attributes:
        job_id: the submission id.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: Ray's own words about the status.
        run: the run that it trains; None for jobs that raydist did not submit.
        run_dir: of that run, as the nodes name it.
        config_hash: what that run computes.
        number: counts the jobs of one run from 1.
        stop_grace_s: how long it may take to end after a stop.
        start_time_ms: Unix milliseconds; None before the start.
        end_time_ms: Unix milliseconds; None before the end.
    """

    job_id: str
    status: str
    message: str | None
    run: str | None
    run_dir: str | None
    config_hash: str | None
    number: int
    stop_grace_s: float
    start_time_ms: int | None
    end_time_ms: int | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in ENDED


class JobsApi:
    """A connection to one cluster's jobs API.

    Ray's token authentication is on: the token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or Ray's token file, and goes
    nowhere but into the request's header. RAY_AUTH_MODE=disabled is for clusters that have none.

    Args:
        address: ``http://host:port`` of the Ray dashboard.

    Raises:
        ClusterError: nobody answers there, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = self._asked(lambda: _connect(address))

    def jobs(self) -> list[Job]:
        """The jobs that were submitted, oldest first."""
        found = [_job(details) for details in self._asked(self._client.list_jobs) if details.submission_id]
        return sorted(found, key=lambda job: (job.start_time_ms or 0, job.number))

    def job(self, job_id: str) -> Job | None:
        """One job by its submission id; None if the cluster has none of this name."""
        return next((job for job in self.jobs() if job.job_id == job_id), None)

    def jobs_of(self, run: str) -> list[Job]:
        """The jobs of a run, oldest first."""
        return sorted((job for job in self.jobs() if job.run == run), key=lambda job: job.number)

    def find(self, name: str) -> Job:
        """The job of this id, or the newest job of the run of this name.

        Raises:
            ClusterError: there is none; lists those that are there.
        """
        jobs = self.jobs()
        named = [job for job in jobs if job.job_id == name] or [job for job in jobs if job.run == name]
        if not named:
            raise ClusterError(
                "no such job on the cluster",
                where=self.address,
                found=name,
                expected="one of " + ", ".join(job.job_id for job in jobs[-10:]) if jobs else "none was submitted",
            )
        return max(named, key=lambda job: job.number)

    def submit(self, *, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> bool:
        """Starts a job; False if the cluster has one of this id already, whoever was faster."""
        try:
            self._client.submit_job(
                submission_id=job_id, entrypoint=entrypoint, runtime_env=runtime_env, metadata=metadata
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                return False
            raise self._refused(error) from None
        except OSError as error:
            raise self._unreachable(error) from None
        return True

    def stop(self, job_id: str) -> None:
        """Asks Ray to end a job: SIGTERM to its driver now, SIGKILL when the job's own grace is over."""
        self._asked(lambda: self._client.stop_job(job_id))

    def log(self, job_id: str) -> str:
        """Everything that the job printed so far."""
        return self._asked(lambda: self._client.get_job_logs(job_id))

    def stream(self, job_id: str) -> Any:
        """An async iterator over the log from its first character; ends when the job does, or the connection."""
        return self._client.tail_job_logs(job_id)

    def wait(self, job_id: str, *, timeout_s: float) -> Job | None:
        """The job when it has ended; None if it still runs after the time. Lives through short outages.

        Raises:
            ClusterError: nobody answered for a minute, or at the end of the time.
        """
        answered_at = time.monotonic()
        deadline = answered_at + timeout_s
        while True:
            try:
                job, answered_at = self.job(job_id), time.monotonic()
            except ClusterError:
                job = None
                if time.monotonic() >= min(deadline, answered_at + _OUTAGE_S):
                    raise
            if job is not None and job.has_ended:
                return job
            if time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def _asked(self, call: Callable[[], _Result]) -> _Result:
        try:
            return call()
        except OSError as error:  # requests' and Ray's connection errors are OSErrors
            raise self._unreachable(error) from None
        except RuntimeError as error:
            raise self._refused(error) from None

    def _unreachable(self, error: Exception) -> ClusterError:
        return ClusterError(
            "the cluster's jobs API does not answer",
            where=self.address,
            found=_words(error),
            expected="a Ray dashboard",
            fix="check --address or the cluster file, and the port-forward or tunnel if there is one",
        )

    def _refused(self, error: Exception) -> ClusterError:
        text = _words(error)
        if "uthenticat" in text or "nauthorized" in text or "status code 403" in text:
            return ClusterError(
                "the cluster refuses the token",
                where=self.address,
                found=text[:120],
                expected="the token that its nodes were started with",
                fix="set RAY_AUTH_TOKEN_PATH to a file with it (or RAY_AUTH_TOKEN); RAY_AUTH_MODE=disabled if it has none",
            )
        return ClusterError("the cluster's jobs API refuses the request", where=self.address, found=text)


def _connect(address: str) -> JobSubmissionClient:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet_libraries()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:  # they set their own levels when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        """Ray's own, which would wait for ever, and has an error of another kind for a wrong token."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            try:
                return super()._do_request(method, endpoint, timeout=_TIMEOUT_S, **options)
            except AuthenticationError as error:
                raise RuntimeError(str(error)) from None

    with _without(_OVERRIDES):
        return Client(address)


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    number, grace = metadata.get(NUMBER_KEY, "1"), metadata.get(STOP_GRACE_KEY, "")
    return Job(
        job_id=details.submission_id,
        status=str(details.status),
        message=details.message,
        run=metadata.get(RUN_KEY),
        run_dir=metadata.get(RUN_DIR_KEY),
        config_hash=metadata.get(CONFIG_HASH_KEY),
        number=int(number) if number.isdigit() else 1,
        stop_grace_s=float(grace) if grace.replace(".", "", 1).isdigit() else _RAY_STOP_WAIT_S,
        start_time_ms=details.start_time,
        end_time_ms=details.end_time,
    )


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

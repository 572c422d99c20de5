"""``raydist status``: how runs are doing, from their directories, and from the cluster where it is there."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from typing import TYPE_CHECKING, Any

from raydist.cli.jobs import add_cluster_arguments, cluster_of
from raydist.cli.output import console, next_commands, say, table

if TYPE_CHECKING:
    from raydist.runtime.jobs import Job
    from raydist.runtime.status import RunStatus

_WATCH_EVERY_S = 5.0
_NUM_LAST_WORDS = 6


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "name", nargs="?", metavar="RUN|JOB", help="a run's name or directory, or a job id; default: all that are there"
    )
    parser.add_argument("--output-dir", default="runs", help="where runs are looked up (default: %(default)s)")
    parser.add_argument("--watch", action="store_true", help="again every few seconds, until the run ends")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    if args.name is None:
        return _all(args)
    while True:
        status, job = _look(args)
        now = time.time()
        if args.watch and console().is_terminal:
            console().clear()
        _show(status, job, now=now)
        if not args.watch or _is_over(status, job, now):
            break
        time.sleep(_WATCH_EVERY_S)
    _say_next(args, status, job, now=now)
    return {**_summary(status, now), "job": dataclasses.asdict(job) if job else None}


def _look(args: argparse.Namespace) -> tuple[RunStatus | None, Job | None]:
    """The run's own status and its job; a cluster that was not named is asked only if no run directory is found.

    A job knows its run's directory; another one of the same name on this machine says nothing about it.

    Raises:
        ClusterError: no run directory has the name, and the cluster does not answer or has no such job.
    """
    from raydist.core import storage
    from raydist.runtime.status import read_status

    status = read_status(args.name) or read_status(storage.join(args.output_dir, args.name))
    named_cluster = args.cluster is not None or args.address is not None
    if status is not None and not named_cluster:
        return status, None
    job = _job(args, required=status is None)
    if job is not None and job.run_dir is not None and (status is None or status.run_dir != job.run_dir):
        status = read_status(job.run_dir)
    return status, job


def _job(args: argparse.Namespace, *, required: bool) -> Job | None:
    from raydist.core.errors import ClusterError
    from raydist.runtime.jobs import JobsApi

    try:
        return JobsApi(cluster_of(args).address).find(args.name)
    except ClusterError as error:
        if required:
            raise ClusterError(
                f"no run and no job is called {args.name}",
                where=f"--output-dir {args.output_dir}",
                found=f"no status there; {error.where}: {error.what}",
                expected=error.expected,
                fix="give the run's directory, the right --output-dir, or --cluster",
            ) from None
        say(f"({error.where}: {error.what}; this is what the run directory says)")
        return None


def _show(status: RunStatus | None, job: Job | None, *, now: float) -> None:
    rows: list[tuple[str, Any]] = []
    if job is not None:
        rows.append(("job", f"{job.job_id}  {job.status.lower()}"))
        if job.status == "FAILED" and job.message:
            rows += [("", line[:200]) for line in job.message.strip().splitlines()[-_NUM_LAST_WORDS:]]
    if status is not None:
        if job is not None and status.job_id != job.job_id:
            rows.append(("written by", status.job_id or "a driver that was no job; this one has not begun to write"))
        rows += _rows(status, now)
    elif job is not None:
        where = job.run_dir or "its run directory"
        rows.append(("run directory", f"{where}: no status there yet, or not readable from this machine"))
    for label, value in rows:
        if value is not None:
            say(f"{label:<21}{value:.4g}" if isinstance(value, float) else f"{label:<21}{value}")


def _rows(status: RunStatus, now: float) -> list[tuple[str, Any]]:
    from raydist.core.units import format_count

    return [
        ("run", status.name),
        ("state", _state(status, now)),
        ("step", f"{status.step} of {status.num_steps or '?'}"),
        ("tokens", None if status.tokens is None else format_count(status.tokens)),
        ("loss", status.loss),
        ("tokens/s", None if status.tokens_per_s is None else format_count(status.tokens_per_s)),
        ("MFU", "peak of this device unknown" if status.mfu is None else f"{100 * status.mfu:.1f} %"),
        ("workers", f"{status.world_size}, attempt {status.attempt}"),
        ("complete checkpoint", _checkpoint(status, now)),
        ("heartbeat", _age(status, now)),
        ("run directory", status.run_dir),
        ("Ray dashboard", status.dashboard_url),
        ("MLflow run", f"{status.mlflow_run_id} in {status.mlflow_uri}" if status.mlflow_run_id else None),
    ]


def _state(status: RunStatus, now: float) -> str:
    if status.is_stale(now):
        return f"{status.state}, but its driver is silent: dead, or cut off from the storage"
    return f"{status.state}: {status.message}" if status.message else status.state


def _checkpoint(status: RunStatus, now: float) -> str:
    from raydist.core.units import format_duration

    text = "none yet" if status.checkpoint_step is None else f"step {status.checkpoint_step}"
    if status.upload_s is not None:
        text += f", stored in {format_duration(status.upload_s)}"
    if status.saving_step is not None and status.saving_since is not None:
        text += f"; step {status.saving_step} on its way for {format_duration(max(0.0, now - status.saving_since))}"
    if status.failed_step is not None:
        text += f"; step {status.failed_step} could not be stored"
    return text


def _age(status: RunStatus, now: float) -> str:
    from raydist.core.units import format_duration

    return f"{format_duration(status.heartbeat_age_s(now))} ago"


def _is_over(status: RunStatus | None, job: Job | None, now: float) -> bool:
    if job is not None:
        return job.has_ended
    return status is not None and (status.has_ended or status.is_stale(now))


def _say_next(args: argparse.Namespace, status: RunStatus | None, job: Job | None, *, now: float) -> None:
    if status is None:
        return
    if status.state == "finished":
        next_commands([("sample it", f"raydist sample {shlex.quote(status.run_dir)} --prompt 'def '")])
    elif status.has_ended or status.is_stale(now) or (job is not None and job.has_ended):
        verb = "submit" if status.job_id else "train"
        cluster = f" --cluster {shlex.quote(args.cluster or 'FILE')}" if status.job_id else ""
        next_commands([("go on", f"raydist {verb} RECIPE name={shlex.quote(status.name)}{cluster} --resume")])


def _all(args: argparse.Namespace) -> dict[str, Any]:
    """Every run of the output directory, and every job of a cluster that was named."""
    from raydist.core import storage
    from raydist.runtime.jobs import JobsApi
    from raydist.runtime.status import read_status

    found = [(read_status(storage.join(args.output_dir, name)), None) for name in storage.list_names(args.output_dir)]
    runs: list[tuple[RunStatus | None, Job | None]] = [pair for pair in found if pair[0] is not None]
    if args.cluster is not None or args.address is not None:
        jobs = [job for job in JobsApi(cluster_of(args).address).jobs() if job.run is not None]
        runs = [(_status_of(job), job) for job in jobs]
    now = time.time()
    if runs:
        columns = ["run", "job", "state", "step", "loss", "checkpoint", "heartbeat"]
        table(columns, [_line(status, job, now) for status, job in runs])
    else:
        say(f"no run has a status in {args.output_dir}; of a cluster: --cluster FILE")
    return {
        "runs": [{**_summary(status, now), "job": dataclasses.asdict(job) if job else None} for status, job in runs]
    }


def _status_of(job: Job) -> RunStatus | None:
    """Of the run that the job trains, where this machine can read it and the job is the one that wrote it last."""
    from raydist.runtime.status import read_status

    status = read_status(job.run_dir) if job.run_dir else None
    return status if status is not None and status.job_id == job.job_id else None


def _line(status: RunStatus | None, job: Job | None, now: float) -> list[Any]:
    if status is None:
        assert job is not None
        return [job.run, job.job_id, job.status.lower(), None, None, None, None]
    state = "silent" if status.is_stale(now) else status.state
    step = f"{status.step}/{status.num_steps or '?'}"
    name = job.job_id if job else status.job_id
    return [status.name, name, state, step, status.loss, status.checkpoint_step, _age(status, now)]


def _summary(status: RunStatus | None, now: float) -> dict[str, Any]:
    if status is None:
        return {"status": None}
    return {
        "status": dataclasses.asdict(status),
        "heartbeat_age_s": status.heartbeat_age_s(now),
        "is_stale": status.is_stale(now),
    }

"""``raydist stop``: a last save, then the end; the run can go on later."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from raydist.cli.jobs import add_cluster_arguments, add_job_argument, cluster_of, where_words
from raydist.cli.output import next_commands, say

_ENDING_S = 60.0  # for Ray to end what is left and to say so


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_job_argument(parser)
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait until the job has ended")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    from raydist.core.errors import ClusterError
    from raydist.runtime.jobs import JobsApi

    api = JobsApi(cluster_of(args).address)
    job = api.find(args.job)
    if job.has_ended:
        say(f"{job.job_id} has ended already: {job.status.lower()}")
        return {"job_id": job.job_id, "status": job.status, "run": job.run, "run_dir": job.run_dir}
    api.stop(job.job_id)
    say(f"{job.job_id}: asked to save and stop; Ray ends it by force after {job.stop_grace_s:g} s")
    ended = None if args.no_wait else api.wait(job.job_id, timeout_s=job.stop_grace_s + _ENDING_S)
    if ended is None and not args.no_wait:
        raise ClusterError(
            "the job did not end in its time",
            where=job.job_id,
            expected=f"an end within {job.stop_grace_s + _ENDING_S:g} s",
            fix=shlex.join(["raydist", "logs", job.job_id, *where_words(args)]),
        )
    status = "STOPPING" if ended is None else ended.status
    say(f"{job.job_id}: {status.lower()}")
    if job.run is not None:
        again = ["raydist", "submit", "RECIPE", f"name={job.run}", *where_words(args), "--resume"]
        next_commands([("go on later", shlex.join(again))])
    return {"job_id": job.job_id, "status": status, "run": job.run, "run_dir": job.run_dir}

"""``raydist logs``: what a job prints, from its first line."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from raydist.cli.jobs import add_cluster_arguments, add_job_argument, cluster_of, follow_job, where_words, write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_job_argument(parser)
    parser.add_argument("--follow", action="store_true", help="go on until the job ends, over lost connections")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    from raydist.runtime.jobs import JobsApi

    api = JobsApi(cluster_of(args).address)
    job = api.find(args.job)
    if args.follow:
        again = shlex.join(["raydist", "logs", args.job, *where_words(args), "--follow"])
        return {"job_id": job.job_id, **follow_job(api, job.job_id, say_how=again)}
    log = api.log(job.job_id)
    write_text(log)
    return {"job_id": job.job_id, "status": job.status, "num_chars": len(log)}

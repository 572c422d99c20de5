"""What the verbs about jobs share: which cluster, and following a log."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from raydist.cli.output import EXIT_FAILED, EXIT_UNFINISHED, console, say

if TYPE_CHECKING:
    from raydist.runtime.jobs import JobsApi


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """``--cluster`` and ``--address``."""
    parser.add_argument("--cluster", metavar="FILE", help="a cluster file, e.g. clusters/local.yaml")
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the jobs API, instead of the file's; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265",
    )


def add_job_argument(parser: argparse.ArgumentParser) -> None:
    """The job that a verb is about."""
    parser.add_argument("job", metavar="JOB", help="job id, or the name of a run for its newest job")


def cluster_of(args: argparse.Namespace) -> Any:
    """The cluster that the arguments mean."""
    from raydist.config.cluster import cluster_at, load_cluster
    from raydist.runtime.jobs import DEFAULT_ADDRESS

    if args.cluster is not None:
        return load_cluster(args.cluster, address=args.address)
    return cluster_at(args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)


def where_words(args: argparse.Namespace) -> list[str]:
    """The arguments that lead to the same cluster again."""
    words = ["--cluster", args.cluster] if args.cluster else []
    return [*words, "--address", args.address] if args.address else words


def follow_job(api: JobsApi, job_id: str, *, say_how: str) -> dict[str, Any]:
    """Prints a job's log until it ends; Ctrl-C leaves the job alone.

    Returns:
        The job's status; with an exit code where it did not succeed.
    """
    from raydist.runtime.job_logs import follow

    def on_reconnect(reason: str) -> None:
        print(f"(connection lost, going on where it broke: {reason})", file=sys.stderr)

    try:
        follow(api, job_id, write=write_text, on_reconnect=on_reconnect)
    except KeyboardInterrupt:
        say(f"\nthe job goes on without you; to look again: {say_how}")
        raise
    job = api.find(job_id)
    say(f"\n{job_id}: {job.status.lower()}")
    exit_codes = {"SUCCEEDED": {}, "STOPPED": {"exit_code": EXIT_UNFINISHED}}
    return {"status": job.status, **exit_codes.get(job.status, {"exit_code": EXIT_FAILED})}


def write_text(text: str) -> None:
    """Text that is not ours, exactly as it came, to where people read."""
    stream = console().file
    stream.write(text)
    stream.flush()

"""``raydist artifacts``: what a run left behind, hash-verified; needs neither Ray nor a GPU."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from raydist.cli.output import say, table
from raydist.cli.runs import add_server_arguments, find_run_of

if TYPE_CHECKING:
    from raydist.tracking.find import TrackedRun


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = verbs.add_parser("list", help="names, sizes and hashes")
    pull = verbs.add_parser("pull", help="bring files into a folder and check their hashes")
    for verb in (listing, pull):
        verb.add_argument("run", metavar="RUN", help="name, MLflow id or run directory")
        add_server_arguments(verb)
    pull.add_argument("--to", required=True, metavar="DIR", help="target folder; files already there are kept")
    pull.add_argument("--threads", type=int, default=8, help="most transfers at a time (default: %(default)s)")
    pull.add_argument(
        "--name",
        action="append",
        help="a file, folder or glob of the run; repeatable (default: all but checkpoints and registered copies)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    from raydist.tracking.artifacts import list_artifacts

    found = find_run_of(args)
    return _pull(found, args) if args.action == "pull" else _list(found.run_id, list_artifacts(found))


def _pull(found: TrackedRun, args: argparse.Namespace) -> dict[str, Any]:
    import os

    from raydist.cli.output import console
    from raydist.cli.transfer import TransferDisplay
    from raydist.core.errors import ConfigError
    from raydist.core.units import format_bytes, format_duration
    from raydist.tracking.pull import pull

    if args.threads < 1:
        raise ConfigError("a pull needs a thread", where="--threads", found=args.threads, expected="1 or more")
    started_s = time.monotonic()
    with TransferDisplay(console()) as display:
        paths = pull(found, to=args.to, names=args.name, num_threads=args.threads, progress=display.update)
    took_s = time.monotonic() - started_s
    num_bytes, num_fetched_bytes = sum(os.path.getsize(path) for path in paths), display.num_fetched_bytes
    say(
        f"{len(paths)} files of {found.name} in {args.to}, {format_bytes(num_bytes)}, hashes checked; "
        f"{format_bytes(num_fetched_bytes)} fetched in {format_duration(took_s)}, "
        f"{format_bytes(int(num_fetched_bytes / took_s))}/s"
    )
    return {
        "run_id": found.run_id,
        "files": paths,
        "num_bytes": num_bytes,
        "num_fetched_bytes": num_fetched_bytes,
        "seconds": round(took_s, 3),
    }


def _list(run_id: str, files: list[Any]) -> dict[str, Any]:
    from raydist.core.units import format_bytes

    rows = [(file.name, format_bytes(file.size), file.sha256[:12], file.uri or "MLflow") for file in files]
    table(["artifact", "size", "sha256", "kept in"], rows)
    entries = [{"name": f.name, "size": f.size, "sha256": f.sha256, "uri": f.uri} for f in files]
    return {"run_id": run_id, "artifacts": entries}

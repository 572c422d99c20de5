"""``raydist artifacts``: what a run left behind, hash-verified; needs neither Ray nor a GPU."""

from __future__ import annotations

import argparse
from typing import Any

from raydist.cli.output import say, table
from raydist.cli.runs import add_server_arguments, find_run_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = verbs.add_parser("list", help="names, sizes and hashes")
    pull = verbs.add_parser("pull", help="bring files into a folder and check their hashes")
    for verb in (listing, pull):
        verb.add_argument("run", metavar="RUN", help="name, MLflow id or run directory")
        add_server_arguments(verb)
    pull.add_argument("--to", required=True, metavar="DIR", help="target folder; files already there are kept")
    pull.add_argument("--name", action="append", help="a file, folder or glob of the run; repeatable (default: all)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    from raydist.tracking import artifacts

    found = find_run_of(args)
    if args.action == "pull":
        paths = artifacts.pull(found, to=args.to, names=args.name)
        say(f"{len(paths)} files of {found.name} in {args.to}, hashes checked")
        return {"run_id": found.run_id, "files": paths}
    return _list(found.run_id, artifacts.list_artifacts(found))


def _list(run_id: str, files: list[Any]) -> dict[str, Any]:
    from raydist.core.units import format_bytes

    rows = [(file.name, format_bytes(file.size), file.sha256[:12], file.uri or "MLflow") for file in files]
    table(["artifact", "size", "sha256", "kept in"], rows)
    entries = [{"name": f.name, "size": f.size, "sha256": f.sha256, "uri": f.uri} for f in files]
    return {"run_id": run_id, "artifacts": entries}

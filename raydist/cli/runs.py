"""``raydist runs``: what was trained, and how it went."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from raydist.cli.output import say, table

if TYPE_CHECKING:
    from raydist.tracking.find import TrackedRun

_PARAM_CHARS = 100
_STATES = ("running", "finished", "failed", "killed")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = verbs.add_parser("list", help="the runs of an experiment, newest first")
    listing.add_argument("--state", choices=_STATES, help="only runs in this state")
    listing.add_argument("--limit", type=int, default=100, help="most runs to list (default: %(default)s)")
    add_server_arguments(listing)
    show = verbs.add_parser("show", help="parameters, tags, last metrics and artifacts of a run")
    show.add_argument("run", metavar="RUN", help="name, MLflow id or run directory")
    add_server_arguments(show)
    curves = verbs.add_parser("curves", help="a run's metrics as a table, without what a restart rolled back")
    curves.add_argument("run", metavar="RUN", help="name, MLflow id or run directory")
    curves.add_argument("--to", required=True, metavar="FILE", help="a CSV file: metric,step,value,attempt")
    curves.add_argument("--metric", action="append", help="only this one; repeatable (default: all)")
    add_server_arguments(curves)
    sync = verbs.add_parser("sync", help="send to MLflow what an outage held back")
    sync.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which MLflow to ask."""
    parser.add_argument(
        "--mlflow-uri", help="server or database; default: MLFLOW_TRACKING_URI, else the output directory's"
    )
    parser.add_argument("--output-dir", default="runs", help="where runs were written (default: %(default)s)")
    parser.add_argument("--experiment", help="only runs of this experiment")


def server_of(args: argparse.Namespace) -> str | None:
    """The MLflow address that the arguments mean."""
    from raydist.tracking.mlflow_runs import resolve_uri

    target = resolve_uri(args.mlflow_uri, output_dir=args.output_dir)
    return target.uri if target else None


def find_run_of(args: argparse.Namespace) -> TrackedRun:
    """The run that the argument RUN means; an address given by hand is asked before any run directory."""
    from raydist.core import storage
    from raydist.tracking.find import find_run

    output_dir = None if args.mlflow_uri else args.output_dir
    named = args.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = (
        server_of(args) if named or not storage.is_remote(args.output_dir) else None
    )  # then the run's own record knows
    return find_run(args.run, uri=uri, experiment=args.experiment, output_dir=output_dir)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    if args.action == "sync":
        return _sync(args.run_dir)
    if args.action == "curves":
        return _curves(args)
    return _list(args) if args.action == "list" else _show(args)


def _curves(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.core.errors import TrackingError
    from raydist.tracking.points import points_of_run, write_csv

    found = find_run_of(args)
    points = points_of_run(found, metrics=args.metric)
    metrics = sorted({point.metric for point in points})
    missing = sorted(set(args.metric or []) - set(metrics))
    if missing:
        known = ", ".join(sorted(found.metrics))
        raise TrackingError("no such metric", where=f"run {found.name}", found=", ".join(missing), expected=known)
    write_csv(points, path=args.to)
    attempts = max((point.attempt for point in points), default=0)
    say(f"{found.name}: {len(points)} points of {len(metrics)} metrics, {attempts} attempts: {args.to}")
    return {
        "run_id": found.run_id,
        "file": args.to,
        "num_points": len(points),
        "metrics": metrics,
        "num_attempts": attempts,
    }


def _sync(run_dir: str) -> dict[str, Any]:
    from raydist.tracking.find import find_run
    from raydist.tracking.mlflow_runs import sync_run

    run_id = sync_run(run_dir)
    found = find_run(run_dir)
    say(f"{found.name}: MLflow has all of it ({found.status.lower()}, step {found.last_step}), run {run_id}")
    return {"run_id": run_id, "uri": found.uri, "status": found.status, "step": found.last_step}


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.core.errors import ConfigError, TrackingError
    from raydist.tracking.find import MAX_RUNS, list_runs

    if not 1 <= args.limit <= MAX_RUNS:
        raise ConfigError("not a number of runs", where="--limit", found=args.limit, expected=f"1 to {MAX_RUNS}")
    uri = server_of(args)
    if uri is None:
        raise TrackingError("MLflow is turned off", where="--mlflow-uri", found="none")
    status = args.state.upper() if args.state else None
    runs = list_runs(uri, experiment=args.experiment, status=status, limit=args.limit)
    if runs:
        columns = ["name", "status", "step", "tokens", "loss", "started", "duration"]
        table(columns, [_row(found) for found in runs], title=uri)
    else:
        say(f"no {args.state or ''} runs in {uri}".replace("  ", " "))
    return {"uri": uri, "runs": [_summary(found) for found in runs]}


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.core.units import format_bytes
    from raydist.tracking.artifacts import list_artifacts

    found = find_run_of(args)
    files = list_artifacts(found)
    say(f"{found.name}  {found.status.lower()}  started {_started(found)}  took {_duration(found)}")
    say(f"run {found.run_id} of experiment {found.experiment} at {found.uri}")
    table(["metric", "last value"], sorted(found.metrics.items()))
    table(["parameter", "value"], [(key, _cut(value)) for key, value in sorted(found.params.items())])
    table(["tag", "value"], [(key, _cut(value)) for key, value in sorted(_own_tags(found).items())])
    rows = [(file.name, format_bytes(file.size), file.uri or "MLflow") for file in files]
    table(["artifact", "size", "kept in"], rows)
    return {
        **_summary(found),
        "uri": found.uri,
        "metrics": {key: _json_number(value) for key, value in found.metrics.items()},
        "params": found.params,
        "tags": found.tags,
        "artifacts": [{"name": f.name, "size": f.size, "sha256": f.sha256, "uri": f.uri} for f in files],
    }


def _row(found: TrackedRun) -> list[Any]:
    from raydist.core.units import format_count

    tokens = found.metrics.get("tokens")
    return [
        found.name,
        found.status.lower(),
        found.last_step,
        None if tokens is None else format_count(float(tokens)),
        found.metrics.get("loss"),
        _started(found),
        _duration(found),
    ]


def _summary(found: TrackedRun) -> dict[str, Any]:
    return {
        "run_id": found.run_id,
        "name": found.name,
        "experiment": found.experiment,
        "status": found.status,
        "step": found.last_step,
        "tokens": _json_number(found.metrics.get("tokens")),
        "loss": _json_number(found.metrics.get("loss")),
        "start_time_ms": found.start_time_ms,
        "end_time_ms": found.end_time_ms,
    }


def _json_number(value: float | None) -> float | str | None:
    """JSON has no infinities."""
    import math

    return value if value is None or math.isfinite(value) else str(value)


def _started(found: TrackedRun) -> str | None:
    from datetime import datetime

    if found.start_time_ms is None:
        return None
    return datetime.fromtimestamp(found.start_time_ms / 1000).strftime("%Y-%m-%d %H:%M")


def _duration(found: TrackedRun) -> str | None:
    import time

    from raydist.core.units import format_duration

    if found.start_time_ms is None:
        return None
    end_time_ms = 1000 * time.time() if found.end_time_ms is None else found.end_time_ms
    return format_duration((end_time_ms - found.start_time_ms) / 1000)


def _own_tags(found: TrackedRun) -> dict[str, str]:
    return {key: value for key, value in found.tags.items() if not key.startswith("mlflow.")}


def _cut(text: str) -> str:
    return text if len(text) <= _PARAM_CHARS else text[: _PARAM_CHARS - 3] + "..."

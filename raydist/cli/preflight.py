"""``raydist preflight``: is the cluster ready? One table and a verdict, before anything expensive is taken."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from raydist.cli.output import EXIT_FAILED, say, table


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("recipe", nargs="?", help="also check its datasets, storage, MLflow and size")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for submit")
    parser.add_argument("--cluster", metavar="FILE", help="a cluster file, e.g. clusters/local.yaml")
    parser.add_argument(
        "--address",
        help="http://host:port of a jobs API, from outside; auto or host:port of a Ray cluster, from one of its nodes",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    inside = args.address is not None and not args.address.startswith("http")
    answers = _from_inside(args) if inside else _from_outside(args)
    _say_table(answers["checks"])
    return {**answers, **({} if answers["ready"] else {"exit_code": EXIT_FAILED})}


def _from_inside(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.config.cluster import is_manifest, load_cluster, recipe_overrides
    from raydist.config.load import load_recipe
    from raydist.runtime.cluster import connected
    from raydist.runtime.preflight import Expectations, preflight
    from raydist.tracking.mlflow_runs import resolve_uri

    cluster = load_cluster(args.cluster) if args.cluster and not is_manifest(args.cluster) else None
    words = recipe_overrides(cluster, args.overrides) if cluster else args.overrides
    recipe = load_recipe(args.recipe, words) if args.recipe else None
    output_dir, mlflow_uri = (cluster.output_dir, cluster.mlflow_uri) if cluster else (None, None)
    if recipe is not None:
        output_dir = recipe.config.output_dir
        target = resolve_uri(recipe.config.tracking.mlflow_uri, output_dir=output_dir)
        mlflow_uri = target.uri if target else None
    expected = Expectations(
        env_names=tuple(cluster.env_names) if cluster else (),
        output_dir=output_dir,
        mlflow_uri=mlflow_uri,
        recipe=recipe,
        **({"limits": cluster.preflight} if cluster else {}),
    )
    with connected(address=args.address):
        checks = preflight(expected)
    return {
        "ready": all(check.passed for check in checks),
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
    }


def _from_outside(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.cli.jobs import cluster_of
    from raydist.config.cluster import recipe_overrides
    from raydist.config.load import load_recipe
    from raydist.runtime.jobs import JobsApi
    from raydist.runtime.preflight_job import preflight_by_job

    cluster = cluster_of(args)
    recipe = load_recipe(args.recipe, recipe_overrides(cluster, args.overrides)) if args.recipe else None
    return preflight_by_job(cluster, api=JobsApi(cluster.address), recipe=recipe)


def _say_table(checks: list[dict[str, Any]]) -> None:
    rows = [
        (
            check["name"],
            "ok" if check["passed"] else "PROBLEM",
            check["detail"] if check["passed"] else check["problem"],
        )
        for check in checks
    ]
    table(["check", "", ""], rows)
    failed = [check["name"] for check in checks if not check["passed"]]
    say(f"not ready: {', '.join(failed)}" if failed else "ready")

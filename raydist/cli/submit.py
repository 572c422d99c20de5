"""``raydist submit``: a recipe to a cluster as one Ray job, or the manifest for Kubernetes."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from raydist.cli.jobs import add_cluster_arguments, cluster_of, follow_job, where_words, write_text
from raydist.cli.output import next_commands, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("recipe", help="a YAML file, e.g. jobs/recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. scaling.num_workers=16")
    add_cluster_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run of this name after its job has ended")
    parser.add_argument("--follow", action="store_true", help="print the job's log until it ends")
    parser.add_argument(
        "--render",
        action="store_true",
        help="print the manifest of --cluster for this recipe; sends nothing",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    return _render(args) if args.render else _submit(args)


def _render(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.config.load import load_recipe
    from raydist.core.errors import ConfigError
    from raydist.runtime.kuberay import render

    if args.cluster is None:
        raise ConfigError(
            "there is no manifest to render",
            where="--cluster",
            expected="one of KubeRay's or ray up's, e.g. clusters/rayjob_8xh100.yaml",
        )
    manifest = render(args.cluster, load_recipe(args.recipe, args.overrides), overrides=args.overrides)
    write_text(manifest)
    return {"manifest": manifest}


def _submit(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.config.cluster import recipe_overrides
    from raydist.config.load import load_recipe
    from raydist.runtime.jobs import JobsApi
    from raydist.runtime.submit import submit_run

    cluster = cluster_of(args)
    recipe = load_recipe(args.recipe, recipe_overrides(cluster, args.overrides))
    api = JobsApi(cluster.address)
    submission = submit_run(recipe, cluster=cluster, api=api, resume=args.resume)
    _say_submission(submission, address=cluster.address, resume=args.resume)
    where = shlex.join([submission.job_id, *where_words(args)])
    result = {
        "job_id": submission.job_id,
        "attached": submission.attached,
        "address": cluster.address,
        "run": recipe.config.name,
        "run_dir": submission.run_dir,
        "package_bytes": submission.size_bytes,
    }
    if args.follow:
        return {**result, **follow_job(api, submission.job_id, say_how=f"raydist logs {where} --follow")}
    next_commands(
        [
            ("watch it", f"raydist status {where} --watch"),
            ("its output", f"raydist logs {where} --follow"),
            ("stop it, to go on later", f"raydist stop {where}"),
        ]
    )
    return result


def _say_submission(submission: Any, *, address: str, resume: bool) -> None:
    from raydist.core.units import format_bytes

    if submission.attached:
        say(f"job            {submission.job_id} runs already on {address}; nothing was sent")
        if resume:
            say("               if it is being stopped, submit again once it has ended")
    else:
        sent = f"{submission.num_files} file{'s' if submission.num_files > 1 else ''}"
        say(f"job            {submission.job_id} on {address}")
        say(f"sent           {sent}, {format_bytes(submission.size_bytes)}")
    say(f"run directory  {submission.run_dir}")

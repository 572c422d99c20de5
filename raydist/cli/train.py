"""``raydist train``: a recipe to a tracked, exported model."""

from __future__ import annotations

import argparse
import functools
import os
from typing import Any

from raydist.cli.output import EXIT_FAILED, EXIT_UNFINISHED, console, next_commands, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("recipe", help="a YAML file, e.g. jobs/recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.num_steps=500")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run of this name")
    again.add_argument(
        "--resume-or-start", action="store_true", help="go on with the run of this name if there is one, else start it"
    )
    parser.add_argument("--address", help="a running Ray cluster; without it Ray is started inside this process")
    parser.add_argument(
        "--no-ray", action="store_true", help="train in this process; under torchrun, in all of torchrun's processes"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    from raydist.cli.progress import ProgressDisplay
    from raydist.config.load import load_recipe

    recipe = load_recipe(args.recipe, [*args.overrides, *_launcher_overrides(no_ray=args.no_ray)])
    resume = args.resume or (args.resume_or_start and _exists(recipe))
    with ProgressDisplay(console()) as display:
        if args.no_ray:
            result = _in_this_process(recipe, resume=resume, display=display)
        else:
            result = _on_ray(recipe, resume=resume, address=args.address, display=display)
    if result.get("interrupted"):
        _say_how_to_go_on(args, recipe, result)
    elif result:
        _say_where(result)
    return result


def _exists(recipe: Any) -> bool:
    from raydist.core import storage
    from raydist.training.run_dir import RECORD, run_dir_of

    return storage.exists(storage.join(run_dir_of(recipe), RECORD))


def _on_ray(recipe: Any, *, resume: bool, address: str | None, display: Any) -> dict[str, Any]:
    from raydist.runtime.status import StatusWriter
    from raydist.runtime.trainer import train_on_ray
    from raydist.training.driver import conduct

    def attempts(recipe: Any, run_dir: str) -> Any:
        with StatusWriter(recipe.config.name, run_dir=run_dir) as status:
            outcome = train_on_ray(recipe, run_dir=run_dir, address=address, hooks=[display, status])
            status.end_with(outcome)
        return outcome

    return _summary(recipe, *conduct(recipe, resume=resume, attempts=attempts))


def _in_this_process(recipe: Any, *, resume: bool, display: Any) -> dict[str, Any]:
    """Rank 0 conducts; the other processes of torchrun only take part in the attempt."""
    from raydist.core.dist import broadcast_json, process_group
    from raydist.runtime.status import StatusWriter
    from raydist.training.driver import conduct
    from raydist.training.lease import holder_of, is_held
    from raydist.training.run_dir import run_dir_of
    from raydist.training.session import run_attempt

    with process_group(timeout_s=recipe.config.scaling.collective_timeout_s) as workers:
        if not workers.is_first:
            if not broadcast_json(None):
                raise SystemExit(EXIT_FAILED)  # rank 0 says which
            run_dir = run_dir_of(recipe)
            run_attempt(recipe, run_dir=run_dir, is_ours=functools.partial(is_held, run_dir, holder_of(run_dir)))
            return {}

        is_prepared = False

        def attempts(recipe: Any, run_dir: str) -> Any:
            nonlocal is_prepared
            is_prepared = broadcast_json(True)
            with StatusWriter(recipe.config.name, run_dir=run_dir) as status:
                is_ours = functools.partial(is_held, run_dir, holder_of(run_dir))
                outcome = run_attempt(recipe, run_dir=run_dir, hooks=[display, status], is_ours=is_ours)
                status.end_with(outcome)
            return outcome

        try:
            return _summary(recipe, *conduct(recipe, resume=resume, attempts=attempts))
        finally:
            if not is_prepared:
                broadcast_json(False)


def _launcher_overrides(*, no_ray: bool) -> list[str]:
    """Without Ray the launcher decides how many workers there are, not the recipe."""
    return [f"scaling.num_workers={os.environ.get('WORLD_SIZE', '1')}", "scaling.min_workers=null"] if no_ray else []


def _summary(recipe: Any, run_dir: str, handle: Any, outcome: Any) -> dict[str, Any]:
    return {
        "run": recipe.config.name,
        "run_dir": run_dir,
        "mlflow_uri": handle.uri,
        "mlflow_run_id": handle.run_id,
        "step": outcome.step,
        "metrics": outcome.metrics,
        "interrupted": outcome.interrupted,
        **({"exit_code": EXIT_UNFINISHED} if outcome.interrupted else {}),
    }


def _say_how_to_go_on(args: argparse.Namespace, recipe: Any, result: dict[str, Any]) -> None:
    import shlex

    words = [args.recipe, *args.overrides, *(["--no-ray"] if args.no_ray else [])]
    if args.address:
        words += ["--address", args.address]
    say(f"\ninterrupted: {recipe.config.name} is saved at step {result['step']} of {recipe.config.training.num_steps}")
    next_commands([("go on", f"raydist train {shlex.join(words)} --resume")])


def _say_where(result: dict[str, Any]) -> None:
    say(f"\nrun directory  {result['run_dir']}")
    say(f"model          {result['run_dir']}/export")
    say(f"loss curves    {result['run_dir']}/pictures/curves.png")
    if result["mlflow_run_id"]:
        say(f"MLflow run     {result['mlflow_run_id']} in {result['mlflow_uri']}")
    next_commands(
        [
            ("sample it", f"raydist sample {result['run_dir']} --prompt 'def ' --compare"),
            ("pull it", f"raydist artifacts pull {result['run']} --to pulled"),
            ("see all runs", "raydist runs list"),
        ]
    )

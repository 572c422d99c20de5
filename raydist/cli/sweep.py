"""``raydist sweep``: many trials of a recipe, compared fairly, to a ranking, pictures and a model."""

from __future__ import annotations

import argparse
from typing import Any

from raydist.cli.output import EXIT_FAILED, EXIT_UNFINISHED, console, next_commands, say, table
from raydist.core.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("sweep", help="a YAML file, e.g. sweeps/learning_rate.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value|+overlay",
        help="keys of the sweep (search.num_trials=8) or of the recipe (data.seq_len=128); +debug takes the file's overlay",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the sweep of this name")
    parser.add_argument("--address", help="a running Ray cluster; without it Ray is started inside this process")
    parser.add_argument("--register", metavar="MODEL", help="register the best trial's model in MLflow under this name")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    from raydist.cli.sweep_table import SweepDisplay
    from raydist.config.sweep import load_sweep
    from raydist.evaluation.sweep_records import Goal
    from raydist.runtime.sweep import run_sweep

    overlay, words = _overlay(args.overrides)
    sweep = load_sweep(args.sweep, words, overlay=overlay)
    goals = [Goal(metric.name, metric.mode) for metric in sweep.config.metric]
    model_dir = _model_dir(sweep)
    display = SweepDisplay(console(), name=sweep.name, goals=goals)
    try:
        with display:
            outcome = run_sweep(
                sweep,
                resume=args.resume,
                view=display,
                model_dir=model_dir,
                address=args.address,
                register=args.register,
            )
    except KeyboardInterrupt:
        if display.has_begun:
            say(f"\ninterrupted; to go on: {_command(args)} --resume")
        raise
    _say_ranking(outcome)
    if outcome.has_more:
        say(f"the sweep's time is over before all trials are done; to go on: {_command(args)} --resume")
    _say_next(sweep, outcome, model_dir=model_dir)
    return _summary(sweep, outcome)


def _model_dir(sweep: Any) -> str | None:
    """The model of a sweep over samplers."""
    if sweep.config.checkpoint is None:
        return None
    from raydist.cli.locate import find_model_dir
    from raydist.runtime.sample_trials import output_dir_of

    try:
        return find_model_dir(sweep.config.checkpoint, output_dir=output_dir_of(sweep))
    except ConfigError as error:
        raise ConfigError(
            error.what,
            where=f"checkpoint in {sweep.path}",
            found=sweep.config.checkpoint,
            expected=error.expected,
            fix="train it (the comment at the head of the file says how), or name another one: checkpoint=RUN",
        ) from None


def _overlay(words: list[str]) -> tuple[str | None, list[str]]:
    """Parts ``+debug`` from the overrides.

    Raises:
        ConfigError: two overlays.
    """
    overlays = [word[1:] for word in words if word.startswith("+")]
    if len(overlays) > 1:
        raise ConfigError("one overlay at a time", found=" ".join(f"+{name}" for name in overlays))
    return (overlays[0] if overlays else None), [word for word in words if not word.startswith("+")]


def _command(args: argparse.Namespace) -> str:
    import shlex

    words = [args.sweep, *args.overrides]
    words += ["--address", args.address] if args.address else []
    words += ["--register", args.register] if args.register else []
    return f"raydist sweep {shlex.join(words)}"


def _say_ranking(outcome: Any) -> None:
    from raydist.cli.sweep_table import cell
    from raydist.evaluation.sweep_report import ranking_table

    ranking = ranking_table(outcome.records, outcome.goals)
    say()
    table(
        ranking.columns, [[cell(value) if isinstance(value, float) else value for value in row] for row in ranking.rows]
    )
    for record in outcome.records:
        failure = outcome.failures.get(record.name)
        if failure:
            say(f"{record.name} failed: {failure.splitlines()[0][:200]}")
    say(f"sweep directory  {outcome.folder.path}")
    for path in outcome.pictures:
        say(f"picture          {path}")
    if outcome.parent.run_id:
        say(f"MLflow run       {outcome.parent.run_id} in {outcome.parent.uri}")
    if outcome.model_version is not None:
        say(f"registered       version {outcome.model_version}")


def _say_next(sweep: Any, outcome: Any, *, model_dir: str | None) -> None:
    import shlex

    best = outcome.best
    if best is None:
        say("\nno trial finished; to run the others: the same command with --resume")
        return
    commands = [("look at it", f"open {shlex.quote(outcome.pictures[-1])}")] if outcome.pictures else []
    if model_dir is None:
        commands += [
            ("train the winner", winner_command(sweep, best.parameters)),
            ("sample it", f"raydist sample {shlex.quote(best.run_dir)} --prompt 'def ' --compare"),
            ("pull it", f"raydist artifacts pull {shlex.quote(best.run_dir)} --to pulled"),
        ]
    else:
        commands.append(("sample with it", _sample_command(sweep, best.parameters, model_dir=model_dir)))
    next_commands(commands)


def _sample_command(sweep: Any, parameters: dict[str, Any], *, model_dir: str) -> str:
    """``raydist sample DIR --sampler NAME key=value ...``, which names all settings of the trial's sampler.

    The model's directory, because a run's name is looked up in the sweep's ``output_dir`` here, and in `runs` there.
    """
    import shlex

    from raydist.config.load import as_overrides
    from raydist.models.hf import read_meta

    sampling = sweep.sampling_of(parameters, defaults=read_meta(model_dir).get("sampling"))
    settings = sampling.sampler.model_dump(mode="json", exclude_unset=True)
    words = [settings.pop("name"), *as_overrides(settings)]
    command = ["raydist sample", shlex.quote(model_dir), "--prompt 'def ' --sampler"]
    return " ".join([*command, *(shlex.quote(word) for word in words)])


def _nested_values(sweep: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """What the sweep sets for all trials and for this one, beyond its budget."""
    from raydist.config.load import merge
    from raydist.config.sweep_space import nested

    values: dict[str, Any] = {}
    for key, value in {**sweep.config.overrides, **parameters}.items():
        values = merge(values, nested(key, value))
    return values


def winner_command(sweep: Any, parameters: dict[str, Any]) -> str:
    """``raydist train RECIPE key=value ...``: what the sweep set and varied, at the recipe's own number of steps."""
    import shlex

    from raydist.config.load import as_overrides

    words = as_overrides({**_nested_values(sweep, parameters), "name": None})
    return " ".join(["raydist train", shlex.quote(sweep.recipe_path), *(shlex.quote(word) for word in words)])


def _summary(sweep: Any, outcome: Any) -> dict[str, Any]:
    from raydist.evaluation.sweep_records import final_value

    return {
        "sweep": sweep.name,
        "sweep_dir": outcome.folder.path,
        "mlflow_uri": outcome.parent.uri,
        "mlflow_run_id": outcome.parent.run_id,
        "best": None if outcome.best is None else outcome.best.name,
        "has_more": outcome.has_more,
        "model_version": outcome.model_version,
        "trials": [
            {
                "name": record.name,
                "state": record.state,
                "parameters": record.parameters,
                "step": record.num_steps,
                "seconds": record.seconds,
                "metrics": {goal.metric: final_value(record, goal.metric) for goal in outcome.goals},
            }
            for record in outcome.records
        ],
        "pictures": outcome.pictures,
        "exit_code": _exit_code(outcome),
    }


def _exit_code(outcome: Any) -> int:
    """As of ``raydist train``: that ``--resume`` goes on is no failure; that no trial finished is one."""
    if outcome.has_more:
        return EXIT_UNFINISHED
    return EXIT_FAILED if outcome.best is None else 0

"""What `raydist sweep` says at its end: commands that can be typed as they are, and its exit code."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raydist.cli.locate import find_model_dir
from raydist.cli.main import _parse, build_parser, main
from raydist.cli.output import EXIT_FAILED, EXIT_UNFINISHED
from raydist.cli.sweep import _command, _model_dir, _say_next, winner_command
from raydist.config.load import load_recipe
from raydist.config.schema import RunConfig
from raydist.config.sweep import Sweep, load_sweep
from raydist.evaluation.sweep_records import Goal, TrialRecord, TrialState
from raydist.runtime import sweep as sweep_module
from raydist.tracking.find import find_run
from raydist.tracking.mlflow_runs import start_run
from tests.runtime.sweeps import METRIC, RATE, make_sweep, write_sweep
from tests.tracking.helpers import make_config

ROOT = Path(__file__).parents[2]
READY = [path for path in sorted((ROOT / "sweeps").glob("*.yaml")) if "recipe" in yaml.safe_load(path.read_text())]


def parsed(command: str) -> argparse.Namespace:
    """What the command line makes of a line on the terminal."""
    program, verb, *words = shlex.split(command)
    assert program == "raydist"
    return _parse(build_parser(verb), [verb, *words])


def without_length_and_checkpoints(config: RunConfig) -> dict[str, Any]:
    """All that the winner's own training shares with the trial."""
    values = config.model_dump(mode="json")
    del values["name"], values["training"]["num_steps"], values["checkpoint"]["keep"], values["checkpoint"]["keep_best"]
    return values


def said(capsys: pytest.CaptureFixture[str], sweep: Sweep, outcome: Any, **arguments: Any) -> dict[str, str]:
    """The last lines on the terminal: purpose and command."""
    _say_next(sweep, outcome, **arguments)
    text = "".join(capsys.readouterr())  # a test before may have left people's text on stderr
    lines = [line.strip().split("  ", 1) for line in text.split("Next:\n")[1].splitlines()]
    return {purpose: command.strip() for purpose, command in lines}


# --- the winner ---


@pytest.mark.parametrize("overlay", [None, "debug"])
@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_winner_is_trained_as_the_trial_was_but_to_the_recipes_own_end(
    path: Path, overlay: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["output_dir=out here", "training.optimizer.weight_decay=0.2", 'tracking.tags={"for": "two words"}']
    sweep = load_sweep(str(path), words, overlay=overlay)
    assert sweep.recipe_path is not None
    own = load_recipe(sweep.recipe_path).config
    trials = sweep.foreseen_trials()
    for trial in (trials[0], trials[len(trials) // 2], trials[-1]):
        args = parsed(winner_command(sweep, trial))
        winner = load_recipe(args.recipe, args.overrides).config
        ran = sweep.resolve_trial(trial).config
        assert without_length_and_checkpoints(winner) == without_length_and_checkpoints(ran)
        assert winner.output_dir == "out here"
        assert winner.training.num_steps == own.training.num_steps
        assert (winner.checkpoint.keep, winner.checkpoint.keep_best) == (own.checkpoint.keep, own.checkpoint.keep_best)


def test_the_winner_can_be_sampled_and_pulled_by_what_is_said(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from a folder with a space in its name."""
    folder = tmp_path / "my runs"
    run_dir = folder / "rates-000"
    start_run(make_config(folder, mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db"), run_dir=str(run_dir), datasets=[])
    (run_dir / "export").mkdir()
    (run_dir / "export" / "config.json").write_text("{}")
    best = TrialRecord("rates-000", {RATE: 1e-3}, "finished", {METRIC: [(8, 2.5)]}, run_dir=str(run_dir))
    outcome = SimpleNamespace(best=best, pictures=[f"{folder}/pictures/sweep.html"])
    sweep = make_sweep(tmp_path, dataset, space={RATE: [1e-3]})
    commands = said(capsys, sweep, outcome, model_dir=None)
    assert shlex.split(commands["look at it"]) == ["open", f"{folder}/pictures/sweep.html"]
    assert commands["train the winner"] == winner_command(sweep, best.parameters)
    sample, pull = parsed(commands["sample it"]), parsed(commands["pull it"])
    assert find_model_dir(sample.model, output_dir=sample.output_dir) == str(run_dir / "export")
    assert sample.compare
    assert pull.action == "pull"
    assert find_run(pull.run).tags["raydist.run_dir"] == str(run_dir)
    assert pull.to


def test_a_model_below_another_output_dir_is_found_by_the_command_that_samples_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = tmp_path / "my runs" / "some" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    (export / "raydist.json").write_text(json.dumps({"sampling": {"sampler": {"name": "autoregressive"}}}))
    values = {
        "checkpoint": "some",
        "continuation": {"data": "some/held_out"},
        "overrides": {"sampling.sampler": {"name": "autoregressive"}},
        "space": {"sampling.sampler.temperature": [0.5, 1.0]},
        "metric": "accuracy",
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    sweep = load_sweep(str(tmp_path / "sweep.yaml"), [f"output_dir={tmp_path}/my runs"])
    outcome = SimpleNamespace(best=TrialRecord("s-000", sweep.grid()[0], "finished"), pictures=[])
    sample = parsed(said(capsys, sweep, outcome, model_dir=_model_dir(sweep))["sample with it"])
    assert find_model_dir(sample.model, output_dir=sample.output_dir) == str(export)
    assert sample.sampler == ["autoregressive", "temperature=0.5"]


# --- to go on ---


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["+debug", "name=a", "data.train=[{path: a b}]"],
        ["--address", "10.0.0.1:6379", "--register", "my-model", "search.num_trials=2"],
    ],
    ids=" ".join,
)
def test_the_command_to_go_on_is_the_one_that_was_typed(words: list[str]) -> None:
    typed = _parse(build_parser("sweep"), ["sweep", "sweeps/my rates.yaml", *words])
    assert vars(parsed(f"{_command(typed)} --resume")) == {**vars(typed), "resume": True}


@pytest.mark.parametrize(
    ("states", "has_more", "exit_code"),
    [
        (("finished", "failed"), False, 0),
        (("finished", "waiting"), True, EXIT_UNFINISHED),
        (("failed", "waiting"), True, EXIT_UNFINISHED),
        (("failed", "failed"), False, EXIT_FAILED),
        (("failed", "stopped"), False, EXIT_FAILED),
    ],
)
def test_the_exit_code_tells_a_sweep_to_resume_and_a_lost_one_from_a_whole_one(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    states: tuple[TrialState, ...], has_more: bool, exit_code: int,
) -> None:  # fmt: skip
    path = write_sweep(tmp_path, dataset, space={RATE: [1e-3, 1e30]})
    records = [
        TrialRecord(f"rates-{index:03d}", {RATE: 1e30}, state, run_dir=str(tmp_path))
        for index, state in enumerate(states)
    ]
    outcome = SimpleNamespace(
        folder=SimpleNamespace(path=str(tmp_path)),
        records=records,
        goals=[Goal(METRIC)],
        pictures=[],
        parent=SimpleNamespace(run_id=None, uri=None),
        best=next((record for record in records if record.state == "finished"), None),
        failures={record.name: "the loss is not a number" for record in records if record.state == "failed"},
        has_more=has_more,
        model_version=None,
    )
    monkeypatch.setattr(sweep_module, "run_sweep", lambda *_, **__: outcome)
    assert main(["sweep", path, "--json"]) == exit_code
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert [trial["state"] for trial in result["trials"]] == list(states)
    assert "exit_code" not in result
    assert ("--resume" in captured.err) == (exit_code != 0)
    assert captured.err.count("failed: the loss is not a number") == states.count("failed")

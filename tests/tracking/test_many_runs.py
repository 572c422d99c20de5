"""A hundred runs are listed by one query, in any state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raydist.cli.main import main
from raydist.tracking import server

NUM_RUNS = 100
STATES = ("FINISHED", "FAILED", "KILLED", "RUNNING")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Runs 0 to 99 of two experiments, each a second after the one before, in turn in all states."""
    from mlflow.entities import Metric, Param

    output_dir = tmp_path_factory.mktemp("many")
    (output_dir / "mlflow.db").write_bytes(empty_database.read_bytes())
    client = server.connect(f"sqlite:///{output_dir}/mlflow.db")
    experiments = [client.create_experiment(name) for name in ("blue", "green")]
    for number in range(NUM_RUNS):
        created = client.create_run(experiments[number % 2], start_time=1000 * number + 1, run_name=f"run-{number}")
        run_id = created.info.run_id
        metrics = [Metric(key, float(number), 1, step=number) for key in ("loss", "tokens", "validation/loss")]
        client.log_batch(run_id, metrics=metrics, params=[Param(f"key.{i}", str(i)) for i in range(60)])
        if STATES[number % 4] != "RUNNING":
            client.set_terminated(run_id, status=STATES[number % 4], end_time=1000 * number + 500)
    return output_dir


def listed(capsys: pytest.CaptureFixture[str], output_dir: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    capsys.readouterr()
    assert main(["runs", "list", "--output-dir", str(output_dir), *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1])["runs"], captured.err


def test_all_are_listed_newest_first_by_one_query(
    many: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    connect = server.connect

    def counting(uri: str) -> Any:
        client = connect(uri)
        for name in ("search_runs", "get_run", "get_metric_history", "list_artifacts"):
            method = getattr(client, name)
            monkeypatch.setattr(client, name, lambda *a, _n=name, _m=method, **k: (calls.append(_n), _m(*a, **k))[1])
        return client

    monkeypatch.setattr(server, "connect", counting)
    runs, text = listed(capsys, many)
    assert [run["name"] for run in runs] == [f"run-{number}" for number in reversed(range(NUM_RUNS))]
    assert [run["step"] for run in runs] == list(reversed(range(NUM_RUNS)))
    assert calls == ["search_runs"]
    assert text.count("run-") == NUM_RUNS


@pytest.mark.parametrize("state", STATES)
def test_states_and_experiments_are_chosen(many: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    numbers = [number for number in reversed(range(NUM_RUNS)) if STATES[number % 4] == state]
    runs, _ = listed(capsys, many, "--state", state.lower())
    assert [run["name"] for run in runs] == [f"run-{number}" for number in numbers]
    assert {run["status"] for run in runs} == {state}
    color = ("blue", "green")[numbers[0] % 2]
    runs, _ = listed(capsys, many, "--state", state.lower(), "--experiment", color, "--limit", "3")
    assert [run["name"] for run in runs] == [f"run-{number}" for number in numbers[:3]]
    other = ("green", "blue")[numbers[0] % 2]
    runs, text = listed(capsys, many, "--state", state.lower(), "--experiment", other)
    assert runs == []
    assert f"no {state.lower()} runs" in text


def test_a_limit_that_is_none_is_refused(many: Path) -> None:
    for limit in ("0", "-1", "1001"):
        assert main(["runs", "list", "--output-dir", str(many), "--limit", limit]) == 2

"""Every (metric, step) reaches MLflow once, whatever dies in between. Straight into SQLite, so that it is fast."""

from __future__ import annotations

import errno
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raydist.core import storage
from raydist.core.errors import ConfigError, StorageError, TrackingError
from raydist.tracking import jsonl, mlflow_runs, server
from raydist.tracking.artifacts import list_artifacts
from raydist.tracking.find import find_run
from raydist.tracking.lineage import Source
from raydist.tracking.mirror import Mirror
from raydist.tracking.mlflow_runs import resolve_uri, start_run, sync_run
from raydist.tracking.mlflow_tracker import open_tracker
from raydist.tracking.record import DatasetInput, load_record
from raydist.tracking.run_files import RUN_RECORD, SENT_RECORD, RunFiles
from tests.tracking.helpers import history, make_config


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Counts what goes over the wire, which is stricter than to count what a store keeps."""
    counter: Counter[tuple[str, int]] = Counter()
    connect = server.connect

    def counting_connect(uri: str) -> Any:
        client = connect(uri)
        log_batch = client.log_batch

        def counting_log_batch(run_id: str, metrics: Any = (), **rest: Any) -> None:
            assert len(metrics) <= 1000
            counter.update((metric.key, metric.step) for metric in metrics)
            log_batch(run_id, metrics=metrics, **rest)

        client.log_batch = counting_log_batch
        return client

    monkeypatch.setattr(server, "connect", counting_connect)
    return counter


def log(run_dir: Path, steps: range, *, attempt: int | None = None, keys: tuple[str, ...] = ("loss",)) -> None:
    tracker = jsonl.JsonlTracker(str(run_dir / jsonl.FILE_NAME), attempt=attempt)
    for step in steps:
        tracker.log_metrics({key: step / 2 for key in keys}, step=step)
    tracker.close()


def test_one_run_for_all_attempts_and_no_step_twice(output_dir: Path, sent: Counter[tuple[str, int]]) -> None:
    run_dir = output_dir / "small"
    ids = set()
    for steps in (range(1, 11), range(7, 14), range(10, 21)):
        handle = start_run(make_config(output_dir), run_dir=str(run_dir))
        tracker = open_tracker(str(run_dir), system_metrics=False)
        for step in steps:
            tracker.log_metrics({"loss": step / 2}, step=step)
        tracker.close()
        ids.add(handle.run_id)
    handle.finish("FINISHED")

    assert len(ids) == 1
    run = find_run(str(run_dir))
    assert (run.status, run.last_step, run.tags["raydist.attempt"]) == ("FINISHED", 20, "3")
    assert history(run.uri, run.run_id, "loss") == [(step, step / 2) for step in range(1, 21)]
    assert sent == Counter({("loss", step): 1 for step in range(1, 21)})


@pytest.mark.parametrize("lost", ["stale", "absent", "damaged"])
def test_a_crash_between_sending_and_recording(output_dir: Path, sent: Counter[tuple[str, int]], lost: str) -> None:
    run_dir = output_dir / "small"
    start_run(make_config(output_dir), run_dir=str(run_dir))
    record = run_dir / SENT_RECORD
    log(run_dir, range(1, 6))
    sync_run(str(run_dir))
    stale = record.read_bytes()
    log(run_dir, range(6, 11), attempt=1)
    sync_run(str(run_dir))

    if lost == "absent":
        record.unlink()
    else:
        record.write_bytes(stale if lost == "stale" else b'{"run_id": ')
    log(run_dir, range(11, 13), attempt=1)
    sync_run(str(run_dir))
    assert sent == Counter({("loss", step): 1 for step in range(1, 13)})


def test_a_run_whose_creation_was_not_recorded_is_found_again(output_dir: Path) -> None:
    run_dir = output_dir / "small"
    first = start_run(make_config(output_dir), run_dir=str(run_dir), datasets=[DatasetInput("text", "d", "a" * 64)])
    record = load_record(str(run_dir / RUN_RECORD))
    assert record is not None
    path = run_dir / RUN_RECORD
    run_id = first.run_id
    path.write_text(path.read_text().replace(f'"{run_id}"', "null"))
    (run_dir / SENT_RECORD).unlink()
    assert start_run(make_config(output_dir), run_dir=str(run_dir)).run_id == run_id


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), min_size=1, max_size=6))
def test_any_sizes_of_records_and_batches(
    output_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    plan: list[tuple[int, int]],
) -> None:
    """Batches of at most 7 metrics, dying after each call, before and after it is recorded: all arrives once."""
    from raydist.tracking import mirror as module

    run_dir = tmp_path_factory.mktemp("run")
    config = make_config(output_dir)
    monkeypatch.setattr(module, "_METRICS_PER_CALL", 7)
    start_run(config, run_dir=str(run_dir))
    expected: dict[str, list[tuple[int, float]]] = {}
    step = 0
    for num_keys, num_steps in plan:
        steps = range(step + 1, step + 1 + num_steps)
        keys = tuple(f"m{index}" for index in range(num_keys))
        log(run_dir, steps, attempt=1, keys=keys)
        step = steps[-1]
        for key in keys:
            expected.setdefault(key, []).extend((s, s / 2) for s in steps)

    class Killed(Exception):
        pass

    def send_until_killed(*, num_sent: int, num_recorded: int) -> bool:
        """A process that dies after that many calls reached the server and that many were recorded."""
        mirror = Mirror(RunFiles(str(run_dir)))
        client, _ = mirror._contact()
        log_batch, num_calls = client.log_batch, 0

        def mortal_log_batch(*args: Any, **rest: Any) -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls <= num_sent:
                log_batch(*args, **rest)
            if num_calls > num_recorded:
                raise Killed

        client.log_batch = mortal_log_batch
        try:
            mirror.send_waiting()
        except Killed:
            return True
        return False

    num_processes = 0
    while send_until_killed(num_sent=1, num_recorded=num_processes % 2):
        num_processes += 1
        assert num_processes < 1000
    run_id = sync_run(str(run_dir))
    uri = find_run(str(run_dir)).uri
    for key, points in expected.items():
        assert history(uri, run_id, key) == points


def test_non_finite_values_odd_names_and_a_torn_tail(output_dir: Path) -> None:
    run_dir = output_dir / "small"
    handle = start_run(make_config(output_dir), run_dir=str(run_dir))
    tracker = jsonl.JsonlTracker(str(run_dir / jsonl.FILE_NAME))
    tracker.log_metrics({"nan": math.nan, "inf": -math.inf, "bad name %": 1.0, "k" * 400: 2.0}, step=1)
    tracker.close()
    with open(run_dir / jsonl.FILE_NAME, "ab") as stream:
        stream.write(b'{"step": 2, "nan": 0')
    sync_run(str(run_dir))
    metrics = find_run(str(run_dir)).metrics
    assert set(metrics) == {"nan", "inf", "bad name _", "k" * 250}
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] < -1e300
    assert Mirror(RunFiles(str(run_dir))).num_waiting() == 0
    with open(run_dir / jsonl.FILE_NAME, "ab") as stream:
        stream.write(b".5}\n")  # the writer was only slow
    sync_run(str(run_dir))
    assert find_run(str(run_dir)).metrics["nan"] == 0.5
    assert handle.run_id == find_run(str(run_dir)).run_id


def test_the_run_carries_config_lineage_and_datasets(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = Source(commit="c" * 40, diff="+learning_rate = 2\n", untracked=False)
    monkeypatch.setattr(mlflow_runs, "read_source", lambda: changed)
    run_dir = output_dir / "small"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 0\n")
    dataset = DatasetInput("text", "s3://bucket/text", "ab" * 32)
    config = make_config(output_dir, tags={"team": "blue"})
    handle = start_run(config, run_dir=str(run_dir), datasets=[dataset], tags={"sweep": "s1"})
    run = find_run(str(run_dir))
    assert run.params["training.optimizer.learning_rate"] == "0.001"
    assert run.params["data.train.0.path"] == "data/text"
    assert run.tags["team"] == "blue"
    assert run.tags["sweep"] == "s1"
    assert run.tags["dataset.text"] == "ab" * 32
    assert {"version.torch", "version.ray", "version.mlflow", "version.pyarrow", "version.python"} <= set(run.tags)
    inputs = server.connect(run.uri).get_run(run.run_id).inputs.dataset_inputs
    assert [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs] == [
        ("text", ("ab" * 32)[:36], "train")
    ]
    assert (run.tags["git.commit"], run.tags["git.dirty"]) == (changed.commit, "true")
    client = server.connect(run.uri)
    assert {"config.yaml", "git.diff"} <= {item.path for item in client.list_artifacts(handle.run_id)}
    stored = Path(client.get_run(run.run_id).info.artifact_uri)
    assert (stored / "git.diff").read_text() == changed.diff


def test_system_metrics_ride_on_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raydist.tracking.mlflow_tracker import RunTracker
    from raydist.tracking.system import SystemSampler

    tracker = RunTracker(RunFiles(str(tmp_path)), sampler=SystemSampler(interval_s=0.0))
    tracker.log_metrics({"loss": 1.0}, step=5)
    tracker.close()
    curves = jsonl.read_curve(str(tmp_path / jsonl.FILE_NAME))
    assert curves["loss"] == [(5, 1.0)]
    ((step, used_gib),) = curves["system/process_memory_gib"]
    assert step == 5
    assert 0.01 < used_gib < 1000


def test_off_means_off(tmp_path: Path) -> None:
    handle = start_run(make_config(tmp_path, mlflow_uri="none"), run_dir=str(tmp_path / "small"))
    tracker = open_tracker(str(tmp_path / "small"))
    tracker.log_metrics({"loss": 1.0}, step=1)
    for logged in (tracker, handle):
        logged.log_artifact(str(tmp_path))
    assert tracker.flush()
    tracker.close()
    assert handle.finish("FINISHED")
    assert handle.run_id is None
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["metrics.jsonl"]
    with pytest.raises(TrackingError, match="no MLflow run"):
        sync_run(str(tmp_path / "small"))


def test_a_run_directory_in_a_bucket_goes_on_from_another_node(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = f"memory://bucket-{output_dir.name}/small"
    config = make_config(output_dir, mlflow_uri=f"sqlite:///{output_dir}/mlflow.db")
    for node, steps in (("one", range(1, 4)), ("two", range(3, 6))):
        monkeypatch.setenv("XDG_CACHE_HOME", str(output_dir / node))
        start_run(config, run_dir=run_dir)
        tracker = open_tracker(run_dir, system_metrics=False)
        for step in steps:
            tracker.log_metrics({"loss": step / 2}, step=step)
        tracker.close()
    assert jsonl.read_curve(f"{run_dir}/metrics.jsonl") == {"loss": [(step, step / 2) for step in range(1, 6)]}
    run = find_run(run_dir)
    assert run.tags["raydist.attempt"] == "2"
    assert history(run.uri, run.run_id, "loss") == [(step, step / 2) for step in range(1, 6)]


def test_a_bucket_that_is_away_at_the_end_does_not_change_how_the_run_ended(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = f"memory://away-{output_dir.name}/small"
    monkeypatch.setenv("XDG_CACHE_HOME", str(output_dir / "cache"))
    config = make_config(output_dir, mlflow_uri=f"sqlite:///{output_dir}/mlflow.db")
    handle = start_run(config, run_dir=run_dir)
    tracker = open_tracker(run_dir, system_metrics=False, mirrored=False)
    tracker.log_metrics({"loss": 0.5}, step=1)
    tracker.close()

    def refuse(*unused: object, **unused_too: object) -> None:
        raise StorageError("the bucket cannot be reached")

    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        for name in ("list_names", "upload_file", "write_bytes", "read_bytes"):
            original = getattr(storage, name)
            patch.setattr(
                storage, name,
                lambda *paths, original=original, **rest: (
                    refuse() if any(str(path).startswith("memory://") for path in paths) else original(*paths, **rest)
                ),
            )  # fmt: skip
        assert not handle.finish("FINISHED")
    assert f"raydist runs sync {run_dir}" in caplog.text
    sync_run(run_dir)
    run = find_run(run_dir)
    assert (run.status, run.last_step) == ("FINISHED", 1)


def test_another_machine_sends_what_an_outage_left_in_the_bucket(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = f"memory://outage-{output_dir.name}/small"
    config = make_config(output_dir, mlflow_uri=f"sqlite:///{output_dir}/mlflow.db")
    monkeypatch.setenv("XDG_CACHE_HOME", str(output_dir / "cluster"))
    handle = start_run(config, run_dir=run_dir)
    tracker = open_tracker(run_dir, system_metrics=False, mirrored=False)
    tracker.log_metrics({"loss": 0.5}, step=1)
    tracker.close()
    with monkeypatch.context() as patch:
        patch.setattr(server, "connect", lambda uri: (_ for _ in ()).throw(ConnectionError("away")))
        assert not handle.finish("FINISHED")
    (output_dir / "cluster").rename(output_dir / "gone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(output_dir / "laptop"))
    sync_run(run_dir)
    names = [entry.name for entry in list_artifacts(find_run(run_dir))]
    assert jsonl.FILE_NAME in names


def test_positions_of_another_copy_of_the_file_skip_nothing(output_dir: Path) -> None:
    run_dir = output_dir / "small"
    start_run(make_config(output_dir), run_dir=str(run_dir))
    log(run_dir, range(1, 6))
    sync_run(str(run_dir))
    (run_dir / jsonl.FILE_NAME).unlink()
    log(run_dir, range(5, 7), attempt=1)
    sync_run(str(run_dir))
    run = find_run(str(run_dir))
    assert history(run.uri, run.run_id, "loss") == [(step, step / 2) for step in range(1, 7)]


def test_a_full_disk_at_the_end_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(str(tmp_path / "small"), system_metrics=False)

    def refuse(tracker: jsonl.JsonlTracker) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    close = jsonl.JsonlTracker.close
    monkeypatch.setattr(jsonl.JsonlTracker, "close", lambda tracker: (close(tracker), refuse(tracker)))
    with caplog.at_level("WARNING"):
        tracker.close()
    assert "No space left" in caplog.text


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve_uri(None, output_dir=str(tmp_path), experiment="e")
    assert target is not None
    assert target.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert target.artifact_location == f"{tmp_path}/mlartifacts/e"
    assert resolve_uri("none", output_dir=str(tmp_path)) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert resolve_uri(None, output_dir="s3://b") == resolve_uri("http://elsewhere:5000", output_dir="s3://b")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="local folder"):
        resolve_uri(None, output_dir="s3://bucket/runs")
    for wrong in ("htp://x", "mlruns", "http://me:" + "pw@host:5000", "http://[::1", "http://me:" + "pw@[::1"):
        with pytest.raises(TrackingError) as caught:
            resolve_uri(wrong, output_dir=str(tmp_path))
        assert "pw" not in str(caught.value)


def test_a_deleted_experiment_is_refused_at_the_start(output_dir: Path) -> None:
    start_run(make_config(output_dir), run_dir=str(output_dir / "small"))
    client = server.connect(f"sqlite:///{output_dir}/mlflow.db")
    client.delete_experiment(client.get_experiment_by_name("raydist").experiment_id)
    with pytest.raises(TrackingError, match="was deleted"):
        start_run(make_config(output_dir), run_dir=str(output_dir / "other"))


def test_a_damaged_run_record_says_so(tmp_path: Path) -> None:
    (tmp_path / RUN_RECORD).write_text('{"uri": 3}')
    with pytest.raises(TrackingError, match="cannot be read"):
        sync_run(str(tmp_path))


def test_a_vanished_artifact_does_not_hold_up_the_others(output_dir: Path) -> None:
    from raydist.tracking.artifacts import list_artifacts

    run_dir = output_dir / "small"
    handle = start_run(make_config(output_dir), run_dir=str(run_dir))
    (output_dir / "kept.txt").write_text("kept")
    tracker = open_tracker(str(run_dir))
    tracker.log_artifact(str(output_dir / "gone.txt"))
    tracker.log_artifact(str(output_dir / "kept.txt"), folder="pictures")
    assert tracker.flush()
    tracker.close()
    assert handle.finish("KILLED")
    assert "pictures/kept.txt" in {entry.name for entry in list_artifacts(find_run(str(run_dir)))}

"""The tracking files of a run in a bucket, as several nodes see them one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raydist.core import storage
from raydist.tracking.run_files import ARTIFACT_SPOOL, RUN_RECORD, RunFiles

METRICS = "metrics.jsonl"


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return f"memory://run-files-{tmp_path.name}/small"


@pytest.fixture
def node(run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunFiles]:
    """What the node of that name sees when it opens the run."""

    def opened(name: str) -> RunFiles:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return RunFiles(run_dir)

    return opened


def append(files: RunFiles, name: str, text: str) -> None:
    Path(files.folder).mkdir(parents=True, exist_ok=True)
    with open(files.path(name), "a") as stream:
        stream.write(text)


def held(files: RunFiles, name: str) -> str:
    return Path(files.path(name)).read_text()


def test_a_node_that_comes_back_gives_way_to_what_went_on_elsewhere(
    run_dir: str, node: Callable[[str], RunFiles]
) -> None:
    """Its unpublished tail makes its file longer than the bucket's, which holds the attempt that overtook it."""
    one = node("one")
    append(one, METRICS, "a\nb\n")
    one.publish()
    append(one, METRICS, "lost 1\nlost 2\nlost 3\n")
    two = node("two")
    append(two, METRICS, "c\n")
    two.publish()
    assert held(node("one"), METRICS) == "a\nb\nc\n"


def test_a_node_keeps_what_it_alone_has_when_nobody_went_on(run_dir: str, node: Callable[[str], RunFiles]) -> None:
    one = node("one")
    append(one, METRICS, "a\n")
    one.publish()
    append(one, METRICS, "b\n")
    again = node("one")
    assert held(again, METRICS) == "a\nb\n"
    again.publish()
    assert storage.read_bytes(f"{run_dir}/{METRICS}") == b"a\nb\n"


def test_the_driver_takes_over_what_workers_published_and_keeps_its_own_artifacts(
    run_dir: str, node: Callable[[str], RunFiles]
) -> None:
    driver = node("driver")
    append(driver, ARTIFACT_SPOOL, "config\n")
    driver.publish()
    worker = node("worker")
    append(worker, METRICS, "a\n")
    append(worker, ARTIFACT_SPOOL, "model\n")
    worker.publish()
    append(driver, ARTIFACT_SPOOL, "picture\n")
    driver.refresh()
    assert held(driver, METRICS) == "a\n"
    assert held(driver, ARTIFACT_SPOOL) == "config\nmodel\npicture\n"
    driver.publish()
    assert storage.read_bytes(f"{run_dir}/{ARTIFACT_SPOOL}") == b"config\nmodel\npicture\n"
    assert storage.read_bytes(f"{run_dir}/{METRICS}") == b"a\n"


def test_a_record_that_could_not_be_published_outlives_the_buckets_older_one(
    run_dir: str, node: Callable[[str], RunFiles]
) -> None:
    one = node("one")
    storage.write_bytes(one.path(RUN_RECORD), b"running")
    one.publish()
    storage.write_bytes(one.path(RUN_RECORD), b"finished")
    again = node("one")
    assert held(again, RUN_RECORD) == "finished"
    two = node("two")
    storage.write_bytes(two.path(RUN_RECORD), b"resumed")
    two.publish()
    assert held(node("one"), RUN_RECORD) == "resumed"


def test_who_only_read_publishes_nothing(run_dir: str, node: Callable[[str], RunFiles]) -> None:
    """`runs sync` beside a live run, twice, so that the second time its copy is there before."""
    live = node("live")
    storage.write_bytes(live.path(RUN_RECORD), b"first")
    append(live, METRICS, "a\n")
    live.publish()
    for line in ("b\n", "c\n"):
        node("reader")
        reader = node("reader")
        append(live, METRICS, line)
        storage.write_bytes(live.path(RUN_RECORD), line.encode())
        live.publish()
        reader.publish()
        assert storage.read_bytes(f"{run_dir}/{METRICS}").endswith(line.encode())
        assert storage.read_bytes(f"{run_dir}/{RUN_RECORD}") == line.encode()

"""The sizes that an elastic run takes; nodes that really come and go: tests/faults/test_network_faults.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from raydist.runtime.elastic import RunTrainer
from tests.training.cases import recipe_of


class Mailbox:
    """Stands for the monitor's actor handle."""

    def __init__(self) -> None:
        self.reasons: list[str | None] = []
        self.request_stop = SimpleNamespace(remote=self.reasons.append)


def trainer(tmp_path: Path, monitor: Any, *, num_workers: int, min_workers: int | str, batch_rows: int) -> RunTrainer:
    changes = {"num_workers": num_workers, "min_workers": min_workers}
    recipe = recipe_of(
        "data",
        tmp_path,
        **{f"scaling.{key}": value for key, value in changes.items()},
        **{"training.batch_rows": batch_rows, "training.microbatch_rows": 1},
    )
    return RunTrainer(lambda: None, config=recipe.config, monitor=monitor)


def policy_of(trainer: RunTrainer, monkeypatch: pytest.MonkeyPatch) -> ElasticScalingPolicy:
    """The policy that the controller would get."""
    seen: dict[str, Any] = {}
    base = type(trainer).__mro__[1]
    monkeypatch.setattr(base, "_initialize_and_run_controller", lambda self, **arguments: seen.update(arguments))
    trainer._initialize_and_run_controller(scaling_policy=None)
    return seen["scaling_policy"]


def test_a_fixed_number_of_workers_stays_rays_own_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = trainer(tmp_path, Mailbox(), num_workers=4, min_workers="null", batch_rows=8)
    assert fixed.scaling_config.num_workers == 4
    assert policy_of(fixed, monkeypatch) is None


@pytest.mark.parametrize(
    ("cpus", "workers"), [([1], 0), ([1, 1], 2), ([1, 2], 3), ([2, 2, 1], 4), ([4, 4], 6), ([0], 0)]
)
def test_sizes_that_do_not_divide_the_batch_are_passed_over(
    cpus: list[int], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic = trainer(tmp_path, Mailbox(), num_workers=6, min_workers=2, batch_rows=12)
    assert elastic.scaling_config.num_workers == (2, 6)
    nodes = {f"node-{number}": {"CPU": float(count)} for number, count in enumerate(cpus)}
    assert policy_of(elastic, monkeypatch)._count_possible_workers(nodes) == workers


@pytest.mark.parametrize(("running", "possible", "asks"), [(2, 4, True), (4, 4, False), (4, 2, False)])
def test_a_running_group_is_asked_to_save_instead_of_being_torn_down(
    running: int, possible: int, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = Mailbox()
    policy = policy_of(trainer(tmp_path, monitor, num_workers=4, min_workers=2, batch_rows=8), monkeypatch)
    decision = ResizeDecision(num_workers=possible, resources_per_worker={"CPU": 1.0})
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: decision)
    state = SimpleNamespace(num_workers=running)
    assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)
    assert len(monitor.reasons) == asks

"""What raydist.runtime.ray_internals and its tests rely on in the pinned Ray; a new Ray that changed it is named here."""

from __future__ import annotations

import importlib
import inspect
import threading

import pytest
import ray

from raydist.core.errors import ConfigError
from raydist.runtime.spare_workers import SpareWorkers

V2 = "ray.train.v2._internal"
GROUP = f"{V2}.execution.worker_group"
# module, class or function, its parameters beside self; or an attribute's name where there is no signature to compare.
RELIED_ON = [
    ("ray.train.torch", "TorchTrainer._create_default_callbacks", []),
    (
        "ray.train.torch",
        "TorchTrainer._initialize_and_run_controller",
        ["controller_init_kwargs"],
    ),
    (
        f"{V2}.execution.controller",
        "TrainController.__init__",
        ["train_fn_ref", "train_run_context", "scaling_policy", "failure_policy", "callbacks", "validation_config"],
    ),
    (f"{V2}.execution.controller", "TrainController.run", []),
    (f"{V2}.execution.controller", "TrainController.get_result", []),
    (f"{V2}.execution.controller", "TrainController.get_worker_group", []),
    (f"{V2}.execution.failure_handling", "DefaultFailurePolicy.make_decision", ["training_failed_error"]),
    (GROUP, "WorkerGroup.create", ["train_run_context", "worker_group_context", "callbacks"]),
    (GROUP, "WorkerGroup.__init__", ["train_run_context", "worker_group_context", "callbacks"]),
    (GROUP, "WorkerGroup._start", []),
    (GROUP, "WorkerGroup._start_impl", ["worker_group_state_builder"]),
    (GROUP, "WorkerGroup._init_train_context", ["workers", "sync_actor"]),
    (GROUP, "WorkerGroup._clear_state", []),
    (f"{V2}.exceptions", "WorkerGroupStartupFailedError", None),
    (GROUP, "WorkerGroup.shutdown", []),
    (GROUP, "WorkerGroup.abort", []),
    (GROUP, "WorkerGroup.get_latest_poll_status", []),
    (GROUP, "WorkerGroup.get_workers", []),
    (GROUP, "ReplicaGroup.__init__", ["workers", "resources_per_worker", "callbacks"]),
    (f"{GROUP}.state", "WorkerGroupState.shutdown", []),
    (f"{GROUP}.state", "WorkerGroupStateBuilder.with_placement_group_handle", ["placement_group_handle"]),
    (f"{GROUP}.state", "WorkerGroupStateBuilder.with_workers", ["workers"]),
    (f"{GROUP}.state", "WorkerGroupStateBuilder.with_sync_actor", ["sync_actor"]),
    (f"{GROUP}.state", "WorkerGroupStateBuilder.build", []),
    (f"{V2}.util", "invoke_context_managers", ["context_managers"]),
    (f"{V2}.callbacks.datasets", "DatasetsCallback", None),
    (f"{V2}.callbacks.placement_group_callback", "PlacementGroupCleanerCallback", None),
]
# What WorkerGroup._start_impl does, in its order; _ReusingGroup does the same with workers that exist.
START_ORDER = [
    "on_worker_group_start",
    "before_worker_group_start",
    "_create_placement_group",
    "with_placement_group_handle",
    "with_sync_actor",
    "_create_workers",
    "_replica_groups =",
    "_worker_rank_to_replica_group_rank =",
    "with_workers",
    "_init_train_context",
    "_worker_group_state =",
    "after_worker_group_start(self)",
    "run_train_fn",
    "after_worker_group_training_start",
]
SHUTDOWN_ORDER = [
    "on_worker_group_shutdown",
    "before_worker_group_shutdown",
    "_worker_group_state.shutdown",
    "_clear_state",
    "after_worker_group_shutdown",
]


def found(module: str, name: str) -> object:
    thing: object = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize(
    ("module", "name", "parameters"), RELIED_ON, ids=lambda value: value if isinstance(value, str) else ""
)
def test_ray_is_as_sweeps_expect_it(module: str, name: str, parameters: list[str] | None) -> None:
    message = f"Ray {ray.__version__} changed {module}.{name}: see raydist/runtime/ray_internals.py"
    try:
        thing = found(module, name)
    except (ImportError, AttributeError):
        pytest.fail(message)
    if parameters is not None:
        assert callable(thing)
        assert [key for key in inspect.signature(thing).parameters if key != "self"] == parameters, message


@pytest.mark.parametrize(("method", "order"), [("_start_impl", START_ORDER), ("shutdown", SHUTDOWN_ORDER)])
def test_a_worker_group_starts_and_ends_as_ours_does(method: str, order: list[str]) -> None:
    source = inspect.getsource(found(GROUP, f"WorkerGroup.{method}"))
    places = [source.find(step) for step in order]
    missing = [step for step, place in zip(order, places, strict=True) if place < 0]
    message = f"Ray {ray.__version__} changed WorkerGroup.{method}: compare it with raydist/runtime/ray_internals.py"
    assert not missing, f"{message}; gone: {missing}"
    assert places == sorted(places), message
    hooks = {
        word.split("(")[0] for word in source.replace("callback.", " callback.").split() if word.startswith("callback.")
    }
    known = {"callback." + step.split("(")[0] for step in order}
    assert hooks <= known, f"{message}; new: {hooks - known}"


def test_only_a_users_mistake_is_final() -> None:
    from ray.train import FailureConfig, WorkerGroupError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision

    from raydist.runtime.ray_internals import _MistakesAreFinal, mistake_of

    policy = _MistakesAreFinal(FailureConfig(max_failures=1))
    died = WorkerGroupError("gone", {0: RuntimeError("killed")})
    mistaken = WorkerGroupError("wrong", {0: RuntimeError("peer closed"), 1: ConfigError("no such thing")})
    assert policy.make_decision(died) == FailureDecision.RETRY
    assert policy.make_decision(mistaken) == FailureDecision.RAISE
    assert str(mistake_of(mistaken)).startswith("ConfigError: no such thing")
    assert mistake_of(died) is None


# --- spare workers ---


def test_a_group_serves_the_next_trial_of_its_shape_once() -> None:
    released: list[str] = []
    spare = SpareWorkers[str](released.append)
    assert spare.take(shape=1) is None
    spare.put("a", shape=1)
    assert spare.take(shape=1) == "a"
    assert spare.take(shape=1) is None
    assert released == []


def test_a_group_of_another_shape_makes_room() -> None:
    released: list[str] = []
    spare = SpareWorkers[str](released.append)
    spare.put("a", shape=1)
    assert spare.take(shape=2) is None
    assert released == ["a"]


def test_a_second_group_takes_the_place_of_the_first() -> None:
    released: list[str] = []
    spare = SpareWorkers[str](released.append)
    spare.put("a", shape=1)
    spare.put("b", shape=1)
    assert released == ["a"]
    spare.release()
    spare.release()
    assert released == ["a", "b"]


def test_what_nobody_takes_is_released() -> None:
    released = threading.Event()
    spare = SpareWorkers[str](lambda group: released.set(), keep_s=0.05)
    spare.put("a", shape=1)
    assert released.wait(timeout=60)
    assert spare.take(shape=1) is None

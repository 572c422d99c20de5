"""Checks of a cluster before a run: everything that would otherwise fail after the GPUs are taken."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_loaders.cache import default_cache_dir
from raydist.checkpoint.store import spool_root
from raydist.config.cluster import PreflightConfig
from raydist.config.load import Recipe
from raydist.core import storage
from raydist.core.errors import RaydistError
from raydist.core.units import format_bytes, format_duration, parse_bytes
from raydist.runtime.cluster import require_capacity
from raydist.runtime.preflight_probe import NodeFacts, NodeProbe, read_mlflow, versions, write_read_delete

_CLOCK_READINGS = 5
_MAX_TEXT_CHARS = 240


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was looked at.
        problem: what is wrong; None if nothing is.
        detail: what was found where nothing is wrong.
    """

    name: str
    problem: str | None
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the cluster may be used, as far as this goes."""
        return self.problem is None


@dataclass(frozen=True)
class Expectations:
    """What is looked for.

    Attributes:
        limits: of space, clocks and waits.
        env_names: variables that every node must have.
        output_dir: where runs are kept; None to leave storage out.
        mlflow_uri: None to leave MLflow out.
        recipe: adds its capacity and its datasets.
    """

    limits: PreflightConfig = field(default_factory=PreflightConfig)
    env_names: tuple[str, ...] = ()
    output_dir: str | None = None
    mlflow_uri: str | None = None
    recipe: Recipe | None = None


def preflight(expected: Expectations) -> list[Check]:
    """Runs all checks on the Ray cluster that this process is connected to; a failed one does not keep others from running.

    Only a node that does not say what it has is asked nothing more, so that waiting for it does not use up everybody's time.
    """
    with _probes(expected.limits.timeout_s) as nodes:
        checks = [_capacity(nodes, expected)]
        facts = nodes.ask(lambda probe, _: probe.facts.remote(names=expected.env_names, folders=_folders(expected)))
        checks.append(_unanswered("versions", facts) or _same_versions(facts.values))
        checks.append(_environment(facts.values, expected))
        checks += _space(facts.values, expected)
        nodes = nodes.without(facts.failures)
        checks.append(_clocks(nodes, expected))
        if expected.output_dir is not None:
            checks.append(_storage(nodes, expected.output_dir))
        checks += _datasets(nodes, expected)
        if expected.mlflow_uri is not None:
            checks.append(_mlflow(nodes, expected.mlflow_uri))
        checks.append(_all_reduce(nodes, expected))
        return checks


@dataclass(frozen=True)
class _Answers:
    """Of all nodes, by node name."""

    values: dict[str, Any]
    failures: dict[str, str]


class _Nodes:
    """A probe on each node."""

    def __init__(self, probes: Mapping[str, Any], *, workers: list[str], timeout_s: float) -> None:
        self.probes = probes
        self.workers = workers
        self._timeout_s = timeout_s

    def ask(self, question: Callable[[Any, int], Any], *, of: list[str] | None = None) -> _Answers:
        """Asks all nodes (or some) at once; who does not answer in time has failed."""
        names = list(self.probes) if of is None else of
        asked = {question(self.probes[name], number): name for number, name in enumerate(names)}
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=self._timeout_s)
        values: dict[str, Any] = {}
        failures = {asked[reference]: f"no answer within {format_duration(self._timeout_s)}" for reference in silent}
        for reference in answered:
            try:
                values[asked[reference]] = ray.get(reference)
            except Exception as error:  # whatever a node has to say belongs in the table
                failures[asked[reference]] = _words(error)
        return _Answers(values, failures)

    def without(self, names: Collection[str]) -> _Nodes:
        """The other nodes."""
        probes = {name: probe for name, probe in self.probes.items() if name not in names}
        workers = [name for name in self.workers if name not in names]
        return _Nodes(probes, workers=workers, timeout_s=self._timeout_s)


@contextlib.contextmanager
def _probes(timeout_s: float) -> Iterator[_Nodes]:
    remote = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = _names(alive)
    probes = {
        names[node["NodeID"]]: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in alive
    }
    workers = [names[node["NodeID"]] for node in alive if {"CPU", "GPU"} & node["Resources"].keys()]
    try:
        yield _Nodes(probes, workers=workers, timeout_s=timeout_s)
    finally:
        for probe in probes.values():
            ray.kill(probe)


def _names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Node id to what a person calls it: its address, and more only where several nodes share one."""
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"
        for node, address in zip(nodes, addresses, strict=True)
    }


def _capacity(nodes: _Nodes, expected: Expectations) -> Check:
    have = ray.cluster_resources()
    detail = f"{len(nodes.probes)}, with {have.get('CPU', 0):g} CPU and {have.get('GPU', 0):g} GPU"
    try:
        if expected.recipe is not None:
            require_capacity(expected.recipe.config.scaling)
    except RaydistError as error:
        return Check("nodes", f"{error.what}: {error.found}, and the recipe asks for {error.expected}")
    return Check("nodes", None, detail)


def _same_versions(facts: Mapping[str, NodeFacts]) -> Check:
    """Every node against this process, which is where the driver will run."""
    mine = versions()
    different = [
        f"{name}: {package} {fact.versions.get(package)} instead of {version}"
        for name, fact in facts.items()
        for package, version in mine.items()
        if fact.versions.get(package) != version
    ]
    return Check("versions", _lines(different), ", ".join(f"{name} {version}" for name, version in mine.items()))


def _environment(facts: Mapping[str, NodeFacts], expected: Expectations) -> Check:
    missing = [f"{name}: {', '.join(fact.missing_names)} not set" for name, fact in facts.items() if fact.missing_names]
    return Check("environment", _lines(missing), ", ".join(expected.env_names) or "nothing asked for")


def _space(facts: Mapping[str, NodeFacts], expected: Expectations) -> list[Check]:
    limits = expected.limits
    disk = {name: fact.disk_free_bytes for name, fact in facts.items()}
    memory = {name: fact.shared_memory_free_bytes for name, fact in facts.items()}
    return [
        _enough("disk", disk, parse_bytes(limits.min_disk)),
        _enough("shared memory", memory, parse_bytes(limits.min_shared_memory)),
    ]


def _enough(name: str, free_bytes: Mapping[str, int], least_bytes: int) -> Check:
    short = [
        f"{node}: {format_bytes(free)} free, less than {format_bytes(least_bytes)}"
        for node, free in free_bytes.items()
        if free < least_bytes
    ]
    least = min(free_bytes.values(), default=0)
    return Check(name, _lines(short), f"at least {format_bytes(least)} free")


def _clocks(nodes: _Nodes, expected: Expectations) -> Check:
    """Each node's clock against this one; of several readings the one with the shortest way there and back counts."""
    readings = {name: _best_reading(nodes, name) for name in nodes.probes}
    lost = [f"{name}: no answer" for name, (round_trip_s, _) in readings.items() if math.isinf(round_trip_s)]
    skews = {name: skew_s for name, (round_trip_s, skew_s) in readings.items() if not math.isinf(round_trip_s)}
    limit_s = expected.limits.max_clock_skew_s
    off = [f"{name}: {skew_s:+.2f} s" for name, skew_s in skews.items() if abs(skew_s) > limit_s]
    largest_s = max((abs(skew_s) for skew_s in skews.values()), default=0.0)
    return Check("clocks", _lines(lost + off), f"within {largest_s:.3f} s")


def _best_reading(nodes: _Nodes, name: str) -> tuple[float, float]:
    """The reading with the shortest round trip; a node that is silent once is not waited for again."""
    best = _reading(nodes, name)
    for _ in range(_CLOCK_READINGS - 1):
        if math.isinf(best[0]):
            break
        best = min(best, _reading(nodes, name))
    return best


def _reading(nodes: _Nodes, name: str) -> tuple[float, float]:
    """Round trip and skew, in seconds."""
    before = time.time()
    answer = nodes.ask(lambda probe, _: probe.now.remote(), of=[name])
    after = time.time()
    if name not in answer.values:
        return math.inf, 0.0
    return after - before, answer.values[name] - (before + after) / 2


def _storage(nodes: _Nodes, output_dir: str) -> Check:
    """The head writes, every node reads that, and writes, reads and deletes something of its own."""
    token = uuid.uuid4().hex
    folder = storage.join(output_dir, f".preflight-{token}")
    shared = storage.join(folder, "shared")
    try:
        write_read_delete(output_dir)
        storage.write_bytes(shared, token.encode())
        answers = nodes.ask(lambda probe, _: probe.try_storage.remote(output_dir, shared=shared, token=token))
        storage.remove_tree(folder)
    except Exception as error:  # each filesystem has its own
        return Check("storage", f"{output_dir} from the head: {_words(error)}")
    return _unanswered("storage", answers) or Check("storage", None, f"{output_dir}: written, read and deleted")


def _datasets(nodes: _Nodes, expected: Expectations) -> list[Check]:
    if expected.recipe is None:
        return []
    data = expected.recipe.config.data
    problems: list[str] = []
    for path in dict.fromkeys(part.path for part in (*data.train, *data.validation)):
        answers = nodes.ask(
            lambda probe, _, path=path: probe.read_dataset.remote(  # type: ignore[misc]
                path, seq_len=data.seq_len, cache_dir=data.cache_dir
            ),
            of=nodes.workers,
        )
        problems += [f"{name}: {words}" for name, words in answers.failures.items()]
        if len(set(answers.values.values())) > 1:
            problems.append(f"{path} is not the same on all nodes")
    return [Check("datasets", _lines(problems), ", ".join(part.path for part in data.train))]


def _mlflow(nodes: _Nodes, uri: str) -> Check:
    try:
        read_mlflow(uri)
    except RaydistError as error:
        return Check("MLflow", f"{uri} from the head: {error.found or error.what}")
    if urlsplit(uri).scheme in ("http", "https"):
        answers = nodes.ask(lambda probe, _: probe.try_mlflow.remote(uri), of=nodes.workers)
        return _unanswered("MLflow", answers) or Check("MLflow", None, uri)
    return Check("MLflow", None, uri)


def _all_reduce(nodes: _Nodes, expected: Expectations) -> Check:
    workers = nodes.workers
    if len(workers) < 2:
        return Check("all-reduce", None, "fewer than two nodes: nothing to connect")
    first = nodes.ask(lambda probe, _: probe.rendezvous.remote(), of=workers[:1])
    if first.failures:
        return Check("all-reduce", _lines([f"{name}: {words}" for name, words in first.failures.items()]))
    url = first.values[workers[0]]
    limit_s = expected.limits.timeout_s / 2
    answers = nodes.ask(
        lambda probe, rank: probe.all_reduce.remote(rank=rank, world_size=len(workers), url=url, timeout_s=limit_s),
        of=workers,
    )
    seconds = max(answers.values.values(), default=0.0)
    detail = f"gloo, {len(workers)} nodes, 4 MiB in {1000 * seconds:.0f} ms"
    failed = _unanswered("all-reduce", answers)
    if failed is None:
        return Check("all-reduce", None, detail)
    hint = "is a firewall between them, or does GLOO_SOCKET_IFNAME have to name the interface?"
    return Check("all-reduce", f"{failed.problem}\n{hint}")


def _folders(expected: Expectations) -> list[str]:
    """Where a node writes: the cache of shards, and the spool of checkpoints on their way to a bucket."""
    if expected.recipe is None:
        return [default_cache_dir()]
    config = expected.recipe.config
    cache_dir = config.data.cache_dir or default_cache_dir()
    if storage.is_remote(expected.output_dir or config.output_dir):
        return [cache_dir, spool_root(config.checkpoint.spool_dir)]
    return [cache_dir]


def _unanswered(name: str, answers: _Answers) -> Check | None:
    if not answers.failures:
        return None
    return Check(name, _lines([f"{node}: {words}" for node, words in answers.failures.items()]))


def _lines(problems: list[str]) -> str | None:
    return "\n".join(problems) or None


def _words(error: Exception) -> str:
    """What is at the bottom of an error, without Ray's account of how it travelled."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RaydistError):
        return " ".join(filter(None, (cause.what, cause.where, cause.found)))[:_MAX_TEXT_CHARS]
    lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return f"{type(cause).__name__}: {' '.join(lines[-1].split())}"[:_MAX_TEXT_CHARS]

"""What a Prometheus server scrapes from Ray during a run, and what the dashboard asks it for."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from raydist.runtime.prometheus import EXPORT_PREFIX, GAUGES, PrometheusHook
from raydist.training.hooks import RunFacts

DASHBOARD = Path(__file__).parents[2] / "clusters/grafana_dashboard.json"
_SERIES = re.compile(r"\bray_raydist_\w+")
_SAMPLE = re.compile(r"^(ray_raydist_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
# Ray's agent adds these to each sample: they say where it came from, not what it is.
_LABELS_OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId", "ActorId", "NodeId"}
_SCRAPE_LIMIT_S = 90.0


def export_in_a_worker() -> None:
    """A run's life, as rank 0 sees it."""
    hook = PrometheusHook()
    hook.on_start(
        RunFacts(name="my-run", num_steps=100, start_step=40, num_parameters=1, tokens_per_step=256, world_size=4)
    )
    for step in (50, 60):
        hook.on_log(
            step,
            {
                "loss": 200.0 / step, "validation/loss": 5.0, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 256.0 * step,
                "tokens_per_s": 1234.0, "step_s": 0.25, "mfu": 0.4, "loss/masked": 9.0,
            },
        )  # fmt: skip
    hook.on_stored(60, 2.5)


def dashboard_queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    return [*panels, *variables]


@pytest.mark.ray
def test_a_scrape_of_rays_endpoint_finds_every_gauge_once_a_run(ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Rank0:
        def train(self) -> None:
            export_in_a_worker()

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    rank_0 = Rank0.remote()
    began = time.time()
    ray.get(rank_0.train.remote())
    expected = {EXPORT_PREFIX + name for name in GAUGES}
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    deadline = time.monotonic() + _SCRAPE_LIMIT_S
    while set(found) != expected and time.monotonic() < deadline:
        time.sleep(1.0)
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        found = {}
        for name, labels, value in _SAMPLE.findall(text):
            tags = dict(_LABEL.findall(labels))
            if tags.get("run") == "my-run":
                found.setdefault(name, []).append((tags, float(value)))
    assert set(found) == expected
    values = {name: samples[0][1] for name, samples in found.items()}
    assert {len(samples) for samples in found.values()} == {1}, "one series a run"
    assert values["ray_raydist_step"] == 60
    assert values["ray_raydist_num_steps"] == 100
    assert values["ray_raydist_start_step"] == 40
    assert values["ray_raydist_workers"] == 4
    assert values["ray_raydist_loss"] == pytest.approx(200 / 60)
    assert values["ray_raydist_tokens_per_second"] == 1234
    assert values["ray_raydist_mfu"] == 0.4
    assert values["ray_raydist_checkpoint_step"] == 60
    assert values["ray_raydist_checkpoint_upload_seconds"] == 2.5
    for name in ("heartbeat", "checkpoint"):
        assert began - 1 <= values[f"ray_raydist_{name}_timestamp_seconds"] <= time.time()
    for samples in found.values():
        ours = {label for label in samples[0][0] if not label.startswith("otel_scope_")} - _LABELS_OF_RAY
        assert ours == {"run"}
    ray.kill(rank_0)


def test_every_query_of_the_dashboard_names_a_gauge_that_exists() -> None:
    exported = {EXPORT_PREFIX + name for name in GAUGES}
    asked: set[str] = set()
    for query in dashboard_queries():
        names = set(_SERIES.findall(query))
        assert names, f"{query} asks for no metric of raydist"
        assert names <= exported, f"{query} asks for {names - exported}"
        asked |= names
    assert asked == exported, f"never shown: {exported - asked}"


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    for query in dashboard_queries():
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")

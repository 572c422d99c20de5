"""The model card of a registered version: what it is, what made it, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raydist.core.units import format_bytes

if TYPE_CHECKING:
    from raydist.tracking.artifacts import ArtifactFile
    from raydist.tracking.find import TrackedRun

_USE = """\
```python
import mlflow

model = mlflow.pyfunc.load_model("models:/NAME/VERSION")
model.predict(["Once upon a time"], params={"max_new_tokens": 64})
```
The process needs the packages of `requirements.txt`, raydist among them."""


def model_card(run: TrackedRun, meta: Mapping[str, Any], files: Sequence[ArtifactFile]) -> str:
    """Markdown, the most telling parts first, since MLflow's pages show only its beginning.

    Args:
        run: that trained the model.
        meta: contents of ``raydist.json``.
        files: of the exported folder.
    """
    objective = (meta.get("objective") or {}).get("name", "unknown")
    sampler = (meta.get("sampling") or {}).get("sampler") or {}
    facts = {
        "objective": objective,
        "sampler": sampler.get("name", "autoregressive"),
        "trained by": f"run `{run.name}` ({run.run_id}), {meta.get('step', 'unknown')} steps",
        "configuration": meta.get("config_hash", "unknown"),
        **{name: f"{value:.4g}" for name, value in _results(run).items()},
    }
    sections = [
        f"# {run.name}\n\nA language model that raydist trained.\n\n{_table(facts)}",
        f"## Use\n\n{_USE}",
        f"## Data\n\n{_table(_tags(run, 'dataset.'))}",
        f"## Versions\n\n{_table({**_tags(run, 'git.'), **_tags(run, 'version.')})}",
        f"## Files\n\n{_table({f'`{f.name}`': f'{format_bytes(f.size)}, sha256 {f.sha256}' for f in files})}",
        "## Recipe\n\n" + "\n".join(f"    {key}: {value}" for key, value in sorted(run.params.items())),
    ]
    return "\n\n".join(sections) + "\n"


def _results(run: TrackedRun) -> dict[str, float]:
    return {key: run.metrics[key] for key in ("loss", "validation/loss", "tokens") if key in run.metrics}


def _tags(run: TrackedRun, prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in sorted(run.tags.items()) if key.startswith(prefix)}


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in rows.items()) or "- none recorded"

"""``raydist submit`` of a run whose job is there already."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydist.cli.main import main
from raydist.config.load import identity_hash, load_recipe, with_absolute_paths
from raydist.runtime.jobs import Job, JobsApi

RECIPE = str(Path(__file__).parents[2] / "jobs" / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_what_is_said_of_a_job_that_still_runs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config_hash = identity_hash(with_absolute_paths(load_recipe(RECIPE, ["name=x"]).config))
    job = Job("raydist-x", "RUNNING", None, "x", "/runs/x", config_hash, 1, 3.0, None, None)
    monkeypatch.setattr(JobsApi, "__init__", lambda self, address: None)
    monkeypatch.setattr(JobsApi, "jobs", lambda self: [job])
    assert main(["submit", RECIPE, "name=x", "--address", "http://127.0.0.1:1", *words]) == 0
    said = "".join(capsys.readouterr())
    assert "raydist-x runs already" in said
    assert ("submit again once it has ended" in said) == bool(words)

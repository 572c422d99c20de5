"""Everything on a real S3 server: dataset, run directory, checkpoints, exported model, pictures, artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydist.checkpoint.layout import complete_checkpoints
from raydist.cli.main import main
from raydist.config.load import Recipe, dump_yaml, resolve
from raydist.core import storage
from raydist.tracking.jsonl import read_curve
from raydist.training.driver import conduct
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import Outcome, run_attempt
from tests.servers.object_store import ObjectStore
from tests.training.cases import recipe_of, recipe_values

CHANGES = {"training.num_steps": 12, "training.validate_every_steps": 6, "checkpoint.every_steps": 5}


@pytest.fixture
def prepared(bucket: str, tmp_path: Path) -> str:
    """A dataset in the bucket, made by the command line."""
    records = tmp_path / "records.jsonl"
    texts = [Path(module).read_text() for module in (json.__file__, json.decoder.__file__, json.encoder.__file__)]
    pieces = [text[start : start + 400] for text in texts for start in range(0, len(text), 400)]
    records.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    arguments = ["data", "prepare", str(records), "--serial", "--tokenizer", "bytes", "--validation-fraction", "0.15"]
    assert main([*arguments, "--work-dir", str(tmp_path / "work"), "--out", f"{bucket}/data"]) == 0
    return f"{bucket}/data"


def notice_at_call(number: int) -> Callable[[], str | None]:
    """Gives notice when it is asked the ``number``-th time; it is asked once per step and once per validation batch."""
    calls = iter(range(1, 10_000))
    return lambda: "the node is drained" if next(calls) >= number else None


def in_bucket(dataset: str, tmp_path: Path, output_dir: str, **changes: Any) -> Recipe:
    """A recipe whose run directory is remote."""
    values = recipe_values(dataset, tmp_path, **CHANGES, **changes)
    return resolve({**values, "output_dir": output_dir}, path="case.yaml")


def test_a_run_in_a_bucket_is_like_one_in_a_folder(
    bucket: str, prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"sampling.prompts": "[a]", "sampling.max_new_tokens": 4}
    tracking = {"tracking.mlflow_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    recipe = in_bucket(prepared, tmp_path, f"{bucket}/runs", **changes, **tracking)

    def interrupted(recipe: Recipe, run_dir: str) -> Outcome:
        return run_attempt(recipe, run_dir=run_dir, notice=notice_at_call(4))

    run_dir, _, outcome = conduct(recipe, resume=False, attempts=interrupted)
    assert (run_dir, outcome.interrupted, outcome.step) == (f"{bucket}/runs/run", True, 4)
    assert [checkpoint.step for checkpoint in complete_checkpoints(run_dir)] == [4]
    assert not storage.exists(f"{run_dir}/export")

    (tmp_path / "case.yaml").write_text(dump_yaml(recipe.config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node2"))
    assert main(["train", str(tmp_path / "case.yaml"), "--no-ray", "--resume"]) == 0

    whole = recipe_of(prepared, tmp_path / "whole", **CHANGES)
    run_attempt(whole, run_dir=prepare_run_dir(whole, resume=False))
    expected, found = (read_curve(f"{folder}/metrics.jsonl") for folder in (f"{tmp_path}/whole/run", run_dir))
    for name in ("loss", "grad_norm", "validation/loss"):
        assert found[name] == expected[name]  # bit for bit
    assert [step for step, _ in found["loss"]] == list(range(1, 13))

    names = storage.list_files(run_dir)
    assert {"config.yaml", "run.json", "export/model.safetensors", "pictures/curves.png"} <= set(names)
    assert not [name for name in names if "partial" in name or "deleted" in name]
    assert storage.read_bytes(f"{run_dir}/export/model.safetensors") == (
        Path(f"{tmp_path}/whole/run/export/model.safetensors").read_bytes()
    )

    assert main(["sample", run_dir, "--prompt", "import ", "--max-new-tokens", "4"]) == 0
    assert main(["sample", "run", "--output-dir", f"{bucket}/runs", "--prompt", "a", "--max-new-tokens", "4"]) == 0
    pull = ["artifacts", "pull", "run", "--to", str(tmp_path / "pulled")]
    assert main([*pull, "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        pulled = (tmp_path / "pulled" / "model" / name).read_bytes()
        assert pulled == storage.read_bytes(f"{run_dir}/export/{name}")
    assert main(["export", run_dir, "--to", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


def test_a_bucket_that_is_not_there_is_one_screen(
    s3: ObjectStore, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = in_bucket(dataset, tmp_path, "s3://no-such-bucket-here/runs")
    (tmp_path / "case.yaml").write_text(dump_yaml(recipe.config))
    assert main(["train", str(tmp_path / "case.yaml"), "--no-ray"]) == 2
    shown = capsys.readouterr().err
    assert "StorageError: there is no such bucket" in shown
    assert "Traceback" not in shown


def test_wrong_credentials_are_one_screen(
    bucket: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-wrong-secret")
    recipe = in_bucket(dataset, tmp_path, f"{bucket}/runs")
    (tmp_path / "case.yaml").write_text(dump_yaml(recipe.config))
    try:
        assert main(["train", str(tmp_path / "case.yaml"), "--no-ray"]) == 2
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    shown = capsys.readouterr().err
    assert "StorageError: the bucket refuses this access" in shown
    assert "planted-wrong-secret" not in shown

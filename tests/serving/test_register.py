"""A registered version samples what the exported folder samples, and loads nothing that was changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raydist.cli.main import main
from raydist.core.errors import ConfigError, TrackingError
from raydist.serving.register import register_export, requirements
from raydist.serving.text_model import TextModel, choose_sampler
from raydist.tracking import server
from raydist.tracking.find import TrackedRun, find_run
from raydist.tracking.mlflow_runs import start_run
from raydist.tracking.record import DatasetInput
from tests.sampling.test_sample_verb import export
from tests.servers.mlflow_server import MlflowServer
from tests.servers.object_store import ObjectStore
from tests.tracking.helpers import make_config

PROMPTS = ["def ", "class of "]
LOAD = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
prompts, params = json.loads(sys.argv[2])
texts = [model.predict(pandas.DataFrame({"prompt": prompts}), params=params), model.predict(prompts, params=params)]
print(json.dumps([*texts, model.predict(prompts[0]), sorted(name for name in sys.modules if name == "ray")]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tmp_path_factory.mktemp("models") / "tiny")


def tracked(output_dir: Path, uri: str, *, name: str = "small") -> TrackedRun:
    config = make_config(output_dir, mlflow_uri=uri).model_copy(update={"name": name})
    data = DatasetInput("text", "s3://bucket/text", "ab" * 32)
    start_run(config, run_dir=str(output_dir / name), datasets=[data])
    return find_run(str(output_dir / name))


def predictions(uri: str, version_uri: str, params: dict[str, object]) -> list[list[str]]:
    """What another process gets from the registry: texts of a table, of a list, of one prompt."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": os.getcwd()}
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:mlflow",
        "-c",
        LOAD,
        version_uri,
        json.dumps([PROMPTS, params]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *texts, ray = json.loads(done.stdout.splitlines()[-1])
    assert ray == [], "a loaded model needs no Ray"
    return texts


def registry_entry(run: TrackedRun, name: str) -> tuple[str, dict[str, str]]:
    version = server.connect(run.uri).get_model_version(name, "1")
    return version.description, version.tags


def test_the_version_samples_as_the_folder_does(output_dir: Path, folder: str) -> None:
    run = tracked(output_dir, f"sqlite:///{output_dir}/mlflow.db")
    version = register_export(run, export=folder, name="tiny-model")
    assert (version.version, version.uri, version.is_new) == (1, "models:/tiny-model/1", True)
    params = {"sampler": "set_block block_size=2", "max_new_tokens": 5, "seed": 3}
    model = TextModel.load(folder)
    expected = model.generate(PROMPTS, **params)
    table, texts, single = predictions(run.uri, version.uri, params)
    assert table == texts == expected
    assert single == model.generate(PROMPTS[:1]), "without parameters: the recipe's"

    description, _ = registry_entry(run, "tiny-model")
    for told in ("set_block", "ab" * 32, "training.optimizer.learning_rate: 0.001", "torch: 2", run.run_id):
        assert told in description


def test_the_same_files_are_one_version_and_others_another(output_dir: Path, folder: str, tmp_path: Path) -> None:
    run = tracked(output_dir, f"sqlite:///{output_dir}/mlflow.db")
    versions = [register_export(run, export=folder, name="tiny") for _ in range(2)]
    assert [(v.version, v.is_new) for v in versions] == [(1, True), (1, False)]
    shutil.copytree(folder, tmp_path / "changed")
    meta = json.loads((tmp_path / "changed" / "raydist.json").read_text())
    (tmp_path / "changed" / "raydist.json").write_text(json.dumps(meta | {"step": 7}))
    assert register_export(run, export=str(tmp_path / "changed"), name="tiny").version == 2
    assert register_export(run, export=folder, name="tiny").version == 1


def test_no_file_of_a_version_is_a_pickle_and_every_requirement_is_pinned(output_dir: Path, folder: str) -> None:
    run = tracked(output_dir, f"sqlite:///{output_dir}/mlflow.db")
    register_export(run, export=folder, name="tiny")
    stored = Path(server.connect(run.uri).get_run(run.run_id).info.artifact_uri) / "registered" / "tiny"
    names = {path.name for path in stored.rglob("*") if path.is_file()}
    assert {"MLmodel", "mlflow_model.py", "model.safetensors", "README.md", "requirements.txt"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    (pinned,) = stored.rglob("requirements.txt")
    assert set(requirements()) <= set(pinned.read_text().split())
    assert all("==" in line for line in requirements())


@pytest.mark.mlflow_server
def test_a_server_with_its_artifacts_in_a_bucket(
    tmp_path: Path, folder: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the server's proxy, and with a large file that lies in the bucket beside it and is only pointed to."""
    from raydist.core import storage

    bucket = object_store.make_bucket("registered-models")
    with MlflowServer(
        tmp_path / "server", artifacts=f"{bucket}/mlflow", environment=object_store.environment()
    ) as mlflow_server:
        run = tracked(tmp_path, mlflow_server.url)
        copied = register_export(run, export=folder, name="copied")
        expected = TextModel.load(folder).generate(PROMPTS, max_new_tokens=4)
        assert predictions(run.uri, copied.uri, {"max_new_tokens": 4})[0] == expected

        for key, value in object_store.environment().items():
            monkeypatch.setenv(key, value)
        for name in storage.list_files(folder):
            storage.upload_file(os.path.join(folder, name), f"{bucket}/runs/small/export/{name}")
        pointed = register_export(run, export=f"{bucket}/runs/small/export", name="pointed", max_bytes=9000)
        assert not [
            name for name in storage.list_files(f"{bucket}/mlflow") if "pointed" in name and "safetensors" in name
        ]
        assert predictions(run.uri, pointed.uri, {"max_new_tokens": 4})[0] == expected

        weights = bytearray(storage.read_bytes(f"{bucket}/runs/small/export/model.safetensors"))
        weights[-1] ^= 1
        storage.write_bytes(f"{bucket}/runs/small/export/model.safetensors", bytes(weights))
        with pytest.raises(AssertionError, match="not what was logged"):
            predictions(run.uri, pointed.uri, {})


def test_the_verb(output_dir: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tracked(output_dir, f"sqlite:///{output_dir}/mlflow.db")
    shutil.copytree(folder, output_dir / "small" / "export")
    arguments = ["export", "small", "--output-dir", str(output_dir), "--register", "from-the-verb", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["registered"] == {
        "name": "from-the-verb",
        "version": 1,
        "uri": "models:/from-the-verb/1",
        "is_new": True,
    }
    assert registry_entry(run, "from-the-verb")[1]["raydist.run"] == "small"
    assert main(["export", "small", "--output-dir", str(output_dir), "--json"]) == 2
    assert main([*arguments[:-2], "a/b", "--json"]) == 2


def test_only_our_exports_and_only_names_are_registered(output_dir: Path, folder: str, tmp_path: Path) -> None:
    run = tracked(output_dir, f"sqlite:///{output_dir}/mlflow.db")
    for name in ("", "../x", "a/b", "a:b", "-x", "ä"):
        with pytest.raises(TrackingError, match="not a name"):
            register_export(run, export=folder, name=name)
    (tmp_path / "other").mkdir()
    with pytest.raises(TrackingError, match="only models that raydist exported"):
        register_export(run, export=str(tmp_path / "other"), name="x")


def test_the_sampler_in_one_string() -> None:
    meta = {"sampling": {"sampler": {"name": "set_block", "block_size": 4}}}
    assert choose_sampler("", meta).model_dump()["block_size"] == 4
    assert choose_sampler("block_size=8", meta).model_dump()["block_size"] == 8
    assert choose_sampler("autoregressive temperature=0.5", meta).model_dump()["temperature"] == 0.5
    assert choose_sampler('{"name": "set_block", "block_size": 2}', meta).model_dump()["block_size"] == 2
    assert choose_sampler("", {}).name == "autoregressive"
    for wrong in ("set_blok", "set_block size=3", "{"):
        with pytest.raises(ConfigError):
            choose_sampler(wrong, meta)


def test_prompts_and_lengths_that_are_none(folder: str) -> None:
    model = TextModel.load(folder)
    with pytest.raises(ConfigError, match="empty prompt"):
        model.generate(["x", ""])
    with pytest.raises(ConfigError, match="nothing to generate"):
        model.generate(["x"], max_new_tokens=0)

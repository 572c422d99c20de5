"""Names that come from storage or a server never lead out of the folder they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_loaders.cache import NodeCache
from data_loaders.dataset import open_dataset
from data_loaders.manifest import FILE_NAME
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.layout import MARKER, read_checkpoint, step_folder
from raydist.core import storage
from raydist.core.dist import Workers, process_group
from raydist.core.errors import CheckpointError, ConfigError, DataError, RaydistError
from raydist.tracking.artifacts import parse_entries
from tests.checkpoint.cases import advance, make
from tests.security.fuzz_readers import canonical_sha256
from tests.training.cases import recipe_of, write_dataset

LEAVING = [
    "../escape", "a/../../escape", "/etc/escape", "..", ".", "", "a//b", "a/./b", "..\\escape", "C:escape", "a\x00b",
    "a\nb", "/",
]  # fmt: skip


@pytest.mark.parametrize("name", LEAVING)
def test_safe_name_refuses(name: str) -> None:
    with pytest.raises(RaydistError):
        storage.safe_name(name, where="a list")


@pytest.mark.parametrize("name", ["a", "a/b.c", "rank-0000.safetensors", "..a", "a..b", "ü"])
def test_safe_name_lets_plain_names_pass(name: str) -> None:
    assert storage.safe_name(name, where="a list") == name


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_dataset(tmp_path_factory.mktemp("dataset"))) / "train"


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("key", ["shard", "tokenizer"])
def test_a_manifest_cannot_name_files_outside(key: str, name: str, dataset: Path, tmp_path: Path) -> None:
    content = json.loads((dataset / FILE_NAME).read_bytes())
    del content["sha256"]
    if key == "shard":
        content["shards"][0]["name"] = name
    else:
        content["tokenizer_file"] = name
    (tmp_path / FILE_NAME).write_text(json.dumps({**content, "sha256": canonical_sha256(content)}))
    with pytest.raises(DataError, match="leaves its folder"):
        open_dataset(str(tmp_path), cache=NodeCache(str(tmp_path / "cache")))


def test_a_cached_shard_is_named_by_its_hash_which_is_one(dataset: Path, tmp_path: Path) -> None:
    content = json.loads((dataset / FILE_NAME).read_bytes())
    del content["sha256"]
    content["shards"][0]["raw_sha256"] = "../../escape"
    (tmp_path / FILE_NAME).write_text(json.dumps({**content, "sha256": canonical_sha256(content)}))
    with pytest.raises(DataError, match="manifest is damaged"):
        open_dataset(str(tmp_path), cache=NodeCache(str(tmp_path / "cache")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    model, optimizer = make()
    advance(model, optimizer)
    workers = Workers(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    with process_group(timeout_s=60.0), Checkpointer(str(run_dir), keep=1, workers=workers) as checkpointer:
        checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
    return Path(step_folder(str(run_dir), 1))


@pytest.mark.parametrize("name", LEAVING)
def test_a_marker_cannot_name_files_outside(name: str, checkpoint: Path) -> None:
    whole = (checkpoint / MARKER).read_bytes()
    content = json.loads(whole)
    content["files"][name] = content["files"].pop("metadata.json")
    (checkpoint / MARKER).write_text(json.dumps(content))
    try:
        with pytest.raises(CheckpointError):
            read_checkpoint(str(checkpoint))
    finally:
        (checkpoint / MARKER).write_bytes(whole)
    assert read_checkpoint(str(checkpoint)).step == 1


@pytest.mark.parametrize("name", LEAVING)
def test_an_artifact_list_cannot_name_files_outside(name: str) -> None:
    row: dict[str, Any] = {"name": "model/config.json", "size": 1, "sha256": "0" * 64, "uri": None}
    assert [entry.name for entry in parse_entries([row], where="a list")] == ["model/config.json"]
    with pytest.raises(RaydistError, match="leaves its folder"):
        parse_entries([{**row, "name": name}], where="a list")


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/b", ".hidden", "-x", "a\\b", "a b", "a\x00"])
def test_a_run_cannot_be_named_out_of_its_folder(name: str, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        recipe_of(str(dataset.parent), tmp_path, name=json.dumps(name))

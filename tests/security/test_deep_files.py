"""Files nested so deeply, or grown so fast, that a recursive reader would end the process or never end; odd scalars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_loaders.manifest import FILE_NAME, read_manifest
from raydist.checkpoint.checkpointer import Checkpointer
from raydist.checkpoint.files import record_of_bytes
from raydist.checkpoint.layout import MARKER, METADATA, TRAINER, step_folder
from raydist.config.cluster import load_cluster
from raydist.config.load import load_recipe, parse_overrides, read_yaml
from raydist.config.sweep import load_sweep
from raydist.core.dist import Workers, process_group
from raydist.core.errors import CheckpointError, ConfigError, DataError
from raydist.runtime.kuberay import read_cluster_file
from tests.checkpoint.cases import advance, make

DEEP = "[" * 100_000 + "]" * 100_000
NINE_TO_THE_EIGHTH = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 8)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [*a{level - 1}, *a{level - 1}]}}\n" for level in range(1, 60)
)
MERGED_WIDE = f"a: &a {{{', '.join(f'k{key}: 1' for key in range(2000))}}}\nb: {{<<: [{', '.join(['*a'] * 20_000)}]}}\n"
VALUES_THAT_PARSERS_CHOKE_ON = ("0x_", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "9" * 5000)
YAML_TEXTS = {
    "deep": f"a: {DEEP}",
    "deep in a list": f"- {DEEP}",
    "dashes": "- " * 50_000,
    "indented": "".join(" " * level + "a:\n" for level in range(900)),
    "long": f"a: {'x' * 2_000_000}",
    "in itself": "a: &a [*a]",
    "exploding": NINE_TO_THE_EIGHTH,
    "merging": MERGED,
    "merging much": MERGED_WIDE,
    "merging itself": "a: &a {<<: *a}",
    **{f"a: {value[:16]}": f"a: {value}" for value in VALUES_THAT_PARSERS_CHOKE_ON},
}


@pytest.mark.parametrize("text", YAML_TEXTS.values(), ids=YAML_TEXTS)
def test_yaml_readers_refuse(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (load_recipe, load_sweep):
        with pytest.raises(ConfigError):
            read(str(path))


@pytest.mark.parametrize("text", YAML_TEXTS.values(), ids=YAML_TEXTS)
def test_cluster_files_refuse(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_cluster_file(str(path))


@pytest.mark.parametrize("value", VALUES_THAT_PARSERS_CHOKE_ON, ids=lambda value: str(value[:16]))
def test_files_of_running_clusters_refuse(value: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(f"address: http://127.0.0.1:8265\noutput_dir: {value}\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(str(path))


@pytest.mark.parametrize("value", [DEEP, *VALUES_THAT_PARSERS_CHOKE_ON], ids=lambda value: str(value[:16]))
def test_overrides_refuse(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([f"a={value}"])
    assert len(str(caught.value)) < 1000


def test_a_manifest_refuses(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(DEEP)
    with pytest.raises(DataError, match="not JSON"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("name", [MARKER, METADATA, TRAINER, "rank-0000.safetensors"])
def test_a_checkpoint_refuses(name: str, tmp_path: Path) -> None:
    workers = Workers(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    model, optimizer = make()
    advance(model, optimizer)
    with process_group(timeout_s=60.0):
        with Checkpointer(str(tmp_path), keep=1, workers=workers) as checkpointer:
            checkpointer.save(1, model=model, optimizer=optimizer, trainer_state={})
        folder = Path(step_folder(str(tmp_path), 1))
        content = DEEP.encode()
        if name.endswith("safetensors"):
            content = len(content).to_bytes(8, "little") + content
        (folder / name).write_bytes(content)
        if name != MARKER:
            marker = json.loads((folder / MARKER).read_bytes())
            marker["files"][name] = record_of_bytes(content).to_json()
            (folder / MARKER).write_text(json.dumps(marker))
        with Checkpointer(str(tmp_path), keep=1, workers=workers) as checkpointer, pytest.raises(CheckpointError):
            checkpointer.load_newest(model, optimizer=optimizer)


def test_depth_is_counted_in_the_structure_and_not_in_texts(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(f"a: '{'[' * 500}'\nb: {'[' * 90}{']' * 90}\n")
    assert read_yaml(str(path))["a"] == "[" * 500


def test_an_anchor_shares_no_place_of_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: &pod {volumes: []}\nb: *pod\n")
    document = read_cluster_file(str(path))
    document["a"]["volumes"].append("x")
    assert document["b"] == {"volumes": []}


def test_merge_keys_of_a_cluster_file_still_merge(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: {inner: &pod {x: 1, y: 1}}\nb: &b {<<: *pod, y: 2}\nc: {<<: [*b, *pod], x: 3}\n")
    assert read_cluster_file(str(path)) == {
        "a": {"inner": {"x": 1, "y": 1}},
        "b": {"x": 1, "y": 2},
        "c": {"x": 3, "y": 2},
    }

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_loaders import assembly
from data_loaders import prepare as prepare_module
from data_loaders.cache import NodeCache
from data_loaders.dataset import open_dataset
from data_loaders.manifest import ShardEntry
from data_loaders.parts import PartTask, make_part
from data_loaders.prepare import prepare, serial_map
from data_loaders.prepare_settings import PrepareSettings
from data_loaders.shards import ShardColumns, write_shard
from data_loaders.sources import Fields
from data_loaders.verify import verify_dataset
from raydist.core.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    for index in range(60):
        (root / f"{index:02d}.txt").write_text(f"document {index} " * (index + 1))
    (root / "copy.txt").write_text("document 7 " * 8)
    (root / "binary.bin").write_bytes(b"\0\1")
    return root


@pytest.fixture
def settings(corpus: Path) -> PrepareSettings:
    return PrepareSettings((str(corpus),), "bytes", validation_fraction=0.2, shard_bytes=4096)


def texts_of(path: str, cache: NodeCache) -> list[str]:
    """Every document of a dataset, in order, with its end token."""
    dataset = open_dataset(path, cache=cache)
    tokenizer = dataset.tokenizer()
    found = []
    for index in range(len(dataset.manifest.shards)):
        shard = dataset.shard(index)
        for low, high in zip(shard.offsets_D[:-1], shard.offsets_D[1:], strict=True):
            found.append(tokenizer.decode(shard.tokens_T[low:high].tolist()))
    return found


def manifests(out: Path) -> list[bytes]:
    return [(out / split / "manifest.json").read_bytes() for split in ("train", "validation")]


def test_every_document_once_with_its_end(settings: PrepareSettings, tmp_path: Path, cache: NodeCache) -> None:
    out = tmp_path / "out"
    report = prepare(settings, out=str(out))
    expected = sorted(f"document {index} " * (index + 1) + "<|eos|>" for index in range(60))
    train, validation = (texts_of(str(out / split), cache) for split in ("train", "validation"))
    assert sorted(train + validation) == expected
    assert 3 <= len(validation) <= 25
    preparation = report.manifests["train"].preparation
    assert (preparation["duplicates_dropped"], preparation["files_skipped"], preparation["documents_read"]) == (
        1,
        1,
        61,
    )
    for split in ("train", "validation"):
        verify_dataset(str(out / split))
        manifest = report.manifests[split]
        assert sum(manifest.documents_by_log2_tokens) == manifest.num_documents
    sizes = [shard.tokens for shard in report.manifests["train"].shards]
    assert len(sizes) > 3
    assert max(sizes) <= 2048 + 900
    assert os.listdir(out) == ["train", "validation"] or sorted(os.listdir(out)) == ["train", "validation"]
    assert train != sorted(train)


def test_result_does_not_depend_on_names_or_grouping(
    settings: PrepareSettings, corpus: Path, tmp_path: Path, cache: NodeCache
) -> None:
    prepare(settings, out=str(tmp_path / "a"))
    lines = [json.dumps({"text": (corpus / f"{index:02d}.txt").read_text()}) for index in reversed(range(60))]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    prepare(replace(settings, sources=(str(tmp_path / "all.jsonl"),)), out=str(tmp_path / "b"))
    for split in ("train", "validation"):
        assert texts_of(str(tmp_path / "a" / split), cache) == texts_of(str(tmp_path / "b" / split), cache)


def test_split_does_not_move_when_documents_are_added(
    settings: PrepareSettings, corpus: Path, tmp_path: Path, cache: NodeCache
) -> None:
    prepare(settings, out=str(tmp_path / "a"))
    (corpus / "new.txt").write_text("something new")
    prepare(settings, out=str(tmp_path / "b"))
    before, after = (set(texts_of(str(tmp_path / name / "validation"), cache)) for name in "ab")
    assert before <= after
    assert after - before <= {"something new<|eos|>"}


def test_same_again_is_nothing_to_do_and_other_settings_are_refused(
    settings: PrepareSettings, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(settings, out=str(out))
    before = manifests(out)
    assert prepare(settings, out=str(out)).nothing_to_do
    assert manifests(out) == before
    for other in (replace(settings, append_eos=False), replace(settings, split_seed=1)):
        with pytest.raises(DataError, match="another dataset is in the way"):
            prepare(other, out=str(out))
    (corpus / "00.txt").write_text("changed")
    with pytest.raises(DataError, match="another dataset is in the way"):
        prepare(settings, out=str(out))
    assert manifests(out) == before
    assert not prepare(settings, out=str(out), overwrite=True).nothing_to_do
    assert manifests(out) != before


def test_interrupted_preparation_goes_on(
    settings: PrepareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_TASK_BYTES", 2000)
    prepare(settings, out=str(tmp_path / "straight"))
    made: list[str] = []
    written: list[str] = []

    def counting(folder: str, *, name: str, columns: ShardColumns) -> ShardEntry:
        written.append(f"{folder}/{name}")
        return write_shard(folder, name=name, columns=columns)

    monkeypatch.setattr(assembly, "write_shard", counting)

    def failing_map(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        for task in tasks:
            if len(made) in (3, 8):
                made.append("crash")
                raise KeyboardInterrupt
            made.append(task.path if isinstance(task, PartTask) else task.name)
            yield function(task)

    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, out=str(out), map_tasks=failing_map)
        assert not (out / "train" / "manifest.json").exists()
    report = prepare(settings, out=str(out), map_tasks=failing_map)
    assert report.num_parts_reused >= 6
    assert len(written) == len(set(written)) > 2
    assert manifests(out) == manifests(tmp_path / "straight")


@pytest.mark.parametrize("by", ["the same, to overwrite", "another one"])
def test_shards_that_were_replaced_since_an_interruption_are_written_again(
    settings: PrepareSettings, tmp_path: Path, by: str
) -> None:
    prepare(settings, out=str(tmp_path / "straight"))

    def interrupted(settings: PrepareSettings, *, after: int) -> None:
        num_shards = 0

        def map_tasks(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
            nonlocal num_shards
            for task in tasks:
                yield function(task)
                num_shards += not isinstance(task, PartTask)
                if num_shards == after:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(settings, out=str(tmp_path / "out"), map_tasks=map_tasks)

    interrupted(settings, after=3)
    if by == "another one":
        interrupted(replace(settings, shard_bytes=2 * settings.shard_bytes), after=1)
        prepare(settings, out=str(tmp_path / "out"))
    else:
        prepare(settings, out=str(tmp_path / "out"), overwrite=True)
    assert manifests(tmp_path / "out") == manifests(tmp_path / "straight")
    for split in ("train", "validation"):
        verify_dataset(str(tmp_path / "out" / split))


def test_a_part_with_a_record_is_whole(settings: PrepareSettings, corpus: Path, tmp_path: Path) -> None:
    """The record comes last, so a crash before it leaves nothing that is mistaken for a part."""
    tasks: list[PartTask] = []

    def catching_map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        tasks.extend(item for item in items if isinstance(item, PartTask))
        return serial_map(function, items)

    work = tmp_path / "work"
    with pytest.raises(DataError, match="no document is left"):
        prepare(
            replace(settings, validation_fraction=0.999999),
            out=str(tmp_path / "out"),
            map_tasks=catching_map,
            work_dir=str(work),
        )
    [task] = tasks
    record = Path(task.path + ".json")
    record.unlink()
    Path(task.path).write_bytes(b"half")
    assert make_part(task).num_documents == 61
    assert record.exists()


def test_prompts_become_a_loss_mask(tmp_path: Path, cache: NodeCache) -> None:
    (tmp_path / "d.jsonl").write_text('{"ask": "12", "text": "345"}\n{"ask": "", "text": "67"}\n')
    settings = PrepareSettings(
        (str(tmp_path / "d.jsonl"),), "bytes", fields=Fields(prompt="ask"), validation_fraction=0, append_bos=True
    )
    prepare(settings, out=str(tmp_path / "out"))
    shard = open_dataset(str(tmp_path / "out" / "train"), cache=cache).shard(0)
    found = {}
    mask = shard.mask_rows(np.array([0]), seq_len=len(shard.tokens_T) - 1)[0]
    for low, high in zip(shard.offsets_D[:-1], shard.offsets_D[1:], strict=True):
        found[tuple(shard.tokens_T[low:high].tolist())] = mask[low:high].tolist()
    assert found == {
        (256, 49, 50, 51, 52, 53, 257): [False] * 3 + [True] * 4,
        (256, 54, 55, 257): [True] * 4,
    }


def test_trained_tokenizer_does_not_see_validation(corpus: Path, tmp_path: Path) -> None:
    settings = PrepareSettings((str(corpus),), "bpe:270", validation_fraction=0.5)
    seen = "".join(prepare_module._training_texts(settings, prepare_module.find_files(settings.sources)))
    report = prepare(settings, out=str(tmp_path / "out"))
    held_out = texts_of(str(tmp_path / "out" / "validation"), NodeCache(str(tmp_path / "cache")))
    assert report.manifests["train"].tokenizer_kind == "bpe"
    assert not any(text.removesuffix("<|eos|>")[:13] in seen for text in held_out if len(text) > 300)


def test_no_text_and_no_documents_left(tmp_path: Path, settings: PrepareSettings) -> None:
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match="no text"):
        prepare(replace(settings, sources=(str(tmp_path / "x.bin"),)), out=str(tmp_path / "out"))


def test_commands(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from raydist.cli.main import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = str(tmp_path / "out")
    command = [
        "data",
        "prepare",
        str(corpus),
        "--out",
        out,
        "--tokenizer",
        "bytes",
        "--serial",
        "--exclude",
        "copy.txt",
    ]
    assert main([*command, "--validation-fraction", "0.2", "--shard-size", "4KiB", "--json"]) == 0
    prepared = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert prepared["splits"]["train"]["documents"] + prepared["splits"]["validation"]["documents"] == 60
    assert main(["data", "inspect", out, "--seq-len", "64", "--steps", "10", "--batch-rows", "4", "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out.splitlines()[-1])["datasets"][f"{out}/train"]
    assert inspected["epochs"] == pytest.approx(40 / inspected["num_rows"])
    assert main(["data", "verify", out]) == 0
    assert "all whole" in capsys.readouterr().out
    shown = _show(
        ["data", "show", f"{out}/train", "--step", "2", "--batch-rows", "3", "--seq-len", "64", "--seed", "5"], capsys
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(
        f"""
seed: 5
data: {{train: [{{path: {out}/train, weight: 1.0}}], seq_len: 64, cache_dir: null, cache_limit: 1GiB, shuffle_window_shards: 8}}
training: {{batch_rows: 3}}
"""
    )
    for words in (["--run", str(run_dir)], [str(run_dir)]):
        assert _show(["data", "show", *words, "--step", "2"], capsys) == shown
    assert len(shown["rows"]) == 3
    damaged = Path(out, "train", "shard-00001.arrow.zst")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["data", "verify", out]) == 2
    assert "shard-00001.arrow.zst" in capsys.readouterr().err
    assert main(["data", "show", "--step", "0"]) == 2


def _show(command: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    from raydist.cli.main import main

    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])

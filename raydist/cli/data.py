"""``raydist data prepare|inspect|verify|show``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from raydist.cli.output import next_commands, say, table

if TYPE_CHECKING:
    from data_loaders.manifest import Manifest
    from data_loaders.mixture import Mixture
    from data_loaders.prepare import MapTasks
    from data_loaders.prepare_settings import PrepareSettings

_SHOWN_CHARACTERS = 400


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the four sub-verbs."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    _configure_prepare(verbs.add_parser("prepare", help="raw text, code, jsonl(.zst), parquet -> shards"))
    inspect = verbs.add_parser("inspect", help="rows, tokens, what is dropped, how often each row is read")
    inspect.add_argument("dataset", help="dataset directory, or the folder that holds train/ and validation/")
    inspect.add_argument("--seq-len", type=int, default=512)
    inspect.add_argument("--steps", type=int, help="optimizer steps of the run")
    inspect.add_argument("--batch-rows", type=int, help="rows of a step over all workers")
    verify = verbs.add_parser("verify", help="read everything and check hashes, boundaries and ids")
    verify.add_argument("dataset", help="dataset directory, or the folder that holds train/ and validation/")
    show = verbs.add_parser("show", help="print the documents that a step read")
    show.add_argument("dataset", nargs="?", help="dataset or run directory; or use --run")
    show.add_argument("--run", metavar="RUN_DIR", help="take everything from a run's config.yaml")
    show.add_argument("--step", type=int, required=True, help="counted from 0: step N is N + 1 in curves and progress")
    show.add_argument("--batch-rows", type=int, default=8)
    show.add_argument("--seq-len", type=int, default=512)
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--window-shards", type=int, default=8, help="data.shuffle_window_shards of the run")
    show.add_argument("--full", action="store_true", help="print whole texts")


def _configure_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", help="folder, glob or file; local or s3://")
    parser.add_argument("--out", required=True, help="folder or bucket prefix; gets train/ and validation/")
    parser.add_argument(
        "--tokenizer", required=True, help="bytes, bpe:SIZE (trained here), a tokenizer.json, or a tiktoken rank file"
    )
    parser.add_argument("--name", help="name of the dataset; default: last part of --out")
    parser.add_argument("--include", action="extend", nargs="+", default=[], metavar="PATTERN", help="'*.py' 'docs/*'")
    parser.add_argument("--exclude", action="extend", nargs="+", default=[], metavar="PATTERN", help="'*/test/*'")
    parser.add_argument("--text-field", default="text", help="field of jsonl and parquet that holds the text")
    parser.add_argument("--prompt-field", help="field that comes before the text and is never a target")
    parser.add_argument("--validation-fraction", type=_fraction, default=0.02, help="share of documents kept apart")
    parser.add_argument("--split-seed", type=int, default=0, help="keys the split and the order of documents")
    parser.add_argument("--shard-size", default="64MiB", help="size of a plain shard")
    parser.add_argument("--bos", action="store_true", help="begin each document with the tokenizer's begin token")
    parser.add_argument("--no-eos", action="store_true", help="do not end each document with the end token")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset of other settings")
    parser.add_argument("--work-dir", help="folder for unfinished work, shared by all workers; default: inside --out")
    executor = parser.add_mutually_exclusive_group()
    executor.add_argument("--serial", action="store_true", help="one process, without Ray")
    executor.add_argument("--ray-address", help="a running cluster; default: a Ray on this machine for this command")
    parser.add_argument("--num-cpus", type=int, help="CPUs of the Ray on this machine; default: all")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the chosen sub-verb."""
    verbs: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "prepare": _prepare,
        "inspect": _inspect,
        "verify": _verify,
        "show": _show,
    }
    return verbs[args.data_verb](args)


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    from data_loaders.prepare import prepare
    from raydist.core import storage

    out = storage.normalize(args.out)
    with _executor(args) as map_tasks:
        report = prepare(
            _settings(args, out),
            out=out,
            map_tasks=map_tasks,
            overwrite=args.overwrite,
            work_dir=args.work_dir,
            progress=_Progress(),
        )
    manifests = report.manifests
    if report.nothing_to_do:
        say(f"{out} is already prepared with these settings")
    _table_of_splits(manifests)
    preparation = manifests["train"].preparation
    say(
        f"{preparation['files']} files ({preparation['files_skipped']} without text), "
        f"{preparation['documents_read']} documents, {preparation['duplicates_dropped']} exact duplicates dropped"
    )
    if "validation" not in manifests:
        say("no document fell into the validation split")
    next_commands(
        [
            ("what a run would read", f"raydist data inspect {args.out}"),
            ("train on it", f"raydist train RECIPE data.train={args.out}/train"),
        ]
    )
    return {
        "out": out,
        "nothing_to_do": report.nothing_to_do,
        "num_parts_reused": report.num_parts_reused,
        "splits": {split: _summary(manifest) for split, manifest in manifests.items()},
        "preparation": preparation,
    }


def _settings(args: argparse.Namespace, out: str) -> PrepareSettings:
    from data_loaders.prepare_settings import PrepareSettings
    from data_loaders.sources import Fields
    from raydist.core.units import parse_bytes

    return PrepareSettings(
        sources=tuple(args.source),
        tokenizer=args.tokenizer,
        name=args.name or out.rstrip("/").split("/")[-1],
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        fields=Fields(text=args.text_field, prompt=args.prompt_field),
        validation_fraction=args.validation_fraction,
        split_seed=args.split_seed,
        shard_bytes=parse_bytes(args.shard_size, where="--shard-size"),
        append_bos=args.bos,
        append_eos=not args.no_eos,
    )


@contextmanager
def _executor(args: argparse.Namespace) -> Iterator[MapTasks]:
    if args.serial:
        from data_loaders.prepare import serial_map

        yield serial_map
        return
    from raydist.runtime.data_tasks import ray_tasks

    with ray_tasks(address=args.ray_address, num_cpus=args.num_cpus) as map_tasks:
        yield map_tasks


class _Progress:
    """Prints a stage's progress at every tenth of it."""

    def __init__(self) -> None:
        self._last: tuple[str, int] = ("", -1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if (stage, tenth) != self._last:
            self._last = (stage, tenth)
            say(f"  {stage}: {done} of {total}")


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    from data_loaders.inspect import describe_reading, length_histogram
    from raydist.core.units import format_count

    result = {}
    for path, manifest in _manifests(args.dataset).items():
        reading = describe_reading(manifest, seq_len=args.seq_len, num_steps=args.steps, batch_rows=args.batch_rows)
        say(
            f"{path}: {manifest.name}, {manifest.split} split, "
            f"tokenizer {manifest.tokenizer_kind} of {manifest.vocab_size}"
        )
        facts: list[tuple[str, Any]] = [
            ("documents", manifest.num_documents),
            ("tokens", f"{manifest.num_tokens} ({format_count(manifest.num_tokens)})"),
            ("shards", len(manifest.shards)),
            (f"rows of {args.seq_len} tokens", reading.num_rows),
            ("tokens dropped at ends of shards", reading.tokens_dropped),
            ("shards too short for a row", reading.shards_too_short),
        ]
        if reading.epochs is not None:
            facts.append((f"times each row is read in {args.steps} steps", f"{reading.epochs:.2f}"))
        table(["", "value"], facts)
        say("tokens per document         documents")
        for line in length_histogram(manifest):
            say("  " + line)
        say()
        result[path] = {**_summary(manifest), **asdict(reading)}
    return {"datasets": result}


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from data_loaders.verify import verify_dataset

    result = {}
    for path in _manifests(args.dataset):
        report = verify_dataset(path)
        say(
            f"{path}: {report.num_shards} shards, {report.num_documents} documents, "
            f"{report.num_tokens} tokens: all whole"
        )
        result[path] = asdict(report)
    return {"datasets": result}


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from data_loaders.show import step_documents

    mixture, batch_rows = _mixture(args)
    rows = step_documents(mixture, first_sample=args.step * batch_rows, num_rows=batch_rows)
    say(f"step {args.step} ({args.step + 1} in curves and progress)")
    for row in rows:
        say(f"row {row.row}, epoch {row.epoch}, {row.dataset}")
        for segment in row.segments:
            text = segment.text if args.full else segment.text[:_SHOWN_CHARACTERS]
            say(f"  {segment.document_id} ({segment.num_tokens} tokens)")
            say("\n".join("    " + line for line in text.splitlines()))
    return {"step": args.step, "manifest_hash": mixture.sha256, "rows": [asdict(row) for row in rows]}


def _mixture(args: argparse.Namespace) -> tuple[Mixture, int]:
    """The training mixture and batch of a run directory, or of the flags."""
    from data_loaders.cache import NodeCache
    from data_loaders.mixture import DatasetWeight, open_mixture
    from raydist.core import storage
    from raydist.core.errors import ConfigError
    from raydist.core.units import parse_bytes
    from raydist.training.run_dir import CONFIG

    if (args.run is None) == (args.dataset is None):
        raise ConfigError("name either a dataset or a run", where="raydist data show", expected="DIR, or --run RUN_DIR")
    run_dir = args.run
    if run_dir is None and storage.exists(storage.join(args.dataset, CONFIG)):
        run_dir = args.dataset
    if run_dir is None:
        mixture = open_mixture(
            [DatasetWeight(args.dataset)],
            cache=NodeCache(),
            seq_len=args.seq_len,
            seed=args.seed,
            window_shards=args.window_shards,
        )
        return mixture, args.batch_rows
    config = _run_config(run_dir)
    data = config["data"]
    mixture = open_mixture(
        [DatasetWeight(part["path"], part["weight"]) for part in data["train"]],
        cache=NodeCache(data["cache_dir"], limit_bytes=parse_bytes(data["cache_limit"], where="data.cache_limit")),
        seq_len=data["seq_len"],
        seed=config["seed"],
        window_shards=data["shuffle_window_shards"],
    )
    return mixture, config["training"]["batch_rows"]


def _run_config(run_dir: str) -> dict[str, Any]:
    """The resolved configuration that a run wrote."""
    from raydist.config.load import read_yaml
    from raydist.core import storage
    from raydist.core.errors import ConfigError
    from raydist.training.run_dir import CONFIG

    path = storage.join(run_dir, CONFIG)
    if not storage.exists(path):
        raise ConfigError("this is not a run directory", where=run_dir, found=f"no {CONFIG}")
    return read_yaml(path)


def _manifests(path: str) -> dict[str, Manifest]:
    """A dataset's manifest, or those of the splits below a folder."""
    from data_loaders.manifest import FILE_NAME, read_manifest
    from data_loaders.prepare import SPLITS
    from raydist.core import storage

    folders = [storage.join(path, split) for split in SPLITS]
    folders = [folder for folder in folders if storage.exists(storage.join(folder, FILE_NAME))]
    return {folder: read_manifest(folder) for folder in folders or [path]}


def _table_of_splits(manifests: dict[str, Manifest]) -> None:
    columns = ["split", "shards", "documents", "tokens", "vocabulary"]
    rows = [[m.split, len(m.shards), m.num_documents, m.num_tokens, m.vocab_size] for m in manifests.values()]
    table(columns, sorted(rows))


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "split": manifest.split,
        "shards": len(manifest.shards),
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "vocab_size": manifest.vocab_size,
        "special_ids": asdict(manifest.special_ids),
        "sha256": manifest.sha256,
    }


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value

"""``raydist export``: a model as a directory that ``transformers`` loads, and as a version in MLflow's model registry."""

from __future__ import annotations

import argparse
from typing import Any

from raydist.cli.output import next_commands, say
from raydist.cli.runs import add_server_arguments, find_run_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("run", metavar="RUN", help="a run's name or directory, or a Hugging Face directory")
    parser.add_argument("--to", metavar="DIR", help="where to; an earlier export there is replaced")
    parser.add_argument(
        "--register", metavar="NAME", help="make it a version of this registered model, on the MLflow that has the run"
    )
    add_server_arguments(parser)
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="limit of one weight file (default: 5GB)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb.

    Raises:
        ConfigError: neither a folder nor a name was given, or the folder is the source itself.
    """
    from raydist.core.errors import ConfigError

    if args.to is None and args.register is None:
        raise ConfigError("nowhere to export to", where="--to", expected="--to DIR, --register NAME, or both")
    result = {} if args.to is None else _export(args)
    if args.register is not None:
        result["registered"] = _register(args)
    return result


def _register(args: argparse.Namespace) -> dict[str, Any]:
    from raydist.cli.locate import find_model_dir
    from raydist.core.units import parse_bytes
    from raydist.serving.register import register_export

    found = find_run_of(args)
    source = args.to or find_model_dir(args.run, output_dir=args.output_dir)
    key = "tracking.max_artifact"
    max_bytes = parse_bytes(found.params.get(key, "2GiB"), where=key)
    version = register_export(found, export=source, name=args.register, max_bytes=max_bytes)
    say(f"{'registered' if version.is_new else 'already registered'}: {version.uri} at {found.uri}")
    load = f'python -c \'import mlflow; mlflow.pyfunc.load_model("{version.uri}").predict(["Once"])\''
    next_commands([("load it", f"MLFLOW_TRACKING_URI={found.uri} {load}")])
    return {"name": version.name, "version": version.version, "uri": version.uri, "is_new": version.is_new}


def _export(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from raydist.cli.locate import find_model_dir
    from raydist.core import storage
    from raydist.core.errors import ConfigError
    from raydist.core.units import format_bytes, format_count, parse_bytes
    from raydist.models.hf import HfWeights, load_decoder, read_hf_config, read_meta, save_hf

    max_shard_bytes = parse_bytes(args.max_shard_size, where="--max-shard-size")
    source = find_model_dir(args.run, output_dir=args.output_dir)
    if storage.normalize(args.to) == source:
        raise ConfigError("source and target are the same folder", where="--to", found=args.to, fix="choose another")
    with storage.fetched(source) as local:
        config = read_hf_config(local)
        meta = read_meta(local)
        tokenizer_path = storage.join(local, "tokenizer.json")
        save_hf(
            args.to,
            state=HfWeights(local, config),
            config=config,
            tokenizer_json=storage.read_bytes(tokenizer_path).decode() if storage.exists(tokenizer_path) else None,
            token_ids=meta["token_ids"],
            extra=meta,
            max_shard_bytes=max_shard_bytes,
            dtype=getattr(torch, args.dtype),
        )
    with storage.fetched(args.to) as written:
        load_decoder(written, dtype=getattr(torch, args.dtype))
    files = storage.list_names(args.to)
    num_bytes = sum(storage.size_bytes(storage.join(args.to, name)) for name in files)
    say(f"{format_count(float(config.num_parameters))} parameters, {format_bytes(num_bytes)}, {args.dtype}: {args.to}")
    say("  " + "  ".join(files))
    next_commands([("sample", f"raydist sample {args.to} --prompt 'Once'")])
    return {"directory": args.to, "files": files, "num_bytes": num_bytes, "num_parameters": config.num_parameters}

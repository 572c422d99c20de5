"""``raydist export``: a model as a directory that ``transformers`` loads."""

from __future__ import annotations

import argparse
from typing import Any

from raydist.cli.output import next_commands, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("run", metavar="RUN", help="a run's name or directory, or a Hugging Face directory")
    parser.add_argument("--to", required=True, metavar="DIR", help="where to; an earlier export there is replaced")
    parser.add_argument("--output-dir", default="runs", help="where runs are looked up by name (default: runs)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="limit of one weight file (default: 5GB)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
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
    config = read_hf_config(source)
    meta = read_meta(source)
    tokenizer_path = storage.join(source, "tokenizer.json")
    save_hf(
        args.to,
        state=HfWeights(source, config),
        config=config,
        tokenizer_json=storage.read_bytes(tokenizer_path).decode() if storage.exists(tokenizer_path) else None,
        token_ids=meta["token_ids"],
        extra=meta,
        max_shard_bytes=max_shard_bytes,
        dtype=getattr(torch, args.dtype),
    )
    load_decoder(args.to, dtype=getattr(torch, args.dtype))
    files = storage.list_names(args.to)
    num_bytes = sum(storage.size_bytes(storage.join(args.to, name)) for name in files)
    say(f"{format_count(float(config.num_parameters))} parameters, {format_bytes(num_bytes)}, {args.dtype}: {args.to}")
    say("  " + "  ".join(files))
    next_commands([("sample", f"raydist sample {args.to} --prompt 'Once'")])
    return {"directory": args.to, "files": files, "num_bytes": num_bytes, "num_parameters": config.num_parameters}

"""``raydist list``: what a recipe may choose by name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from raydist.cli.output import table

if TYPE_CHECKING:
    from raydist.config.base import Registry


# names of registries in raydist/config/registries.py, in lower case
_KINDS = ("objectives", "paths", "schedules", "sources", "couplings", "samplers", "unmasking")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("what", choices=[*_KINDS, "models"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    if args.what == "models":
        return {"models": _models()}
    from raydist.config import registries

    registry: Registry = getattr(registries, args.what.upper())
    described = registry.describe()
    table([registry.kind, "what it is"], list(described.items()))
    return {args.what: described}


def _models() -> dict[str, Any]:
    from raydist.core.units import format_count
    from raydist.models.presets import PRESETS

    rows = {name: preset for name, preset in PRESETS.items()}
    table(
        ["model", "family", "parameters", "layers", "width", "vocabulary"],
        [
            [
                name,
                c.family,
                format_count(float(c.num_parameters)),
                c.num_layers,
                c.width,
                c.vocab_size or "of the data",
            ]
            for name, c in rows.items()
        ],
    )
    return {name: c.num_parameters for name, c in rows.items()}

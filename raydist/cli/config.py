"""``raydist config``: what a recipe resolves to, and the schema that editors complete from."""

from __future__ import annotations

import argparse
import json
from typing import Any

from raydist.cli.output import say


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    verbs = parser.add_subparsers(dest="config_verb", metavar="WHAT", required=True)
    show = verbs.add_parser("show", help="print the recipe with every default and override resolved")
    show.add_argument("recipe")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    verbs.add_parser("schema", help="print the JSON schema of recipes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    if args.config_verb == "schema":
        from raydist.config.schema import RunConfig

        schema = RunConfig.model_json_schema()
        say(json.dumps(schema, indent=2))
        return {"schema": schema}
    from raydist.config.load import dump_yaml, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    say(dump_yaml(recipe.config).rstrip())
    say(f"# config hash: {recipe.config_hash}")
    return {"config": recipe.config.model_dump(mode="json"), "config_hash": recipe.config_hash}

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
    schema = verbs.add_parser("schema", help="print the JSON schema of recipes")
    schema.add_argument("--sweep", action="store_true", help="of sweep files instead")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb."""
    if args.config_verb == "schema":
        schema = _sweep_schema() if args.sweep else _recipe_schema()
        say(json.dumps(schema, indent=2))
        return {"schema": schema}
    from raydist.config.load import dump_yaml, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    say(dump_yaml(recipe.config).rstrip())
    say(f"# config hash: {recipe.config_hash}")
    return {"config": recipe.config.model_dump(mode="json"), "config_hash": recipe.config_hash}


def _recipe_schema() -> dict[str, Any]:
    from raydist.config.schema import RunConfig

    return RunConfig.model_json_schema()


def _sweep_schema() -> dict[str, Any]:
    from raydist.config.sweep_json_schema import sweep_json_schema

    return sweep_json_schema()

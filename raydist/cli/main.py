"""``raydist VERB ...``: one verb per module, errors as one screen, ``--json`` as the last line of stdout."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from raydist import __version__
from raydist.cli import output
from raydist.core.errors import RaydistError

# verb -> (module, one line of help); a verb's module is imported only when it is called.
VERBS = {
    "data": ("raydist.cli.data", "prepare, inspect, verify or show a token dataset"),
    "train": ("raydist.cli.train", "train a recipe on an embedded or a running Ray cluster"),
    "sweep": ("raydist.cli.sweep", "train trials of a recipe with Ray Tune, and rank them"),
    "submit": ("raydist.cli.submit", "send a recipe to a cluster as one Ray job"),
    "status": ("raydist.cli.status", "how runs are doing, from their directories and the cluster"),
    "logs": ("raydist.cli.logs", "what a job prints"),
    "stop": ("raydist.cli.stop", "save and stop a job, so that it can go on later"),
    "preflight": ("raydist.cli.preflight", "check a cluster, its storage and MLflow before a run"),
    "sample": ("raydist.cli.sample", "continue prompts with a trained model, by any sampler"),
    "runs": ("raydist.cli.runs", "list and show tracked runs"),
    "artifacts": ("raydist.cli.artifacts", "list and pull a run's artifacts"),
    "export": ("raydist.cli.export", "write a Hugging Face directory that transformers loads"),
    "config": ("raydist.cli.config", "show a resolved recipe, or the JSON schema of recipes"),
    "list": ("raydist.cli.list", "list objectives, paths, schedules, samplers, models, ..."),
}


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser of all verbs, with the arguments of one of them."""
    parser = argparse.ArgumentParser(
        prog="raydist", description="Train, on Ray, language models that decode in parallel, and use them."
    )
    parser.add_argument("--version", action="version", version=f"raydist {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, help_text) in VERBS.items():
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        if name == verb:
            importlib.import_module(module).configure(sub)
            _add_common(sub)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """``--json`` on a verb and on each of its own sub-verbs."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in nested:
        for sub in action.choices.values():
            _add_common(sub)
    if not nested:
        parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Like ``parse_args``, but ``key=value`` overrides may also stand behind options, where argparse gives up on them."""
    args, left = parser.parse_known_args(arguments)
    if left and hasattr(args, "overrides") and all(_is_override(word) for word in left):
        args.overrides = [*args.overrides, *left]
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def _is_override(word: str) -> bool:
    return word.startswith("+") or ("=" in word and not word.startswith("-"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 2 for a mistake that the user can mend, or what the verb says."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in arguments if not word.startswith("-")), None)
    parser = build_parser(verb)
    if verb is not None and verb not in VERBS:
        from raydist.config.base import nearest_hint

        parser.error(f"no verb {verb!r}: {nearest_hint(verb, VERBS) or 'expected one of ' + ', '.join(VERBS)}")
    args = _parse(parser, arguments)
    as_json = bool(getattr(args, "json", False))
    output.set_json_mode(as_json)
    if verb not in ("list", "config"):
        from raydist.core.log import quiet_libraries, set_up_logging

        quiet_libraries()
        set_up_logging()
    module = importlib.import_module(VERBS[args.verb][0])
    try:
        result = module.run(args)
    except RaydistError as error:
        print(error, file=sys.stderr)
        if as_json:
            print(json.dumps({"error": type(error).__name__, **error.fields()}))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    exit_code = int(result.pop("exit_code", 0))
    if as_json:
        print(json.dumps(result))
    return exit_code


def entry_point() -> None:
    """The ``raydist`` command."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()

"""The sweep that docs/sweeps.md shows: paths and schedules with early stopping, then samplers on its winner.

    python jobs/sweep_gallery.py [--num-steps 600] [--out docs/pictures/sweeps] [--doc docs/sweeps.md]
    python jobs/sweep_gallery.py --redraw        the page's section again, from the results as they are

About ten minutes on two cores. The text is the interpreter's own character tables, byte by byte. It writes the pictures,
``results.json`` with every number, and the marked section of the page, so that no number there is typed by hand.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from raydist.cli.main import main as raydist
from raydist.cli.output import say
from raydist.core.units import format_count, format_duration
from raydist.evaluation.sweep_records import Goal, TrialRecord, pareto_front
from raydist.tracking.jsonl import read_curve

TABLES = "runs/data/python-tables"
OUTPUT_DIR = "runs/gallery"
TRAINING, SAMPLING = "gallery-paths", "gallery-flow-sampler"
PACKAGES = ("raydist", "torch", "ray", "mlflow")
BOUND = "validation/bound_nats_per_token"
GOALS = [Goal("accuracy", "max"), Goal("tokens_per_forward", "max")]
_ABOVE_GUESSING = (
    " Above 8 bits a bound says less than a guess would: where such a path is nearly done its rates are high, and a model that "
    "still leaves a little probability to wrong bytes there pays for it."
)
BEGIN, END = "<!-- begin: python jobs/sweep_gallery.py -->", "<!-- end -->"


def run(*command: str) -> float:
    """Shows a command, runs it, and ends everything if it fails; returns its seconds."""
    say(f"\n$ raydist {shlex.join(command)}")
    started = time.monotonic()
    exit_code = raydist(command)
    if exit_code:
        sys.exit(exit_code)
    return time.monotonic() - started


def sweep(file: str, name: str, *words: str) -> tuple[Path, float]:
    """Runs a sweep anew; returns its directory and its seconds."""
    shutil.rmtree(f"{OUTPUT_DIR}/{name}", ignore_errors=True)
    return Path(OUTPUT_DIR, name), run("sweep", file, *words, f"name={name}", f"output_dir={OUTPUT_DIR}")


def keep_pictures(folder: Path, out: Path, prefix: str) -> None:
    """Copies a sweep's pictures to where the page has them."""
    out.mkdir(parents=True, exist_ok=True)
    for picture in sorted((folder / "pictures").iterdir()):
        shutil.copyfile(picture, out / f"{prefix}_{picture.name}")


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found, "num_cpus": str(os.cpu_count())}


def measure(out: Path, *, num_steps: int) -> dict[str, Any]:
    """Runs both sweeps; returns the results."""
    encodings = os.path.join(sysconfig.get_paths()["stdlib"], "encodings")
    run("data", "prepare", encodings, "--out", TABLES, "--tokenizer", "bytes", "--include", "*.py",
        "--validation-fraction", "0.05")  # fmt: skip
    words = ["+gallery", f"budget.num_steps={num_steps}", *_shortened(num_steps)]
    folder, training_s = sweep("sweeps/schedulers_and_paths.yaml", TRAINING, *words)
    keep_pictures(folder, out, "paths")
    training = results_of_training(folder)
    winner = f"checkpoint={training['best']['run_dir']}"
    sampler_folder, sampling_s = sweep("sweeps/flow_sampler.yaml", SAMPLING, winner)
    keep_pictures(sampler_folder, out, "samplers")
    return {
        "versions": versions(),
        "training": {**training, "wall_s": round(training_s, 1)},
        "sampling": {**results_of_samplers(sampler_folder), "wall_s": round(sampling_s, 1)},
    }


def _shortened(num_steps: int) -> list[str]:
    """For a quick look: rungs and validations where a shorter run has them."""
    if num_steps >= 600:
        return []
    every = max(1, num_steps // 12)
    keys = ("training.validate_every_steps", "training.log_every_steps", "checkpoint.every_steps")
    return [*(f"{key}={every}" for key in keys), f"scheduler.grace_steps={2 * every}"]


def results_of_training(folder: Path) -> dict[str, Any]:
    """What the trials reached, in bits per byte (a token is a byte), and what early stopping saved."""
    spec = yaml.safe_load((folder / "sweep.yaml").read_text())
    ranking = json.loads((folder / "ranking.json").read_text())
    rung, num_steps = spec["scheduler"]["grace_steps"], spec["budget"]["num_steps"]
    trials = []
    for entry in ranking:
        bound = dict(read_curve(str(folder / entry["trial"] / "metrics.jsonl")).get(BOUND, []))
        trials.append(
            {
                **names_of(entry["parameters"]),
                "state": entry["state"],
                "step": entry["step"],
                "bits_at_rung": _bits(bound.get(rung)),
                "bits": _bits(entry[BOUND]),
            }
        )
    best = json.loads((folder / "best.json").read_text())["trial"]
    return {
        "num_parameters": _num_parameters(folder / best / "export"),
        "num_steps": num_steps,
        "rung": rung,
        "reduction_factor": spec["scheduler"]["reduction_factor"],
        "steps_run": sum(trial["step"] for trial in trials),
        "steps_of_all": num_steps * len(trials),
        "trials": trials,
        "best": {**trials[0], "run_dir": str(folder / best)},
    }


def results_of_samplers(folder: Path) -> dict[str, Any]:
    """What each setting of the sampler reached, and which of them no other one beats in both goals."""
    entries = json.loads((folder / "ranking.json").read_text())
    records = [
        TrialRecord(
            name=entry["trial"],
            parameters=entry["parameters"],
            state=entry["state"],
            curve={goal.metric: [(1, entry[goal.metric])] for goal in GOALS},
        )
        for entry in entries
    ]
    on_front = {record.name for record in pareto_front(records, GOALS)}
    trials = [
        {
            "num_steps": entry["parameters"]["sampling.sampler.num_steps"],
            "temperature": entry["parameters"]["sampling.sampler.temperature"],
            **{goal.metric: round(entry[goal.metric], 4) for goal in GOALS},
            "on_front": entry["trial"] in on_front,
        }
        for entry in entries
    ]
    return {"trials": sorted(trials, key=lambda trial: (trial["num_steps"], trial["temperature"]))}


def names_of(parameters: Mapping[str, Any]) -> dict[str, str]:
    """A trial's path and what it varies beside that, as the page calls them."""
    path, schedule = parameters["objective.path"], parameters.get("objective.path.schedule")
    name = f"{path['source']['name']} mixture" if path["name"] == "mixture" else path["name"].replace("_", "-")
    if schedule is None:
        return {"path": name, "setting": f"c = {parameters['objective.path.beta.c']:g}"}
    power = f" {schedule['power']:g}" if "power" in schedule else ""
    return {"path": name, "setting": schedule["name"].replace("_", " ") + power}


def _bits(nats: float | None) -> float | None:
    return None if nats is None else round(nats / math.log(2), 4)


def _num_parameters(export: Path) -> int:
    """Of all weight files of a model: the decoder's own, and what its objective added."""
    count = 0
    for file in export.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def render(results: Mapping[str, Any], *, pictures: str) -> str:
    """The page's section."""
    parts = [*_training_section(results, pictures), *_sampling_section(results, pictures)]
    return "\n\n".join(_wrapped(part) for part in parts)


def _wrapped(part: str) -> str:
    """A paragraph in lines; commands, tables and pictures as they are."""
    is_text = part[0] not in " |!"
    return textwrap.fill(part, width=128, break_long_words=False, break_on_hyphens=False) if is_text else part


def _training_section(results: Mapping[str, Any], pictures: str) -> list[str]:
    training, versions = results["training"], results["versions"]
    states, rung = Counter(trial["state"] for trial in training["trials"]), training["rung"]
    measured = [trial for trial in training["trials"] if trial["bits_at_rung"] is not None]
    paths = {trial["path"]: [one for one in measured if one["path"] == trial["path"]] for trial in measured}
    ranges = {path: sorted(one["bits_at_rung"] for one in trials) for path, trials in paths.items()}
    ordered = sorted(ranges.items(), key=lambda item: item[1][0])
    best, share = training["best"], training["steps_run"] / training["steps_of_all"]
    rows = [
        f"| {trial['path']} | {trial['setting']} | {_cell(trial['bits_at_rung'])} | {_cell(trial['bits'])} "
        f"| {trial['step']} | {trial['state']} |"
        for trial in training["trials"]
    ]
    return [
        f"    raydist sweep sweeps/schedulers_and_paths.yaml +gallery name={TRAINING} output_dir={OUTPUT_DIR}",
        f"{len(training['trials'])} trials of a model with {format_count(training['num_parameters'])} parameters, "
        f"{training['num_steps']} steps each, on the interpreter's character tables, byte by byte; "
        f"{format_duration(results['training']['wall_s'])} on {versions['num_cpus']} cores "
        f"(Python {versions['python']}, torch {versions['torch']}, Ray {versions['ray']}). "
        f"{states['finished']} came to the last step, {states['stopped']} were stopped early"
        + (f", {states['failed']} failed" if states["failed"] else "")
        + f": {share:.0%} of the steps of all trials were run.",
        f"**What it found.** The best trial is the {best['path']} path, {best['setting']}: {best['bits']:.2f} bits per byte. "
        f"At step {rung}, where all were measured, the bounds lie at "
        + "; ".join(f"{values[0]:.2f} to {values[-1]:.2f} ({path})" for path, values in ordered)
        + ". Within a path that is the schedule's doing; between paths also how tight their bounds are."
        + (_ABOVE_GUESSING if ordered[-1][1][-1] > 8 else ""),
        f"![the bound against the step]({pictures}/paths_metric_against_step.png)",
        f"![all parameters]({pictures}/paths_parallel_coordinates.png)",
        f"![each parameter]({pictures}/paths_marginals.png)",
        f"Bits per byte, best first ([interactive page]({pictures}/paths_sweep.html)):",
        "\n".join([f"| path | setting | at step {rung} | at its end | step | |", "|---|---|---|---|---|---|", *rows]),
    ]


def _sampling_section(results: Mapping[str, Any], pictures: str) -> list[str]:
    sampling, best = results["sampling"], results["training"]["best"]
    front = [trial for trial in sampling["trials"] if trial["on_front"]]
    front.sort(key=lambda trial: -trial["accuracy"])
    rows = [
        f"| {trial['num_steps']} | {trial['temperature']:g} | {trial['accuracy']:.3f} | {trial['tokens_per_forward']:.2f} |"
        for trial in front
    ]
    return [
        f"    raydist sweep sweeps/flow_sampler.yaml checkpoint={best['run_dir']}",
        f"The winner continues 64 tokens of held-out text, with {len(sampling['trials'])} settings "
        f"({format_duration(sampling['wall_s'])}). {_trade(front[0], front[-1])}",
        "\n".join(["| steps | temperature | accuracy | tokens per forward |", "|---|---|---|---|", *rows]),
        f"![accuracy against tokens per forward]({pictures}/samplers_pareto_front.png)",
    ]


def _trade(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """What the front says, from its most accurate setting to its fastest."""
    if first == last:
        return "One setting is best in both goals:"
    return (
        f"From {first['num_steps']} steps to {last['num_steps']} the share of tokens that are the text's goes from "
        f"{first['accuracy']:.3f} to {last['accuracy']:.3f}, and a forward yields {last['tokens_per_forward']:.2f} tokens in "
        f"the place of {first['tokens_per_forward']:.2f}. Nothing beats these in both:"
    )


def _cell(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.2f}"


def with_section(page: str, section: str) -> str:
    """The page with another text between its two marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END, 1)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/sweeps"))
    parser.add_argument("--doc", type=Path, default=Path("docs/sweeps.md"))
    parser.add_argument("--redraw", action="store_true", help="write the page's section only")
    args = parser.parse_args(arguments)
    file = args.out / "results.json"
    if not args.redraw:
        results = measure(args.out, num_steps=args.num_steps)
        file.write_text(json.dumps(results, indent=1) + "\n")
    section = render(json.loads(file.read_text()), pictures=os.path.relpath(args.out, args.doc.parent))
    args.doc.write_text(with_section(args.doc.read_text(), section))
    say(f"\nwritten: {args.doc}, {file} and the pictures beside it")


if __name__ == "__main__":
    main()

"""Recipes of every schedule, source and path, on a vocabulary of four symbols and a mask."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from raydist.config.registries import PATHS
from raydist.core.token_ids import TokenIds

MASK = 2
IDS = TokenIds(vocab_size=5, bos=None, eos=None, mask=MASK, pad=None)
SYMBOLS = torch.tensor([0, 1, 3, 4])
WEIGHTS = [4.0, 1.0, 0.0, 3.0, 2.0]
TIMES = [0.08, 0.37, 0.83]

SHARED_SCHEDULES = [
    {"name": "linear"},
    {"name": "polynomial", "power": 2.0},
    {"name": "polynomial", "power": 3.0},
    {"name": "polynomial", "power": 0.6},
    {"name": "cubic", "slope_at_noise": 0.5, "slope_at_data": 1.5},
    {"name": "cubic", "slope_at_noise": 3.0, "slope_at_data": 0.0},
    {"name": "cubic", "slope_at_noise": 0.0, "slope_at_data": 0.0},
    {"name": "cosine"},
    {"name": "sine"},
    {"name": "log_linear"},
    {"name": "kinetic_optimal"},
]
SCHEDULE_FIELDS = [*SHARED_SCHEDULES, {"name": "source_kinetic_optimal"}]
SOURCES = ["mask", "uniform", "given", "previous"]


def source_fields(name, folder):
    if name != "given":
        return {"name": name}
    path = folder / "weights.json"
    path.write_text(json.dumps(WEIGHTS))
    return {"name": name, "path": str(path), "power": 0.5}


def embedding_fields(folder, *, table=None, **fields):
    if table is None:
        table = torch.from_numpy(np.random.default_rng(3).normal(size=(IDS.vocab_size, 3))).float()
    save_file({"embed": table}, folder / "table.safetensors")
    return {"name": "embedding", "path": str(folder / "table.safetensors"), "tensor": "embed", **fields}


def mixture_cases():
    """Fields of every mixture: all sources with a few schedules, all schedules with two sources."""
    few = [SHARED_SCHEDULES[0], SHARED_SCHEDULES[2], {"name": "kinetic_optimal"}, {"name": "source_kinetic_optimal"}]
    cases = [(schedule, source) for source in SOURCES for schedule in few]
    cases += [(schedule, source) for source in ("mask", "given") for schedule in SCHEDULE_FIELDS if schedule not in few]
    return [
        {"name": "mixture", "schedule": schedule, "source": source}
        for schedule, source in cases
        if (schedule["name"], source) != ("source_kinetic_optimal", "previous")
    ]


def other_cases():
    return [
        {"name": "three_way", "randomness": 0.8},
        {"name": "three_way", "schedule": {"name": "kinetic_optimal"}, "flux_rule": "uniform"},
        {"name": "metric"},
        {"name": "metric", "metric": {"name": "values", "exponent": 0.5, "scale": 2.0}, "beta": {"c": 1.0, "a": 2.0}},
        {"name": "metric", "metric": "embedding"},
    ]


def case_id(fields):
    parts = [fields["name"], fields.get("source"), fields.get("metric"), fields.get("schedule")]
    return "-".join(str(value.get("name") if isinstance(value, dict) else value) for value in parts if value)


def built_path(fields, folder, *, rows=None, ids=IDS, **more):
    """The path; rows of a context are given to a source that depends on them."""
    fields = {**fields, **more}
    if isinstance(fields.get("source"), str):
        fields["source"] = source_fields(fields["source"], folder)
    if fields.get("metric") == "embedding":
        fields["metric"] = embedding_fields(folder)
    path = PATHS.parse(fields).build(ids)
    context = torch.tensor([[0, 3, 3, 4]])
    return path.in_context(context.expand(rows or 1, -1), given_BL=torch.ones(rows or 1, 4, dtype=torch.bool))

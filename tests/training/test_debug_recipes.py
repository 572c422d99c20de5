"""Every recipe of jobs/recipes/debug_cpu: trains on real text, resumes bit for bit, samples, and starts from a base model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raydist.checkpoint.layout import newest_complete
from raydist.cli.main import main
from raydist.config.load import Recipe, load_recipe
from raydist.config.registries import OBJECTIVES, SAMPLERS
from raydist.core.dist import process_group
from raydist.fsdp_utils.materialize import full_state
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf import load_decoder, save_hf
from raydist.models.init import initialize
from raydist.models.mask_spec import CausalMask
from raydist.tracking.jsonl import read_curve
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from raydist.training.setup import assemble

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes" / "debug_cpu").glob("*.yaml"))
NUM_STEPS = 50
# samplers that no recipe names as its own
MORE_SAMPLERS = {"next_token": ["byte_level"], "discrete_flow": ["masked"]}


def load(path: Path, dataset: str, output_dir: Path, *changes: str) -> Recipe:
    return load_recipe(
        str(path),
        [
            f"output_dir={output_dir}",
            f"data.train={dataset}/train",
            f"data.validation={dataset}/validation",
            f"data.cache_dir={output_dir}/cache",
            "tracking.mlflow_uri=none",
            "tracking.system_metrics=false",
            "training.log_every_steps=1",
            "training.num_threads=1",
            *changes,
        ],
    )


def train(recipe: Recipe, *, resume: bool) -> str:
    run_dir = prepare_run_dir(recipe, resume=resume)
    run_attempt(recipe, run_dir=run_dir)
    return run_dir


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    files = sorted(Path(run_dir, "export").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_every_objective_has_a_recipe() -> None:
    names = {load_recipe(str(path), []).config.objective.name for path in RECIPES}
    assert names == set(OBJECTIVES.classes())


def test_every_sampler_is_drawn() -> None:
    drawn = {load_recipe(str(path), []).config.sampling.sampler.name for path in RECIPES}
    assert drawn | {name for names in MORE_SAMPLERS.values() for name in names} == set(SAMPLERS.classes())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_trains_resumes_and_samples(path: Path, dataset: str, tmp_path: Path) -> None:
    recipe = load(path, dataset, tmp_path)
    assert recipe.config.training.num_steps == NUM_STEPS
    run_dir = train(recipe, resume=False)

    curves = read_curve(f"{run_dir}/metrics.jsonl")
    assert all(math.isfinite(value) for curve in curves.values() for _, value in curve)
    losses = [value for _, value in curves["loss"]]
    assert len(losses) == NUM_STEPS
    assert mean(losses[-10:]) < 0.95 * mean(losses[:10])

    whole = weights(run_dir)
    newest = newest_complete(run_dir)
    assert newest is not None
    assert newest.step == NUM_STEPS
    shutil.rmtree(newest.folder)
    shutil.rmtree(f"{run_dir}/export")
    train(recipe, resume=True)
    resumed = weights(run_dir)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    samples = json.loads(Path(run_dir, "pictures", "samples.json").read_text())
    assert samples
    for sample in samples:
        assert sample["tokens"] <= recipe.config.sampling.max_new_tokens
        assert sample["forwards"] >= 1
        assert "<|mask|>" not in sample["text"]
    assert Path(run_dir, "pictures", "trace.png").stat().st_size > 1000
    assert "const data" in Path(run_dir, "pictures", "trace.html").read_text()
    for sampler in MORE_SAMPLERS.get(path.stem, []):
        for trace in (tmp_path / f"{sampler}.png", tmp_path / f"{sampler}.html"):
            arguments = ["--sampler", sampler, "--prompt", "def ", "--max-new-tokens", "8", "--trace", str(trace)]
            assert main(["sample", run_dir, *arguments]) == 0
            assert trace.stat().st_size > 1000


def base_model(folder: Path, *, family: str, dataset: str) -> Decoder:
    """A random model as Hugging Face has it: a vocabulary without our mask token."""
    config = DecoderConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=257,
        num_layers=2,
        width=32,
        hidden_width=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
    )
    decoder = Decoder(config)
    initialize(decoder, seed=3)
    state = dict(decoder.named_parameters())
    save_hf(str(folder), state=state, config=config, tokenizer_json=None, token_ids={"bos": None, "eos": 256})
    return decoder.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_starts_from_a_base_model_and_keeps_what_it_predicts(
    path: Path, family: str, dataset: str, tmp_path: Path
) -> None:
    """Step 0 from Hugging Face weights: the causal read-out of the base model, whatever time and features say."""
    base = base_model(tmp_path / "base", family=family, dataset=dataset)
    recipe = load(path, dataset, tmp_path, f"model={{init_from: {tmp_path}/base}}", "training.num_steps=2")
    with process_group() as workers:
        model = assemble(recipe.config, workers).model
        config, state = model.config, full_state(model)
    started = Decoder(config)
    started.load_state_dict(state, strict=False)
    tokens_BL = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"time_BL": torch.rand(2, 24)} if config.time_input else {}
    if config.input_features:
        inputs["features"] = {
            name: torch.randint(0, num_values, (2, 24)) for name, num_values in config.input_features.items()
        }
    positions_1L, mask = torch.arange(24)[None], CausalMask(length=24)
    with torch.no_grad():
        found = started.logits(tokens_BL, positions_1L, mask, **inputs)
        expected = base.logits(tokens_BL, positions_1L, mask)
    torch.testing.assert_close(found[..., :257], expected, rtol=1e-5, atol=1e-5)
    run_dir = train(recipe, resume=False)
    decoder, meta = load_decoder(f"{run_dir}/export")
    assert meta["objective"]["name"] == recipe.config.objective.name
    assert decoder.config.extra_heads == config.extra_heads

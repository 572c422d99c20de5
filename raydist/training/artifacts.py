"""What a finished run leaves: the model as a Hugging Face directory, pictures, and all of it in the tracker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from data_loaders.tokenizer import Tokenizer
from raydist.config.load import Recipe
from raydist.config.schema import SamplingConfig
from raydist.core import storage
from raydist.core.dist import Workers, barrier
from raydist.evaluation.animation import write_animation
from raydist.evaluation.compare import sampler_label
from raydist.evaluation.curves import draw_curves
from raydist.evaluation.trace import draw_trace, token_pieces
from raydist.fsdp_utils.materialize import full_state
from raydist.models.hf import load_decoder, save_hf
from raydist.sampling.base import Trained
from raydist.tracking.base import Tracker
from raydist.tracking.jsonl import read_curve
from raydist.training import run_dir as layout
from raydist.training.setup import Assembly


def export_model(recipe: Recipe, parts: Assembly, *, run_dir: str, workers: Workers, step: int) -> None:
    """Gathers the weights and writes ``export/`` from rank 0. A collective: every rank calls it."""
    state = full_state(parts.model)
    if workers.is_first:
        target = storage.join(run_dir, layout.EXPORT)
        save_hf(
            target,
            state=state,
            config=parts.model.config,
            tokenizer_json=parts.data.train.datasets[0].tokenizer_bytes().decode(),
            token_ids=_special_ids(parts),
            extra=_how_to_use(recipe, step=step),
        )
    barrier()


def log_results(tracker: Tracker, recipe: Recipe, *, run_dir: str) -> None:
    """Hands the model to the tracker, draws the curves, samples the recipe's prompts, hands these over too. Rank 0 only."""
    tracker.publish()
    tracker.log_artifact(storage.join(run_dir, layout.EXPORT), folder="model")
    pictures = storage.join(run_dir, layout.PICTURES)
    with storage.filled(pictures) as folder:
        curves = read_curve(storage.join(run_dir, layout.METRICS))
        draw_curves(curves, path=os.path.join(folder, "curves.png"), title=os.path.basename(run_dir))
        if recipe.config.sampling.prompts:
            with storage.fetched(storage.join(run_dir, layout.EXPORT)) as export:
                _sample_prompts(recipe.config.sampling, export=export, pictures=folder)
    tracker.log_artifact(pictures, folder="pictures")


def _sample_prompts(sampling: SamplingConfig, *, export: str, pictures: str) -> None:
    """Continues the recipe's prompts with the exported model; draws which token of the first came in which forward."""
    decoder, meta = load_decoder(export)
    tokenizer = Tokenizer.load(storage.join(export, "tokenizer.json"))
    trained = Trained.from_meta(meta, vocab_size=tokenizer.vocab_size, seed=0, tokenizer=tokenizer.byte_level)
    sampler = sampling.sampler.build(trained)
    prompts = [tokenizer.encode(prompt) for prompt in sampling.prompts]
    generations = sampler.generate(decoder, prompts, max_new_tokens=sampling.max_new_tokens)
    texts = [
        {
            "prompt": prompt,
            "text": tokenizer.decode(generation.tokens),
            "tokens": len(generation.tokens),
            "forwards": generation.num_forwards,
        }
        for prompt, generation in zip(sampling.prompts, generations, strict=True)
    ]
    storage.write_json(storage.join(pictures, "samples.json"), texts)
    shown = {"title": sampler_label(sampling.sampler), "prompt": sampling.prompts[0]}
    pieces = token_pieces(generations[0].tokens, decode=tokenizer.decode)
    draw_trace(generations[0], pieces, path=os.path.join(pictures, "trace.png"), **shown)
    write_animation(
        generations[0],
        decode=tokenizer.decode,
        mask_id=trained.ids.mask,
        path=os.path.join(pictures, "trace.html"),
        **shown,
    )


def _special_ids(parts: Assembly) -> dict[str, int | None]:
    ids = parts.data.ids
    return {"bos": ids.bos, "eos": ids.eos, "mask": ids.mask, "pad": ids.pad}


def _how_to_use(recipe: Recipe, *, step: int) -> Mapping[str, Any]:
    config = recipe.config
    return {
        "run": config.name,
        "config_hash": recipe.config_hash,
        "step": step,
        "objective": config.objective.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json"),
    }

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raydist.config.load import Recipe
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf import save_hf
from raydist.models.init import initialize
from raydist.objectives.base import Needs
from raydist.training.data import open_data
from raydist.training.model import decoder_config, initial_weights
from tests.training.cases import recipe_of

NEEDS = Needs(time=True, extra_heads={"insert": 0, "rates": 3}, input_features={"offset": 4})


def config_for(recipe: Recipe, needs: Needs) -> DecoderConfig:
    config = recipe.config
    data = open_data(config.data, seed=config.seed)
    return decoder_config(config.model, data=data, seq_len=config.data.seq_len, needs=needs)


@pytest.fixture
def exported(dataset: str, tmp_path: Path) -> tuple[Decoder, Recipe]:
    """A model of an objective with every need, and a recipe that starts from it."""
    decoder = Decoder(config_for(recipe_of(dataset, tmp_path), NEEDS))
    initialize(decoder, seed=1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.01)
    folder = str(tmp_path / "hf")
    save_hf(folder, state=decoder.state_dict(), config=decoder.config, tokenizer_json=None, token_ids={})
    return decoder, recipe_of(dataset, tmp_path, **{"model.init_from": folder, "model.overrides": "{}"})


def test_the_decoder_has_what_the_objective_needs(dataset: str, tmp_path: Path) -> None:
    recipe = recipe_of(dataset, tmp_path, **{"model.overrides.time_width": 16})
    found = config_for(recipe, NEEDS)
    assert (found.time_input, found.time_width) == (True, 16)
    assert found.extra_heads == {"insert": 0, "rates": 3}
    assert found.input_features == {"offset": 4}
    assert not config_for(recipe, Needs()).has_extras


def test_the_same_needs_keep_the_stored_weights(exported: tuple[Decoder, Recipe]) -> None:
    decoder, recipe = exported
    config = config_for(recipe, NEEDS)
    assert config == decoder.config
    weights = initial_weights(recipe.config.model, config, seed=0)
    assert weights is not None
    assert all(torch.equal(weights.read(name), parameter) for name, parameter in decoder.named_parameters())


def test_other_needs_leave_out_and_add(exported: tuple[Decoder, Recipe]) -> None:
    decoder, recipe = exported
    config = config_for(recipe, Needs(extra_heads={"rates": 3, "delete": 0}))
    weights = initial_weights(recipe.config.model, config, seed=0)
    assert weights is not None
    assert not any("modulation" in name or name.startswith("input_features") for name in weights)
    assert torch.equal(weights.read("extra_heads.rates.weight"), decoder.extra_heads["rates"].weight)
    assert torch.equal(weights.read("extra_heads.delete.weight"), decoder.head.weight)

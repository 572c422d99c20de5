"""Extra inputs and heads beside the weights that other libraries know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydist.core.errors import ModelError
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf import HfWeights, load_decoder, read_hf_config, save_hf
from raydist.models.hf_names import hf_name, is_extra
from raydist.models.init import initial_value
from raydist.models.mask_spec import CausalMask
from tests.models.conftest import CONFIGS, lively_decoder, random_tokens, with_extras
from tests.models.test_conditioning import some_features, some_times
from tests.models.test_hf import our_logits, their_model

NO_IDS = {"bos": None, "eos": None, "mask": None, "pad": None}
EXTRAS = "raydist_extras.safetensors"


def saved(folder: Path, config: DecoderConfig, **options) -> Decoder:
    decoder = lively_decoder(config)
    save_hf(str(folder), state=decoder.state_dict(), config=config, tokenizer_json=None, token_ids=NO_IDS, **options)
    return decoder


def filled(weights: HfWeights, config: DecoderConfig) -> Decoder:
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(weights.read(name))
    return decoder


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_extras_survive_the_round_trip(config, tmp_path, max_shard_bytes):
    ours = saved(tmp_path / "m", with_extras(config), max_shard_bytes=max_shard_bytes)
    assert read_hf_config(str(tmp_path / "m")) == ours.config
    loaded, meta = load_decoder(str(tmp_path / "m"))
    assert meta["decoder"] == ours.config.extras
    expected = dict(ours.named_parameters())
    assert [name for name, _ in loaded.named_parameters()] == list(expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())
    assert set(load_file(tmp_path / "m" / EXTRAS)) == {name for name in expected if is_extra(name)}


def test_extras_are_cast_with_the_other_weights(tmp_path):
    saved(tmp_path / "m", with_extras(CONFIGS["llama3"]), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / EXTRAS).values()} == {torch.bfloat16}


def test_a_plain_model_has_no_file_of_extras(tmp_path):
    saved(tmp_path / "m", CONFIGS["llama3"])
    assert not (tmp_path / "m" / EXTRAS).exists()


def test_transformers_loads_the_base_of_a_model_with_extras(config, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = saved(tmp_path / "m", with_extras(config))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    base = Decoder(config).eval()
    base.load_state_dict({name: value for name, value in ours.state_dict().items() if not is_extra(name)})
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        found = theirs.eval()(tokens).logits
    torch.testing.assert_close(found, our_logits(base, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("time_length", [1, 30])
def test_others_weights_with_new_extras_keep_their_predictions(config, tmp_path, time_length):
    """Whatever the time and the features: at step 0 the logits are those of ``transformers``."""
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    extended = with_extras(config)
    decoder = filled(HfWeights(str(tmp_path), extended, seed=5), extended)
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        expected = theirs(tokens).logits
        hidden = decoder.hidden(
            tokens,
            torch.arange(30)[None],
            CausalMask(length=30),
            time_BL=some_times(2, time_length),
            features=some_features(2, 30),
        )
    for head in ("lm", "insert"):
        torch.testing.assert_close(decoder.head_logits(hidden, head), expected, rtol=0, atol=1e-5)
    assert not decoder.head_logits(hidden, "rates").any()


def test_new_extras_are_a_function_of_the_seed(tmp_path):
    saved(tmp_path / "m", CONFIGS["llama3"])
    config, name = with_extras(CONFIGS["llama3"]), "time_embedding.inner.weight"
    for seed in (0, 1):
        found = HfWeights(str(tmp_path / "m"), config, seed=seed).read(name)
        assert torch.equal(found, initial_value(name, (32, 32), config=config, seed=seed))


def test_a_vocabulary_head_grows_with_the_vocabulary(tmp_path):
    ours = saved(tmp_path / "m", with_extras(CONFIGS["qwen3"]))
    stored = ours.extra_heads["insert"].weight
    grown = HfWeights(str(tmp_path / "m"), ours.config.with_vocab(104)).read("extra_heads.insert.weight")
    assert torch.equal(grown[:101], stored)
    torch.testing.assert_close(grown[101:], stored.mean(0).expand(3, -1))
    saved(tmp_path / "plain", CONFIGS["qwen3"])
    weights = HfWeights(str(tmp_path / "plain"), ours.config.with_vocab(104))
    assert torch.equal(weights.read("extra_heads.insert.weight"), weights.read("head.weight"))


def test_stored_extras_are_kept_where_used_left_where_not_and_new_ones_start_fresh(tmp_path):
    ours = saved(tmp_path / "m", with_extras(CONFIGS["llama3"]))
    config = CONFIGS["llama3"].model_copy(update={"extra_heads": {"rates": 3, "delete": 1}})
    weights = HfWeights(str(tmp_path / "m"), config)
    assert torch.equal(weights.read("extra_heads.rates.weight"), ours.extra_heads["rates"].weight)
    assert torch.equal(weights.read("extra_heads.delete.weight"), torch.zeros(1, 48))
    assert {name for name in weights if is_extra(name)} == {"extra_heads.rates.weight", "extra_heads.delete.weight"}


def test_an_extra_of_another_size_is_refused(tmp_path):
    ours = saved(tmp_path / "m", with_extras(CONFIGS["llama3"]))
    config = ours.config.model_copy(update={"extra_heads": {"rates": 4}})
    with pytest.raises(ModelError, match=r"(?s)wrong shape.*extra_heads.rates.weight.*\(3, 48\).*\(4, 48\)"):
        HfWeights(str(tmp_path / "m"), config).read("extra_heads.rates.weight")


def test_lost_extras_are_refused(tmp_path):
    saved(tmp_path / "m", with_extras(CONFIGS["llama3"]))
    path = tmp_path / "m" / EXTRAS
    tensors = load_file(path)
    del tensors["output_modulation.bias"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"missing: output_modulation\.bias"):
        load_decoder(str(tmp_path / "m"))
    path.unlink()
    with pytest.raises(ModelError, match=f"(?s)a weight file is missing.*expected: {EXTRAS}"):
        load_decoder(str(tmp_path / "m"))


def test_an_unknown_extra_is_refused_by_key(tmp_path):
    saved(tmp_path / "m", with_extras(CONFIGS["llama3"]))
    path = tmp_path / "m" / "raydist.json"
    meta = json.loads(path.read_text())
    meta["decoder"]["telepathy"] = True
    path.write_text(json.dumps(meta))
    with pytest.raises(ModelError, match=r"decoder\.telepathy is not supported"):
        read_hf_config(str(tmp_path / "m"))


def test_every_parameter_is_theirs_or_extra():
    for name, _ in Decoder(with_extras(CONFIGS["qwen3"])).named_parameters():
        assert is_extra(name) or hf_name(name)

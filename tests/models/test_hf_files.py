"""Reading and writing the files: growth of the vocabulary, configuration forms, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydist.core.errors import ModelError
from raydist.models.config import RopeScaling
from raydist.models.decoder import Decoder
from raydist.models.hf import HfWeights, load_decoder, read_hf_config, save_hf
from raydist.models.hf_config import to_hf_config
from raydist.models.hf_names import hf_name
from raydist.models.presets import PRESETS
from tests.models.conftest import CONFIGS, lively_decoder

NO_IDS = {"bos": None, "eos": None, "mask": None, "pad": None}


def saved(folder: Path, name: str = "llama3.1", **options) -> Decoder:
    decoder = lively_decoder(CONFIGS[name])
    save_hf(
        str(folder), state=decoder.state_dict(), config=decoder.config, tokenizer_json=None, token_ids=NO_IDS, **options
    )
    return decoder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
def test_new_vocabulary_rows_are_the_mean_of_the_old(tmp_path, name):
    decoder = saved(tmp_path / "m", name)
    grown = decoder.config.with_vocab(decoder.config.vocab_size + 3)
    weights = HfWeights(str(tmp_path / "m"), grown)
    tables = ["embedding.weight"] if grown.tied_embeddings else ["embedding.weight", "head.weight"]
    for table in tables:
        old, new = decoder.state_dict()[table], weights.read(table)
        assert torch.equal(new[:101], old)
        torch.testing.assert_close(new[101:], old.mean(0).expand(3, -1))
    assert set(weights.names()) == {parameter for parameter, _ in decoder.named_parameters()}
    for parameter in set(weights.names()) - set(tables):
        assert torch.equal(weights.read(parameter), decoder.state_dict()[parameter])


def test_a_vocabulary_smaller_than_the_files_is_refused(tmp_path):
    decoder = saved(tmp_path / "m")
    weights = HfWeights(str(tmp_path / "m"), decoder.config.model_copy(update={"vocab_size": 100}))
    with pytest.raises(ModelError, match=r"(?s)embed_tokens.*\(101, 48\).*\(100, 48\)"):
        weights.read("embedding.weight")


@pytest.mark.parametrize("preset", PRESETS)
def test_configurations_survive_the_round_trip(tmp_path, preset):
    config = PRESETS[preset].with_vocab(100)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config, token_ids=NO_IDS, dtype="float32")))
    assert read_hf_config(str(tmp_path)) == config


def test_the_old_form_of_the_rotary_keys_is_read(tmp_path):
    values = to_hf_config(PRESETS["llama3.2-1b"], token_ids=NO_IDS, dtype="bfloat16")
    del values["rope_parameters"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert read_hf_config(str(tmp_path)) == PRESETS["llama3.2-1b"]
    values["rope_scaling"] = {"type": "llama3", **{k: v for k, v in values["rope_scaling"].items() if k != "rope_type"}}
    path.write_text(json.dumps(values))
    assert read_hf_config(str(tmp_path)).rope_scaling == RopeScaling(factor=32.0)
    values["rope_scaling"] = None
    path.write_text(json.dumps(values))
    assert read_hf_config(str(tmp_path)).rope_scaling is None


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_key(tmp_path, change, key):
    saved(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", **change)
    with pytest.raises(ModelError, match=f"the model's {key} is not supported"):
        load_decoder(str(tmp_path / "m"))


def test_a_missing_size_is_named(tmp_path):
    saved(tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", hidden_size=None)
    with pytest.raises(ModelError, match="expected: hidden_size"):
        load_decoder(str(tmp_path / "m"))


def test_a_folder_without_configuration_or_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_decoder(str(tmp_path))
    saved(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ModelError, match="no safetensors weights"):
        load_decoder(str(tmp_path / "m"))


def test_damaged_weights_are_refused(tmp_path):
    saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="a weight file is damaged"):
        load_decoder(str(tmp_path / "m"))


def test_a_missing_shard_is_named(tmp_path):
    saved(tmp_path / "m", max_shard_bytes=50_000)
    victim = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ModelError, match=f"expected: {victim.name}"):
        load_decoder(str(tmp_path / "m"))


def test_an_index_that_leaves_the_folder_is_refused(tmp_path):
    saved(tmp_path / "m", max_shard_bytes=50_000)
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(Exception, match="a file name leaves its folder"):
        load_decoder(str(tmp_path / "m"))


@pytest.mark.parametrize(("change", "message"), [("drop", "missing: model.norm.weight"), ("add", "unknown: x.bias")])
def test_parameters_that_do_not_fit_are_named(tmp_path, change, message):
    saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    if change == "drop":
        del tensors["model.norm.weight"]
    else:
        tensors["x.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=message):
        load_decoder(str(tmp_path / "m"))


def test_shards_stay_below_the_limit_and_hold_everything_once(tmp_path):
    decoder = saved(tmp_path / "m", max_shard_bytes=50_000)
    names: list[str] = []
    for path in (tmp_path / "m").glob("model-*.safetensors"):
        tensors = load_file(path)
        names += tensors
        assert sum(t.nbytes for t in tensors.values()) <= 50_000
    assert sorted(names) == sorted(hf_name(name) for name, _ in decoder.named_parameters())


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    saved(tmp_path / "m", max_shard_bytes=50_000)
    decoder = saved(tmp_path / "m", "qwen3")
    loaded, _ = load_decoder(str(tmp_path / "m"))
    assert loaded.config == decoder.config
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(ModelError, match="the folder is in use"):
        saved(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"


def test_a_failed_save_leaves_the_earlier_export(tmp_path):
    decoder = saved(tmp_path / "m")

    class Broken(dict):
        def __getitem__(self, name):
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        save_hf(
            str(tmp_path / "m"),
            state=Broken(decoder.state_dict()),
            config=decoder.config,
            tokenizer_json=None,
            token_ids=NO_IDS,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    load_decoder(str(tmp_path / "m"))


def test_special_ids_must_be_in_the_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    decoder = lively_decoder(CONFIGS["llama3"])
    with pytest.raises(ModelError, match=r"(?s)the mask id is not in the tokenizer.*found: +77"):
        save_hf(
            str(tmp_path / "m"),
            state=decoder.state_dict(),
            config=decoder.config,
            tokenizer_json=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str(),
            token_ids={**NO_IDS, "mask": 77},
        )
    assert not (tmp_path / "m").exists()


def test_a_bucket_is_written_through_storage(tmp_path):
    import fsspec

    decoder = lively_decoder(CONFIGS["llama3"])
    save_hf(
        "memory://bucket/export",
        state=decoder.state_dict(),
        config=decoder.config,
        tokenizer_json=None,
        token_ids=NO_IDS,
    )
    fsspec.filesystem("memory").get("/bucket/export", str(tmp_path / "m"), recursive=True)
    loaded, _ = load_decoder(str(tmp_path / "m"))
    assert torch.equal(loaded.norm.weight, decoder.norm.weight)
    with pytest.raises(ModelError, match="weights are read from a local folder"):
        HfWeights("memory://bucket/export", decoder.config)

from __future__ import annotations

import argparse
import json

import pytest
import torch

from raydist.cli import export
from raydist.cli.locate import find_model_dir
from raydist.core import storage
from raydist.core.errors import ConfigError
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf import load_decoder, save_hf
from raydist.models.init import initialize
from raydist.models.presets import PRESETS

CONFIG = DecoderConfig.model_validate(PRESETS["debug"].model_dump() | {"vocab_size": 300, "width": 32})
IDS = {"bos": 0, "eos": 1, "mask": 2, "pad": None}


@pytest.fixture
def runs(tmp_path):
    """A folder of runs: one finished, one not."""
    decoder = Decoder(CONFIG)
    initialize(decoder, seed=0)
    root = tmp_path / "runs"
    for name in ("first-run", "unfinished"):
        (root / name).mkdir(parents=True)
        (root / name / "config.yaml").write_text("name: x\n")
    save_hf(
        str(root / "first-run" / "export"),
        state=decoder.state_dict(),
        config=CONFIG,
        tokenizer_json=None,
        token_ids=IDS,
        extra={"objective": {"name": "set_block"}},
    )
    return root


def run_export(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    export.configure(parser)
    return export.run(parser.parse_args(arguments))


def test_a_run_is_found_by_name_by_folder_and_by_its_export(runs):
    expected = str(runs / "first-run" / "export")
    for wanted in ("first-run", str(runs / "first-run"), expected):
        assert find_model_dir(wanted, output_dir=str(runs)) == expected


def test_an_unknown_name_lists_the_finished_runs(runs):
    with pytest.raises(ConfigError) as caught:
        find_model_dir("frist-run", output_dir=str(runs))
    assert "finished runs: first-run" in str(caught.value)
    assert "did you mean 'first-run'?" in str(caught.value)
    assert "unfinished" not in str(caught.value)


def test_an_unfinished_run_says_so(runs):
    with pytest.raises(ConfigError, match="no exported model yet"):
        find_model_dir("unfinished", output_dir=str(runs))


def test_export_keeps_weights_ids_and_how_it_was_trained(runs, tmp_path):
    result = run_export("first-run", "--output-dir", str(runs), "--to", str(tmp_path / "out"))
    source, source_meta = load_decoder(str(runs / "first-run" / "export"))
    copy, meta = load_decoder(result["directory"])
    assert meta == source_meta
    assert meta["token_ids"] == IDS
    for name, value in copy.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert json.dumps(result)
    assert result["num_parameters"] == CONFIG.num_parameters


def test_export_shards_and_casts(runs, tmp_path):
    out = tmp_path / "out"
    run_export(
        "first-run", "--output-dir", str(runs), "--to", str(out), "--max-shard-size", "100KB", "--dtype", "bfloat16"
    )
    shards = list(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(path.stat().st_size < 110_000 for path in shards)
    copy, _ = load_decoder(str(out))
    source, _ = load_decoder(str(runs / "first-run" / "export"))
    assert torch.equal(copy.embedding.weight, source.embedding.weight.bfloat16().float())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_onto_its_own_source_is_refused(runs):
    with pytest.raises(ConfigError, match="the same folder"):
        run_export("first-run", "--output-dir", str(runs), "--to", str(runs / "first-run" / "export"))
    load_decoder(str(runs / "first-run" / "export"))


def test_export_into_a_bucket_is_read_back(runs, tmp_path):
    target = f"memory://exports-{tmp_path.name}/first"
    result = run_export("first-run", "--output-dir", str(runs), "--to", target)
    assert result["directory"] == target
    with storage.fetched(target) as copy:
        decoder, _ = load_decoder(copy)
    assert torch.equal(decoder.embedding.weight, load_decoder(str(runs / "first-run" / "export"))[0].embedding.weight)

"""``raydist sample`` from the command line to its JSON, on a tiny exported model."""

import json

import pytest
import torch

from data_loaders.tokenizer_sources import byte_tokenizer
from raydist.cli.main import main
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.hf import save_hf
from raydist.models.init import initialize


def export(folder, *, mask=True, objective=True, max_new_tokens=6):
    tokenizer = byte_tokenizer().with_mask()
    ids = tokenizer.special_ids
    config = DecoderConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        width=16,
        hidden_width=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=64,
    )
    decoder = Decoder(config)
    initialize(decoder, 0)
    with torch.no_grad():
        for parameter in decoder.blocks.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0)  # so that the prompt matters
    sampling = {
        "sampler": {"name": "set_block", "block_size": 4},
        "max_new_tokens": max_new_tokens,
        "prompts": ["from the recipe"],
    }
    save_hf(
        str(folder),
        state=decoder.state_dict(),
        config=config,
        tokenizer_json=tokenizer.to_bytes().decode(),
        token_ids={"bos": ids.bos, "eos": ids.eos, "mask": ids.mask if mask else None, "pad": ids.pad},
        extra={"sampling": sampling, "objective": {"name": "set_block"}} if objective else {},
    )
    return str(folder)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return export(tmp_path_factory.mktemp("models") / "tiny")


def sample(capsys, *arguments, code=0):
    assert main(["sample", *arguments, "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_prompts_from_arguments_and_files(capsys, tmp_path, model_dir):
    (tmp_path / "prompt.txt").write_text("two\nlines")
    result, shown = sample(
        capsys, model_dir, "--prompt", "one", "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "7"
    )
    assert result["prompts"] == ["one", "two\nlines"]
    assert result["sampler"]["name"] == "set_block"
    assert result["sampler"]["block_size"] == 4
    for row in result["generations"]:
        assert row["num_tokens"] == len(row["tokens"]) == len(row["revealed_at"]) <= 7
        assert row["text"] in shown
        assert f"{row['num_tokens']} tokens, {row['num_forwards']} forwards" in shown


def test_the_recipe_gives_the_defaults(capsys, model_dir):
    result, _ = sample(capsys, model_dir)
    assert result["prompts"] == ["from the recipe"]
    assert result["generations"][0]["num_tokens"] == 6


def test_flags_and_settings_reach_the_sampler(capsys, model_dir):
    result, _ = sample(capsys, model_dir, "--gamma", "0", "--block-size", "3")
    assert (result["sampler"]["unmasking"]["gamma"], result["sampler"]["block_size"]) == (0.0, 3)
    assert result["generations"][0]["num_forwards"] == 7
    result, _ = sample(capsys, model_dir, "--sampler", "autoregressive", "temperature=0.7", "top_k=5", "--seed", "3")
    assert (result["sampler"]["temperature"], result["sampler"]["top_k"]) == (0.7, 5)
    assert result["generations"][0]["num_forwards"] == 6
    again, _ = sample(capsys, model_dir, "--sampler", "autoregressive", "temperature=0.7", "top_k=5", "--seed", "3")
    assert again == result


def test_comparison_and_trace(capsys, tmp_path, model_dir):
    path = tmp_path / "pictures" / "trace.png"
    result, shown = sample(capsys, model_dir, "--prompt", "a", "--prompt", "b", "--compare", "--trace", str(path))
    assert [row["gamma"] for row in result["rows"]] == [None, 0.0, 0.35, 0.6]
    for row in result["rows"]:
        assert row["tokens"] == sum(generation["num_tokens"] for generation in row["generations"])
        assert row["forwards"] == sum(generation["num_forwards"] for generation in row["generations"])
    assert result["rows"][0]["forwards"] == result["rows"][0]["tokens"]
    assert "tokens per forward" in shown
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in shown


def test_bos_is_set_for_foreign_models_and_on_request(capsys, tmp_path, model_dir):
    foreign = export(tmp_path / "foreign", objective=False)
    flags = ("--prompt", "a", "--max-new-tokens", "5")
    texts = {
        name: sample(capsys, folder, *flags, *extra)[0]["generations"][0]["tokens"]
        for name, folder, extra in (
            ("foreign", foreign, ["--sampler", "autoregressive"]),
            ("foreign without", foreign, ["--sampler", "autoregressive", "--no-bos"]),
            ("ours", model_dir, ["--sampler", "autoregressive"]),
            ("ours with", model_dir, ["--sampler", "autoregressive", "--bos"]),
        )
    }
    assert texts["foreign"] == texts["ours with"]
    assert texts["foreign without"] == texts["ours"]
    assert texts["ours"] != texts["ours with"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "a prompt has no tokens"),
        (["--prompt", "x" * 60], "longer than the model's positions"),
        (["--sampler", "set_blok"], "did you mean 'set_block'"),
        (["--sampler", "autoregressive", "--gamma", "1"], "this sampler has no entropy bound"),
        (["--sampler", "set_block", "unmasking={name: entropy_bounded, gama: 1}"], "did you mean 'gamma'"),
        (["--sampler", "masked"], "the model was trained for another sampler"),
        (["--gamma", "-1"], "greater than or equal to 0"),
        (["--max-new-tokens", "0"], "nothing to generate"),
        (["--prompt-file", "missing.txt"], "a prompt file cannot be read"),
        (["--trace", "picture.xyz"], "the picture cannot be written"),
    ],
)
def test_mistakes_end_in_one_screen(capsys, model_dir, arguments, message):
    result, shown = sample(capsys, model_dir, *arguments, code=2)
    assert result["error"] == "ConfigError"
    assert message in shown
    assert "Traceback" not in shown


def test_mask_id_missing(capsys, tmp_path):
    folder = export(tmp_path / "plain", mask=False)
    result, shown = sample(capsys, folder, "--prompt", "a", "--sampler", "set_block", code=2)
    assert "mask id missing" in result["what"]
    assert "--sampler autoregressive" in shown
    assert sample(capsys, folder, "--prompt", "a", "--sampler", "autoregressive")[0]["generations"]


def test_no_prompt_and_no_model(capsys, tmp_path):
    folder = export(tmp_path / "bare", objective=False)
    assert sample(capsys, folder, code=2)[0]["what"] == "no prompt"
    assert sample(capsys, str(tmp_path / "nowhere"), code=2)[0]["what"] == "no model under this name"


def test_half_precision(capsys, model_dir):
    result, _ = sample(capsys, model_dir, "--dtype", "bfloat16", "--device", "cpu")
    assert result["generations"][0]["num_tokens"] == 6
    assert torch.get_default_dtype() == torch.float32

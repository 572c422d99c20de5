"""Parity with transformers: logits, both directions of loading, greedy text."""

from __future__ import annotations

import json

import pytest
import torch

from raydist.models.config import DecoderConfig
from raydist.models.hf import HfWeights, load_decoder, read_hf_config, save_hf
from raydist.models.mask_spec import CausalMask, SetBlockMask
from tests.models.conftest import CONFIGS, lively_decoder, random_tokens

NO_IDS = {"bos": None, "eos": None, "mask": None, "pad": None}
SHARD_BYTES = 50_000


def their_model(config: DecoderConfig):
    """A random transformers model of the same sizes, built by their own configuration classes."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[config.family]
    theirs = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.hidden_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tied_embeddings,
        max_position_embeddings=config.max_positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = model_class(theirs).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def our_logits(decoder, tokens):
    with torch.no_grad():
        return decoder.logits(tokens, torch.arange(tokens.shape[1])[None], CausalMask(length=tokens.shape[1]))


@pytest.mark.parametrize("max_shard_size", ["5GB", SHARD_BYTES])
def test_their_save_is_our_load(config, tmp_path, max_shard_size):
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == SHARD_BYTES)
    assert read_hf_config(str(tmp_path)) == config
    ours, _ = load_decoder(str(tmp_path))
    tokens = random_tokens(2, 60)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(ours, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_shard_bytes", [10**9, SHARD_BYTES])
def test_our_save_is_their_load(config, tmp_path, max_shard_bytes):
    from transformers import AutoModelForCausalLM

    ours = lively_decoder(config)
    folder = tmp_path / "export"
    save_hf(
        str(folder),
        state=ours.state_dict(),
        config=config,
        tokenizer_json=None,
        token_ids=NO_IDS,
        max_shard_bytes=max_shard_bytes,
    )
    shards = list(folder.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == SHARD_BYTES)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = random_tokens(2, 60)
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
    torch.testing.assert_close(our_logits(ours, tokens), expected, rtol=0, atol=1e-5)
    again, _ = load_decoder(str(folder))
    assert torch.equal(our_logits(again, tokens), our_logits(ours, tokens))


def test_greedy_text_is_theirs_token_by_token(config, tmp_path):
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_decoder(str(tmp_path))
    tokens = random_tokens(1, 7)
    expected = theirs.generate(tokens, max_new_tokens=40, do_sample=False)
    for _ in range(40):
        tokens = torch.cat((tokens, our_logits(ours, tokens)[:, -1:].argmax(-1)), dim=1)
    assert tokens.tolist() == expected.tolist()


def test_set_block_forward_equals_theirs_under_the_same_mask(tmp_path):
    config = CONFIGS["qwen3"]
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_decoder(str(tmp_path))
    spec = SetBlockMask(length=12, block_size=4)
    tokens, positions = random_tokens(2, 24), torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        found = ours.logits(tokens, positions, spec)
        expected = theirs(tokens, position_ids=positions, attention_mask=spec.dense().expand(2, 1, 24, 24)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_bf16_loads_on_both_sides(tmp_path):
    from transformers import AutoModelForCausalLM

    ours = lively_decoder(CONFIGS["llama3.1"])
    folder = str(tmp_path / "export")
    save_hf(
        folder,
        state=ours.state_dict(),
        config=ours.config,
        tokenizer_json=None,
        token_ids=NO_IDS,
        dtype=torch.bfloat16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    loaded, _ = load_decoder(folder, dtype=torch.bfloat16)
    assert theirs.dtype == loaded.embedding.weight.dtype == torch.bfloat16
    assert loaded.frequencies_f.dtype == torch.float32
    for name, value in HfWeights(folder, ours.config).items():
        assert torch.equal(value, ours.state_dict()[name].bfloat16().float())


def test_tokenizer_and_ids_travel_along(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, GenerationConfig

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|bos|>", "<|eos|>", "<|mask|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    token_ids = dict(zip(("bos", "eos", "mask", "pad"), range(256, 260), strict=True))
    config = CONFIGS["llama3"].with_vocab(260)
    folder = str(tmp_path / "export")
    save_hf(
        folder,
        state=lively_decoder(config).state_dict(),
        config=config,
        tokenizer_json=tokenizer.to_str(),
        token_ids=token_ids,
        extra={"objective": {"name": "set_block"}, "stop_ids": [257, 256]},
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):  return 'naïve 日本'\n"
    assert theirs.encode(text) == tokenizer.encode(text).ids
    assert theirs.decode(theirs.encode(text)) == text
    found = (theirs.bos_token_id, theirs.eos_token_id, theirs.mask_token_id, theirs.pad_token_id)
    assert found == (256, 257, 258, 259)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [257, 256]
    _, meta = load_decoder(folder)
    assert meta["token_ids"] == token_ids
    assert meta["stop_ids"] == [257, 256]
    assert meta["objective"] == {"name": "set_block"}
    assert meta["format_version"] == 1


def test_ids_of_a_foreign_directory_come_from_its_configuration(tmp_path):
    their_model(CONFIGS["llama3"]).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [5, 9]}))
    _, meta = load_decoder(str(tmp_path))
    assert meta == {"token_ids": {"bos": None, "eos": 5, "mask": None, "pad": 0}, "stop_ids": [5, 9]}

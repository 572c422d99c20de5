"""Objective, model and samplers together: what the loss teaches is what the samplers read."""

import pytest
import torch

from raydist.config.registries import OBJECTIVES, SAMPLERS
from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from tests.sampling.decoders import trained

PERIOD, MASK_ID, LENGTH = 7, 7, 24


@pytest.fixture(scope="module")
def counting_decoder():
    """Learned to count 0, 1, ..., 6, 0, 1, ... from any start by Set Block Decoding."""
    config = DecoderConfig(
        family="llama",
        vocab_size=8,
        num_layers=2,
        width=32,
        hidden_width=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
    )
    decoder = Decoder(config)
    initialize(decoder, 0)
    ids = TokenIds(vocab_size=8, bos=None, eos=None, mask=MASK_ID, pad=None)
    objective = OBJECTIVES.parse({"name": "set_block", "block_size_max": 8}).build(ids)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3, weight_decay=0.0)
    rows_B = torch.arange(2 * PERIOD)
    tokens_BS = (rows_B[:, None] + torch.arange(LENGTH + 1)) % PERIOD
    for step in range(300):
        rows = Rows(
            step=step,
            tokens_BS=tokens_BS,
            documents_BS=torch.zeros_like(tokens_BS, dtype=torch.int32),
            loss_mask_BS=None,
            rows_B=rows_B,
            epochs_B=torch.full_like(rows_B, step),
        )
        noised = objective.corrupt(rows, RowRng(seed=0, step=step, epochs_B=rows.epochs_B, rows_B=rows_B))
        loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised)))
        optimizer.zero_grad()
        (loss.sums["targets"] / noised.counts["targets"]).backward()
        optimizer.step()
    return decoder.eval()


@pytest.mark.parametrize(
    ("settings", "most_forwards"),
    [
        ({"name": "autoregressive"}, 14),
        ({"name": "set_block", "block_size": 4, "gamma": 0.0}, 15),
        ({"name": "set_block", "block_size": 4, "gamma": 0.5}, 8),
    ],
)
def test_samplers_continue_what_was_learned(counting_decoder, settings, most_forwards):
    sampler = SAMPLERS.parse(settings).build(trained(mask_id=MASK_ID))
    prompts = [[3, 4, 5], [0], [5, 6, 0, 1]]
    for prompt, generation in zip(prompts, sampler.generate(counting_decoder, prompts, max_new_tokens=14), strict=True):
        assert generation.tokens == [(prompt[-1] + 1 + i) % PERIOD for i in range(14)]
        assert generation.num_forwards <= most_forwards

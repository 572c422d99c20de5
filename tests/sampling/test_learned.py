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
IDS = TokenIds(vocab_size=8, bos=None, eos=None, mask=MASK_ID, pad=None)


def counting_decoder(objective, *, num_steps):
    """Learned to count 0, 1, ..., 6, 0, 1, ... from any start."""
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
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3, weight_decay=0.0)
    rows_B = torch.arange(2 * PERIOD)
    tokens_BS = (rows_B[:, None] + torch.arange(LENGTH + 1)) % PERIOD
    for step in range(num_steps):
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


def counts_on(decoder, sampler, *, num_new_tokens, most_forwards):
    prompts = [[3, 4, 5], [0], [5, 6, 0, 1]]
    generations = sampler.generate(decoder, prompts, max_new_tokens=num_new_tokens)
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.tokens == [(prompt[-1] + 1 + i) % PERIOD for i in range(num_new_tokens)]
        assert generation.num_forwards <= most_forwards


@pytest.fixture(scope="module")
def set_block_decoder():
    objective = OBJECTIVES.parse({"name": "set_block", "block_size_max": 8}).build(IDS)
    return counting_decoder(objective, num_steps=300)


@pytest.mark.parametrize(
    ("settings", "most_forwards"),
    [
        ({"name": "autoregressive"}, 14),
        ({"name": "set_block", "block_size": 4, "unmasking": {"name": "entropy_bounded", "gamma": 0.0}}, 15),
        ({"name": "set_block", "block_size": 4, "unmasking": {"name": "entropy_bounded", "gamma": 0.5}}, 8),
    ],
)
def test_samplers_continue_what_was_learned(set_block_decoder, settings, most_forwards):
    sampler = SAMPLERS.parse(settings).build(trained(mask_id=MASK_ID))
    counts_on(set_block_decoder, sampler, num_new_tokens=14, most_forwards=most_forwards)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("objective", "sampler", "num_steps"),
    [
        ({"name": "masked", "weighting": "none"}, {"name": "masked", "block_size": 4}, 450),
        ({"name": "block", "block_size": 4}, {"name": "block"}, 150),
    ],
    ids=["masked", "block"],
)
def test_samplers_read_where_their_objectives_wrote(objective, sampler, num_steps, shift):
    config = OBJECTIVES.parse({**objective, "shift": shift})
    decoder = counting_decoder(config.build(IDS), num_steps=num_steps)
    settings = {**sampler, "unmasking": {"name": "confidence_threshold", "threshold": 0.9}}
    told = trained(mask_id=MASK_ID, objective=config.model_dump(mode="json"))
    counts_on(decoder, SAMPLERS.parse(settings).build(told), num_new_tokens=12, most_forwards=12)
    wrong = SAMPLERS.parse({**settings, "shift": not shift}).build(told)
    found = wrong.generate(decoder, [[3, 4, 5]], max_new_tokens=8)[0].tokens
    assert found != [(6 + i) % PERIOD for i in range(8)]

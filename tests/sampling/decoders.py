"""Tiny random decoders whose predictions are sharp enough to differ from place to place."""

import torch

from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.sampling.base import Trained

VOCAB_SIZE, MASK_ID = 12, 11


def tiny_decoder(*, family="llama", seed=0, dtype=torch.float64):
    config = DecoderConfig(
        family=family,
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        width=16,
        hidden_width=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=64,
    )
    decoder = Decoder(config)
    initialize(decoder, seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.startswith("blocks") and parameter.ndim == 2:
                parameter.mul_(20.0)
            if name == "head.weight":
                parameter.mul_(2.5 / 4 / parameter.std())
    return decoder.to(dtype).eval()


def trained(*, stop_ids=(), mask_id=MASK_ID, seed=0, vocab_size=VOCAB_SIZE, objective=None):
    """What a sampler is built from."""
    ids = TokenIds(vocab_size=vocab_size, bos=None, eos=None, mask=mask_id, pad=None)
    return Trained(ids=ids, stop_ids=tuple(stop_ids), objective=objective, seed=seed)

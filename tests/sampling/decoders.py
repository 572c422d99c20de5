"""Tiny random decoders whose predictions are sharp enough to differ from place to place."""

import torch

from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.sampling.base import Trained

VOCAB_SIZE, MASK_ID = 12, 11


def tiny_decoder(*, family="llama", seed=0, dtype=torch.float64, **fields):
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
        **fields,
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


class Recorder(torch.nn.Module):
    """A decoder that keeps the widths it was fed."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.config, self.head = decoder, decoder.config, decoder.head
        self.widths = []

    def hidden(self, tokens_BL, positions_BL, mask, cache):
        self.widths.append(tokens_BL.shape[1])
        return self.decoder.hidden(tokens_BL, positions_BL, mask, cache)


def check_stopped(free, stopped, *, stop):
    """A stop id ends a row once everything before it is known, and changes nothing before; returns how many rows ended."""
    for before, after in zip(free, stopped, strict=True):
        assert after.stopped == (stop in before.tokens)
        end = before.tokens.index(stop) + 1 if after.stopped else len(before.tokens)
        assert after.tokens == before.tokens[:end]
        assert after.revealed_at == before.revealed_at[:end]
        assert after.num_forwards == max(after.revealed_at)
    return sum(generation.stopped for generation in stopped)

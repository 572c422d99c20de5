from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from raydist.core.errors import ModelError
from raydist.core.terms import CrossEntropyTerm
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.models.mask_spec import CachedMask, CausalMask, SetBlockMask, document_positions
from raydist.models.presets import PRESETS
from tests.models.conftest import CONFIGS, lively_decoder, random_tokens


class ConcatenatingCache:
    """Keeps everything it is given; rows have equal lengths."""

    def __init__(self, num_layers: int) -> None:
        self.slots: list = [None] * num_layers

    def extend(self, layer, keys, values):
        if self.slots[layer] is not None:
            old_keys, old_values = self.slots[layer]
            keys, values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        self.slots[layer] = (keys, values)
        return keys, values


def causal_logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    with torch.no_grad():
        return decoder.logits(tokens, torch.arange(length)[None], CausalMask(length=length))


def test_cached_decoding_equals_the_full_forward(decoder):
    tokens = random_tokens(2, 17)
    cache = ConcatenatingCache(decoder.config.num_layers)
    pieces, done = [], 0
    for num_new in (6, 1, 1, 4, 5):
        mask = CachedMask(cache_lengths_B=torch.full((2,), done), cache_width=done, num_causal=num_new)
        new = slice(done, done + num_new)
        with torch.no_grad():
            pieces.append(decoder.logits(tokens[:, new], torch.arange(new.start, new.stop)[None], mask, cache))
        done += num_new
    torch.testing.assert_close(torch.cat(pieces, 1), causal_logits(decoder, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_packed_documents_equal_each_document_alone(dtype, atol):
    decoder = lively_decoder(CONFIGS["llama3.1"], dtype=dtype)
    lengths = [5, 1, 9, 3]
    documents = torch.tensor([[d for d, n in enumerate(lengths) for _ in range(n)]], dtype=torch.int32)
    tokens = random_tokens(1, sum(lengths))
    with torch.no_grad():
        packed = decoder.logits(
            tokens, document_positions(documents), CausalMask(length=sum(lengths), documents_BL=documents)
        )
    alone = torch.cat([causal_logits(decoder, piece) for piece in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=atol)


def set_block_logits(decoder: Decoder, clean: torch.Tensor, noised: torch.Tensor, k: int) -> torch.Tensor:
    length = clean.shape[1]
    with torch.no_grad():
        return decoder.logits(
            torch.cat((clean, noised), 1),
            torch.arange(length).repeat(2)[None],
            SetBlockMask(length=length, block_size=k),
        )


@pytest.mark.parametrize("k", [1, 3, 4, 16])
def test_clean_half_equals_a_plain_causal_forward(decoder, k):
    clean, noised = random_tokens(2, 14), random_tokens(2, 14, seed=1)
    doubled = set_block_logits(decoder, clean, noised, k)
    torch.testing.assert_close(doubled[:, :14], causal_logits(decoder, clean), rtol=0, atol=1e-5)


def test_a_changed_token_reaches_only_who_may_see_it():
    decoder = lively_decoder(CONFIGS["qwen3"], dtype=torch.float64)
    length, k = 13, 4
    clean, noised = random_tokens(1, length), random_tokens(1, length, seed=1)
    base = set_block_logits(decoder, clean, noised, k)
    for j in range(length):
        other = noised.clone()
        other[0, j] = (other[0, j] + 1) % 101
        moved = (set_block_logits(decoder, clean, other, k) - base).abs().amax(-1)[0] > 1e-9
        assert moved.nonzero()[:, 0].tolist() == [length + i for i in range(length) if i // k == j // k]
        other = clean.clone()
        other[0, j] = (other[0, j] + 1) % 101
        moved = (set_block_logits(decoder, other, noised, k) - base).abs().amax(-1)[0] > 1e-9
        noised_reached = [length + i for i in range(length) if i // k > j // k]
        assert moved.nonzero()[:, 0].tolist() == [*range(j, length), *noised_reached]


def test_a_noised_block_equals_decoding_behind_a_cache(decoder):
    length, k, b = 12, 4, 2
    clean, noised = random_tokens(1, length), random_tokens(1, length, seed=1)
    doubled = set_block_logits(decoder, clean, noised, k)
    cache = ConcatenatingCache(decoder.config.num_layers)
    start, cached = b * k, (b - 1) * k
    with torch.no_grad():
        prefix = CachedMask(cache_lengths_B=torch.tensor([0]), cache_width=0, num_causal=cached)
        decoder.hidden(clean[:, :cached], torch.arange(cached)[None], prefix, cache)
        block = CachedMask(cache_lengths_B=torch.tensor([cached]), cache_width=cached, num_causal=k, num_block=k)
        fed = torch.cat((clean[:, cached:start], noised[:, start : start + k]), 1)
        logits = decoder.logits(fed, torch.arange(cached, start + k)[None], block, cache)
    torch.testing.assert_close(logits[:, k:], doubled[:, length + start : length + start + k], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[:, :k], doubled[:, cached:start], rtol=0, atol=1e-5)


def test_terms_equal_cross_entropy_of_the_logits(decoder):
    tokens, positions, mask = random_tokens(2, 10), torch.arange(10)[None], CausalMask(length=10)
    targets = random_tokens(2, 10, seed=2)
    some = torch.tensor([3, 17, 0, 9])
    terms = [
        CrossEntropyTerm(name="all", positions_T=torch.arange(20), targets_T=targets.flatten(), weights_T=None),
        CrossEntropyTerm(
            name="some",
            positions_T=some,
            targets_T=targets.flatten()[some],
            weights_T=torch.tensor([0.0, 2.0, 0.5, 1.0]),
        ),
    ]
    results = decoder(tokens, positions, mask, terms)
    (results[0].loss_sum / 20 + 3.0 * results[1].loss_sum).backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    losses = F.cross_entropy(decoder.logits(tokens, positions, mask).flatten(0, 1), targets.flatten(), reduction="none")
    weighted = (losses[some] * terms[1].weights_T).sum()
    (losses.sum() / 20 + 3.0 * weighted).backward()
    assert [result.term for result in results] == terms
    torch.testing.assert_close(results[0].losses_T, losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1].loss_sum, weighted, rtol=1e-5, atol=0)
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_head_that_the_model_lacks_is_named():
    term = CrossEntropyTerm(
        name="x", positions_T=torch.tensor([0]), targets_T=torch.tensor([0]), weights_T=None, head="time"
    )
    with pytest.raises(ModelError, match="found:    time\n  expected: lm"):
        lively_decoder(CONFIGS["llama3"])(random_tokens(1, 3), torch.arange(3)[None], CausalMask(length=3), [term])


@pytest.mark.parametrize("preset", ["debug", "tiny-2m", "qwen3-0.6b", "llama3.1-8b"])
def test_loss_at_initialisation_is_that_of_a_uniform_guess(preset):
    config = PRESETS[preset].model_copy(update={"vocab_size": 2048, "num_layers": 2})
    if config.width > 512:
        config = config.model_copy(update={"width": 256, "hidden_width": 512, "num_heads": 8, "head_dim": 32})
    decoder = Decoder(config)
    initialize(decoder, seed=0)
    tokens = random_tokens(2, 64, vocab_size=2048)
    term = CrossEntropyTerm(
        name="ntp",
        positions_T=torch.arange(128),
        targets_T=random_tokens(128, vocab_size=2048, seed=1),
        weights_T=None,
    )
    with torch.no_grad():
        (result,) = decoder(tokens, torch.arange(64)[None], CausalMask(length=64), [term])
    # logits of unit variance raise the loss by one half
    assert math.log(2048) - 0.3 < result.loss_sum.item() / 128 < math.log(2048) + 0.8


def test_one_batch_can_be_learned_by_heart():
    decoder = Decoder(CONFIGS["llama3-tied"])
    initialize(decoder, seed=0)
    tokens = random_tokens(2, 17)
    term = CrossEntropyTerm(name="ntp", positions_T=torch.arange(32), targets_T=tokens[:, 1:].flatten(), weights_T=None)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        (result,) = decoder(tokens[:, :-1], torch.arange(16)[None], CausalMask(length=16), [term])
        loss = result.loss_sum / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_meta_construction_materialises_to_the_same_logits(config):
    plain = lively_decoder(config)
    with torch.device("meta"):
        late = Decoder(config)
    late.to_empty(device="cpu")
    late.retie()
    late.reset_buffers("cpu")
    late.load_state_dict(plain.state_dict())
    assert (late.head.weight is late.embedding.weight) == config.tied_embeddings
    tokens = random_tokens(2, 9)
    assert torch.equal(causal_logits(late, tokens), causal_logits(plain, tokens))


def test_nothing_but_parameters_is_stored(decoder):
    tied = {"head.weight"} if decoder.config.tied_embeddings else set()
    assert decoder.state_dict().keys() - tied == {name for name, _ in decoder.named_parameters()}

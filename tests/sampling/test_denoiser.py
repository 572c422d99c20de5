"""Canvases, and clean tokens that are drawn in chunks and only where they are wanted."""

import pytest
import torch

from raydist.sampling import denoiser
from raydist.sampling.canvas import Canvas
from raydist.sampling.denoiser import Denoiser, draw_chunked
from raydist.sampling.drawing import draw_tokens
from tests.sampling.decoders import MASK_ID, tiny_decoder

PREFIXES, SUFFIXES = [[1, 2, 3], [4], [5, 6]], [[], [7, 8], [9]]


def canvas():
    return Canvas.of(PREFIXES, SUFFIXES, num_new_tokens=2, max_positions=64, device=torch.device("cpu"))


def test_layout():
    one = canvas()
    filled = one.tokens_BL.scatter(1, one.columns_BN, torch.tensor([[10, 10]] * 3))
    assert filled.tolist() == [[1, 2, 3, 10, 10], [4, 10, 10, 7, 8], [5, 6, 10, 10, 9]]
    assert torch.equal(one.in_gap_BL, filled == 10)
    assert torch.equal(one.given_BL, filled != 10)
    ragged = Canvas.of([[1], [2, 3, 4]], [[], []], num_new_tokens=1, max_positions=64, device=torch.device("cpu"))
    assert ragged.given_BL.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert ragged.mask(torch.tensor([1])).documents_BL is None
    seen = ragged.mask(torch.tensor([0])).dense()[0, 0]
    assert seen.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2


@pytest.mark.parametrize("chunk_logits", [1, 40, 10_000])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_chunks_do_not_change_the_draws(chunk_logits, temperature, monkeypatch):
    monkeypatch.setattr(denoiser, "_CHUNK_LOGITS_CPU", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(9, 14, generator=generator, dtype=torch.float64)
    logits_TV[:, 12:] = 100.0
    uniforms_T = torch.rand(9, generator=generator, dtype=torch.float64)
    drawn_T = draw_chunked(
        lambda places_C: logits_TV[places_C],
        torch.arange(9),
        uniforms_T=uniforms_T,
        vocab_size=12,
        banned_id=MASK_ID,
        temperature=temperature,
    )
    expected_T = draw_tokens(logits_TV[:, :MASK_ID], uniforms_BN=uniforms_T, temperature=temperature)
    assert torch.equal(drawn_T, expected_T)


@pytest.mark.parametrize("shift", [False, True])
def test_only_wanted_positions_of_wanted_rows_are_drawn(shift):
    """The same as drawing every position from the logits of the whole batch and keeping the wanted ones."""
    one, decoder = canvas(), tiny_decoder()
    tokens_BL = torch.where(one.in_gap_BL, MASK_ID, one.tokens_BL)
    wanted_BL = torch.zeros_like(one.given_BL)
    wanted_BL[0, 3:] = True
    wanted_BL[2, 3] = True
    uniforms_BL = torch.rand(tokens_BL.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reader = Denoiser(
        model=decoder, canvas=one, null_BL=tokens_BL, guidance=0.0, shift=shift, vocab_size=12, mask_id=MASK_ID
    )
    drawn_BL = reader.draw(tokens_BL, wanted_BL=wanted_BL, uniforms_BL=uniforms_BL, time=0.5, temperature=1.0)
    logits_BLV = decoder.logits(tokens_BL, one.positions(), one.mask(torch.arange(3)))[..., :MASK_ID]
    logits_BLV = logits_BLV.roll(int(shift), dims=1)
    expected_BL = draw_tokens(logits_BLV.detach(), uniforms_BN=uniforms_BL, temperature=1.0)
    assert torch.equal(drawn_BL, torch.where(wanted_BL, expected_BL, tokens_BL))
    nothing = reader.draw(tokens_BL, wanted_BL=wanted_BL & False, uniforms_BL=uniforms_BL, time=0.5, temperature=1.0)
    assert torch.equal(nothing, tokens_BL)

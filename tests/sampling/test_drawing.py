import pytest
import torch

from raydist.sampling.drawing import draw_tokens, prompt_uniforms
from tests.sampling.oracle import chi_square

CPU = torch.device("cpu")


def uniforms(prompts, *, seed=0, num_positions=6):
    return prompt_uniforms(prompts, seed=seed, num_positions=num_positions, device=CPU)


def draw_many(logits_V, *, num=4000, **settings):
    u = uniforms([[1]], num_positions=num)
    return draw_tokens(logits_V.expand(1, num, -1), uniforms_BN=u, **settings)[0]


def test_noise_belongs_to_the_prompt_and_not_to_the_batch():
    alone = uniforms([[3, 4]])
    among = uniforms([[9], [3, 4], [7, 7, 7], [3, 4]])
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[1], among[3])
    assert not torch.equal(alone, uniforms([[3, 4]], seed=1))
    assert torch.equal(uniforms([[3, 4]], num_positions=9)[:, :6], alone)


def test_uniforms_are_uniform():
    u = uniforms([[i] for i in range(20)], num_positions=500).flatten()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=16, min=0, max=1)
    statistic, df = chi_square(counts, torch.full((16,), 1 / 16, dtype=torch.float64))
    assert statistic < df + 4 * (2 * df) ** 0.5


def test_temperature_zero_is_argmax():
    logits = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0))
    u = uniforms([[1], [2]])
    assert torch.equal(draw_tokens(logits, uniforms_BN=u, temperature=0.0), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -1.0], dtype=torch.float64)
    tokens = draw_many(logits, temperature=temperature)
    statistic, df = chi_square(torch.bincount(tokens, minlength=5).double(), torch.softmax(logits / temperature, -1))
    assert statistic < df + 4 * (2 * df) ** 0.5


def test_top_k_and_top_p_renormalise_over_what_is_kept():
    p = torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05], dtype=torch.float64)
    for settings, kept in (({"top_k": 2}, [0, 2]), ({"top_p": 0.71}, [0, 2, 3]), ({"top_p": 0.3}, [0])):
        law = torch.zeros(5, dtype=torch.float64)
        law[kept] = p[kept] / p[kept].sum()
        counts = torch.bincount(draw_many(p.log(), temperature=1.0, **settings), minlength=5).double()
        if len(kept) == 1:
            assert counts[0] == counts.sum()
            continue
        statistic, df = chi_square(counts, law)
        assert statistic < df + 4 * (2 * df) ** 0.5


def test_extreme_uniforms_never_draw_an_impossible_token():
    logits = torch.tensor([[[-torch.inf, 0.0, 0.0, -torch.inf]]], dtype=torch.float64)
    for u, token in ((0.0, 1), (1 - 2.0**-48, 2)):
        drawn = draw_tokens(logits, uniforms_BN=torch.tensor([[u]], dtype=torch.float64), temperature=1.0)
        assert drawn.item() == token

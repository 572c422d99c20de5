from __future__ import annotations

import math

import pytest
import torch

from raydist.models.presets import PRESETS
from raydist.models.rope import Rotation, rope_frequencies


def test_llama31_frequencies_have_the_published_values():
    plain, scaled = rope_frequencies(PRESETS["llama3-8b"]), rope_frequencies(PRESETS["llama3.1-8b"])
    expected_plain = {28: 3.2114460e-3, 29: 2.6160993e-3, 34: 9.3847387e-4, 63: 2.4551408e-6}
    expected_scaled = {28: 3.2114460e-3, 29: 2.1665708e-3, 34: 1.7850781e-4, 63: 3.0689260e-7}
    for i, value in expected_plain.items():
        assert float(plain[i]) == pytest.approx(value, rel=2e-7)
    for i, value in expected_scaled.items():
        assert float(scaled[i]) == pytest.approx(value, rel=1e-6)
    assert torch.equal(plain[:29], scaled[:29])
    torch.testing.assert_close(plain[35:] / 8, scaled[35:], rtol=1e-6, atol=0)
    ratios = (scaled / plain)[29:35]
    torch.testing.assert_close(
        ratios, torch.tensor([0.828168, 0.643743, 0.493507, 0.371122, 0.271425, 0.190211]), rtol=0, atol=2e-6
    )


def test_frequencies_equal_the_power_law_in_double():
    config = PRESETS["qwen3-8b"]
    expected = [config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    torch.testing.assert_close(rope_frequencies(config).double(), torch.tensor(expected).double(), rtol=5e-7, atol=0)


def test_rotation_turns_channel_pairs_half_a_head_apart():
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = torch.tensor([1.0, 0.5, 0.25, 0.125])
    rotated = Rotation.at(torch.tensor([[3]]), frequencies=frequencies).apply(x)[0, 0, 0]
    for i in range(4):
        angle, a, b = 3 * float(frequencies[i]), float(x[0, 0, 0, i]), float(x[0, 0, 0, i + 4])
        assert float(rotated[i]) == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
        assert float(rotated[i + 4]) == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-6)


def test_rotation_keeps_norms_and_scores_see_only_distances():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 128, generator=generator, dtype=torch.float64) for _ in range(2))
    frequencies = rope_frequencies(PRESETS["llama3.1-8b"])

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return Rotation.at(torch.tensor([[position]]), frequencies=frequencies).apply(x)

    torch.testing.assert_close(at(q, 777).norm(), q.norm(), rtol=1e-6, atol=0)
    scores = [float((at(q, 20 + shift) * at(k, 3 + shift)).sum()) for shift in (0, 1, 100, 400)]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-3)
    assert abs(float((at(q, 21) * at(k, 3)).sum()) - scores[0]) > 1e-2


def test_bf16_heads_are_rotated_in_float32():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 5, 16, generator=generator).bfloat16()
    rotation = Rotation.at(torch.arange(1000, 1005)[None], frequencies=torch.rand(8, generator=generator))
    assert torch.equal(rotation.apply(x), rotation.apply(x.float()).bfloat16())


def test_gradient_of_a_rotation():
    generator = torch.Generator().manual_seed(0)
    rotation = Rotation.at(torch.arange(3)[None], frequencies=torch.rand(4, generator=generator))
    rotation = Rotation(rotation.cos_B1Lh.double(), rotation.sin_B1Lf.double())
    x = torch.randn(2, 2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotation.apply, (x,))

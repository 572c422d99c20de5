from __future__ import annotations

import math

import pytest

from raydist.config.schema import LearningRateConfig
from raydist.training.lr import learning_rate_factor


def factors(num_steps: int, **fields: object) -> list[float]:
    schedule = LearningRateConfig(**fields)
    return [learning_rate_factor(schedule, step, num_steps=num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("name", ["cosine", "stable_decay", "constant"])
def test_warm_up_is_linear_and_reaches_one(name: str) -> None:
    values = factors(100, name=name, warmup_steps=9)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == 1.0


def test_cosine_against_its_formula() -> None:
    values = factors(101, name="cosine", warmup_steps=0, final_factor=0.2)
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(101)]
    assert values == pytest.approx(expected)
    assert values[-1] == pytest.approx(0.2)


def test_llama_3_405b_endpoints() -> None:
    """8e-5 at step 8,000 and 8e-7 at step 1,200,000."""
    schedule = LearningRateConfig(warmup_steps=8000, final_factor=0.01)
    at = [8e-5 * learning_rate_factor(schedule, step, num_steps=1_200_001) for step in (8000, 1_200_000)]
    assert at == pytest.approx([8e-5, 8e-7])


def test_stable_decay_is_flat_then_linear() -> None:
    values = factors(101, name="stable_decay", decay_fraction=0.2, final_factor=0.0)
    assert set(values[:81]) == {1.0}
    assert values[80:] == pytest.approx([1 - step / 20 for step in range(21)])


def test_a_run_shorter_than_its_warm_up_never_fails() -> None:
    assert factors(3, warmup_steps=10) == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factors(1) == [1.0]

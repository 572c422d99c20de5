from __future__ import annotations

import pytest

from raydist.evaluation.continuation import score_continuations
from raydist.sampling.autoregressive import AutoregressiveConfig
from raydist.sampling.base import Generation, Sampler
from tests.sampling.decoders import tiny_decoder, trained


class Parrot(Sampler):
    """Gives known answers, one forward for two tokens."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers
        self.seen: list[list[int]] = []

    def generate(self, model: object, prompts: list[list[int]], *, max_new_tokens: int) -> list[Generation]:
        self.seen = prompts
        return [
            Generation(tokens=tokens[:max_new_tokens], num_forwards=2, revealed_at=[1, 1, 2, 2], stopped=False)
            for tokens in self.answers
        ]


def test_counts_by_hand() -> None:
    sampler = Parrot([[4, 5, 0, 7], [4, 9]])  # the second one stops early: two of its four are missing
    score = score_continuations(
        sampler, None, [[1, 2, 4, 5, 6, 7, 8], [1, 3, 4, 5, 6, 7]], prompt_tokens=2, new_tokens=4
    )
    assert sampler.seen == [[1, 2], [1, 3]]
    assert (score.num_correct, score.num_expected, score.num_generated, score.num_forwards) == (4, 8, 6, 4)
    assert score.metrics == {"accuracy": 0.5, "tokens_per_forward": 1.5, "forwards_per_token": 4 / 6}


def test_a_models_own_greedy_text_is_found_again() -> None:
    decoder = tiny_decoder()
    sampler = AutoregressiveConfig(temperature=0.0).build(trained())
    prompts = [[1, 2, 3], [4, 5, 6]]
    texts = [
        prompt + generation.tokens
        for prompt, generation in zip(prompts, sampler.generate(decoder, prompts, max_new_tokens=8), strict=True)
    ]
    metrics = score_continuations(sampler, decoder, texts, prompt_tokens=3, new_tokens=8).metrics
    assert metrics["accuracy"] == 1.0
    assert metrics["tokens_per_forward"] == pytest.approx(1.0, abs=0.2)
    other = [[*text[:-1], (text[-1] + 1) % 11] for text in texts]
    assert score_continuations(sampler, decoder, other, prompt_tokens=3, new_tokens=8).metrics["accuracy"] == 7 / 8


def test_rows_that_are_too_short() -> None:
    with pytest.raises(ValueError, match="at least 2 \\+ 2"):
        score_continuations(Parrot([]), None, [[1, 2, 3]], prompt_tokens=2, new_tokens=2)

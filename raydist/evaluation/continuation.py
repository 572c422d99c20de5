"""How much of a held-out text a sampler finds again, and at what cost: the two axes of a sweep over samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydist.sampling.base import Sampler


@dataclass(frozen=True)
class ContinuationScore:
    """The sums over all prompts.

    Attributes:
        num_correct: generated tokens that are the text's token at the same place.
        num_expected: tokens of the text that were asked for; what a generation leaves out is wrong.
        num_generated: tokens that came.
        num_forwards: forwards that the prompts needed, each counted as if it were alone.
    """

    num_correct: int
    num_expected: int
    num_generated: int
    num_forwards: int

    @property
    def metrics(self) -> dict[str, float]:
        """``accuracy``, ``tokens_per_forward`` and its inverse; none of them depends on the machine."""
        return {
            "accuracy": self.num_correct / self.num_expected,
            "tokens_per_forward": self.num_generated / max(1, self.num_forwards),
            "forwards_per_token": self.num_forwards / max(1, self.num_generated),
        }


def score_continuations(
    sampler: Sampler, model: Any, rows: Sequence[Sequence[int]], *, prompt_tokens: int, new_tokens: int
) -> ContinuationScore:
    """Continues the start of each row, all rows as one batch, and compares with what follows there.

    Args:
        sampler: with its noise seed.
        model: a decoder in evaluation mode.
        rows: token ids of held-out text, at least ``prompt_tokens + new_tokens`` each; the rest is not looked at.
        prompt_tokens: tokens that are given.
        new_tokens: tokens that are compared.

    Raises:
        ValueError: a row is too short.
        ConfigError: the sampler cannot continue such prompts.
    """
    stop = prompt_tokens + new_tokens
    if not rows or any(len(row) < stop for row in rows):
        raise ValueError(f"rows of at least {prompt_tokens} + {new_tokens} tokens are needed")
    prompts = [list(row[:prompt_tokens]) for row in rows]
    generations = sampler.generate(model, prompts, max_new_tokens=new_tokens)
    pairs = [(generation.tokens, row[prompt_tokens:stop]) for generation, row in zip(generations, rows, strict=True)]
    return ContinuationScore(
        num_correct=sum(found == wanted for tokens, text in pairs for found, wanted in zip(tokens, text, strict=False)),
        num_expected=len(rows) * new_tokens,
        num_generated=sum(len(generation.tokens) for generation in generations),
        num_forwards=sum(generation.num_forwards for generation in generations),
    )

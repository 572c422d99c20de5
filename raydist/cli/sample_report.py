"""What ``raydist sample`` shows, writes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raydist.cli.output import say, table

if TYPE_CHECKING:
    from data_loaders.tokenizer import Tokenizer
    from raydist.evaluation.compare import SamplerResult
    from raydist.sampling.base import Generation, SamplerConfig


def text_of(tokens: Sequence[int], *, tokenizer: Tokenizer) -> str:
    """What the tokens say, without stop and other special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


def show(
    texts: Sequence[str], generations: Sequence[Generation], *, suffixes: Sequence[str], tokenizer: Tokenizer
) -> None:
    """Prints each prompt with its continuation, or its gap and what is behind it, and what that cost."""
    for text, generation, suffix in zip(texts, generations, suffixes or [""] * len(texts), strict=True):
        say(text + text_of(generation.tokens, tokenizer=tokenizer) + suffix)
        say(
            f"-- {len(generation.tokens)} tokens, {generation.num_forwards} forwards, "
            f"{generation.tokens_per_forward:.2f} tokens per forward, "
            f"ended by {'a stop token' if generation.stopped else 'the length limit'}\n"
        )


def show_comparison(results: Sequence[SamplerResult], *, tokenizer: Tokenizer, prompt: str) -> None:
    """Prints the first prompt's continuation by each sampler, then one table over all prompts."""
    from raydist.evaluation.compare import sampler_label

    for result in results:
        say(f"== {sampler_label(result.config)}")
        say(prompt + text_of(result.generations[0].tokens, tokenizer=tokenizer) + "\n")
    table(
        ["sampler", "setting", "tokens", "forwards", "tokens per forward", "seconds"],
        [
            [
                result.config.name,
                result.config.setting or "-",
                result.num_tokens,
                result.num_forwards,
                round(result.tokens_per_forward, 2),
                round(result.seconds, 3),
            ]
            for result in results
        ],
        title="all prompts in one batch; the forward over the prompt is counted",
    )


def generation_row(generation: Generation, *, tokenizer: Tokenizer) -> dict[str, Any]:
    """One prompt's part of the JSON object."""
    return {
        "text": text_of(generation.tokens, tokenizer=tokenizer),
        "tokens": generation.tokens,
        "revealed_at": generation.revealed_at,
        "num_tokens": len(generation.tokens),
        "num_forwards": generation.num_forwards,
        "tokens_per_forward": generation.tokens_per_forward,
        "stopped": generation.stopped,
    }


def comparison_row(result: SamplerResult, *, tokenizer: Tokenizer) -> dict[str, Any]:
    """One sampler's part of the JSON object."""
    return {
        "sampler": result.config.model_dump(mode="json"),
        "setting": result.config.setting,
        "gamma": result.gamma,
        "tokens": result.num_tokens,
        "forwards": result.num_forwards,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": result.seconds,
        "generations": [generation_row(generation, tokenizer=tokenizer) for generation in result.generations],
    }


def draw(
    path: str,
    generation: Generation,
    *,
    config: SamplerConfig,
    tokenizer: Tokenizer,
    prompt: str,
    mask_id: int | None,
) -> None:
    """Writes the picture of a decoding trace, or its animation where the file ends in ``.html``, and says where it is.

    Raises:
        ConfigError: the file cannot be written, or its ending names no format.
    """
    import os

    from raydist.core.errors import ConfigError
    from raydist.evaluation.animation import write_animation
    from raydist.evaluation.compare import sampler_label
    from raydist.evaluation.trace import draw_trace, token_pieces

    title = sampler_label(config)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if path.endswith(".html"):
            decode = tokenizer.decode
            write_animation(generation, decode=decode, mask_id=mask_id, path=path, title=title, prompt=prompt)
        else:
            pieces = token_pieces(generation.tokens, decode=tokenizer.decode)
            draw_trace(generation, pieces, path=path, title=title, prompt=prompt)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the picture cannot be written", where=path, found=str(error), expected="a .png, .pdf, .svg or .html file"
        ) from None
    say(f"decoding trace: {path}")

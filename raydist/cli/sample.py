"""``raydist sample``: continue prompts with a trained model, by any sampler."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raydist.cli import sample_report as report
from raydist.cli import sampler_choice as choice

if TYPE_CHECKING:
    from data_loaders.tokenizer import Tokenizer
    from raydist.models.decoder import Decoder

_DEFAULT_NEW_TOKENS = 128


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", metavar="RUN|DIR", help="a run's name or directory, or a Hugging Face directory")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; default: the recipe's prompts"
    )
    parser.add_argument(
        "--prompt-file", action="append", metavar="FILE", help="one prompt, the whole file; may be repeated"
    )
    parser.add_argument(
        "--suffix",
        action="append",
        metavar="TEXT",
        help="fill the gap between a prompt and this text instead of going on; one for each prompt",
    )
    parser.add_argument(
        "--sampler",
        nargs="+",
        metavar=("NAME", "key=value"),
        help="a name of `raydist list samplers` and its settings; default: the recipe's sampler",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="the sampler at several values of the setting that trades speed for quality (or at --gamma), in one table",
    )
    parser.add_argument("--gamma", type=float, help="unmask by the entropy_bounded policy with this bound, in nats")
    parser.add_argument("--block-size", type=int, help="mask tokens per block of set_block or block")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, help="default: the recipe's, or 128")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise (default: %(default)s)")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each prompt with the begin-of-text token (default: for models that raydist did not train)",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="draw which token of the first prompt came in which forward: .png, .svg or .pdf, or .html for an animation",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and cache")
    parser.add_argument("--output-dir", default="runs", help="where runs are looked up by name (default: %(default)s)")


@dataclass(frozen=True)
class _Loaded:
    """A model with what is needed to talk to it."""

    folder: str
    decoder: Decoder
    tokenizer: Tokenizer
    meta: dict[str, Any]

    @property
    def defaults(self) -> dict[str, Any]:
        """The recipe's ``sampling`` section; empty for a model that raydist did not train."""
        return self.meta.get("sampling") or {}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb.

    Raises:
        ConfigError: no model, no prompt, a prompt too long, an unknown sampler or setting, or no mask id.
    """
    from raydist.sampling.base import Trained

    explicit = choice.explicit_sampler(args)
    model = _load(args)
    texts = _prompt_texts(args, model.defaults)
    suffixes = _suffix_texts(args, num_prompts=len(texts))
    prompts = [_with_bos(model.tokenizer.encode(text), model=model, flag=args.bos) for text in texts]
    trained = Trained.from_meta(
        model.meta,
        vocab_size=model.tokenizer.vocab_size,
        seed=args.seed,
        tokenizer=model.tokenizer.byte_level,
    )
    config = explicit or choice.default_sampler(args, model.defaults)
    max_new_tokens = _max_new_tokens(args, model.defaults)
    if args.compare:
        from raydist.evaluation.compare import compare_samplers

        configs = choice.compared_samplers(args, config)
        results = compare_samplers(
            model.decoder, prompts, configs=configs, max_new_tokens=max_new_tokens, trained=trained
        )
        report.show_comparison(results, tokenizer=model.tokenizer, prompt=texts[0])
        traced, config = results[-1].generations[0], results[-1].config
        result: dict[str, Any] = {"rows": [report.comparison_row(row, tokenizer=model.tokenizer) for row in results]}
    else:
        sampler = config.build(trained)
        if suffixes:
            behind = [model.tokenizer.encode(suffix) for suffix in suffixes]
            generations = sampler.infill(model.decoder, prompts, behind, num_new_tokens=max_new_tokens)
        else:
            generations = sampler.generate(model.decoder, prompts, max_new_tokens=max_new_tokens)
        report.show(texts, generations, suffixes=suffixes, tokenizer=model.tokenizer)
        traced = generations[0]
        result = {
            "sampler": config.model_dump(mode="json"),
            "generations": [report.generation_row(generation, tokenizer=model.tokenizer) for generation in generations],
        }
    if args.trace:
        report.draw(
            args.trace,
            traced,
            config=config,
            tokenizer=model.tokenizer,
            prompt=texts[0],
            mask_id=trained.ids.mask,
        )
    return {"model": model.folder, "prompts": texts, "suffixes": suffixes, **result, "trace": args.trace}


def _load(args: argparse.Namespace) -> _Loaded:
    import torch

    from data_loaders.tokenizer import Tokenizer
    from raydist.cli.locate import find_model_dir
    from raydist.core import storage
    from raydist.core.errors import ConfigError
    from raydist.models.hf import load_decoder

    folder = find_model_dir(args.model, output_dir=args.output_dir)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device", where="--device", found=device, fix="use --device cpu")
    with storage.fetched(folder) as local:
        tokenizer = Tokenizer.load(local)
        decoder, meta = load_decoder(local, device=device, dtype=getattr(torch, args.dtype))
    return _Loaded(folder=folder, decoder=decoder, tokenizer=tokenizer, meta=meta)


def _max_new_tokens(args: argparse.Namespace, defaults: dict[str, Any]) -> int:
    from raydist.core.errors import ConfigError

    value = args.max_new_tokens
    if value is None:
        value = defaults.get("max_new_tokens", _DEFAULT_NEW_TOKENS)
    if value < 1:
        raise ConfigError("nothing to generate", where="--max-new-tokens", found=value, expected="at least 1")
    return int(value)


def _prompt_texts(args: argparse.Namespace, defaults: dict[str, Any]) -> list[str]:
    from raydist.core.errors import ConfigError

    texts = list(args.prompt or [])
    for path in args.prompt_file or []:
        try:
            with open(path, encoding="utf-8") as file:
                texts.append(file.read())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "a prompt file cannot be read", where=path, found=str(error), expected="a text file in UTF-8"
            ) from None
    texts = texts or list(defaults.get("prompts") or [])
    if not texts:
        raise ConfigError(
            "no prompt", where="--prompt", expected="a text to continue", fix='give one: --prompt "def main("'
        )
    return texts


def _suffix_texts(args: argparse.Namespace, *, num_prompts: int) -> list[str]:
    from raydist.core.errors import ConfigError

    suffixes = list(args.suffix or [])
    if suffixes and args.compare:
        raise ConfigError("a comparison continues prompts", where="--suffix", fix="leave --compare or --suffix out")
    if suffixes and len(suffixes) != num_prompts:
        raise ConfigError(
            "each prompt needs the text behind its gap",
            where="--suffix",
            found=f"{len(suffixes)} suffixes",
            expected=f"{num_prompts}, one for each prompt",
        )
    return suffixes


def _with_bos(tokens: list[int], *, model: _Loaded, flag: bool | None) -> list[int]:
    from raydist.core.errors import ConfigError

    bos = model.meta["token_ids"]["bos"]
    if flag and bos is None:
        raise ConfigError("the vocabulary has no begin-of-text token", where="--bos", fix="leave the flag out")
    trained_here = "objective" in model.meta
    wanted = bos is not None and not trained_here if flag is None else flag
    return [bos, *tokens] if wanted else tokens

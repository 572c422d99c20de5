"""Resample-Previous-Tokens where everything can be enumerated: 20 symbols, exact laws, errors that are put in or learned.

Three parts, all of total variations (TV) between the sampler's exact law and the true one; nothing is drawn but errors,
training rows and weights:

- ``pair``: a joint law of two tokens and controlled errors of its three conditionals p(a), p(b | a), p(a | b).
- ``text``: a Markov chain of four tokens; compares strides.
- ``learned``: a small decoder, trained on next tokens and then by the objective; compares the objective's settings, after
  the same number of steps, by the law of the next two tokens.

Run it with ``python benchmarks/resample_synthetic.py``; it writes ``results/resample_synthetic.json``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import environment, write_result
from torch import Tensor

from raydist.core.rng import RowRng
from raydist.core.rows import Rows
from raydist.core.target_offsets import OFFSET_FEATURE, TargetOffsets
from raydist.core.token_ids import TokenIds
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.models.mask_spec import CausalMask
from raydist.objectives.resample import ResampleConfig

NUM_SYMBOLS = 20
NUM_LAWS = 20
ITERATIONS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
PREFIX_TOKENS = 8


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def random_joint(generator: torch.Generator, *, sharpness: float) -> Tensor:
    """``p(a, b)`` proportional to ``exp(sharpness * N(0, 1))``, ``[V, V]``."""
    logits = sharpness * torch.randn(NUM_SYMBOLS, NUM_SYMBOLS, generator=generator, dtype=torch.float64)
    return torch.softmax(logits.flatten(), dim=0).view_as(logits)


def noisy(p: Tensor, generator: torch.Generator, *, error: float) -> Tensor:
    """Each probability times ``exp(error * N(0, 1))``, normalised over the last axis."""
    factors = torch.exp(error * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return p * factors / (p * factors).sum(dim=-1, keepdim=True)


def conditionals(joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``p(a)`` as ``[a]``, ``p(b | a)`` as ``[a, b]`` and ``p(a | b)`` as ``[b, a]``."""
    first = joint.sum(dim=1)
    return first, joint / first[:, None], (joint / joint.sum(dim=0)).T


def proposals(previous_ba: Tensor, *, greedy: bool, threshold: float) -> Tensor:
    """The probability that an accepted proposal is a, given b, ``[b, a]``; rows may sum to less than 1."""
    proposed = previous_ba
    if greedy:
        proposed = torch.zeros_like(previous_ba).scatter(1, previous_ba.argmax(dim=1, keepdim=True), 1.0)
    return proposed * (previous_ba > threshold)


def corrected(
    joint: Tensor, next_ab: Tensor, previous_ba: Tensor, *, iterations: float, greedy: bool = False,
    threshold: float = 0.0, refresh: str = "accepted",
) -> Tensor:  # fmt: skip
    """The law of a window of two after full or half iterations, from its law before."""
    accepted_ba = proposals(previous_ba, greedy=greedy, threshold=threshold)
    rejected_b = 1.0 - accepted_ba.sum(dim=1)
    for half in range(round(2 * iterations)):
        if half % 2 == 0:
            taken = accepted_ba.T * joint.sum(dim=0)
            left = joint * rejected_b
        elif refresh == "always":
            taken, left = next_ab * (taken + left).sum(dim=1, keepdim=True), torch.zeros_like(joint)
        else:
            taken = next_ab * taken.sum(dim=1, keepdim=True)
        joint = taken + left
    return joint


def average(measure: Callable[[torch.Generator], dict[str, Any]]) -> dict[str, Any]:
    """Means over laws and errors of the numbers that a measurement returns."""
    runs = [measure(torch.Generator().manual_seed(seed)) for seed in range(NUM_LAWS)]
    return {name: round(statistics.fmean(run[name] for run in runs), 5) for name in runs[0]}


def pair_errors(*, first: float, following: float, previous: float, sharpness: float = 1.0) -> dict[str, float]:
    """TV after k sampled iterations, by the errors of the three conditionals."""

    def measure(generator: torch.Generator) -> dict[str, float]:
        joint = random_joint(generator, sharpness=sharpness)
        exact = conditionals(joint)
        errors = (first, following, previous)
        p_a, p_ab, p_ba = (noisy(p, generator, error=e) for p, e in zip(exact, errors, strict=True))
        start = p_a[:, None] * p_ab
        return {
            f"k={k:g}": total_variation(corrected(start, p_ab, p_ba, iterations=k, refresh="always"), joint)
            for k in ITERATIONS
        }

    return average(measure)


def pair_bound() -> dict[str, float]:
    """The bound ``(e_c + e_r) / (1 - delta)`` on the stationary error of a, beside that error."""

    def measure(generator: torch.Generator) -> dict[str, float]:
        joint = random_joint(generator, sharpness=1.0)
        p_a, p_ab, p_ba = conditionals(joint)
        c, r = noisy(p_ab, generator, error=0.1), noisy(p_ba, generator, error=0.1)
        kernel = c @ r
        stationary = torch.linalg.matrix_power(kernel, 200)[0]
        delta = max(total_variation(one, other) for one in kernel for other in kernel)
        errors = [max(total_variation(*pair) for pair in zip(x, y, strict=True)) for x, y in ((c, p_ab), (r, p_ba))]
        actual, bound = total_variation(stationary, p_a), sum(errors) / (1 - delta)
        return {"stationary": actual, "bound": bound, "dobrushin": delta, "stationary_per_bound": actual / bound}

    return average(measure)


def pair_proposals() -> dict[str, dict[str, float]]:
    """Ways to propose previous tokens, after one iteration, when they are predicted better than next ones."""
    ways: dict[str, dict[str, Any]] = {"none": {"iterations": 0.0}, "sampled": {"iterations": 1.0}}
    for threshold in (0.0, 0.5, 0.7, 0.9, 0.95):
        for refresh in ("accepted", "always"):
            ways[f"greedy>{threshold:g},{refresh}"] = {
                "iterations": 1.0, "greedy": True, "threshold": threshold, "refresh": refresh,
            }  # fmt: skip

    def measure(generator: torch.Generator) -> dict[str, float]:
        joint = random_joint(generator, sharpness=4.0)
        exact = conditionals(joint)
        p_a, p_ab, p_ba = (
            noisy(p, generator, error=e) for p, e in zip(exact, (0.6, 0.6, 0.15), strict=True)
        )  # fmt: skip
        result = {}
        for name, way in ways.items():
            law = corrected(p_a[:, None] * p_ab, p_ab, p_ba, **way)
            result[f"{name}/tv"] = total_variation(law, joint)
            result[f"{name}/log_likelihood"] = float((law * joint.log()).sum())
        return result

    flat = average(measure)
    return {name: {what: flat[f"{name}/{what}"] for what in ("tv", "log_likelihood")} for name in ways}


def text_strides() -> dict[str, float]:
    """Four tokens of a Markov chain, one sampled iteration in each window of two."""

    def measure(generator: torch.Generator) -> dict[str, float]:
        chain = random_joint(generator, sharpness=1.5)
        first, step, _ = conditionals(chain)
        true = torch.einsum("a,ab,bc,cd->abcd", first, step, step, step)
        next_1, next_2 = noisy(first, generator, error=0.4), noisy(step, generator, error=0.4)
        pair_ab = first[:, None] * step
        inner_abc = step[:, :, None] * step[None]
        previous_1 = noisy((pair_ab / pair_ab.sum(dim=0)).T, generator, error=0.1)
        previous_2 = noisy((inner_abc / inner_abc.sum(dim=1, keepdim=True)).transpose(1, 2), generator, error=0.1)

        def window(law: Tensor, start: int, *, correct: bool) -> Tensor:
            """Windows hold the last two axes of ``law``; the first starts at 0."""
            if not correct:
                return law
            if start == 0:
                return torch.einsum("b,ba,ac->ac", law.sum(dim=0), previous_1, next_2)
            before = law.sum(dim=-2)
            return torch.einsum("...pc,pcb,bd->...pbd", before, previous_2, next_2)

        result = {}
        for name, starts in {"none": (), "stride_1": (0, 1, 2), "stride_2": (0, 2)}.items():
            law = window(next_1[:, None] * next_2, 0, correct=0 in starts)
            for start in (1, 2):
                law = window(law[..., None] * next_2, start, correct=start in starts)
            result[name] = total_variation(law, true)
        return result

    return average(measure)


def markov_rows(step: Tensor, num_rows: int, *, seed: int) -> Tensor:
    """Texts of the chain, int64 ``[num_rows, 25]``."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, NUM_SYMBOLS, (num_rows,), generator=generator)]
    for _ in range(24):
        columns.append(torch.multinomial(step[columns[-1]], 1, generator=generator)[:, 0])
    return torch.stack(columns, dim=1)


def new_decoder(*, seed: int) -> Decoder:
    """Two layers, with the offset table for windows of two."""
    config = DecoderConfig(
        family="llama", vocab_size=NUM_SYMBOLS, num_layers=2, width=32, hidden_width=64, num_heads=4, num_kv_heads=4,
        head_dim=8, rope_theta=10_000.0, max_positions=64,
        input_features={OFFSET_FEATURE: TargetOffsets(2).num_values},
    )  # fmt: skip
    decoder = Decoder(config)
    initialize(decoder, seed)
    return decoder


def train(decoder: Decoder, config: ResampleConfig, step_law: Tensor, *, first_step: int, num_steps: int) -> None:
    """Steps of the objective on fresh texts of the chain; the same texts for every setting."""
    objective = config.build(TokenIds(vocab_size=NUM_SYMBOLS, bos=None, eos=None, mask=None, pad=None))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=4e-3, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(first_step, first_step + num_steps):
        tokens_BS = markov_rows(step_law, 32, seed=step)
        rows_B = torch.arange(32) + 32 * step
        zeros_BS = torch.zeros_like(tokens_BS, dtype=torch.int32)
        rows = Rows(step, tokens_BS, zeros_BS, None, rows_B, torch.zeros_like(rows_B))
        noised = objective.corrupt(rows, RowRng(0, step, rows.epochs_B, rows_B))
        loss = objective.combine(decoder(**noised.inputs, terms=objective.terms(noised))).sums["targets"]
        optimizer.zero_grad()
        (loss / noised.counts["targets"]).backward()
        optimizer.step()
        decay.step()


@torch.inference_mode()
def answers(decoder: Decoder, config: ResampleConfig, tokens_BL: Tensor, sources: list[int], target: int) -> Tensor:
    """What the last of the tokens at ``sources`` predicts, ``[B, V]`` probabilities in float64."""
    ahead = torch.tensor([*sources[1:], target]) - torch.tensor(sources)
    places = torch.tensor(sources) if config.rotary_positions == "content" else torch.arange(len(sources))
    features = {OFFSET_FEATURE: TargetOffsets(config.window).rows(ahead).expand_as(tokens_BL)}
    logits = decoder.logits(tokens_BL, places[None], CausalMask(length=len(sources)), features=features)[:, -1]
    return torch.softmax(logits.double(), dim=-1)


def learned_window(decoder: Decoder, config: ResampleConfig, step_law: Tensor) -> dict[str, float]:
    """Errors of the learned conditionals and of the law of the next two tokens, over held-out prefixes."""
    prefixes = markov_rows(step_law, 64, seed=99)[:, :PREFIX_TOKENS]
    symbols = torch.arange(NUM_SYMBOLS).repeat(len(prefixes), 1).flatten()[:, None]
    with_symbol = torch.cat([prefixes.repeat_interleave(NUM_SYMBOLS, dim=0), symbols], dim=1)
    before, place = list(range(PREFIX_TOKENS)), PREFIX_TOKENS
    first_Pa = answers(decoder, config, prefixes, before, place)
    next_Pab = answers(decoder, config, with_symbol, [*before, place], place + 1).unflatten(0, (-1, NUM_SYMBOLS))
    previous_Pba = answers(decoder, config, with_symbol, [*before, place + 1], place).unflatten(0, (-1, NUM_SYMBOLS))
    result: dict[str, list[float]] = {}
    for prefix, p_a, p_ab, p_ba in zip(prefixes, first_Pa, next_Pab, previous_Pba, strict=True):
        true = step_law[prefix[-1]].double()[:, None] * step_law.double()
        ways: dict[str, dict[str, Any]] = {f"k={k:g}": {"iterations": k, "refresh": "always"} for k in (0, 0.5, 1, 2)}
        ways["k=1,greedy>0.9"] = {"iterations": 1.0, "greedy": True, "threshold": 0.9}
        for name, way in ways.items():
            law = corrected(p_a[:, None] * p_ab, p_ab, p_ba, **way)
            result.setdefault(f"tv {name}", []).append(total_variation(law, true))
            result.setdefault(f"log_likelihood {name}", []).append(float((law * true.log()).sum()))
        result.setdefault("ce_next", []).append(-float((true.sum(1) * p_a.log()).sum()))
        result.setdefault("ce_previous", []).append(-float((true * p_ba.T.log()).sum()))
    return {name: round(statistics.fmean(values), 5) for name, values in result.items()}


def learned(*, num_steps: int = 300, seeds: tuple[int, ...] = (1, 2)) -> dict[str, dict[str, float]]:
    """The objective's settings, from the same next-token model, at equal steps and tokens."""
    step_law = torch.softmax(
        2.0 * torch.randn(NUM_SYMBOLS, NUM_SYMBOLS, generator=torch.Generator().manual_seed(5)), dim=1
    )
    half = {"row_probability": 0.5, "window_probability": 0.5}
    grid: dict[str, dict[str, Any]] = {
        f"q={q:g},s={s:g}": {"row_probability": q, "window_probability": s}
        for q, s in ((0, 0), (0.5, 0.25), (0.5, 0.5), (0.5, 1), (1, 0.2), (1, 0.5), (1, 1))
    }
    grid["q=0.5,s=0.5,content"] = {**half, "rotary_positions": "content"}
    grid["q=0.5,s=0.5,random"] = {**half, "permutation": "random"}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in grid}
    for seed in seeds:
        base, plain = new_decoder(seed=seed), ResampleConfig(row_probability=0.0)
        train(base, plain, step_law, first_step=100_000 * seed, num_steps=num_steps)
        for name, fields in grid.items():
            config = ResampleConfig(**fields)
            decoder = copy.deepcopy(base)
            train(decoder, config, step_law, first_step=100_000 * seed + num_steps, num_steps=num_steps)
            runs[name].append(learned_window(decoder.eval(), config, step_law))
    return {
        name: {key: round(statistics.fmean(run[key] for run in found), 4) for key in found[0]}
        for name, found in runs.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    content = {
        "environment": environment("torch"),
        "pair": {
            "error_of_first_0.2_others_exact": pair_errors(first=0.2, following=0.0, previous=0.0),
            "errors_0.2_0.05_0.05": pair_errors(first=0.2, following=0.05, previous=0.05),
            "errors_0.1_0.1_0.1": pair_errors(first=0.1, following=0.1, previous=0.1),
            "bound_at_errors_0.1": pair_bound(),
            "proposals": pair_proposals(),
        },
        "text": {"tv_one_iteration": text_strides()},
        "learned": learned(),
    }
    print(write_result("resample_synthetic", content))


if __name__ == "__main__":
    main()

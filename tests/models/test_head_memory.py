"""What a head costs in memory: its weights' gradient and one chunk, whatever the vocabulary and the number of positions.

Measured by torch's own count of bytes allocated and freed, forward and backward together. Allowed beside the ``[V, D]``
gradient: a small number of ``[C, V]`` float32 tensors of one chunk (logits and probabilities, for rates that differ by
token also the rates and one product), and the narrow tensors of the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from raydist.core.terms import CrossEntropyTerm, ElboTerm, HeadTerm, PoissonTerm
from raydist.models.head_costs import CrossEntropyCost, ElboCost, LogitCost
from raydist.models.heads import evaluate_terms
from raydist.models.linear_loss import default_chunk_positions, linear_loss

SMALL, LARGE = 8_192, 131_072
D, K = 2, 4
CHUNK_BYTES, MAX_CHUNK_BYTES = 4 * 2**20, 64 * 2**20
NARROW_BYTES = 128 * 2**10
KINDS = {"cross entropy": 2, "equal rates": 2, "rates by token": 4}
"""Cost to the number of ``[C, V]`` tensors of a chunk that may live at once."""


@dataclass(frozen=True)
class Rates:
    scale_U: torch.Tensor

    def at(self, time_C):
        return self.scale_U / (1 - time_C)[:, None]

    def to(self, device):
        return self


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that was allocated at once while the function ran, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def problem(kind: str, *, vocab_size: int, num: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
    """Hidden states, a head, and the fields of the term."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, D, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, D, generator=generator, requires_grad=True)
    known: dict[str, object] = {"targets_T": torch.randint(0, vocab_size, (num,), generator=generator)}
    if kind != "cross entropy":
        known["current_T"] = torch.randint(0, vocab_size, (num,), generator=generator)
        known["times_T"] = 0.9 * torch.rand(num, generator=generator)
        known["rates"] = Rates(torch.rand(1 if kind == "equal rates" else vocab_size, generator=generator))
    return hidden, weight, known


def peak_of_loss(kind: str, *, vocab_size: int, num: int) -> int:
    """With chunks of as many logits as fit in ``CHUNK_BYTES``."""
    hidden, weight, known = problem(kind, vocab_size=vocab_size, num=num)
    cost: LogitCost = CrossEntropyCost(**known) if kind == "cross entropy" else ElboCost(**known)
    chunk = CHUNK_BYTES // 4 // vocab_size
    return peak_bytes(lambda: linear_loss(hidden, weight_VD=weight, cost=cost, chunk_positions=chunk)[0].backward())


def test_the_measure_sees_what_is_freed():
    def allocate() -> None:
        first = torch.zeros(2**20, dtype=torch.uint8)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert peak_bytes(allocate) == pytest.approx(2 * 2**20, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_times_the_vocabulary_adds_its_gradient_and_nothing_else(kind):
    small, large = (peak_of_loss(kind, vocab_size=size, num=256) for size in (SMALL, LARGE))
    assert abs(large - small - (LARGE - SMALL) * D * 4) < NARROW_BYTES
    assert large - LARGE * D * 4 < KINDS[kind] * CHUNK_BYTES + NARROW_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_positions_add_no_logits(kind):
    few, many = (peak_of_loss(kind, vocab_size=SMALL, num=num) for num in (256, 512))
    assert abs(many - few) < NARROW_BYTES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_terms_keep_to_the_chunk_budget(kind, vocab_size):
    """Through the door that the step uses, where the dense logits of 640 positions at V = 128 Ki would take 320 MiB."""
    num = 640
    hidden, weight, known = problem(kind, vocab_size=vocab_size, num=num)
    of_term = CrossEntropyTerm if kind == "cross entropy" else ElboTerm
    term: HeadTerm = of_term(name="x", positions_T=torch.arange(num), **known)

    def step() -> None:
        (result,) = evaluate_terms(hidden[None], terms=[term], heads={"lm": weight})
        result.loss_sum.backward()

    chunk_bytes = CHUNK_BYTES if vocab_size == SMALL else MAX_CHUNK_BYTES
    peak = peak_bytes(step)
    assert peak < vocab_size * D * 4 + KINDS[kind] * chunk_bytes + NARROW_BYTES
    assert peak > vocab_size * D * 4 + chunk_bytes


@pytest.mark.parametrize("vocab_size", [256, SMALL, 49_152, LARGE, 151_936, 10**6, 2**25])
def test_no_vocabulary_exceeds_the_chunk_budget(vocab_size):
    chunk_bytes = 4 * vocab_size * default_chunk_positions(vocab_size, is_cuda=False)
    assert chunk_bytes <= max(MAX_CHUNK_BYTES, 4 * vocab_size)
    on_cuda = 4 * vocab_size * default_chunk_positions(vocab_size, is_cuda=True)
    assert on_cuda <= max(512 * 2**20, 4 * vocab_size)


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_a_narrow_head_does_not_know_the_vocabulary(vocab_size):
    hidden, weight, _ = problem("cross entropy", vocab_size=vocab_size, num=256)
    heads = {"lm": weight, "rates": torch.zeros(K, D, requires_grad=True)}
    ones_TK = torch.ones(256, K)
    term = PoissonTerm(
        name="rates", positions_T=torch.arange(256), exposure_TK=ones_TK, counts_TK=ones_TK, head="rates"
    )

    def step() -> None:
        (result,) = evaluate_terms(hidden[None], terms=[term], heads=heads)
        result.loss_sum.backward()

    assert peak_bytes(step) < NARROW_BYTES

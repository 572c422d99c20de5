"""The contenders of ``samplers.py``, one per process: our flow sampler, and flow-matching's solver.

Each order on stdin is one whole chain from the source to data; it is answered by ``{"seconds": ..., "cpu_seconds": ...,
"peak_growth_bytes": ...}``, the last one what the peak of the resident memory grew by since the stub was made.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def fixed_logits(spec: dict[str, Any]) -> Tensor:
    """The stub's table, float32 ``[L, V]``; the mask id is never likely."""
    generator = torch.Generator().manual_seed(0)
    logits_LV = torch.empty(spec["length"], spec["vocab_size"]).normal_(std=3.0, generator=generator)
    logits_LV[:, -1] = -1e4
    return logits_LV


class PositionStub(nn.Module):
    """Speaks the decoder's inference interface: a hidden state is its position, and the head looks up its logits."""

    def __init__(self, logits_LV: Tensor, *, takes_time: bool) -> None:
        super().__init__()
        self.logits_LV = nn.Parameter(logits_LV, requires_grad=False)
        self.config = SimpleNamespace(max_positions=len(logits_LV) + 1, time_input=takes_time)

    def hidden(self, tokens_BL: Tensor, positions_BL: Tensor, mask: Any, time_BL: Tensor | None = None) -> Tensor:
        """Positions, ``[B, L]``; the text begins behind a prompt of one token."""
        return positions_BL.expand_as(tokens_BL) - 1

    def head_logits(self, hidden_T: Tensor) -> Tensor:
        """Logits ``[T, V]``."""
        return self.logits_LV[hidden_T]


def raydist_chain(spec: dict[str, Any], logits_LV: Tensor) -> Callable[[], Any]:
    """Our sampler through its public interface."""
    from raydist.config.registries import PATHS, SAMPLERS
    from raydist.core.token_ids import TokenIds
    from raydist.sampling.base import Trained

    path = PATHS.parse({"name": "mixture", "source": {"name": spec["source"]}, "step_rule": "euler"})
    ids = TokenIds(vocab_size=spec["vocab_size"], bos=None, eos=None, mask=spec["vocab_size"] - 1, pad=None)
    record = {"name": "discrete_flow", "path": path.model_dump(mode="json")}
    corrector = {"strength": spec["corrector"], "power_start": 0.0, "power_stop": 0.0}
    config = SAMPLERS.parse({"name": "discrete_flow", "num_steps": spec["num_steps"], "corrector": corrector})
    sampler = config.build(Trained(ids=ids, objective=record))
    model = PositionStub(logits_LV, takes_time=spec["source"] != "mask")
    prompts = [[row] for row in range(spec["batch_rows"])]
    return lambda: sampler.generate(model, prompts, max_new_tokens=spec["length"])


def flow_matching_chain(spec: dict[str, Any], logits_LV: Tensor) -> Callable[[], Any]:
    """The peer's solver, with a model that gives probabilities."""
    from flow_matching.path import MixtureDiscreteProbPath
    from flow_matching.path.scheduler import CondOTScheduler
    from flow_matching.solver import MixtureDiscreteEulerSolver
    from flow_matching.utils import ModelWrapper

    vocab_size, shape = spec["vocab_size"], (spec["batch_rows"], spec["length"])
    if spec["probabilities"] == "free":
        logits_LV.copy_(torch.softmax(logits_LV, dim=-1))

    class Model(ModelWrapper):
        def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            answers_BLV = logits_LV.expand(*shape, vocab_size)
            return answers_BLV if spec["probabilities"] == "free" else torch.softmax(answers_BLV, dim=-1)

    source_V = torch.full((vocab_size,), 1 / (vocab_size - 1))
    source_V[-1] = 0.0
    solver = MixtureDiscreteEulerSolver(
        model=Model(nn.Identity()),
        path=MixtureDiscreteProbPath(scheduler=CondOTScheduler()),
        vocabulary_size=vocab_size,
        source_distribution_p=source_V,
    )
    mask = torch.full(shape, vocab_size - 1)

    def chain() -> Tensor:
        start = mask if spec["source"] == "mask" else torch.randint(0, vocab_size - 1, shape)
        return solver.sample(
            start,
            step_size=None,
            div_free=(lambda t: spec["corrector"] * (t > 0)) if spec["corrector"] else 0.0,
            time_grid=torch.linspace(0.0, 1.0, spec["num_steps"] + 1),
        )

    return chain


def peak_bytes() -> int:
    """The most resident memory the process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    logits_LV = fixed_logits(spec)
    chain = {"raydist": raydist_chain, "flow_matching": flow_matching_chain}[spec["contender"]](spec, logits_LV)
    before_bytes = peak_bytes()
    for _ in sys.stdin:
        started, cpu_started = time.perf_counter(), time.process_time()
        chain()
        answer = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        print(json.dumps({**answer, "peak_growth_bytes": peak_bytes() - before_bytes}), flush=True)


if __name__ == "__main__":
    main()

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raydist.core.dist import process_group
from raydist.fsdp_utils.apply import reshard
from raydist.fsdp_utils.materialize import materialize
from raydist.fsdp_utils.mesh import make_mesh
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from tests.fsdp_utils.cases import CASES, NUM_ROWS, SEED, Case, backward_of_rows, read


def _plain_gradients(case: Case) -> dict[str, Tensor]:
    decoder = Decoder(case.config())
    initialize(decoder, SEED)
    loss = backward_of_rows(decoder, rows=slice(0, NUM_ROWS))
    return {"loss": torch.tensor([loss])} | {name: p.grad for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_summed_over_workers_and_microbatches(
    computed: dict[int, str], case: Case, world_size: int
) -> None:
    tolerance = 2e-2 if case.precision == "bf16" else 1e-6
    found, expected = read(computed[world_size], case, "gradients"), _plain_gradients(case)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= tolerance * gradient.norm(), name  # 0 behind weights that start at zero


def test_bf16_policy_computes_in_bf16_and_keeps_float32_gradients(computed: dict[int, str]) -> None:
    by_name = {case.name: case for case in CASES}
    exact = read(computed[1], by_name["accumulated"], "gradients")
    rounded = read(computed[1], by_name["bf16"], "gradients")
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    assert any(not torch.allclose(rounded[name], exact[name], rtol=1e-4) for name in exact)


@pytest.mark.parametrize(("recompute", "extras"), [("none", False), ("block", False), ("block", True)])
def test_each_block_is_compiled_with_and_without_recompute(
    monkeypatch: pytest.MonkeyPatch, recompute: str, extras: bool
) -> None:
    num_operations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        num_operations.append(
            sum(node.op.startswith("call") for module in graph.modules() for node in module.graph.nodes)
        )
        return graph.forward

    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_with(module, backend=backend))
    torch.compiler.reset()
    case = Case("compiled", tied=True, extras=extras)
    with process_group() as workers:
        decoder = materialize(
            case.config(),
            mesh=make_mesh(workers),
            device=workers.device,
            seed=SEED,
            recompute=recompute,
            compile=True,
        )
        backward_of_rows(decoder, rows=slice(0, NUM_ROWS))
        reshard(decoder)
        found = {name: parameter.grad.full_tensor() for name, parameter in decoder.named_parameters()}
    assert max(num_operations) > 20
    for name, gradient in _plain_gradients(case).items():
        if name != "loss":
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)

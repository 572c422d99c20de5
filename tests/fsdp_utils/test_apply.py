import pytest
import torch
from torch import Tensor

from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from tests.fsdp_utils.cases import CASES, NUM_ROWS, SEED, Case, backward_of_rows, read, tiny_config


def _plain_gradients(case: Case) -> dict[str, Tensor]:
    decoder = Decoder(tiny_config(tied=case.tied, family=case.family))
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
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, name


def test_bf16_policy_computes_in_bf16_and_keeps_float32_gradients(computed: dict[int, str]) -> None:
    by_name = {case.name: case for case in CASES}
    exact = read(computed[1], by_name["accumulated"], "gradients")
    rounded = read(computed[1], by_name["bf16"], "gradients")
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    assert any(not torch.allclose(rounded[name], exact[name], rtol=1e-4) for name in exact)

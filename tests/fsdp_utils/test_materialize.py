import math

import pytest
import torch

from raydist.core.dist import process_group
from raydist.core.errors import ModelError
from raydist.fsdp_utils.materialize import materialize
from raydist.fsdp_utils.mesh import make_mesh
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from tests.fsdp_utils.cases import CASES, SEED, ArrayWeights, Case, read, tiny_config


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_meta_path_equals_plain_path_bit_for_bit(computed: dict[int, str], case: Case, world_size: int) -> None:
    plain = Decoder(case.config())
    initialize(plain, SEED)
    found = read(computed[world_size], case, "weights")
    expected = dict(plain.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


def test_buffers_are_made_anew() -> None:
    config = tiny_config(tied=True)
    with process_group() as workers:
        decoder = materialize(config, mesh=make_mesh(workers), device=workers.device, seed=SEED)
    assert torch.equal(decoder.frequencies_f, Decoder(config).frequencies_f)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("norm.weight", lambda value: value[:-1], "another shape"),
        (
            "blocks.1.feed_forward.up.weight",
            lambda value: value.index_fill(0, torch.tensor(3), math.nan),
            "not a number",
        ),
    ],
)
def test_stored_weights_that_do_not_fit_are_refused(name: str, damage, what: str) -> None:
    config = tiny_config(tied=True)
    stored = {key: value.detach() for key, value in Decoder(config).named_parameters()}
    stored[name] = damage(stored[name])
    with process_group() as workers, pytest.raises(ModelError, match=what) as caught:
        materialize(config, mesh=make_mesh(workers), device=workers.device, seed=SEED, weights=ArrayWeights(stored))
    assert caught.value.where == name

"""The step reads nothing back: neither a number nor a shape that the device would have to be waited for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_loaders.loader import Loader
from raydist.config.registries import OBJECTIVES
from raydist.models.decoder import Decoder
from raydist.models.init import initialize
from raydist.training.batches import StepBatch, step_batch_maker
from raydist.training.data import open_data
from raydist.training.meters import Meters
from raydist.training.model import decoder_config
from raydist.training.optim import GuardedAdamW
from raydist.training.step import NonFiniteGuard, train_step
from tests.training.cases import recipe_of

CPU = torch.device("cpu")
WAITS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten._unique2,
}


class NothingReadBack(TorchDispatchMode):
    """On a GPU the host would wait in these operations, and in an index by a mask; here they fail.

    Copies to the host (``tolist``, ``cpu``) do nothing on a CPU, so they go unnoticed.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        by_mask = function.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or function.overloadpacket in WAITS:
            raise AssertionError(f"{function} reads from the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x[x > 0], torch.nonzero],
)
def test_reading_is_noticed(read: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="reads from the device"), NothingReadBack():
        read(torch.ones(()))


@pytest.mark.parametrize("name", sorted(OBJECTIVES.classes()))
def test_no_step_waits(name: str, uneven_dataset: str, tmp_path: Path) -> None:
    config = recipe_of(uneven_dataset, tmp_path, **{"objective": f"{{name: {name}}}"}).config
    data = open_data(config.data, seed=config.seed)
    objective = config.objective.build(data.ids)
    model = Decoder(decoder_config(config.model, data=data, seq_len=config.data.seq_len, needs=objective.needs))
    initialize(model, config.seed)
    optimizer = GuardedAdamW(model.named_parameters(), config.training.optimizer)
    make = step_batch_maker(objective, noise_seed=config.seed, microbatch_rows=4)
    loader: Loader[StepBatch] = Loader(data.train, batch_rows=8, num_steps=2, transform=make)
    guard, meters = NonFiniteGuard.create(CPU), Meters()
    for batch in loader:
        with NothingReadBack():
            ballot = train_step(
                model, objective, optimizer, batch,
                device=CPU, clip_norm=1.0, guard=guard, meters=meters, wishes=[1.0, 0.0],
            )  # fmt: skip
        assert ballot.read() == [True, False]
    assert meters.read()["loss"] > 0

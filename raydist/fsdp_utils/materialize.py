"""The one path from a configuration to a sharded model with weights.

Meta device, shard, allocate, fill, re-create buffers: no worker ever holds the whole model, and what is filled is
checked.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from raydist.core.errors import ModelError
from raydist.fsdp_utils.apply import apply_fsdp, reshard
from raydist.fsdp_utils.precision import Precision
from raydist.models.attention import AttentionBackend
from raydist.models.config import DecoderConfig
from raydist.models.decoder import Decoder
from raydist.models.init import initial_value


class WeightSource(Protocol):
    """Where stored weights come from; :class:`raydist.models.hf.HfWeights` is one."""

    def read(self, name: str) -> Tensor:
        """The whole tensor of one parameter, named as in the decoder, on the CPU."""


def materialize(
    config: DecoderConfig,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    seed: int,
    precision: Precision = "fp32",
    recompute: str = "none",
    compile: bool = False,
    reshard_after_forward: bool = True,
    weights: WeightSource | None = None,
    attention: AttentionBackend = "sdpa",
) -> Decoder:
    """A sharded decoder whose weights are loaded, or drawn as :func:`raydist.models.init.initialize` draws them.

    Each parameter is made or read whole on the host, one at a time, and each worker copies its rows. So the weights are
    a function of the seed alone, the same bits on any number of workers.

    Args:
        config: sizes, with the vocabulary already grown.
        mesh: of all workers.
        device: where this worker's shards live.
        seed: of the initial weights; unused with ``weights``.
        precision: see :func:`raydist.fsdp_utils.precision.mixed_precision`.
        recompute: see :func:`raydist.fsdp_utils.apply.apply_fsdp`.
        compile: see :func:`raydist.fsdp_utils.apply.apply_fsdp`.
        reshard_after_forward: see :func:`raydist.fsdp_utils.apply.apply_fsdp`.
        weights: stored weights to load.
        attention: kernel of the decoder.

    Raises:
        ModelError: a stored tensor has another shape, or holds a NaN.
    """
    with torch.device("meta"):
        decoder = Decoder(config, attention=attention)
    apply_fsdp(
        decoder,
        mesh=mesh,
        precision=precision,
        recompute=recompute,
        compile=compile,
        reshard_after_forward=reshard_after_forward,
    )
    decoder.to_empty(device=device)
    decoder.retie()
    _fill_with_sentinel(decoder)

    def source(name: str, shape: torch.Size) -> Tensor:
        if weights is not None:
            return weights.read(name)
        return initial_value(name, shape, config=config, seed=seed)

    for name, parameter in decoder.named_parameters():
        copy_whole(source(name, parameter.shape), into=parameter, name=name)
    decoder.reset_buffers(device)
    _check_filled(decoder)
    return decoder


def copy_whole(value: Tensor, *, into: Tensor, name: str) -> None:
    """Copies a whole host tensor into a parameter; of a sharded one, the rows that this worker holds.

    Raises:
        ModelError: the shapes differ.
    """
    if value.shape != into.shape:
        raise ModelError(
            "stored weights have another shape",
            where=name,
            found=list(value.shape),
            expected=list(into.shape),
            fix="choose the preset that the weights belong to",
        )
    target = into.detach()
    if isinstance(target, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        rows = tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))
        target.to_local().copy_(value[rows])
    else:
        target.copy_(value)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters in float32 on rank 0's host, for export; empty on the other workers. All of them call it.

    Gathered one parameter at a time, so a device needs room for the largest one only. Tied weights appear once.
    """
    reshard(model)
    state = {}
    for name, parameter in model.named_parameters():
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            is_first = whole.device_mesh.get_rank() == 0
            whole = whole.full_tensor()
        else:
            is_first = True
        if is_first:
            state[name] = whole.to("cpu", torch.float32, copy=True)
    return state


def _local_tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in named.items()}


def _fill_with_sentinel(model: nn.Module) -> None:
    for tensor in _local_tensors(model).values():
        tensor.fill_(math.nan)


def _check_filled(model: nn.Module) -> None:
    """Raises for the first tensor in which a sentinel, or a NaN of the stored weights, is left."""
    for name, tensor in _local_tensors(model).items():
        if torch.isnan(tensor).any():
            raise ModelError(
                "a weight is not a number after loading",
                where=name,
                found=f"{int(torch.isnan(tensor).sum())} NaN of {tensor.numel()} values on this worker",
                fix="check the stored weights",
            )

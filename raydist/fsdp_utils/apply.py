"""Recompute, compile, shard: always in this order, also on one worker.

Recompute must be inside what is compiled, and both inside the module whose parameters FSDP gathers and frees. Recompute
and compile change no parameter name.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from raydist.fsdp_utils.precision import Precision, mixed_precision
from raydist.models.decoder import Decoder


def apply_fsdp(
    decoder: Decoder,
    *,
    mesh: DeviceMesh,
    precision: Precision,
    recompute: str,
    compile: bool,
    reshard_after_forward: bool = True,
) -> None:
    """Shards a decoder in place, one FSDP group a block and one for the rest.

    The embedding, the last norm and the head are in the root's group, so tied weights are gathered and reduced once.
    The root's parameters stay gathered between forward and backward: the head is the last used and the first needed
    again.

    Gradients are summed over workers, not averaged: the loss is divided by the global denominator before the backward.

    Args:
        decoder: on the meta device or on the mesh's device.
        mesh: from :func:`raydist.fsdp_utils.mesh.make_mesh`.
        precision: of ``training.precision``.
        recompute: ``"block"`` recomputes each block's activations in the backward, ``"none"`` keeps them.
        compile: whether each block is compiled.
        reshard_after_forward: free a block's gathered parameters after its forward and gather them again in the backward
            (ZeRO-3); False keeps them (ZeRO-2): a third of the collectives less, for the memory of a whole gathered model.
    """
    policy = mixed_precision(precision)
    for block in decoder.blocks:
        if recompute == "block":
            _recompute_in_backward(block)
        if compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(decoder, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.size() > 1:  # on one worker there is nothing to average, and FSDP would spend a pass on dividing by one
        for module in fsdp_modules(decoder):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _recompute_in_backward(block: nn.Module) -> None:
    """Replaces the forward, where a wrapper module would change parameter names. No block draws random numbers.

    A function of its own, not a partial: the compiler follows ``checkpoint`` only inside a frame that it compiles.
    """
    plain_forward = block.forward

    def forward(*args: Any) -> Any:
        return checkpoint(plain_forward, *args, use_reentrant=False, preserve_rng_state=False)

    block.forward = forward


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that own an FSDP group, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Makes every parameter a shard again.

    After a forward without a backward (validation, sampling) the root's parameters are still the gathered ones; whoever
    reads or writes parameters by name calls this first. Nothing happens to a model without FSDP.
    """
    for module in fsdp_modules(model):
        module.reshard()

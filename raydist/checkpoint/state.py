"""Model and optimizer as one flat dictionary of tensors, and nothing else.

Names are ``model.<parameter>`` and ``optimizer.<parameter>.<moment>``. Hyperparameters of the optimizer are not in it:
they come from the recipe, so a resumed run follows its recipe. Shared parameters appear once, under their first name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from raydist.checkpoint.shards import dtype_name
from raydist.core.errors import ResumeError
from raydist.fsdp_utils.apply import reshard


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under ``model.``; the very tensors, not copies."""
    reshard(model)
    kept = model.state_dict(keep_vars=True)
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    tensors.update({f"model.{name}": buffer for name, buffer in model.named_buffers() if name in kept})
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under ``optimizer.``, named after the parameters it belongs to."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} is {type(value).__name__}, not a tensor")
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def allocate_optimizer_state(model: nn.Module, optimizer: Optimizer, *, metadata: Metadata) -> None:
    """Gives the optimizer the empty state that the checkpoint will fill, sharded like the parameters.

    A moment has the shape of its parameter and lies beside it; anything else (AdamW's step count) is a small tensor
    that every worker holds, on the host unless the optimizer keeps it on the device.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        keys = [fqn for fqn in metadata.state_dict_metadata if _moment(fqn, prefix) is not None]
        if not keys or parameter not in groups:
            continue
        on_device = groups[parameter].get("capturable") or groups[parameter].get("fused")
        state: dict[str, Tensor] = {}
        for fqn in keys:
            stored = metadata.state_dict_metadata[fqn]
            dtype = stored.properties.dtype
            if stored.size == parameter.shape:
                state[fqn.removeprefix(prefix)] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                device = parameter.device if on_device else torch.device("cpu")
                state[fqn.removeprefix(prefix)] = torch.zeros(stored.size, dtype=dtype, device=device)
        optimizer.state[parameter] = state


def _moment(fqn: str, prefix: str) -> str | None:
    key = fqn.removeprefix(prefix)
    return key if key != fqn and "." not in key else None


def check_fits(tensors: dict[str, Tensor], *, metadata: Metadata, where: str) -> None:
    """Compares names, shapes and dtypes with the checkpoint before anything is overwritten.

    Raises:
        ResumeError: naming the first tensor that differs.
    """
    stored = metadata.state_dict_metadata
    missing = [fqn for fqn in tensors if fqn not in stored]
    extra = [fqn for fqn in stored if fqn.startswith("model.") and fqn not in tensors]
    if missing or extra:
        raise ResumeError(
            "the checkpoint belongs to another model",
            where=where,
            found=f"{len(extra)} tensors that the model lacks" + (f", first {extra[0]}" if extra else ""),
            expected=f"{len(missing)} tensors that are not stored" + (f", first {missing[0]}" if missing else ""),
            fix="use the recipe that the run began with, or another run name",
        )
    for fqn, tensor in tensors.items():
        found, expected = (
            _describe(stored[fqn].properties.dtype, stored[fqn].size),
            _describe(tensor.dtype, tensor.shape),
        )
        if found != expected:
            raise ResumeError(
                f"the checkpoint's {fqn} does not fit the model",
                where=where,
                found=found,
                expected=expected,
                fix="use the recipe that the run began with, or another run name",
            )


def _describe(dtype: torch.dtype, shape: Any) -> str:
    return f"{dtype_name(dtype)} {list(shape)}"

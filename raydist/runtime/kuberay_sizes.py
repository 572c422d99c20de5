"""How many nodes of a cluster file a recipe needs, and how much local disk each of them."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from raydist.config.schema import ModelConfig, RunConfig
from raydist.core.errors import ConfigError
from raydist.core.units import parse_bytes
from raydist.models.config import DecoderConfig
from raydist.models.hf import read_hf_config
from raydist.models.presets import PRESETS

GIB = 2**30
# float32 master weights and AdamW's two moments.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
# Inputs and heads that an objective adds, vocabulary rows for a mask token, headers.
_ALLOWANCE = 1.1
_CHECKPOINTS_ON_SPOOL = 2


@dataclass(frozen=True)
class NodeOffer:
    """What one worker node of a cluster file has.

    Attributes:
        num_gpus: 0 for a node without.
        num_cpus: logical cores for the workers.
    """

    num_gpus: int
    num_cpus: float


@dataclass(frozen=True)
class NodeNeeds:
    """What a recipe takes of a cluster file.

    Attributes:
        num_nodes: worker nodes of the whole run.
        min_nodes: with fewer the run cannot start.
        workers_per_node: at most so many on one node.
        gpus_per_node: that the nodes reserve; 0 for a run on CPU.
        spool_bytes: node-local disk of each node.
    """

    num_nodes: int
    min_nodes: int
    workers_per_node: int
    gpus_per_node: int
    spool_bytes: int


def node_needs(config: RunConfig, offer: NodeOffer, *, where: str) -> NodeNeeds:
    """Spreads the workers evenly over as few nodes as hold them.

    Args:
        config: the resolved recipe.
        offer: of one worker node.
        where: the cluster file, for messages.

    Raises:
        ConfigError: a node holds no worker at all, or the model's size is not known here.
    """
    scaling = config.scaling
    most = offer.num_gpus if scaling.use_gpu else math.floor(offer.num_cpus / scaling.cpus_per_worker)
    if most < 1:
        need = "one GPU" if scaling.use_gpu else f"scaling.cpus_per_worker={scaling.cpus_per_worker:g} CPUs"
        raise ConfigError(
            "a worker does not fit on a node of this cluster",
            where=where,
            found=f"{offer.num_gpus} GPUs, {offer.num_cpus:g} CPUs a node",
            expected=f"at least {need}",
        )
    num_nodes = math.ceil(scaling.num_workers / most)
    workers_per_node = math.ceil(scaling.num_workers / num_nodes)
    min_nodes = math.ceil((scaling.min_workers or scaling.num_workers) / workers_per_node)
    return NodeNeeds(
        num_nodes=num_nodes,
        min_nodes=min_nodes,
        workers_per_node=workers_per_node,
        gpus_per_node=workers_per_node if scaling.use_gpu else 0,
        spool_bytes=spool_bytes(config, num_nodes=min_nodes),
    )


def spool_bytes(config: RunConfig, *, num_nodes: int) -> int:
    """Node-local disk of one node: ``2 x checkpoint / nodes + data.cache_limit``, in whole GiB.

    Two checkpoints, because one may still be on its way to the bucket while the next is written; the fewest nodes that an
    elastic run may shrink to, because each then holds more of it.
    """
    checkpoint_bytes = num_parameters(config.model) * _CHECKPOINT_BYTES_PER_PARAMETER * _ALLOWANCE
    cache_bytes = parse_bytes(config.data.cache_limit, where="data.cache_limit")
    return math.ceil((_CHECKPOINTS_ON_SPOOL * checkpoint_bytes / num_nodes + cache_bytes) / GIB) * GIB


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the decoder; with the largest known vocabulary where the data decides.

    Weights to start from are often not on the machine that renders; then the name of their folder says which they are.

    Raises:
        ConfigError: the preset or the folder's name is not known.
    """
    decoder = _decoder(model)
    if decoder.vocab_size == 0:
        largest = max(preset.vocab_size for preset in PRESETS.values())
        decoder = decoder.with_vocab(largest)
    overrides = {key: value for key, value in model.overrides.items() if key in DecoderConfig.model_fields}
    return decoder.model_copy(update=overrides).num_parameters


def _decoder(model: ModelConfig) -> DecoderConfig:
    if model.init_from is None:
        name, where = model.preset, "model.preset"
    elif os.path.isfile(os.path.join(model.init_from, "config.json")):
        return read_hf_config(model.init_from)
    else:
        name, where = os.path.basename(model.init_from.rstrip("/")), "model.init_from"
    known = {_bare(preset): decoder for preset, decoder in PRESETS.items()}
    if _bare(name) not in known:
        raise ConfigError(
            "the size of the model is not known here, so neither is the disk that its checkpoints need",
            where=where,
            found=name,
            expected="a folder with config.json on this machine, or one named like a model of: raydist list models",
        )
    return known[_bare(name)]


def _bare(name: str) -> str:
    """``Meta-Llama-3.1-8B-Instruct`` and ``llama3.1-8b`` alike."""
    lowered = re.sub(r"^meta-|-(instruct|base|chat)$", "", name.lower())
    return re.sub(r"[^a-z0-9.]", "", lowered)

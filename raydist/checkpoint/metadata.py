"""Which chunk of which tensor lies in which file, as JSON.

torch's distributed checkpoint (DCP) keeps this table as a pickle, and reading a pickle from a bucket is running
whatever is in it. Ours is data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from raydist.checkpoint.shards import dtype_name, dtype_of


@dataclass(frozen=True)
class ChunkPlace:
    """Where one chunk is: the shard file and the tensor's name in it."""

    file: str
    name: str


def chunk_name(fqn: str, offsets: tuple[int, ...]) -> str:
    """The name of a chunk in its shard file: ``model.norm.weight@0``, ``model.head.weight@128,0``."""
    return f"{fqn}@{','.join(str(offset) for offset in offsets)}" if offsets else fqn


def metadata_to_json(metadata: Metadata) -> dict[str, Any]:
    """The table of all tensors, each with dtype, shape and its chunks."""
    tensors = {}
    for fqn, tensor in metadata.state_dict_metadata.items():
        chunks = []
        for chunk in tensor.chunks:
            place = metadata.storage_data[MetadataIndex(fqn, chunk.offsets)]
            chunks.append(
                {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": place.file, "name": place.name}
            )
        tensors[fqn] = {
            "dtype": dtype_name(tensor.properties.dtype),
            "shape": list(tensor.size),
            "chunks": chunks,
        }
    return {"tensors": tensors}


def metadata_from_json(value: dict[str, Any]) -> Metadata:
    """The inverse of :func:`metadata_to_json`.

    Raises:
        ValueError, KeyError, TypeError: it is no such table, or a chunk does not lie inside its tensor.
    """
    state: dict[str, Any] = {}
    places: dict[MetadataIndex, ChunkPlace] = {}
    for fqn, tensor in value["tensors"].items():
        chunks = []
        for chunk in tensor["chunks"]:
            offsets = torch.Size(chunk["offsets"])
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            _require_inside(chunk["offsets"], chunk["sizes"], tensor["shape"], name=fqn)
            places[MetadataIndex(fqn, offsets)] = ChunkPlace(chunk["file"], chunk["name"])
        state[fqn] = TensorStorageMetadata(
            TensorProperties(dtype=dtype_of(tensor["dtype"])), torch.Size(tensor["shape"]), chunks
        )
    return Metadata(state, storage_data=places)


def _require_inside(offsets: list[int], sizes: list[int], shape: list[int], *, name: str) -> None:
    bounds = zip(offsets, sizes, shape, strict=True)  # ValueError where they differ in number
    if any(offset < 0 or size < 0 or offset + size > extent for offset, size, extent in bounds):
        raise ValueError(f"{name}: a chunk at {offsets} of size {sizes} in a tensor of shape {shape}")

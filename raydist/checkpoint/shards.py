"""Shard files: the tensor chunks of one worker, as an ordinary safetensors file that any tool can look into.

The format is 8 bytes of header length, a JSON header, then raw little-endian tensors. Writing streams the tensors out
without a second copy in memory; reading fetches only the rows that are asked for.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raydist.checkpoint.files import FileRecord, HashingWriter, VerifiedReader
from raydist.core import storage
from raydist.core.errors import CheckpointError

_ALIGNMENT_BYTES = 8
_LENGTH_BYTES = 8
_NAMES_OF_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES_OF_NAMES = {name: dtype for dtype, name in _NAMES_OF_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """``F32`` and the like, as safetensors and our metadata spell it."""
    return _NAMES_OF_DTYPES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`."""
    return _DTYPES_OF_NAMES[name]


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_shard(path: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes host tensors as one local safetensors file, without a second copy in memory.

    Returns:
        The record of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES_OF_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT_BYTES)
    with storage.atomic_file(path) as partial, open(partial, "wb") as stream:
        writer = HashingWriter(stream)
        writer.write(struct.pack("<Q", len(encoded)))
        writer.write(encoded)
        for tensor in tensors.values():
            if tensor.numel():
                writer.write(_bytes_of(tensor))
    return writer.record()


class ShardReader:
    """The tensors of one shard file, read by rows."""

    def __init__(self, reader: VerifiedReader) -> None:
        self._reader = reader
        (header_bytes,) = struct.unpack("<Q", reader.read(0, _LENGTH_BYTES))
        self._data_start = _LENGTH_BYTES + header_bytes
        header = bytes(reader.read(_LENGTH_BYTES, self._data_start))
        try:
            self._table: dict[str, Any] = json.loads(header)
        except ValueError as error:
            raise CheckpointError("a shard file is not safetensors", where=reader.path, found=error) from None

    def start(self, name: str) -> int:
        """Where a tensor begins in the data section; reading in this order reads the file forwards."""
        return int(self._entry(name)["data_offsets"][0])

    def rows(self, name: str, *, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor along its first dimension.

        Raises:
            CheckpointError: the file has no such tensor, or the bytes are damaged.
        """
        entry = self._entry(name)
        dtype, row_shape = dtype_of(entry["dtype"]), entry["shape"][1:]
        row_bytes = dtype.itemsize * math.prod(row_shape)
        first = self._data_start + entry["data_offsets"][0]
        shape = (stop - start, *row_shape)
        return self._tensor(first + start * row_bytes, first + (start + shape[0]) * row_bytes, dtype, shape)

    def whole(self, name: str) -> Tensor:
        """One whole tensor, of any number of dimensions."""
        entry = self._entry(name)
        low, high = (self._data_start + offset for offset in entry["data_offsets"])
        return self._tensor(low, high, dtype_of(entry["dtype"]), tuple(entry["shape"]))

    def _tensor(self, low: int, high: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if low == high:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._reader.read(low, high), dtype=dtype).view(shape)

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._table:
            raise CheckpointError("a shard file lacks a tensor", where=self._reader.path, expected=name)
        return self._table[name]

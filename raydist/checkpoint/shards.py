"""Shard files: the tensor chunks of one worker, as an ordinary safetensors file that any tool can look into.

The format is 8 bytes of header length, a JSON header, then raw little-endian tensors. Writing streams the tensors out
without a second copy in memory; reading fetches only the rows that are asked for.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a shard's header.

    Attributes:
        dtype: of the elements.
        shape: of the tensor.
        start: first byte in the data section.
        stop: the byte behind the last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def from_json(cls, entry: Any) -> StoredTensor:
        """The inverse of what :func:`write_shard` writes.

        Raises:
            ValueError, KeyError, TypeError: it is no such entry, or its numbers contradict each other.
        """
        start, stop = entry["data_offsets"]
        stored = cls(dtype_of(entry["dtype"]), tuple(entry["shape"]), start=start, stop=stop)
        if any(type(number) is not int or number < 0 for number in (*stored.shape, start, stop)):
            raise ValueError(f"shape {stored.shape} at bytes [{start}, {stop})")
        if stop - start != stored.dtype.itemsize * math.prod(stored.shape):
            raise ValueError(f"{stop - start} bytes for a tensor of shape {stored.shape}")
        return stored


class ShardReader:
    """The tensors of one shard file, read by rows.

    Raises:
        CheckpointError: the header is damaged.
    """

    def __init__(self, reader: VerifiedReader) -> None:
        self._reader = reader
        (header_bytes,) = struct.unpack("<Q", reader.read(0, _LENGTH_BYTES))
        self._data_start = _LENGTH_BYTES + header_bytes
        header = bytes(reader.read(_LENGTH_BYTES, self._data_start))
        try:
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            self._table = {name: StoredTensor.from_json(entry) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError("a shard file is not safetensors", where=reader.path, found=repr(error)) from None

    def start(self, name: str) -> int:
        """Where a tensor begins in the data section; reading in this order reads the file forwards."""
        return self._entry(name).start

    def rows(self, name: str, *, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor along its first dimension.

        Raises:
            CheckpointError: the file has no such tensor or not these rows, or the bytes are damaged.
        """
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                "a tensor of a shard file has another shape than the table says",
                where=f"{self._reader.path}: {name}",
                found=f"shape {entry.shape}",
                expected=f"rows [{start}, {stop})",
            )
        row_bytes = entry.dtype.itemsize * math.prod(entry.shape[1:])
        first = self._data_start + entry.start
        shape = (stop - start, *entry.shape[1:])
        return self._tensor(first + start * row_bytes, first + stop * row_bytes, entry.dtype, shape)

    def whole(self, name: str) -> Tensor:
        """One whole tensor, of any number of dimensions."""
        entry = self._entry(name)
        return self._tensor(self._data_start + entry.start, self._data_start + entry.stop, entry.dtype, entry.shape)

    def _tensor(self, low: int, high: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if low == high:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._reader.read(low, high), dtype=dtype).view(shape)

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._table:
            raise CheckpointError("a shard file lacks a tensor", where=self._reader.path, expected=name)
        return self._table[name]

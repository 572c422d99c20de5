from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from raydist.checkpoint.files import open_verified
from raydist.checkpoint.shards import ShardReader, write_shard
from raydist.core import storage
from raydist.core.errors import CheckpointError

TENSORS: dict[str, Tensor] = {
    "matrix@0,0": torch.randn(7, 5),
    "bf16@3": torch.randn(11).to(torch.bfloat16),
    "transposed": torch.randn(4, 6).T,
    "scalar": torch.tensor(3.5),
    "empty@8,0": torch.empty(0, 5),
    "half": torch.randn(3).half(),
    "double": torch.randn(2, 2, 2).double(),
    "ids": torch.arange(5),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
}


def test_the_file_is_what_the_safetensors_library_reads_and_writes(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.safetensors")
    record = write_shard(path, TENSORS)
    assert (record.size_bytes, record.sha256) == (storage.size_bytes(path), storage.sha256(path))
    found = safetensors.torch.load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_whole_tensors_and_rows_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.safetensors")
    with open_verified(path, record=write_shard(path, TENSORS)) as reader:
        shard = ShardReader(reader)
        for name, tensor in TENSORS.items():
            assert torch.equal(shard.whole(name), tensor), name
            for start in range(tensor.shape[0] if tensor.ndim else 0):
                for stop in range(start, tensor.shape[0] + 1):
                    assert torch.equal(shard.rows(name, start=start, stop=stop), tensor[start:stop]), name
        with pytest.raises(CheckpointError, match="lacks a tensor"):
            shard.whole("other")

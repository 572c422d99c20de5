"""Keys and values of finished text, one row per prompt, rows of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor


class KvCache:
    """Storage for the keys and values of every layer; implements :class:`raydist.models.attention.KeyValueCache`.

    The first ``lengths_B[b]`` slots of row b hold its cached tokens. A forward of n new tokens writes theirs behind the
    ``width`` slots that the longest row uses, so that the keys a layer sees, ``[width cached slots ; n new]``, are a
    view and nothing is copied. Then :meth:`commit` keeps the first tokens of each row and forgets the rest. Slots
    between a row's length and ``width`` hold old numbers; the mask hides them.

    Args:
        batch_size: rows B.
        capacity: slots per row; at least the longest row plus the most tokens fed in one forward. Layers are
            allocated when they are first used, in the type and on the device of their keys.
    """

    def __init__(self, *, batch_size: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def width(self) -> int:
        """Slots that the longest row uses."""
        return int(self.lengths_B.max())

    def extend(self, layer: int, keys_BGNh: Tensor, values_BGNh: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' keys and values of one layer and returns all, ``[B, G, width + N, h]``."""
        batch_size, num_kv_heads, num_new, head_dim = keys_BGNh.shape
        if layer == len(self._keys):
            shape = (batch_size, num_kv_heads, self.capacity, head_dim)
            self._keys.append(keys_BGNh.new_zeros(shape))
            self._values.append(values_BGNh.new_zeros(shape))
        end = self.width + num_new
        if end > self.capacity:
            raise ValueError(f"{end} slots needed, the cache was made with {self.capacity}")
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self.width : end] = keys_BGNh
        values[:, :, self.width : end] = values_BGNh
        return keys[:, :, :end], values[:, :, :end]

    def commit(self, counts_B: Tensor) -> None:
        """Keeps the first ``counts_B[b]`` tokens of the last forward in row b; the others are dropped.

        Args:
            counts_B: int64 ``[B]`` on the CPU.
        """
        most = int(counts_B.max())
        new = torch.arange(most)
        rows_R, new_R = (new[None, :] < counts_B[:, None]).nonzero(as_tuple=True)
        source_R = self.width + new_R
        target_R = self.lengths_B[rows_R] + new_R
        for stored in (*self._keys, *self._values):
            stored[rows_R, :, target_R] = stored[rows_R, :, source_R]
        self.lengths_B = self.lengths_B + counts_B

    def truncate(self, lengths_B: Tensor) -> None:
        """Forgets the tokens of row b from the ``lengths_B[b]``-th on; int64 ``[B]`` on the CPU."""
        self.lengths_B = torch.minimum(self.lengths_B, lengths_B)

    def keep_rows(self, rows_R: Tensor) -> None:
        """Forgets all other rows; row ``rows_R[i]`` becomes row i. int64 on the CPU."""
        self.lengths_B = self.lengths_B[rows_R]
        self._keys = [stored[rows_R.to(stored.device)] for stored in self._keys]
        self._values = [stored[rows_R.to(stored.device)] for stored in self._values]

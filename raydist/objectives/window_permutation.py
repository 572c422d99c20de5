"""Disjoint random windows in rows of tokens, and permutations that stay inside them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Permutation = Literal["swap", "rotate", "random"]


def windows_fit(movable_BS: Tensor, *, width: int) -> Tensor:
    """Where a window of ``width`` tokens that may all move can start, bool ``[B, S]``."""
    fits_BS = torch.zeros_like(movable_BS)
    if movable_BS.shape[1] >= width:
        fits_BS[:, : movable_BS.shape[1] - width + 1] = movable_BS.unfold(1, width, 1).all(dim=-1)
    return fits_BS


def leftmost_disjoint(candidates_BS: Tensor, *, width: int) -> Tensor:
    """The windows that a scan from the left opens, bool ``[B, S]``.

    The scan opens a window at the first candidate and goes on ``width`` tokens later. Every window thus has one successor,
    and what is reached from the first one is found by doubling: after n rounds the first ``2 ** n`` windows are known.

    Args:
        candidates_BS: where a window may start.
        width: tokens of a window.
    """
    num_rows, length = candidates_BS.shape
    index_S = torch.arange(length, device=candidates_BS.device)
    nowhere = torch.full((num_rows, width + 1), length, device=candidates_BS.device)
    own_BS = torch.where(candidates_BS, index_S, length)
    first_from = torch.cat([own_BS.flip(1).cummin(dim=1).values.flip(1), nowhere], dim=1)
    jump = first_from[:, width:]
    reached = torch.zeros(num_rows, length + 1, dtype=torch.int8, device=candidates_BS.device)
    reached.scatter_(1, first_from[:, :1], 1)
    for _ in range((length // width).bit_length()):
        reached = reached.scatter_reduce(1, jump, reached, reduce="amax")
        jump = jump.gather(1, jump)
    return reached[:, :length].bool()


def permuted_order(starts_BS: Tensor, uniforms_BS: Tensor, *, width: int, permutation: Permutation) -> Tensor:
    """The old position of the token at each new position, int64 ``[B, S]``; the identity outside windows.

    - ``swap``: the two tokens of a window change places; needs ``width = 2``.
    - ``rotate``: one token of the window, any but the last with equal probability, moves to its end.
    - ``random``: all ``width!`` orders with equal probability, the identity among them.

    Args:
        starts_BS: first tokens of disjoint windows.
        uniforms_BS: noise in [0, 1).
        width: tokens of a window.
        permutation: the law.
    """
    index_S = torch.arange(starts_BS.shape[1], device=starts_BS.device)
    start_BS = torch.where(starts_BS, index_S, -width).cummax(dim=1).values
    place_BS = index_S - start_BS
    inside_BS = place_BS < width
    if permutation == "random":
        keys_BS = uniforms_BS.double()
    else:
        moved_BS = (uniforms_BS * (width - 1)).long().gather(1, start_BS.clamp(min=0))
        keys_BS = torch.where(place_BS == moved_BS, width - 0.5, place_BS.double()) / width
    return torch.where(inside_BS, start_BS + keys_BS, index_S.double()).argsort(dim=1, stable=True)

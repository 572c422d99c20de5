"""The two sides of ``alignment.py``: raydist's batched alignment and a plain Python dynamic program with its way back."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

VOCABULARY = 32_000
EDIT_SHARE = 0.3

Pair = tuple[list[int], list[int]]


def make_pairs(*, kind: str, length: int, pairs: int) -> list[Pair]:
    """The batch; the same in every process."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(pairs):
        first = rng.integers(0, VOCABULARY, rng.integers(3 * length // 4, length + 1)).tolist()
        if kind == "edited":
            second = []
            for token in first:
                draw = rng.random()
                if draw >= EDIT_SHARE / 3:
                    second.append(token if draw >= 2 * EDIT_SHARE / 3 else int(rng.integers(VOCABULARY)))
                if draw >= 1 - EDIT_SHARE / 3:
                    second.append(int(rng.integers(VOCABULARY)))
            second = second[:length]
        else:
            second = rng.integers(0, VOCABULARY, rng.integers(3 * length // 4, length + 1)).tolist()
        made.append((first, second))
    return made


def plain_alignments(pairs: list[Pair]) -> list[int]:
    """Each pair's number of edits, counted on its alignment."""
    return [sum(a != b for a, b in plain_alignment(first, second)) for first, second in pairs]


def plain_alignment(first: list[int], second: list[int]) -> list[tuple[int | None, int | None]]:
    """A table of costs row by row, then the way back."""
    table = [list(range(len(second) + 1))]
    for i, symbol in enumerate(first, 1):
        above, row = table[-1], [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (symbol != other)))
        table.append(row)
    columns: list[tuple[int | None, int | None]] = []
    i, j = len(first), len(second)
    while i or j:
        if i and j and table[i][j] == table[i - 1][j - 1] + (first[i - 1] != second[j - 1]):
            columns.append((first[i - 1], second[j - 1]))
            i, j = i - 1, j - 1
        elif i and table[i][j] == table[i - 1][j] + 1:
            columns.append((first[i - 1], None))
            i -= 1
        else:
            columns.append((None, second[j - 1]))
            j -= 1
    return columns[::-1]


def batched_alignments(batch: Any) -> list[int]:
    """Each pair's number of edits, counted on its alignment."""
    import torch

    from raydist.objectives.alignment import align

    start, data = batch
    uniforms_SN = torch.empty(len(start.lengths_S), 0)
    aligned = align(start, data, kind="optimal", uniforms_SN=uniforms_SN)
    edits: list[int] = (aligned.start_SN != aligned.data_SN).sum(dim=1).tolist()
    return edits


def tensors(pairs: list[Pair]) -> Any:
    """The pairs as an objective has them."""
    import torch

    from raydist.objectives.alignment import BLANK, Ragged

    def ragged(side: int) -> Ragged:
        lengths_S = torch.tensor([len(pair[side]) for pair in pairs])
        tokens_SL = torch.full((len(pairs), int(lengths_S.max())), BLANK)
        for row, pair in enumerate(pairs):
            tokens_SL[row, : len(pair[side])] = torch.tensor(pair[side])
        return Ragged(tokens_SL, lengths_S)

    return ragged(0), ragged(1)


def prepared(name: str, order: dict[str, Any]) -> Any:
    """The batch as the contender takes it: lists for the plain program, tensors for raydist."""
    pairs = make_pairs(**{field: order[field] for field in ("kind", "length", "pairs")})[: order["limit"]]
    return pairs if name == "plain" else tensors(pairs)


ALIGNERS: dict[str, Callable[[Any], list[int]]] = {"raydist": batched_alignments, "plain": plain_alignments}


def main() -> None:
    name = json.loads(sys.argv[1])["name"]
    known: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        key = json.dumps({field: value for field, value in order.items() if field != "order"})
        if key not in known:
            known[key] = prepared(name, order)
        start = time.perf_counter()
        edits = ALIGNERS[name](known[key])
        wall_s = time.perf_counter() - start
        print(
            json.dumps({"edits": edits} if order["order"] == "check" else {"alignments": len(edits), "wall_s": wall_s})
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""What all samplers of mask states share: the loop that turns masks into tokens, and the books it keeps.

The state is a text some of whose tokens are the mask. A forward answers every masked position of a window with a
distribution over its token; an unmasking policy says which of them are fixed, until none is left or the text has
stopped. Samplers differ in what the window is and in how the forward sees the rest of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from raydist.config.base import choice
from raydist.config.registries import UNMASKING
from raydist.sampling.base import Generation, SamplerConfig, Trained
from raydist.sampling.drawing import draw_tokens
from raydist.sampling.unmasking.base import Unmasking

COMPARED_GAMMAS = (0.0, 0.35, 0.6)


@dataclass(frozen=True)
class Window:
    """Consecutive positions of every row of the batch, and their noise.

    Attributes:
        tokens_Bk: token ids, the mask id at masked positions.
        new_Bk: positions to be revealed, bool; the mask may also stand at others, which are then only seen.
        token_uniforms_Bk: draw the tokens.
        order_uniforms_Bk: for policies that draw the order.
    """

    tokens_Bk: Tensor
    new_Bk: Tensor
    token_uniforms_Bk: Tensor
    order_uniforms_Bk: Tensor

    def columns(self, start: int, stop: int) -> Window:
        """The positions ``[start, stop)`` of each row."""
        return self._each(lambda tensor_Bk: tensor_Bk[:, start:stop])

    def rows(self, rows_R: Tensor) -> Window:
        """Only these rows."""
        return self._each(lambda tensor_Bk: tensor_Bk[rows_R])

    def _each(self, pick: Callable[[Tensor], Tensor]) -> Window:
        return Window(
            tokens_Bk=pick(self.tokens_Bk),
            new_Bk=pick(self.new_Bk),
            token_uniforms_Bk=pick(self.token_uniforms_Bk),
            order_uniforms_Bk=pick(self.order_uniforms_Bk),
        )


@dataclass(frozen=True)
class Revealed:
    """A window after its forwards.

    Attributes:
        tokens_Bk: token ids; at new positions the mask id only behind a stop id.
        revealed_at_Bk: the window's forward, counted from 1, in which a token was fixed; 0 where it never was.
        num_forwards_B: forwards until the row's window was complete or stopped.
        stopped_B: True where a new token is a stop id and everything before it is revealed.
    """

    tokens_Bk: Tensor
    revealed_at_Bk: Tensor
    num_forwards_B: Tensor
    stopped_B: Tensor


@dataclass(frozen=True)
class MaskStates:
    """How windows are revealed.

    Attributes:
        policy: which masked positions a forward reveals.
        temperature: 0 takes the most likely token.
        vocab_size: ids that may be drawn are below it; a model may have more rows.
        mask_id: never drawn.
        stop_ids: tokens that end a text.
        first_token_first: the others may be revealed only after a window's first token; for read-outs that show that token
            nothing of its window, so that drawing it later would ignore what is known by then.
    """

    policy: Unmasking
    temperature: float
    vocab_size: int
    mask_id: int
    stop_ids: tuple[int, ...]
    first_token_first: bool = False

    def reveal(self, window: Window, *, logits_of: Callable[[Tensor], Tensor]) -> Revealed:
        """Forwards until every row's new positions are revealed or a stop id ends it.

        What a row reveals depends on that row alone. A row that is done waits for the others, and waiting is not
        counted; a row without new positions spends nothing.

        Args:
            window: what is known.
            logits_of: one forward: the window's tokens ``[B, k]`` to logits ``[B, k, V]``, which may be overwritten.
        """
        tokens_Bk, masked_Bk = window.tokens_Bk, window.new_Bk
        revealed_at_Bk = torch.zeros_like(tokens_Bk)
        num_forwards_B, stopped_B = torch.zeros_like(tokens_Bk[:, 0]), torch.zeros_like(masked_Bk[:, 0])
        stop_ids = torch.tensor(self.stop_ids, dtype=torch.int64, device=tokens_Bk.device)
        busy_B, forward = masked_Bk.any(dim=-1), 0
        while bool(busy_B.any()):
            logits_BkV = logits_of(tokens_Bk)[..., : self.vocab_size]
            logits_BkV[..., self.mask_id] = -torch.inf
            forward += 1
            num_forwards_B = num_forwards_B + busy_B
            reveal_Bk = busy_B[:, None] & self.policy.reveal(
                logits_BkV, masked_Bk=self._eligible(masked_Bk), order_uniforms_Bk=window.order_uniforms_Bk
            )
            drawn_R = draw_tokens(
                logits_BkV[reveal_Bk], uniforms_BN=window.token_uniforms_Bk[reveal_Bk], temperature=self.temperature
            )
            tokens_Bk = tokens_Bk.masked_scatter(reveal_Bk, drawn_R)
            revealed_at_Bk = revealed_at_Bk.masked_fill(reveal_Bk, forward)
            masked_Bk = masked_Bk & ~reveal_Bk
            known_prefix_Bk = masked_Bk.cumsum(dim=-1) == 0
            stopped_B = (torch.isin(tokens_Bk, stop_ids) & window.new_Bk & known_prefix_Bk).any(dim=-1)
            busy_B = masked_Bk.any(dim=-1) & ~stopped_B
        return Revealed(tokens_Bk, revealed_at_Bk, num_forwards_B, stopped_B)

    def _eligible(self, masked_Bk: Tensor) -> Tensor:
        """The masked positions among which the policy chooses."""
        if not self.first_token_first:
            return masked_Bk
        first_B1, others_Bk = masked_Bk[:, :1], masked_Bk[:, 1:]
        return torch.cat([first_B1, others_Bk & ~first_B1], dim=1)


@dataclass(frozen=True)
class Transcript:
    """What one row became so far, and the forwards spent on it."""

    num_forwards: int
    tokens: tuple[int, ...] = ()
    revealed_at: tuple[int, ...] = ()
    stopped: bool = False

    def generation(self, stop_ids: Sequence[int]) -> Generation:
        """The result, cut behind the first stop id where the row has stopped."""
        end = len(self.tokens)
        if self.stopped:
            end = 1 + min(index for index, token in enumerate(self.tokens) if token in stop_ids)
        return Generation(
            tokens=list(self.tokens[:end]),
            num_forwards=self.num_forwards,
            revealed_at=list(self.revealed_at[:end]),
            stopped=self.stopped,
        )


class Transcripts:
    """What the rows of a batch became so far; rows leave when they are done."""

    def __init__(self, num_forwards: Sequence[int]) -> None:
        self._rows = [Transcript(forwards) for forwards in num_forwards]
        self._live = list(range(len(self._rows)))

    def add(self, revealed: Revealed, *, new_Bk: Tensor) -> None:
        """Takes in the new positions of the next window of each row that is still there."""
        parts = (revealed.tokens_Bk, revealed.revealed_at_Bk, new_Bk, revealed.num_forwards_B, revealed.stopped_B)
        for row, tokens, revealed_at, new, num_forwards, stopped in zip(
            self._live, *[part.tolist() for part in parts], strict=True
        ):
            before = self._rows[row]
            places = [place for place, is_new in enumerate(new) if is_new]
            self._rows[row] = Transcript(
                num_forwards=before.num_forwards + num_forwards,
                tokens=(*before.tokens, *[tokens[place] for place in places]),
                revealed_at=(*before.revealed_at, *[before.num_forwards + revealed_at[place] for place in places]),
                stopped=stopped,
            )

    def keep_rows(self, rows_R: Tensor) -> None:
        """The other rows are done."""
        self._live = [self._live[row] for row in rows_R.tolist()]

    def generations(self, stop_ids: Sequence[int]) -> list[Generation]:
        """The results, in the order of the prompts."""
        return [row.generation(stop_ids) for row in self._rows]


class MaskStateSamplerConfig(SamplerConfig):
    """The keys that all samplers of mask states share."""

    unmasking: choice(UNMASKING) = Field(default_factory=lambda: {"name": "entropy_bounded"})  # type: ignore[valid-type]
    """Which masked positions a forward reveals."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the most likely token; otherwise each token is drawn from its own softmax(logits / temperature)."""

    @property
    def setting(self) -> str:
        """The unmasking policy."""
        return self.unmasking.label

    def compared(self) -> list[SamplerConfig]:
        """The entropy-bounded policy at :data:`COMPARED_GAMMAS`, with this sampler's proxy if it has one."""
        proxy = getattr(self.unmasking, "proxy", "entropy")
        bounds = [{"name": "entropy_bounded", "gamma": gamma, "proxy": proxy} for gamma in COMPARED_GAMMAS]
        return self.at("unmasking", *map(UNMASKING.parse, bounds))

    def states(self, trained: Trained, *, objectives: frozenset[str]) -> MaskStates:
        """How windows are revealed.

        Args:
            trained: the model.
            objectives: those of our objectives whose models this sampler can read.

        Raises:
            ConfigError: the vocabulary has no mask id, or the model was trained by another of our objectives.
        """
        trained.require_objective(objectives, sampler=self.name)
        return MaskStates(
            policy=self.unmasking,
            temperature=self.temperature,
            vocab_size=trained.ids.vocab_size,
            mask_id=trained.require_mask_id(sampler=self.name),
            stop_ids=trained.stop_ids,
        )


def shifted(shift: bool | None, trained: Trained) -> bool:
    """Whether token i is read at position i - 1: as set, else as trained."""
    return bool((trained.objective or {}).get("shift", False)) if shift is None else shift

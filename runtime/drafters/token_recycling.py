"""Token recycling: keep the successors that the model thought likely the last time it saw each token, and guess along them.

Paper: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling" (papers/20). The state is one
matrix M [V, k]; every verified row, rejected or not, overwrites the row of its token. The tree is grown likeliest guess first, instead of
along one fixed template; the paper's template and others can be asked for. How likely a guess is, is learned per class of guesses: by how
sure the model was of it when it was written, and by how often the text has confirmed it since.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planc.runtime.drafters.base import Context, DrafterPart, Verified
from planc.runtime.engine import Floats
from planc.runtime.errors import PlanError
from planc.runtime.trees import Cell, Draft

_EMPTY = -1  # in M: no successor known
_FEW = 6  # rows that are written one by one faster than at once
_FLOOR = 0.02  # reach from which the one path that is verified is worth going on
_STREAK = 3  # longest run of confirmations that is told apart

#: bounds between the classes of a successor's share, which is its probability among the k that are kept
_SHARES = np.array([0.004, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.7, 0.82, 0.91, 0.97, 0.99])
_CENTRES = tuple(np.sqrt(np.append(0.002, _SHARES) * np.append(_SHARES, 1.0)).tolist())
_UNKNOWN = 255  # class of a successor that came without a logit
_TRANSFER = 0.6  # of a share that holds in the next context, until that is learned

#: acceptance rates before anything is learned where shares are unknown: first rank by streak, then the other ranks
_FIRST = (0.22, 0.45, 0.55, 0.65)
_OTHERS = (0.08, 0.05, 0.035, 0.025, 0.02, 0.015, 0.01)

Template = tuple[tuple[int, ...], ...]

#: Children of every node of the paper's 80-node template, level by level in node order; nodes that are not listed have none.
_PAPER_CHILDREN: tuple[tuple[int, ...], ...] = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1),
    (2, 0, 0, 1),
)


def paper_template() -> Template:
    """The 80 paths of child ranks, shorter ones first, that the paper's code uses."""
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for counts in _PAPER_CHILDREN:
        level = [(*path, rank) for path, count in zip(level, counts, strict=False) for rank in range(count)]
        paths.extend(level)
    return tuple(paths)


class TokenRecycling(DrafterPart):
    """Guesses along the successors that the model last ranked highest for each token (papers/20)."""

    data_file: ClassVar[str | None] = "warm"
    k: Annotated[int, Field(ge=1, le=64)] = 8
    prefill_update: bool = True
    prefill_rows: Annotated[int, Field(ge=1)] = 32
    scope: Literal["process", "request"] = "process"
    warm: str | None = None
    template: Literal["paper"] | Template | None = None

    @property
    def needs_top_k(self) -> int:
        return self.k

    def build(self, vocab_size: int) -> RecyclingDrafter:
        warm = None if self.warm is None else _load(self.warm, vocab_size)
        template = paper_template() if self.template == "paper" else self.template
        rows = self.prefill_rows if self.prefill_update else 0
        return RecyclingDrafter(vocab_size, self.k, rows, self.scope == "request", warm, template)


class RecyclingDrafter:
    """Runtime object of `TokenRecycling`: M [V, k] int32, a byte per entry and one per token, shared by all texts of a batch."""

    def __init__(
        self,
        vocab_size: int,
        k: int = 8,
        prompt_rows: int = 32,
        per_request: bool = False,
        warm: NDArray[np.int32] | None = None,
        template: Template | None = None,
    ) -> None:
        self.top_k, self.prompt_rows, self.per_request, self.template = k, prompt_rows, per_request, template
        self._warm = warm
        self.matrix = np.full((vocab_size, k), _EMPTY, dtype=np.int32)  # [V, k] successors, likeliest first
        self.shares = np.full((vocab_size, k), _UNKNOWN, dtype=np.uint8)  # [V, k] class of the share of each
        self.streak = np.zeros(vocab_size, dtype=np.uint8)  # [V] how often in a row the first successor was right
        self._reset()

    def _reset(self) -> None:
        self.matrix.fill(_EMPTY)
        self.shares.fill(_UNKNOWN)
        self.streak.fill(0)
        if self._warm is not None:
            width = min(self.top_k, self._warm.shape[1])
            self.matrix[:, :width] = self._warm[:, :width]

    def start(self, sequence: int) -> None:
        if self.per_request and sequence == 0:  # a batch is one request, and its first text starts first
            self._reset()

    def propose(self, context: Context, draft: Draft) -> None:
        if self.template is not None:
            self._fill_template(context, draft)
        else:
            self._grow(context, draft)

    def update(self, verified: Verified) -> None:
        """Write the successors of every row back. On duplicates an accepted row wins over a rejected one, a shallow one over a deep one."""
        if verified.top_ids is None or not len(verified.top_ids):
            return
        tokens, matrix = verified.tokens, self.matrix
        for row, y in zip(verified.rows, verified.chosen, strict=True):
            token = tokens[row]
            self.streak[token] = min(_STREAK, int(self.streak[token]) + 1) if y == matrix[token, 0] else 0
        order: Sequence[int] = verified.rows
        if len(order) < len(tokens):
            accepted = set(verified.rows)
            rejected = sorted((row for row in range(len(tokens)) if row not in accepted), key=lambda row: -verified.depths[row])
            order = [*rejected, *verified.rows]
        width = min(self.top_k, verified.top_ids.shape[1])
        shares = None if verified.top_logits is None else _share_classes(verified.top_logits[:, :width])
        if len(order) <= _FEW:
            for row in order:
                matrix[tokens[row], :width] = verified.top_ids[row, :width]
                if shares is not None:
                    self.shares[tokens[row], :width] = shares[row]
            return
        where = [tokens[row] for row in order]  # of equal indices in one assignment numpy keeps the last
        matrix[where, :width] = verified.top_ids[order, :width]
        if shares is not None:
            self.shares[where, :width] = shares[order]

    def _cell(self, token: int, rank: int, contested: bool) -> tuple[Cell, float]:
        """What is known about guessing the successor `rank` of `token`, and the rate to start from."""
        streak, share = 0 if rank else int(self.streak[token]), int(self.shares[token, rank])
        if share != _UNKNOWN:
            cell: Cell = (TokenRecycling.key, "first" if rank == 0 else "other", share, streak, contested)
            prior = _TRANSFER * _CENTRES[share]
        else:
            cell = (TokenRecycling.key, rank, streak, contested)
            prior = _OTHERS[min(rank, len(_OTHERS)) - 1] if rank else _FIRST[streak]
        return (
            cell,
            prior * 0.5 if contested else prior,
        )  # contested: another drafter has its own guess here, so this one is right less often

    def _grow(self, context: Context, draft: Draft) -> None:
        """Best first: add the likeliest guess that is not in the tree yet, until the budget is spent.

        However unlikely: what is worth verifying is the controller's business, and a rank that is no longer proposed could never show that
        it has become better. Where only one path is verified, that is the first rank's, down to where nothing can be expected of it.
        """
        before = len(draft)
        contested = {row for row in range(before) if draft.children[row]}
        reach = draft.reach()
        successors: dict[int, list[int]] = {}
        heap: list[tuple[float, int, int]] = []  # (-P(accepted), parent row, rank)

        def offer(parent: int, rank: int) -> None:
            token = draft.tokens[parent]
            if parent not in successors:
                successors[parent] = [t for t in self.matrix[token].tolist() if t != _EMPTY] if draft.depths[parent] < context.depth else []
            if rank < len(successors[parent]) and (context.siblings or (rank == 0 and reach[parent] >= _FLOOR)):
                cell, prior = self._cell(token, rank, parent in contested)
                heappush(heap, (-reach[parent] * draft.rates.get((cell,), prior), parent, rank))

        for row in range(before):
            offer(row, 0)
        while heap and len(draft) - before < context.budget:
            _, parent, rank = heappop(heap)
            row = self._guess(draft, parent, successors[parent][rank], rank, parent in contested)
            if row == len(reach):
                reach.append(reach[parent] * draft.p[row])
                offer(row, 0)
            offer(parent, rank + 1)

    def _guess(self, draft: Draft, parent: int, token: int, rank: int, contested: bool) -> int:
        agrees = contested and token in draft.children[parent]
        cell, prior = self._cell(draft.tokens[parent], rank, contested and not agrees)
        return draft.add(parent, token, (TokenRecycling.key, min(rank, 2), "agrees") if agrees else cell, prior)

    def _fill_template(self, context: Context, draft: Draft) -> None:
        rows: dict[tuple[int, ...], int] = {(): 0}
        contested = {row for row in range(len(draft)) if draft.children[row]}
        for path in sorted(self.template or (), key=len):
            parent = rows.get(path[:-1])
            if parent is None or len(path) > context.depth or path[-1] >= self.top_k:
                continue
            token = int(self.matrix[draft.tokens[parent], path[-1]])
            if token != _EMPTY:
                rows[path] = self._guess(draft, parent, token, path[-1], parent in contested)


def _share_classes(logits: Floats) -> NDArray[np.uint8]:
    """The class of the share of every successor, of their logits [R, k], descending."""
    shares = np.exp(logits - logits[:, :1])
    shares /= shares.sum(-1, keepdims=True)
    classes: NDArray[np.uint8] = np.searchsorted(_SHARES, shares).astype(np.uint8)
    return classes


def _load(path: str, vocab_size: int) -> NDArray[np.int32]:
    try:
        warm = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        message = f"token_recycling: cannot read the warm matrix {path}: {error}"
        raise PlanError("plan-bad-value", message, fix="name an .npy file") from error
    if not isinstance(warm, np.ndarray) or warm.ndim != 2 or warm.shape[0] != vocab_size or warm.dtype.kind not in "iu":
        found = f"{warm.dtype} {list(warm.shape)}" if isinstance(warm, np.ndarray) else type(warm).__name__
        raise PlanError("plan-bad-value", f"token_recycling: {path} holds {found}, wanted integers [{vocab_size}, k]")
    if warm.size and (warm.min() < _EMPTY or warm.max() >= vocab_size):
        raise PlanError("plan-bad-value", f"token_recycling: {path} holds ids outside -1..{vocab_size - 1}")
    return warm.astype(np.int32)

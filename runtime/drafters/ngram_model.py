"""N-gram model: guess what the target itself expects after the last few tokens, from a table that was counted once.

`planc fit` lets the target write, notes the probabilities that it gave to its likeliest next tokens, and averages them by the one, two, .. tokens
before; contexts that were seen seldom lean on the next shorter one (back-off). Nothing is trained, and a guess costs a few searches in sorted keys.
Bigrams of the model itself are the learning-free drafts of "The N-Grammys: Accelerating Autoregressive Inference with Learning-Free Batched
Speculation"; longer contexts and soft counts are what is added here.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planc.runtime.drafters.base import Context, DrafterPart, Verified
from planc.runtime.errors import PlanError
from planc.runtime.trees import Cell, Draft

MULTIPLIER = 0x9E3779B97F4A7C15  #: of the hash of a context: odd, its bits spread
_MASK = 2**64 - 1
_CLASSES = 16  # of probability, that learn their acceptance rates apart
_FLOOR = 0.02  # guesses less likely than this are not worth a place


class NgramModel(DrafterPart):
    """Guesses from a back-off table of the target's own expectations, which `planc fit` counts."""

    data_file: ClassVar[str | None] = "file"
    file: str | None = Field(
        None, description="table (`planc fit` writes it); counts from the folder of the plan, `{model}` in it stands for the model's name"
    )
    optional: bool = Field(False, description="compile without this drafter where the file does not exist")
    order: int = Field(5, ge=1, le=16, description="`planc fit`: longest context, in tokens")
    successors: int = Field(3, ge=1, le=64, description="`planc fit`: tokens kept of each context")

    def build(self, vocab_size: int) -> NgramDrafter:
        """See `DrafterPart`."""
        if self.file is None:
            raise PlanError("plan-bad-value", "ngram_model has no table yet", fix="name a `file`, and make it with `planc fit`")
        return NgramDrafter(load_table(self.file, vocab_size))


class BackOff:
    """What the target expects: `keys` [n] uint64 ascending (`key` of a context), `ids` [n, s] (-1: none), `shares` [n, s] uint8, 255 for certain."""

    def __init__(
        self, order: int, keys: NDArray[np.uint64], ids: NDArray[np.int32], shares: NDArray[np.uint8], about: dict[str, Any]
    ) -> None:
        self.order, self.keys, self.ids, self.shares, self.about = order, keys, ids, shares, about
        self._view = memoryview(keys.data)  # bisects faster than numpy finds one key
        self._powers = [pow(MULTIPLIER, n, 2**64) for n in range(order)]

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The row of the longest known context at the end of `tokens`, and its length; -1, 0 where nothing is known."""
        found, length, key = -1, 0, 0
        for n in range(min(self.order, len(tokens))):
            key = (key + (tokens[-1 - n] + 1) * self._powers[n]) & _MASK
            at = bisect_left(self._view, key)
            if at == len(self._view) or self._view[at] != key:  # what is known of a longer context is known of its end, too
                break
            found, length = at, n + 1
        return found, length


class NgramDrafter:
    """Runtime object of `NgramModel`. No state: the table does not change."""

    prompt_rows = 0
    top_k = 0

    def __init__(self, table: BackOff) -> None:
        self.table = table

    def start(self, sequence: int) -> None:
        """Nothing to forget."""

    def propose(self, context: Context, draft: Draft) -> None:
        """Best first: add the likeliest guess that is not in the tree yet, until the budget is spent or what is left is too unlikely."""
        table, before = self.table, len(draft)
        contested = {row for row in range(before) if draft.children[row]}
        reach = draft.reach()
        tails = {0: context.tokens[-table.order :]}  # row -> the tokens that end there
        open_ = dict[int, Iterator[tuple[int, Cell, float]]]()
        heap = list[tuple[float, int, tuple[int, Cell, float]]]()  # (-P(accepted), parent row, guess)

        def offer(parent: int) -> None:
            guess = next(open_[parent], None)
            if guess is not None:
                chance = reach[parent] * draft.rates.get((guess[1],), guess[2])
                if chance >= _FLOOR:
                    heappush(heap, (-chance, parent, guess))

        def enter(row: int) -> None:
            if row:
                tails[row] = [*tails[draft.parents[row]], draft.tokens[row]][-table.order :]
            if draft.depths[row] < context.depth and reach[row] >= _FLOOR:
                open_[row] = self._successors(tails[row], row in contested, context.siblings)
                offer(row)

        for row in range(before):
            enter(row)
        while heap and len(draft) - before < context.budget:
            _, parent, guess = heappop(heap)
            row = draft.add(parent, *guess)
            if row == len(reach):
                reach.append(reach[parent] * draft.p[row])
                enter(row)
            offer(parent)

    def update(self, verified: Verified) -> None:
        """Nothing to learn; how often guesses of each kind are right is learned by the loop."""

    def _successors(self, tail: Sequence[int], contested: bool, siblings: bool) -> Iterator[tuple[int, Cell, float]]:
        """Guesses after `tail`, likeliest first: token, what is known of it, and its rate until that is learned."""
        at, length = self.table.find(tail)
        if at < 0:
            return
        for token, share in zip(self.table.ids[at].tolist(), self.table.shares[at].tolist(), strict=True):
            if token < 0:
                return
            yield token, (NgramModel.key, length, share * _CLASSES // 256, contested), share / 255
            if not siblings:
                return


def write_table(order: int, keys: NDArray[np.uint64], ids: NDArray[np.int32], shares: NDArray[np.uint8], about: dict[str, Any]) -> bytes:
    """The file that `load_table` reads."""
    packed = io.BytesIO()
    text = np.frombuffer(json.dumps({**about, "order": order}).encode(), dtype=np.uint8)
    np.savez_compressed(packed, keys=keys, ids=ids, shares=shares, about=text)
    return packed.getvalue()


def load_table(path: str | Path, vocab_size: int) -> BackOff:
    """Read and check a table. Raises PlanError[plan-bad-value] for a file that is none, or that was made for another vocabulary."""
    fix = "make it with `planc fit` for this model"
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            keys, ids, shares = (file[name] for name in ("keys", "ids", "shares"))
            about = json.loads(file["about"].tobytes())
        order = int(about["order"])
    except (OSError, ValueError, EOFError, LookupError, TypeError) as error:
        raise PlanError("plan-bad-value", f"ngram_model: cannot read the table {path}: {error}", fix=fix) from error
    if wrong := next(_faults(order, keys, ids, shares, vocab_size), None):
        raise PlanError("plan-bad-value", f"ngram_model: {path} is no table for a vocabulary of {vocab_size}: {wrong}", fix=fix)
    return BackOff(order, keys, ids, shares, about)


def _faults(order: int, keys: NDArray[Any], ids: NDArray[Any], shares: NDArray[Any], vocab_size: int) -> Iterator[str]:
    if not 1 <= order <= 16:
        yield f"order {order}"
    elif keys.ndim != 1 or ids.ndim != 2 or ids.shape != shares.shape or len(keys) != len(ids):
        yield f"keys {list(keys.shape)}, ids {list(ids.shape)} and shares {list(shares.shape)} do not belong together"
    elif (keys.dtype.name, ids.dtype.name, shares.dtype.name) != ("uint64", "int32", "uint8"):
        yield "keys must be uint64, ids int32 and shares uint8"
    elif (keys[1:] <= keys[:-1]).any():
        yield "keys do not ascend"
    elif ids.size and (ids.min() < -1 or ids.max() >= vocab_size):
        yield "an id lies outside the vocabulary"

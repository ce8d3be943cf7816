"""How much to draft, decided every round from measured cost and learned acceptance rates (papers/A0 section 12).

A pass over 1 + n rows costs c(1 + n) and commits 1 + sum of P(accepted) tokens on average; the controller takes the n, tree or chain, with
the most tokens per millisecond. n = 0, plain decoding, is always among the choices. The estimates are of single guesses, so that rows of a
batch go to the sequences that promise most; or of positions, as in "Optimizing Speculative Decoding for Serving LLMs Using Goodput" (papers/70).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

from planc.runtime.decode import Control, Tree
from planc.runtime.trees import Cell, Draft, Rates

_MOST = 32  # guesses per pass that `budget: auto` considers
_PAST_STEP = 128  # cost is looked up at multiples of this past length
_WINDOW = 32  # rounds between two checks of the realised gain
_PAUSE = 64  # rounds without speculation after the first failed check; doubles with every further one
_EXPLORE = 24  # plain rounds before speculation is tried again regardless; doubles up to the patience of `Control`
_EXPLORE_ROWS = 4  # of all sequences of the pass, but at least one each
_TRUST = 8  # wide passes before a plain one is made to measure it; doubles up to 32 times this
_OUTLIER = 2.0  # a pass slower than this times its usual cost was disturbed from outside; it counts as this much
_MARGIN = 0.01  # realised rate below plain that is still noise
_PRIOR = 0.7  # acceptance of a position, its predecessor being accepted, until it is learned
_NEXT = 0.8  # acceptance of a guess by that of the one added before it, until it is learned


@runtime_checkable
class CostTable(Protocol):
    """Measured cost of a pass."""

    def ms(self, rows: int, past: int, batch: int) -> float:
        """Milliseconds of a pass with `rows` rows for each of `batch` sequences that have `past` tokens in the cache."""


Cost = CostTable | Callable[[int, int], float]  # the callable takes (rows of all sequences, past)


def linear_cost(rows: int, past: int) -> float:
    """Stand-in when nothing was measured: one row more costs a twentieth of a pass."""
    return 1.0 + 0.05 * (rows - 1)


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of every draft a pass shall verify, settled before the drafts are made."""

    guesses: int
    chain: bool  # no siblings
    tested: bool = True  # draws are tested, so that what is verified must not depend on them

    def of(self, draft: Draft) -> Draft:
        """What is verified of `draft`."""
        if not self.tested:
            return draft.take(draft.best_path(draft.reach())[: self.guesses])
        return draft.first_path(self.guesses) if self.chain else draft.first(self.guesses)


class Controller:
    """Chooses what is verified. Keep it between requests: what it has learned stays useful."""

    def __init__(self, tree: Tree | None = None, cost: Cost = linear_cost, control: Control | None = None) -> None:
        self.tree = tree if tree is not None else Tree()
        self.control = control if control is not None else Control()
        self.rates = Rates()
        self._places = Rates(strength=1.0, memory=1.0 - self.control.smoothing)  # acceptance by position
        self._draft_ms = 0.0  # of one guess for all sequences, running mean
        self._settled = 0, 0, 0  # batch, guesses, and passes for which they stay
        self._cost = cost
        self._costs: dict[tuple[int, int], list[float]] = {}  # (past step, batch) -> cost of 0, 1, 2 .. rows
        self._typical = 8.0  # guesses taken lately
        self._plain_rounds, self._patience = 0, min(_EXPLORE, self.control.patience)
        self._pause, self._strikes = 0, 0
        self._scale: dict[bool, float] = {}  # measured over tabled milliseconds of wide and of plain passes, running means
        self._wide_rounds, self._trust = 0, _TRUST
        self._rounds, self._spent, self._plain = 0, 0.0, 0.0  # this window: rounds, ms, tabled ms of plain decoding for the same tokens

    @property
    def budget(self) -> int:
        """Guesses that are worth proposing this round; drafting more than what may be taken is wasted host time."""
        if self.tree.budget != "auto":
            return self.tree.budget
        return min(_MOST, 4 + 2 * round(self._typical))

    def siblings(self, trees: bool) -> bool:
        """Whether siblings are taken, `trees` saying whether they keep the promised exactness."""
        return self.control.estimate == "guess" and self._shape(trees)

    def _shape(self, trees: bool) -> bool:
        return self.tree.shape == "tree" or (self.tree.shape == "auto" and trees)

    @property
    def paused(self) -> bool:
        """Speculation was seen not to pay: only guesses that cost nothing are taken for a while."""
        return self._pause > 0 and self.tree.budget == "auto"

    def select(
        self,
        drafts: Sequence[Draft],
        lengths: Sequence[int],
        room: int,
        batch: int = 1,
        *,
        min_rows: int = 1,
        trees: bool = True,
        block: int | None = None,
        ragged: bool = False,
    ) -> list[Draft]:
        """Cut every draft to what this pass shall verify.

        `lengths` are the committed slots of the sequences, `room` the rows that fit into the cache, `batch` the sequences of the pass,
        those that are finished included. Siblings are taken if the plan says `tree`, or leaves the shape open and `trees` allows them; a
        step with siblings ends before the next multiple of `block` slots, a chain may cross it. All sequences get the same n, because the
        pass is as wide as its widest draft; where it is `ragged` (the engine leaves padding out) the rows go where they promise most.
        """
        most = max(0, min(room, max(len(draft) for draft in drafts)) - 1)
        reaches = [draft.reach() for draft in drafts]
        choices: list[tuple[list[list[int]], int]] = []  # per draft the rows in the order of adding them; how many fit
        if self.siblings(trees):
            fits = room if block is None else min(block - length % block for length in lengths)
            if fits >= min_rows:
                choices.append(([draft.ranking(reach) for draft, reach in zip(drafts, reaches, strict=True)], min(most, fits - 1)))
        if not choices or choices[0][1] < most:
            choices.append(([draft.best_path(reach) for draft, reach in zip(drafts, reaches, strict=True)], most))
        if self.control.policy == "confidence" and self.tree.budget == "auto":
            orders, limit = choices[0]
            likely = [
                [row for row in order[:limit] if reach[row] >= self.control.threshold] for order, reach in zip(orders, reaches, strict=True)
            ]
            self._follow(max(map(len, likely)))
            return [draft.take(rows) for draft, rows in zip(drafts, likely, strict=True)]
        costs = self._table(max(lengths), batch, max(most + 1, min_rows))
        low, high = self._span(most, min_rows, batch)
        if ragged and self.tree.budget == "auto":
            taken = _most_promising(choices, reaches, costs, low * batch, high * batch)
            self._follow(max(map(len, taken)))
            return [draft.take(rows) for draft, rows in zip(drafts, taken, strict=True)]
        best, best_n, best_rate = choices[0][0], 0, -1.0
        for orders, limit in choices:
            gains = _gains(orders, reaches, limit)  # expected tokens of the pass for n = 0 ..
            for n in range(min(low, len(gains) - 1), min(high, len(gains) - 1) + 1):
                width = max(n + 1, min_rows)
                rate = gains[n] / (costs[width] * self.control.margin if width > min_rows else costs[width])
                if rate > best_rate:
                    best, best_n, best_rate = orders, n, rate
        self._follow(best_n)
        return [draft.take(order[:best_n]) for draft, order in zip(drafts, best, strict=True)]

    @property
    def settles_ahead(self) -> bool:
        """Whether the choice is made before the drafts are, whatever they are."""
        return self.control.estimate != "guess" and self.tree.budget == "auto"

    def ahead(
        self,
        lengths: Sequence[int],
        room: int,
        batch: int = 1,
        *,
        min_rows: int = 1,
        trees: bool = True,
        block: int | None = None,
        tested: bool = True,
    ) -> Cut:
        """How much to draft and verify this round, settled without knowing the drafts; arguments as for `select`.

        Where draws are tested against their distribution, the choice must not depend on the tokens drawn (`Draft.first`), and all that
        `select` weighs does. What is left are the acceptance rates of the first, second, .. guess added, learned in rounds before. With
        `estimate: position` or `constant` every round is settled so, `tested` or not.
        """
        most = max(0, min(room - 1, _MOST if self.tree.budget == "auto" else self.tree.budget))
        gains = list(accumulate(self._expected(most)))  # expected tokens of the pass for n = 0 ..
        costs = self._table(max(lengths), batch, max(most + 1, min_rows))
        low, high = self._span(most, min_rows, batch)
        span = range(min(low, most), min(high, most) + 1)
        of_batch, n, stays = self._settled
        if of_batch != batch or stays <= 0 or n not in span:
            margin = self.control.margin if self.settles_ahead else 1.0

            def rate(n: int) -> float:
                wide = n + 1 > min_rows
                return gains[n] / ((costs[max(n + 1, min_rows)] + n * self._draft_ms) * (margin if wide else 1.0))

            n, stays = max(span, key=rate), self.control.interval if self.settles_ahead else 1
        self._settled = batch, n, stays - 1
        if self.settles_ahead:
            self._follow(n)
        fits = room if block is None else min(block - length % block for length in lengths)
        return Cut(n, chain=not self.siblings(trees) or max(n + 1, min_rows) > fits, tested=tested)

    def _expected(self, most: int) -> list[float]:
        """P(accepted) of the root and the first, second, .. guess added."""
        reaches = [1.0]
        for row in range(1, most + 1):
            if self.control.estimate == "guess":
                reaches.append(self.rates.get((("row", row),), _NEXT * reaches[-1]))
            else:
                reaches.append(reaches[-1] * self._places.get((self._place(row),), _PRIOR))
        return reaches

    def _place(self, row: int) -> Cell:
        return ("place", row if self.control.estimate == "position" else 1)

    def judge(self, verified: Draft, rows: Sequence[int]) -> None:
        """Learn from a round that was settled by `ahead`: `rows` of the verified draft were accepted."""
        accepted = set(rows)
        if self.control.estimate != "guess":  # a rate given that the position before was accepted, so that depth can grow again
            for row in range(1, min(len(verified), len(rows) + 1)):
                self._places.observe((self._place(row),), row in accepted)
            return
        for row in range(1, len(verified)):
            self.rates.observe((("row", row),), row in accepted)

    def observe(self, rows: int, past: int, batch: int, tokens: float, ms: float, *, min_rows: int = 1, draft_ms: float = 0.0) -> None:
        """Account for a pass of `rows` rows that committed `tokens` tokens per unfinished sequence and took `ms` milliseconds.

        `draft_ms` is what drafting for it took; plain decoding does not pay that.
        After every window of rounds the realised rate is held against plain decoding, whose cost is the table's, corrected by the plain
        passes seen. A rate below it means that costs or estimates are wrong: speculation pauses, longer every time.
        """
        if self._settled[1]:
            self._draft_ms += 0.1 * (draft_ms / self._settled[1] - self._draft_ms)
        plain_ms = self._table(past, batch, min_rows)[min_rows]
        wide, tabled = rows > min_rows, self._table(past, batch, rows)[rows]
        usual = self._scale.setdefault(wide, ms / tabled)
        ms = min(ms, _OUTLIER * usual * tabled)
        self._scale[wide] = usual + 0.1 * (ms / tabled - usual)
        if wide:
            self._plain_rounds, self._wide_rounds = 0, self._wide_rounds + 1
        else:
            self._plain_rounds, self._wide_rounds = self._plain_rounds + 1, 0
        if self._pause:
            self._pause -= 1
            return
        if False not in self._scale:  # no plain pass to compare with yet
            return
        self._rounds += 1
        self._spent += ms + draft_ms
        self._plain += plain_ms * tokens
        if self._rounds < _WINDOW:
            return
        if self._plain * self._scale[False] < (1.0 - _MARGIN) * self._spent:
            self._pause = min(_PAUSE << self._strikes, self.control.patience)
            self._strikes = min(self._strikes + 1, 4)
            self._trust = _TRUST
        else:
            self._strikes = max(self._strikes - 1, 0)
        self._rounds, self._spent, self._plain = 0, 0.0, 0.0

    def _follow(self, taken: int) -> None:
        """Quickly up, or the drafts of a text that begins to repeat itself would be cut short for long; slowly down."""
        self._typical += (0.5 if taken > self._typical else 0.1) * (taken - self._typical)

    def _span(self, most: int, min_rows: int, batch: int) -> tuple[int, int]:
        """Fewest and most guesses of a sequence to consider. Up to `min_rows` - 1 guesses cost nothing: their rows would be padding otherwise."""
        if self.tree.budget != "auto":
            return self.tree.budget, self.tree.budget
        if self._pause:
            return 0, min_rows - 1
        if self._wide_rounds >= self._trust:
            self._trust = min(2 * self._trust, 32 * _TRUST)
            return 0, min_rows - 1
        if self._plain_rounds >= self._patience:
            self._patience = min(2 * self._patience, 16 * _EXPLORE, self.control.patience)
            return min(max(1, _EXPLORE_ROWS // batch), most), most
        if not self._plain_rounds:
            self._patience = min(max(_EXPLORE, self._patience // 2), self.control.patience)
        return 0, most

    def _table(self, past: int, batch: int, rows: int) -> list[float]:
        """Cost by number of rows, at least up to `rows`; entry 0 is never used."""
        costs = self._costs.setdefault((past // _PAST_STEP, batch), [float("inf")])
        while len(costs) <= rows:
            costs.append(self._ms(len(costs), past // _PAST_STEP * _PAST_STEP, batch))
        return costs

    def _ms(self, rows: int, past: int, batch: int) -> float:
        cost = self._cost
        if isinstance(cost, CostTable):
            return cost.ms(rows, past, batch)
        return cost(rows * batch, past)


def _most_promising(
    choices: Sequence[tuple[list[list[int]], int]], reaches: Sequence[Sequence[float]], costs: Sequence[float], low: int, high: int
) -> list[list[int]]:
    """Rows of every draft such that the batch commits most tokens per millisecond; from `low` to `high` guesses in all (papers/70)."""
    batch = len(reaches)
    best, best_n, best_rate = list[tuple[float, int, int]](), 0, -1.0
    for orders, limit in choices:
        # by falling reach; stable, and reach falls along every order, so each prefix is a prefix of every order
        guesses = [(reach[row], i, row) for i, (order, reach) in enumerate(zip(orders, reaches, strict=True)) for row in order[:limit]]
        guesses.sort(key=lambda guess: -guess[0])
        for n, gain in enumerate(accumulate((guess[0] for guess in guesses[:high]), initial=float(batch))):
            whole, part = divmod(batch + n, batch)  # the table has rows per sequence; between two of its entries cost grows evenly
            rate = gain / (costs[whole] + (costs[whole + 1] - costs[whole]) * part / batch if part else costs[whole])
            if rate > best_rate and n >= min(low, len(guesses)):
                best, best_n, best_rate = guesses, n, rate
    taken = [list[int]() for _ in reaches]
    for _, i, row in best[:best_n]:
        taken[i].append(row)
    return taken


def _gains(orders: Sequence[Sequence[int]], reaches: Sequence[Sequence[float]], limit: int) -> list[float]:
    """Expected tokens of a pass for n = 0 .. limit guesses per sequence; a sequence that has fewer adds no more."""
    sums = [list(accumulate((reach[row] for row in order[:limit]), initial=1.0)) for order, reach in zip(orders, reaches, strict=True)]
    longest = max(len(gains) for gains in sums)
    return [sum(gains[min(n, len(gains) - 1)] for gains in sums) for n in range(longest)]

"""Draft trees: what the drafters propose for one sequence, and how several of them become one pass.

Row 0 is the pending token (the root, already committed); rows 1.. are guesses, parents before children (papers/A0 sections 2 and 7). Every
guess carries the estimated probability that it is accepted *given that its parent was*; the estimates are learned while decoding (`Rates`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from planc.runtime.engine import CHAIN, Floats, Ints, Step

Cell = tuple[str | int, ...]  # what a drafter knows about a guess: (drafter key, feature, ...)


class Rates:
    """Acceptance rates, learned online as decayed counts of hits and trials.

    A rate belongs to the tuple of cells of a guess, so "both drafters say so" is learned apart from either alone. A tuple that was never
    tried has the caller's prior, which weighs as much as `strength` trials; `memory` is the factor by which old trials fade.
    """

    __slots__ = ("_counts", "memory", "strength")

    def __init__(self, strength: float = 6.0, memory: float = 0.99) -> None:
        self.strength, self.memory = strength, memory
        self._counts: dict[tuple[Cell, ...], list[float]] = {}  # cells -> [hits, trials]

    def get(self, cells: tuple[Cell, ...], prior: float) -> float:
        """Estimated probability that a guess with these cells is right, its parent being right."""
        counts = self._counts.get(cells)
        if counts is None:
            return prior
        return (counts[0] + self.strength * prior) / (counts[1] + self.strength)

    def observe(self, cells: tuple[Cell, ...], hit: bool) -> None:
        """A guess with these cells was reached, and was right or wrong."""
        counts = self._counts.setdefault(cells, [0.0, 0.0])
        counts[0] = counts[0] * self.memory + hit
        counts[1] = counts[1] * self.memory + 1.0

    def learn(self, draft: Draft, committed: Sequence[int]) -> None:
        """Judge the guesses of `draft` by the tokens that were committed after its root.

        The draft may be larger than what was verified: whatever the text decides is observed, so a drafter that is not trusted at the
        moment goes on being judged at no cost.
        """
        row: int | None = 0
        for token in committed:
            children = draft.children[row or 0]
            for child_token, child in children.items():
                self.observe(draft.cells[child], child_token == token)
            row = children.get(token)
            if row is None:
                return


Kind = Literal["without_replacement", "with_replacement"]


@dataclass(slots=True)
class Proposal:
    """The distribution that children of a row were drawn from, and the draws.

    `marks[j]` is the number of rows that the draft had when `drawn[j]` was drawn: the row that it got, unless the token was there already
    (guessed by another drafter, or drawn before with replacement).
    """

    q: Floats  # [V] float32, after the draft's own warping
    kind: Kind = "without_replacement"
    drawn: list[int] = field(default_factory=list)  # tokens in draw order
    marks: list[int] = field(default_factory=list)


class Draft:
    """A tree of guesses for one sequence. Lists are indexed by row; row 0 is the pending token.

    Children of a row with a proposal are its draws, then what other drafters guessed there; all children of the other rows are guesses
    without a distribution (point masses).
    """

    __slots__ = ("cells", "children", "depths", "p", "parents", "proposals", "rates", "tokens")

    def __init__(self, root: int, rates: Rates | None = None) -> None:
        self.rates = rates if rates is not None else Rates()
        self.tokens: list[int] = [root]
        self.parents: list[int] = [-1]
        self.depths: list[int] = [0]
        self.p: list[float] = [1.0]  # P(accepted | parent accepted)
        self.cells: list[tuple[Cell, ...]] = [()]
        self.children: list[dict[int, int]] = [{}]  # token -> row
        self.proposals: dict[int, Proposal] = {}  # parent row -> where its children were drawn from

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, cell: Cell, prior: float) -> int:
        """The row of guess `token` after `parent`: a new one, or the one that is already there, now with two reasons."""
        siblings = self.children[parent]
        row = siblings.get(token)
        p = self.rates.get((cell,), prior)
        if row is None:
            row = len(self.tokens)
            siblings[token] = row
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self.p.append(p)
            self.cells.append((cell,))
            self.children.append({})
        elif all(known[0] != cell[0] for known in self.cells[row]):  # a drafter's second vote for the same token adds nothing
            self.cells[row] = (*self.cells[row], cell)
            self.p[row] = self.rates.get(self.cells[row], 1.0 - (1.0 - self.p[row]) * (1.0 - p))
        return row

    def draw(self, parent: int, token: int, cell: Cell, prior: float) -> int:
        """The row of a token drawn from the proposal of `parent`. Draws are added in the order of drawing, all of them."""
        proposal = self.proposals[parent]
        proposal.drawn.append(token)
        proposal.marks.append(len(self.tokens))
        return self.add(parent, token, cell, prior)

    def sources(self, row: int) -> list[str]:
        """The drafters that made this guess."""
        return [str(cell[0]) for cell in self.cells[row]]

    def path(self, row: int) -> list[int]:
        """Tokens of the guesses from below the root down to `row`."""
        tokens = []
        while row:
            tokens.append(self.tokens[row])
            row = self.parents[row]
        return tokens[::-1]

    def reach(self) -> list[float]:
        """P(row is accepted) for every row: the product of `p` down from the root."""
        reach = [1.0]
        for row in range(1, len(self.tokens)):
            reach.append(reach[self.parents[row]] * self.p[row])
        return reach

    @property
    def is_chain(self) -> bool:
        """Every row is the child of the row before it."""
        return all(parent == row - 1 for row, parent in enumerate(self.parents))

    def ranking(self, reach: Sequence[float]) -> list[int]:
        """Guesses by falling `reach`; every prefix is closed under ancestors, because no child is likelier than its parent."""
        return sorted(range(1, len(self.tokens)), key=lambda row: -reach[row])  # stable: on a tie the parent, being older, stays first

    def best_path(self, reach: Sequence[float]) -> list[int]:
        """Rows of the chain from the root that promises most accepted tokens."""
        promise = [0.0] * len(reach)  # best promise among the children of a row
        heir = [0] * len(reach)  # the child that has it
        for row in range(len(reach) - 1, 0, -1):
            parent, total = self.parents[row], reach[row] + promise[row]
            if total >= promise[parent]:  # on a tie the older one
                promise[parent], heir[parent] = total, row
        path, row = [], heir[0]
        while row:
            path.append(row)
            row = heir[row]
        return path

    def take(self, rows: Iterable[int]) -> Draft:
        """The sub-tree of these rows (closed under ancestors, root implied), likeliest branch first.

        Depth first along the likeliest child puts the path that is accepted most often into consecutive slots, so keeping it moves nothing.
        Proposals stay behind: which draws are in a tree that was cut by estimates depends on the tokens drawn, so they are guesses like any
        other from here on. `first` and `first_path` are the cuts that keep proposals.
        """
        wanted = set(rows)
        taken = Draft(self.tokens[0], self.rates)
        stack = [(0, 0)]  # (row here, row there)
        while stack:
            row, copy = stack.pop()
            if row:
                parent, copy = copy, len(taken.tokens)
                taken._copy(self, row, parent)
            heirs = [child for child in self.children[row].values() if child in wanted]
            if len(heirs) > 1:
                heirs.sort(key=lambda child: self.p[child])
            stack.extend((child, copy) for child in heirs)
        assert len(taken) == len(wanted - {0}) + 1, "rows must be closed under ancestors"
        return taken

    def first(self, count: int) -> Draft:
        """The first `count` guesses in the order of adding, and the draws made up to there.

        The ratio test of a draw is unbiased only if its being in the tree does not depend on the token drawn (papers/A0 section 5, inclusion
        rule). The order of adding satisfies that: what was added before a draw does not know it. So must `count`: it is fixed before
        anything is drawn, and never computed from q, from estimates of the guesses, or from the size of the draft, all of which know the
        tokens. Draws that met an existing row have no row of their own to count; their mark stands for it, lest a draw be kept because of
        the token that it met.
        """
        taken = Draft(self.tokens[0], self.rates)
        for row in range(1, min(count + 1, len(self.tokens))):
            taken._copy(self, row, self.parents[row])
        for parent, proposal in self.proposals.items():
            draws = sum(mark <= count for mark in proposal.marks)
            if draws:
                taken.proposals[parent] = Proposal(proposal.q, proposal.kind, proposal.drawn[:draws], proposal.marks[:draws])
        return taken

    def first_path(self, count: int) -> Draft:
        """The chain of at most `count` guesses that follows the child added first at every row.

        Legal like `first`: the first child is either the first draw, whatever its token, or a guess that stood there before the draw, which
        then is left out whatever its token. To follow the likeliest child instead would choose draws by their tokens.
        """
        taken, row = Draft(self.tokens[0], self.rates), 0
        while self.children[row] and len(taken.tokens) <= count:
            child, here = min(self.children[row].values()), len(taken.tokens) - 1
            proposal = self.proposals.get(row)
            if proposal is not None and proposal.marks[:1] == [child]:
                taken.proposals[here] = Proposal(proposal.q, proposal.kind, proposal.drawn[:1], [here + 1])
            taken._copy(self, child, here)
            row = child
        return taken

    def _copy(self, other: Draft, row: int, parent: int) -> None:
        """Append `row` of another draft as a child of `parent`."""
        self.children[parent][other.tokens[row]] = len(self.tokens)
        self.tokens.append(other.tokens[row])
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.p.append(other.p[row])
        self.cells.append(other.cells[row])
        self.children.append({})


def chain(tokens: Sequence[int], rates: Rates | None = None) -> Draft:
    """A draft of one path: `tokens[0]` is the root. Its guesses have no source and probability 1."""
    draft = Draft(tokens[0], rates)
    for row, token in enumerate(tokens[1:]):
        draft.add(row, token, ("given",), 1.0)
    return draft


def pack(drafts: Sequence[Draft], min_rows: int = 1, sequences: Ints | None = None) -> Step:
    """One step `[B, R]` of all drafts, R = the longest, at least `min_rows`; `sequences` [B] names those of the cache that they belong to.

    Short drafts are padded by repeating their last token as a chain behind their last row: a padding row attends to real keys (no NaN), has
    a valid position, and is no row of the draft, so no walk can accept it.
    """
    rows = max(min_rows, max(len(draft) for draft in drafts))
    tokens = np.array([draft.tokens + [draft.tokens[-1]] * (rows - len(draft)) for draft in drafts], dtype=np.int64)  # [B, R]
    counts = np.array([len(draft) for draft in drafts], dtype=np.int64)
    parents = CHAIN
    if not all(draft.is_chain for draft in drafts):
        parents = np.array([draft.parents + list(range(len(draft) - 1, rows - 1)) for draft in drafts], dtype=np.int64)
    return Step(tokens, parents, sequences=sequences, counts=counts, least=min_rows)

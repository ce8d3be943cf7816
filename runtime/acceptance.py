"""Acceptance rules (papers/A0 sections 2, 4, 5 and 6): how the target's answer to a draft becomes text.

There is one walk down the tree. A rule says which token follows a row; where that token is a guess, the walk goes on in its row. All rules
commit text with exactly the target's distribution p, processed as in plain decoding, in the tree, in the rows after a rejection and in the
row after the last guess. They differ in how often guesses are accepted:

- `coupled` chooses the token that plain decoding would draw at that place, so the text is the plain text token by token.
- `recursive` tests every draw against the distribution that it came from, in draw order; guesses without one are matched as in `coupled`.
- `block` tests the draws of a chain together (Sun et al., block verification); it accepts at least as many as `recursive` on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planc.runtime.engine import Floats
from planc.runtime.sampling import Purpose, Sampler, probabilities, process, uniforms
from planc.runtime.trees import Draft, Proposal

#: (row, tokens accepted below the root up to and with that row) -> the token to commit after that row
Choose = Callable[[int, list[int]], int]
Distribution = NDArray[np.float64]  # [V], sums to 1


@dataclass(frozen=True, slots=True)
class Walk:
    """What a verified draft yields. `rows[i]` is the row whose output chose `tokens[i]`, so both have 1 + accepted entries."""

    rows: list[int]  # the root and the accepted guesses, ascending
    tokens: list[int]  # the accepted guesses, then the correction or bonus token


def walk(draft: Draft, choose: Choose) -> Walk:
    """Follow the chosen tokens down the tree until they leave it. Rows that the text does not visit are never evaluated.

    With a `choose` that does not look at the draft (argmax, or coupled sampling), a guess is accepted when it equals what the target would
    have chosen anyway: the committed text is the plain text for any tree, however it was made.
    """
    rows, tokens = [0], list[int]()
    while True:
        y = choose(rows[-1], tokens)
        child = draft.children[rows[-1]].get(y)
        tokens.append(y)
        if child is None:
            return Walk(rows, tokens)
        rows.append(child)


@dataclass(frozen=True, slots=True)
class Target:
    """What the last pass said about one sequence."""

    logits: Floats  # [R', V]
    sampler: Sampler
    text: int  # keys the noise
    place: int  # absolute position of the token after the root
    seen: set[int] | frozenset[int] = frozenset()  # tokens of the text, where a choice depends on them
    first: int = 0  # row of the first output

    def choose(self, row: int, path: list[int]) -> int:
        """The token that plain decoding would commit here."""
        return self.sampler.choose(self.logits[row - self.first], self.text, self.place + len(path), self._seen(path))

    def p(self, row: int, path: list[int]) -> Distribution:
        """The distribution of that token."""
        return probabilities(process(self.logits[row - self.first], self.sampler.sampling, self._seen(path)))

    def sample(self, p: Distribution, depth: int) -> int:
        """A token from `p` [V] for the place `depth` tokens after the root.

        The noise is that of the place: every place is sampled at most once, and no draw knows its noise (`Drawing.tested`).
        """
        return self.sampler.sample(p, self.text, self.place + depth)

    def uniforms(self, row: int, count: int) -> NDArray[np.float64]:
        """Numbers [count] in [0, 1) for the tests at a row, fresh in every round."""
        return uniforms(self.sampler.sampling.seed, self.text, self.place, count, Purpose.TEST, row)

    def _seen(self, path: list[int]) -> set[int] | frozenset[int]:
        return self.seen.union(path) if self.seen else self.seen


class Rule(Protocol):
    """How tokens are chosen where a draft was verified."""

    tested: bool  # draws are tested against their distribution: drafts carry proposals, and may be cut in legal ways only (`Draft.first`)
    chains: bool  # only chains can be verified

    def choices(self, draft: Draft, target: Target) -> Choose:
        """The token after each row that the walk visits."""


class Coupled:
    """Sample, then match: exact for any tree, and greedy at temperature 0."""

    tested = chains = False

    def choices(self, draft: Draft, target: Target) -> Choose:
        return target.choose


class Recursive:
    """Rejection sampling at every node, children in draw order (RSD, SpecInfer, SpecTr; papers/21)."""

    tested, chains = True, False

    def choices(self, draft: Draft, target: Target) -> Choose:
        def choose(row: int, path: list[int]) -> int:
            proposal = draft.proposals.get(row)
            if proposal is None:  # a leaf, or guesses without a distribution: the same law as testing p(x), and the plain token
                return target.choose(row, path)
            p = target.p(row, path)
            for u, (x, acceptance, rest) in zip(target.uniforms(row, len(proposal.drawn)), trials(p, proposal), strict=True):
                if u < acceptance:
                    return x
                p = rest
            # Guesses of other drafters beside the draws come after them, as point masses: a sample of what is left meets one of them or
            # not. They may know the draws; no draw knows them, or it was made without regard to them. Rejected draws have no mass left.
            return target.sample(p, len(path))

        return choose


class Block:
    """Block verification: the longest prefix of a chain that passes, so that a good draw makes up for a poor one before it."""

    tested = chains = True

    def choices(self, draft: Draft, target: Target) -> Choose:
        assert draft.is_chain
        guesses, last = draft.tokens[1:], len(draft) - 1
        p = [target.p(row, guesses[:row]) for row in range(len(draft))]  # [1 + n, V]
        thresholds, rest = block_thresholds(guesses, p, [draft.proposals.get(row) for row in range(last)])
        u = target.uniforms(0, last)
        accepted = max((i for i in range(1, last + 1) if u[i - 1] < thresholds[i - 1]), default=0)

        def choose(row: int, path: list[int]) -> int:
            if row < accepted:
                return guesses[row]
            # What is left may hold the guess that failed. Then its row is valid, and what follows it is a plain sample.
            return target.sample(rest[row] if row == accepted else p[row], row)

        return choose


class Transferred:
    """Tests draws of a chain against p' = softmax(z - strength (p - q)) in the place of p (RAPID, papers/28).

    Not lossless: committed text follows neither p nor p' exactly (`law` of benchmarks/papers/p28.py); at strength 0 it follows p. Rows without a
    draw, the last one among them, follow p. At temperature 0 a guess is kept where it is the likeliest by p', else the likeliest by p follows.
    """

    tested = chains = True

    def __init__(self, strength: float, floor: float) -> None:
        self.strength, self.floor = strength, floor

    def choices(self, draft: Draft, target: Target) -> Choose:
        def choose(row: int, path: list[int]) -> int:
            proposal = draft.proposals.get(row)
            if proposal is None:
                return target.choose(row, path)
            x, p, q = proposal.drawn[0], target.p(row, path), _normed(proposal.q)
            moved = transferred(p, q, self.strength, self.floor)
            if target.sampler.sampling.temperature == 0.0:
                return x if int(moved.argmax()) == x else int(p.argmax())
            if target.uniforms(row, 1)[0] * q[x] < moved[x]:
                return x
            rest = rejected(p, q, moved)
            return target.sample(rest if rest.any() else p, len(path))

        return choose


def transferred(p: Distribution, q: Distribution, strength: float, floor: float) -> Distribution:
    """The target's p [V] moved towards the draft's q [V] where q has at least `floor` times its maximum."""
    shift = np.where(q >= floor * q.max(), p - q, 0.0)
    with np.errstate(divide="ignore"):
        return probabilities(np.log(p) - strength * shift)


def rejected(p: Distribution, q: Distribution, moved: Distribution) -> Distribution:
    """What to sample from after a rejection, not normalised: the larger of what p has beyond q and beyond `moved`, in every place."""
    return np.maximum(np.maximum(p - q, p - moved), 0.0)


RULES: dict[str, Rule] = {"coupled": Coupled(), "recursive": Recursive(), "block": Block()}


def rule_of(acceptance: str, temperature: float) -> Rule:
    """The rule with this name; at temperature 0 there is nothing to sample, and every rule is greedy matching."""
    return RULES["coupled" if temperature == 0.0 else acceptance]


def trials(p: Distribution, proposal: Proposal) -> Iterator[tuple[int, float, Distribution]]:
    """For each draw x: its token, the probability of accepting it, and what is left of p if it is rejected (papers/A0 section 5).

    x_j is accepted with min(1, p^j(x_j) / q^j(x_j)), and p^(j+1) = norm(max(p^j - q^j, 0)). With replacement q^j is q; without, q without
    the draws before, normalised by the mass that is left.
    """
    left = proposal.q.astype(np.float64)
    for x in proposal.drawn:
        q = left / left.sum()
        rest = np.maximum(p - q, 0.0)
        mass = rest.sum()
        if mass <= 0.0:  # p and q are equal but for rounding
            rest = p.copy()
            rest[x] = 0.0
            mass = rest.sum()
        acceptance = min(1.0, p[x] / q[x])
        p = rest / mass if mass > 0.0 else p  # without mass p was certain of x, which cannot be rejected
        yield x, acceptance, p
        if proposal.kind == "without_replacement":
            left[x] = 0.0


def block_thresholds(
    guesses: Sequence[int], p: Sequence[Distribution], proposals: Sequence[Proposal | None]
) -> tuple[list[float], list[Distribution]]:
    """For a chain of n guesses: h_1 .. h_n and what to sample from if 0 .. n of them are accepted (papers/A0 section 4).

    The number accepted is the largest i with u_i < h_i. `p` has 1 + n rows; a guess without a proposal is a point mass. n may depend on the
    guesses, as long as stopping after a guess depends on none after it.
    """
    kept, ratios, rests = 1.0, list[float](), list[Distribution]()  # kept is p_i of the paper, ratios hold S_i / (S_i + 1 - p_i)
    for x, target, proposal in zip(guesses, p, proposals, strict=False):
        q = _normed(proposal.q) if proposal is not None else _point(x, target.size)
        rest = np.maximum(kept * target - q, 0.0)
        mass = float(rest.sum())  # S_i
        # without mass p_i is 1 and p equals q, or i is never the number accepted
        rests.append(rest / mass if mass > 0.0 else target)
        ratios.append(mass / (mass + (1.0 - kept)) if mass > 0.0 else float(kept >= 1.0))
        kept = min(1.0, kept * float(target[x] / q[x]))
    return [*ratios[1:], kept][: len(guesses)], [*rests, p[len(guesses)]]


def _normed(q: Floats) -> Distribution:
    wide = q.astype(np.float64)
    return np.asarray(wide / wide.sum())


def _point(x: int, size: int) -> Distribution:
    mass = np.zeros(size)
    mass[x] = 1.0
    return mass

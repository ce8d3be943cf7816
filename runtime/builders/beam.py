"""RSD-S: stochastic beam search (papers/21)."""

from __future__ import annotations

from math import exp, log, log1p
from typing import TYPE_CHECKING

from pydantic import Field

from planc.runtime.builders.base import BuilderPart, Growth, Node
from planc.runtime.builders.source import Source
from planc.runtime.trees import Draft

if TYPE_CHECKING:
    from planc.runtime.drafters.base import Context


class Beam(BuilderPart):
    """The `width` best sequences of every length, drawn without replacement (RSD-S); one draft pass per level."""

    width: int = Field(4, ge=1, le=64, description="guesses per level")
    depth: int = Field(4, ge=1, le=64, description="levels")

    def grow(self, source: Source, context: Context, draft: Draft, key: str) -> None:
        growth = Growth(source, context, draft, key)
        beam = [(growth.root(), 0.0, 0.0)]  # node, phi = log q of the sequence, psi = phi perturbed
        for depth in range(1, self.depth + 1):
            candidates = [
                (-psi, entry, rank, phi)
                for entry, (node, phi_s, psi_s) in enumerate(beam)
                for rank, (phi, psi) in enumerate(self._children(node, phi_s, psi_s, growth.greedy))
            ]
            # The survivors of a parent are the first of its draws: psi falls with the rank, whatever the tokens are.
            following = list[tuple[int, float, float]]()
            for minus_psi, entry, _, phi in sorted(candidates)[: self.width]:
                row = growth.draw(beam[entry][0])
                if row is not None and growth.may_follow(row):
                    following.append((row, phi, -minus_psi))
            if growth.full or depth == self.depth:
                return
            nodes = growth.expand([row for row, _, _ in following])
            beam = [(node, phi, psi) for node, (_, phi, psi) in zip(nodes, following, strict=True)]

    def _children(self, node: Node, phi_s: float, psi_s: float, greedy: bool) -> list[tuple[float, float]]:
        """(phi, psi) of the children of a beam entry that can survive, by falling psi: g conditioned on its maximum being psi of the entry."""
        found, best = list[tuple[float, float]](), 0.0
        for x in node.order(self.width):
            phi = phi_s + log(float(node.q[x]))
            g = phi_s - log(float(node.times[x]))  # phi + Gumbel noise; without noise phi itself
            if greedy:
                psi = phi
            elif not found:
                psi, best = psi_s, g
            elif g < best:
                v = psi_s - g + log1p(-exp(g - best))
                psi = psi_s - max(0.0, v) - log1p(exp(-abs(v)))
            found.append((phi, psi))
        return found

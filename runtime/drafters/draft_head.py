"""Draft with a head on the target's own last hidden state (papers/A1). What it is made of is for the plan to say.

`body: layer` is a decoder layer that guesses the next state, and with it the next token (EAGLE). It reads a row per token of the text: the target's
state f_t behind token x_t and the embedding of the token x_(t+1) that was chosen there, at position t. It gives the logits of x_(t+2), and an
estimate of f_(t+1) that a guess below that token is fed instead of the true state. So drafting costs passes of one layer over few rows, and the
target is never asked for a state that it has not computed anyway. EAGLE feeds back the vector that makes the logits; FSPAD (papers/83) has one for
each and lets the token gate the state.

`body: mlp` has `heads` small networks without memory. Head i reads f_t, and the embeddings of x_(t+1) .. x_(t+i), the guesses among them (Hydra,
papers/49); or f_t alone (Medusa). It gives the logits of x_(t+1+i).

Which of them it is stands in the graph; here only the source of the logits differs.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from planc.runtime.builders import BuilderItem
from planc.runtime.drafters.base import Context, DrafterPart, Host, Loaded, Verified
from planc.runtime.drafters.draft_model import Economy, Floor, guess
from planc.runtime.drafters.head_source import STATE, StateSource, TailSource
from planc.runtime.errors import PlanError
from planc.runtime.trees import Draft

HEAD = "head"  #: where the artifact of a target keeps its draft head

Fuse = Literal["linear", "gated", "concat", "none"]
_FUSES: dict[str, tuple[Fuse, ...]] = {"layer": ("linear", "gated"), "mlp": ("concat", "none")}  # the first is what is taken by itself


class DraftHead(DrafterPart):
    """Guesses with a head on the target's last hidden state, trained by `planc fit` (EAGLE, FSPAD, Medusa, Hydra; papers/A1)."""

    conflicts = ("draft_head",)
    file: str | None = Field(None, description="trained head (`planc fit` writes it); counts from the folder of the plan")
    artifact: str | None = Field(None, description="set by compile: folder of the artifact that holds the head")
    body: Literal["layer", "mlp"] = Field(
        "layer", description="a decoder layer with a cache of its own (EAGLE), or residual blocks without memory (Medusa, Hydra)"
    )
    layer: int = Field(-1, description="layer: decoder layer of the target that the head is made like; -1 is the last")
    fuse: Fuse | None = Field(
        None,
        description="how state and tokens meet. layer: linear; gated: the token gates the state (papers/83). "
        "mlp: concat, all guesses before (Hydra); none: no tokens (Medusa). Left out: the first of these",
    )
    feedback: Literal["shared", "own"] = Field(
        "shared", description="layer: the vector that is fed back: the one that makes the logits, or one of its own (papers/83)"
    )
    heads: int = Field(3, ge=1, le=8, description="mlp: how many guesses deep; each depth has weights of its own")
    blocks: int = Field(1, ge=1, le=8, description="mlp: residual blocks of a head")
    vocabulary: int = Field(
        8192, ge=1, description="tokens that the head chooses from: the most frequent ones of the text it was fitted on"
    )
    min_p: Floor = Field("auto", description="stop where the guesses so far are right with less probability; auto: by measured cost")
    builder: BuilderItem | None = Field(None, description="the tree of guesses; left out: one chain that stops at `min_p`")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.fused not in _FUSES[self.body]:
            fix = f"use one of {', '.join(_FUSES[self.body])}, or another `body`"
            raise PlanError("plan-bad-value", f"draft_head: a head with `body: {self.body}` has no `fuse: {self.fuse}`", fix=fix)
        foreign = {"layer": ("heads", "blocks"), "mlp": ("layer", "feedback")}[self.body]
        if idle := [name for name in foreign if getattr(self, name) != type(self).model_fields[name].default]:
            message = f"draft_head: `{idle[0]}` says nothing of a head with `body: {self.body}`"
            raise PlanError("plan-bad-value", message, fix="remove it, or use another `body`")
        return self

    @property
    def fused(self) -> Fuse:
        """How state and tokens meet."""
        return _FUSES[self.body][0] if self.fuse is None else self.fuse

    @property
    def levels(self) -> int:
        """Graphs that the head consists of: one that is run for every guess, or one for each depth."""
        return self.heads if self.body == "mlp" else 1

    @property
    def draws(self) -> Literal["nothing", "chain", "tree"]:
        """See `DrafterPart`."""
        return "nothing" if self.builder is None else self.builder.draws

    def build_for(self, host: Host) -> HeadDrafter:
        """See `DrafterPart`."""
        if self.artifact is None or self.artifact not in host.models:
            raise PlanError("plan-bad-value", "draft_head has no trained head yet", fix="name a `file`, and make it with `planc fit`")
        if STATE not in host.engine.spec.taps:
            raise PlanError("output-missing", "a draft head reads the target's hidden state, and this graph does not return it")
        return HeadDrafter(host, host.models[self.artifact], self)


class HeadDrafter:
    """Runtime object of `DraftHead`: a source per row of the batch."""

    prompt_rows = 0
    top_k = 0

    def __init__(self, host: Host, model: Loaded, options: DraftHead) -> None:
        self._model, self._options = model, options
        self._sources: dict[int, StateSource | TailSource] = {}
        self._economy = Economy(host, options.min_p, model.pass_ms)
        self._eos = frozenset(host.eos_ids)

    @property
    def passes(self) -> int:
        """Passes of the head so far."""
        return sum(source.passes for source in self._sources.values())

    def start(self, sequence: int) -> None:
        """The source sees by itself what it knows of the new text."""
        self._economy.forget(sequence)

    def propose(self, context: Context, draft: Draft) -> None:
        """A chain or a tree from the root, where the states of the text are known."""
        source = self._source(context.sequence)
        source.longest = max(source.longest, context.longest)
        most = min(context.budget, context.depth, source.room(context.tokens))
        if most <= 0 or context.paused or not source.ready(context.tokens):
            return
        guess(source, context, draft, most, self._options.builder, self._economy, self._eos, DraftHead.key)

    def update(self, verified: Verified) -> None:
        """Remember the states behind tokens that are now text."""
        states = verified.taps[STATE]
        before, rows = states[: verified.before], np.array(verified.rows)
        self._source(verified.sequence).observe(verified.past, np.concatenate([before, states[verified.before + rows]]))

    def _source(self, sequence: int) -> StateSource | TailSource:
        if sequence not in self._sources:
            conditioned = self._options.fused != "none"
            tail = self._options.body == "mlp"
            self._sources[sequence] = TailSource(self._model, conditioned=conditioned) if tail else StateSource(self._model)
        return self._sources[sequence]

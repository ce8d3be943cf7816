"""Draft and verify: the same text as plain decoding, several tokens per pass (papers/A0)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from planc.runtime.acceptance import walk
from planc.runtime.controller import Controller
from planc.runtime.decode import Decode
from planc.runtime.drafters import Drafter
from planc.runtime.engine import Cache, Engine
from planc.runtime.loops.run import CHUNK, Piece, Run, Stats, Stop
from planc.runtime.trees import Draft


def speculative(
    engine: Engine,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    drafters: Sequence[Drafter],
    controller: Controller,
    decode: Decode,
    *,
    eos: Collection[int] = (),
    trees_allowed: bool = True,
    block: int | None = None,
    min_rows: int | None = None,
    chunk: int = CHUNK,
    ids: Sequence[int] | None = None,
    stop: Stop | None = None,
    stats: Stats | None = None,
) -> Iterator[Piece]:
    """Generate from every prompt, a `Piece` per sequence and round.

    `prompts[b]` is the whole text so far; what `cache` already holds of it is not computed again. `eos` ids end a text and are part of it;
    `stop` is asked after every token. A pass has at least `min_rows` rows (default: the plan's, or 2: the least that keeps rows bitwise
    independent). `ids` key the sampling noise of the sequences, by default their place in the batch. `trees_allowed` and `block` state
    where siblings keep the promised exactness. In a batch the cache of a finished sequence is released.
    """
    run = Run(engine, cache, prompts, decode, drafters, eos=eos, min_rows=min_rows, chunk=chunk, ids=ids, stop=stop, stats=stats)
    run.require_trees(controller.tree.shape == "tree")
    return run.stats.timed(_rounds(run, controller, trees_allowed and engine.spec.trees, block))


def _rounds(run: Run, controller: Controller, trees: bool, block: int | None) -> Iterator[Piece]:
    yield from run.prefill()
    while live := run.live:
        yield from one_round(run, live, controller, trees, block)


def one_round(run: Run, live: Sequence[int], controller: Controller, trees: bool, block: int | None) -> Iterator[Piece]:
    """Draft and verify once for each of these sequences, in one pass."""
    before = {b: int(run.cache.lengths[b]) for b in live}  # committed slots: all of the text but the pending token
    batch, past, room = len(live), list(before.values()), run.room(live)
    ragged = batch > 1 and run.engine.spec.ragged
    least = 1 if ragged else run.min_rows  # a ragged pass has rows enough, and pays for every one of them
    rules = [run.rule(b) for b in live]
    trees = trees and not any(rule.chains for rule in rules)
    # where draws are tested, how many guesses this pass is worth is settled before anything is drawn
    cut, tested = None, any(rule.tested for rule in rules)
    if tested or controller.settles_ahead:
        cut = controller.ahead(past, room, batch, min_rows=least, trees=trees, block=block, tested=tested)
    siblings, budget = (controller.siblings(trees), controller.budget) if cut is None else (not cut.chain, cut.guesses)
    # 1. draft: every drafter adds its guesses to the one tree of the sequence
    drafts = {b: Draft(run.texts[b].tokens[-1], controller.rates) for b in live}
    run.propose(drafts, budget, controller.tree.depth, siblings=siblings, paused=controller.paused, in_turn=tested)
    # 2. choose how much of it this pass is worth; nothing at all is always a choice
    if cut is not None:
        chosen = [cut.of(draft) for draft in drafts.values()]
    else:
        chosen = controller.select(list(drafts.values()), past, room, batch, min_rows=least, trees=trees, block=block, ragged=ragged)
    verified = dict(zip(live, chosen, strict=True))
    outputs = run.forward(run.pack(verified))  # 3. verify: rows [B, R], one pass
    committed = 0
    for b, tree in verified.items():
        path = walk(tree, run.chooser(b, outputs, tree))  # 4. accept: follow the chosen tokens down the tree
        pieces = run.commit(b, path.rows, path.tokens, tree)  # 5. commit the accepted guesses and the token after them
        controller.rates.learn(drafts[b], pieces[0].tokens)  # 6. adapt
        if cut is not None:
            controller.judge(tree, path.rows)
        run.teach(b, tree, path, outputs, before[b])
        committed += len(pieces[0].tokens)
        yield from pieces
    if run.shared:
        return  # the time of a pass that fed a prompt too says nothing about drafts
    controller.observe(run.rows, max(past), batch, committed / batch, run.pass_ms, min_rows=least, draft_ms=run.draft_ms)

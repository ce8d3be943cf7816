"""The pass kv_cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import (
    FAMILIES,
    POOL,
    applied,
    apply,
    before_and_after,
    close,
    decoding,
    eager,
    model,
    one_layer,
    pooled,
    raised,
    token_ids,
)
from torch import nn

from planc.backends.reference import ReferenceCache, ReferenceEngine, probe
from planc.compiler.dialect import OPS
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.argmax import Argmax
from planc.passes.kv_cache import KvCache
from planc.runtime.engine import Step
from planc.runtime.errors import CompileError, PlanError

Trees = Literal["none", "fused", "split"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(KvCache(trees="fused"), one_layer()), "kv_cache.txt")


# a split program is the fused one but for a mark that only a backend reads, so one family is enough
@pytest.mark.parametrize(("family", "trees"), [*((f, t) for f in FAMILIES for t in ("none", "fused")), ("gemma2", "split")])
def test_equals_eager(family: str, trees: Trees) -> None:
    """Prefill, a ragged batch, a tree, decoding and a rollback give the logits of one pass without cache."""
    program = decoding(raised(family), trees)
    assert [s.split for s in program.states] == [trees == "split"] * len(program.states)
    engine = ReferenceEngine(program)
    run(engine, model(family))


def run(engine: ReferenceEngine, module: nn.Module) -> None:
    ids = token_ids(2, 24).numpy()
    texts = [list(ids[0, :11]), list(ids[1, :9])]  # what is committed
    cache = engine.new_cache(2, 40)
    out = engine.forward(cache, Step(ids[:, :11]), logits=True)
    close(out.logits, eager(module, torch.from_numpy(ids[:, :11])))
    cache.keep(0, np.arange(11))
    cache.keep(1, np.arange(9))
    if engine.spec.trees:
        parents = np.array([[-1, 0, 0, 1, 1, 3], [-1, 0, 1, 2, 0, 4]])
        check(engine, cache, module, texts, ids[:, 11:17], parents)
        for b, rows in enumerate(([0, 2], [0, 1, 2])):
            cache.keep(b, np.array(rows))
            texts[b] += [ids[b, 11 + r] for r in rows]
    check(engine, cache, module, texts, ids[:, 17:19], None)
    cache.keep(0, np.arange(2))
    texts[0] += list(ids[0, 17:19])
    cache.rollback(1, 5)
    texts[1] = texts[1][:5]
    check(engine, cache, module, texts, ids[:, 19:20], None)


def check(
    engine: ReferenceEngine,
    cache: ReferenceCache,
    module: nn.Module,
    texts: list[list[int]],
    tokens: np.ndarray,
    parents: np.ndarray | None,
) -> None:
    """Each row's logits are those of the text on the path to it."""
    out = engine.forward(cache, Step(tokens, parents), logits=True)
    assert out.logits is not None
    for b, text in enumerate(texts):
        paths: list[list[int]] = []
        for row, token in enumerate(tokens[b]):
            parent = row - 1 if parents is None else int(parents[b, row])
            paths.append([*(paths[parent] if parent >= 0 else []), int(token)])
            close(out.logits[b, row], eager(module, torch.tensor([[*text, *paths[row]]]))[0, -1])


def test_states_follow_the_graph() -> None:
    program = apply(raised("gemma3"), KvCache(trees="fused"))
    assert [(s.name, s.heads, s.key_width, s.window) for s in program.states] == [
        (f"past.{i}", 2, 16, 0 if i == 5 else 8) for i in range(6)
    ]
    assert [n for n in program.inputs if n.startswith("bias")] == ["bias.8", "bias"]  # one mask per kind of layer
    assert not any(n.startswith("bias") for n in apply(raised("gemma3"), KvCache(trees="none")).inputs)


def changed(index: int, value: object) -> Program:
    """A program whose attention has another argument."""
    edit = raised("llama").edit("test")
    node = next(n for n in edit.graph.nodes if n.target is OPS.attention.default)
    node.update_arg(index, node.args[0] if value == "bias" else value)
    return edit.done(1, 1)


@pytest.mark.parametrize(("index", "value"), [(5, False), (3, "bias")])
def test_refuses(index: int, value: object) -> None:
    with pytest.raises(CompileError) as caught:
        apply(changed(index, value), KvCache())
    assert caught.value.code == "pass-refused"
    assert "model.layers.0.self_attn" in (caught.value.node or "")


def test_refuses_no_room() -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"kv_cache": {"capacity": 1}}]})
    assert refused.value.code == "plan-bad-value"


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.sampled_from(["none", "fused", "split"]), st.integers(1, 3), st.data())
def test_property(name: str, trees: Trees, batch: int, data: st.DataObject) -> None:
    """However a text is cut into passes, its logits are those of one pass."""
    module, program = pooled(name)
    new = applied(KvCache(trees=trees), program)
    ids = token_ids(batch, data.draw(st.integers(2, 20)), seed=data.draw(st.integers(0, 99)))
    want = eager(module, ids)
    close(probe(new, ids)["logits"], want)
    engine = ReferenceEngine(apply(new, Argmax()))
    cache = engine.new_cache(batch, ids.shape[1] + data.draw(st.integers(0, 5)))
    done = 0
    while done < ids.shape[1]:
        count = data.draw(st.integers(1, ids.shape[1] - done))
        out = engine.forward(cache, Step(ids[:, done : done + count].numpy()), logits=True)
        close(out.logits, want[:, done : done + count])
        for b in range(batch):
            cache.keep(b, np.arange(count))
        done += count

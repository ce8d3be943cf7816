"""The pass fuse_projections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import POOL, applied, apply, before_and_after, close, eager, model, one_layer, pooled, raised, token_ids

from planc.backends.reference import probe
from planc.compiler.program import Program
from planc.passes.fuse_projections import FuseProjections

aten = torch.ops.aten


def products(program: Program) -> list[str]:
    return [str(n.args[1].target) for n in program.main.nodes if n.target is aten.linear.default]


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(FuseProjections(), one_layer()), "fuse_projections.txt")


@pytest.mark.parametrize(("family", "joined"), [("llama", 4), ("qwen2", 4), ("opt", 2), ("gemma2", 4)])
def test_equals_eager(family: str, joined: int) -> None:
    ids, program = token_ids(2, 13), raised(family)
    new = applied(FuseProjections(), program)
    close(probe(new, ids)["logits"], eager(model(family), ids))
    names = [name for name in products(new) if "|" in name]
    assert len(names) == joined
    assert [name.split("|")[0].rsplit(".", 2)[1] for name in names[:1]] == ["q_proj"]  # q, k, v in this order
    assert len(products(new)) == len(products(program)) - sum(name.count("|") for name in names)
    assert new.bytes() == program.bytes()


def test_refuses() -> None:
    """What is one product already, or has biases in some only, stays as it is."""
    for family in ("phi3", "gpt2", "gpt_neox"):
        assert apply(raised(family), FuseProjections()) is raised(family)
    edit = one_layer().edit("test")
    key = next(n for n in edit.graph.nodes if n.target is aten.linear.default and "k_proj" in n.args[1].target)
    with edit.before(key):
        key.args = (*key.args, edit.param("bias", torch.ones(16)))
    new = apply(edit.done(1, 1), FuseProjections())
    assert [name.count("|") for name in products(new)] == [0, 0, 0, 0, 1, 0, 0]  # gate and up only


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(POOL), st.integers(1, 2), st.integers(1, 12), st.integers(0, 99))
def test_property(name: str, batch: int, rows: int, seed: int) -> None:
    module, program = pooled(name)
    ids = token_ids(batch, rows, seed=seed)
    new = applied(FuseProjections(), program)
    close(probe(new, ids)["logits"], eager(module, ids))
    readers: dict[object, int] = {}
    for node in new.main.nodes:
        if node.target is aten.linear.default:
            readers[node.args[0]] = readers.get(node.args[0], 0) + 1
    assert set(readers.values()) == {1}  # no two products are left that read the same

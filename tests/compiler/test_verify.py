"""The verifier: every kind of damage is found and reported with the pass and the node."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from models_tiny import FAMILIES, decoding, one_layer, raised, traced
from torch.fx import Graph

import planc.compiler.verify
from planc.compiler.passbase import Context
from planc.compiler.program import Editor, Program
from planc.compiler.verify import verify
from planc.passes.top_k import TopK
from planc.runtime.errors import CompileError

aten = torch.ops.aten


def with_param(program: Program, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Program:
    name = "model.layers.0.mlp.up_proj.weight"
    params = dict(program.params)
    if change is None:
        del params[name]
    else:
        params[name] = change(params[name])
    return program.replace(params=params)


def edited(change: Callable[[Editor], object]) -> Program:
    verify(one_layer(), "the pass before")  # what was checked once is only checked again where it differs
    edit = one_layer().edit("test")
    change(edit)
    return edit.program.replace(graphs={"main": edit.graph})


def find(edit: Editor, target: object) -> torch.fx.Node:
    return next(n for n in edit.graph.nodes if n.target is target)


def foreign(edit: Editor) -> None:
    node = find(edit, aten.linear.default)
    node.target = torch.ops.prims.neg.default
    node.args = node.args[:1]


def python_function(edit: Editor) -> None:
    node = find(edit, aten.embedding.default)
    with edit.graph.inserting_after(node):
        new = edit.graph.call_function(math.sqrt, (2.0,))
    new.meta["val"] = 1.4
    edit.outputs(extra=new)


def method(edit: Editor) -> None:
    node = find(edit, aten.embedding.default)
    with edit.graph.inserting_after(node):
        new = edit.graph.call_method("relu", (node,))
    new.meta["val"] = node.meta["val"]
    edit.outputs(extra=new)


def wrong_shape(edit: Editor) -> None:
    node = find(edit, aten.linear.default)
    node.meta["val"] = node.meta["val"][..., :5]


def wrong_dtype(edit: Editor) -> None:
    node = find(edit, aten.linear.default)
    with edit.mode:
        node.meta["val"] = node.meta["val"].double()


def nothing_recorded(edit: Editor) -> None:
    del find(edit, aten.linear.default).meta["val"]


def no_type_of_parameter(edit: Editor) -> None:
    del next(n for n in edit.graph.nodes if n.op == "get_attr").meta["val"]


def misfit(edit: Editor) -> None:
    node = find(edit, aten.linear.default)
    node.update_arg(1, next(n for n in edit.graph.nodes if n.op == "get_attr" and "down_proj" in str(n.target)))


def read_before_made(edit: Editor) -> None:
    node = find(edit, aten.embedding.default)
    find(edit, aten.linear.default).append(node)


def node_of_another_graph(edit: Editor) -> None:
    edit.outputs(extra=one_layer().outputs["logits"])


CASES: dict[str, tuple[Callable[[], Program], str]] = {
    "missing parameter": (lambda: with_param(one_layer(), None), "up_proj.weight is missing"),
    "parameter of another dtype": (
        lambda: with_param(one_layer(), torch.Tensor.double),
        "is float64[48, 32], the graph expects float32[48, 32]",
    ),
    "parameter of another shape": (lambda: with_param(one_layer(), lambda w: w[:7]), "is float32[7, 32], the graph expects"),
    "parameter without a type": (lambda: edited(no_type_of_parameter), "model.embed_tokens.weight has no recorded shape"),
    "foreign op": (lambda: edited(foreign), "prims.neg.default is neither ATen nor dialect"),
    "Python function": (lambda: edited(python_function), "sqrt"),
    "method": (lambda: edited(method), "call_method"),
    "wrong shape": (lambda: edited(wrong_shape), "the pass recorded"),
    "wrong dtype": (lambda: edited(wrong_dtype), "recorded float64"),
    "nothing recorded": (lambda: edited(nothing_recorded), "recorded None"),
    "inputs that do not fit": (lambda: edited(misfit), "inputs do not fit"),
    "read before it is made": (lambda: edited(read_before_made), "before"),
    "node of another graph": (lambda: edited(node_of_another_graph), ""),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_found(case: str) -> None:
    make, text = CASES[case]
    program = make()
    for _ in range(2):  # and found again
        with pytest.raises(CompileError) as caught:
            verify(program, "some_pass", ("logits",))
        assert caught.value.code == "verify-failed"
        assert caught.value.message.startswith("after some_pass: ")
        assert text in caught.value.message
        assert "--disable some_pass" in (caught.value.fix or "")


def test_the_node_is_named() -> None:
    with pytest.raises(CompileError) as caught:
        verify(edited(misfit), "some_pass")
    assert "linear (module" in (caught.value.node or "")
    assert "q_proj" in (caught.value.node or "")


def test_outputs_that_are_gone() -> None:
    program = edited(lambda edit: edit.outputs(logits=None, hidden=find(edit, aten.embedding.default)))
    verify(program, "some_pass")
    with pytest.raises(CompileError) as caught:
        verify(program, "some_pass", ("logits",))
    assert caught.value.code == "verify-failed"
    assert "logits" in caught.value.message


def test_every_graph_is_checked() -> None:
    draft = Graph()
    weight = draft.get_attr("nothing")
    weight.meta["val"] = torch.ones(1)
    draft.output({"out": weight})
    with pytest.raises(CompileError) as caught:
        verify(one_layer().replace(graphs={**one_layer().graphs, "draft": draft}), "some_pass")
    assert "nothing is missing" in caught.value.message


def test_only_what_differs_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    verify(one_layer(), "raising")
    computed: list[str] = []
    checked = planc.compiler.verify._check_value
    monkeypatch.setattr(planc.compiler.verify, "_check_value", lambda node, after: (computed.append(node.name), checked(node, after)))
    verify(TopK(k=3).apply(one_layer(), Context()), "top_k")
    assert computed == ["topk_default", "getitem_3", "getitem_2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_programs_pass(family: str) -> None:
    for program in (traced(family), raised(family), decoding(raised(family), "fused")):
        verify(program, "nothing", ("logits",))
    assert any(n.target is operator.getitem for n in decoding(raised(family)).main.nodes)

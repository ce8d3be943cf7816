"""Program and Editor: copies, new nodes with computed shapes, provenance, parameters that come and go."""

from __future__ import annotations

import pytest
import torch
from models_tiny import one_layer, token_ids, traced
from torch.fx import Node

from planc.backends.reference import probe, run
from planc.compiler.dialect import OPS
from planc.compiler.printer import show
from planc.compiler.program import MAIN, Program, describe, eliminate_dead, fake_mode, module_path, source_line
from planc.compiler.verify import verify

aten = torch.ops.aten


def node_of(program: Program, target: object) -> Node:
    return next(n for n in program.main.nodes if n.target is target)


def doubled() -> Program:
    """The logits times two, made by a pass called test."""
    edit = one_layer().edit("test")
    logits = edit[one_layer().outputs["logits"]]
    with edit.after(logits):
        new = edit.call(aten.mul.Tensor, logits, 2.0)
    edit.replace(logits, new)
    return edit.done(1, 1, ["twice"])


def test_edit_makes_a_copy() -> None:
    program = one_layer()
    before, nodes = show(program), list(program.main.nodes)
    new = doubled()
    assert show(program) == before and list(program.main.nodes) == nodes
    assert not set(new.main.nodes) & set(nodes)
    ids = token_ids(1, 5)
    assert torch.equal(probe(new, ids)["logits"], 2 * probe(program, ids)["logits"])
    assert new.params["lm_head.weight"] is program.params["lm_head.weight"]  # parameters are shared
    assert new.main is new.graphs[MAIN]


def test_a_node_that_wraps_the_old_one_is_not_its_own_input() -> None:
    new = node_of(doubled(), aten.mul.Tensor)
    assert new.args[0] is not new and new.args[0].target is aten.linear.default


def test_new_nodes_record_pass_origin_and_place() -> None:
    program = doubled()
    new = program.outputs["logits"]
    assert (new.meta["pass"], new.meta["origin"]) == ("test", "linear_7")
    assert module_path(new).endswith("lm_head")
    assert program.history[-1].pass_name == "test"
    assert program.history[-1].notes == ("twice",)
    assert new.meta["val"].shape == one_layer().outputs["logits"].meta["val"].shape
    edit = program.edit("second")  # what is made from a made node comes from the first one
    with edit.after(edit[new]):
        later = edit.call(aten.neg.default, edit[new])
    assert (later.meta["pass"], later.meta["origin"]) == ("second", "linear_7")


def test_shapes_are_computed_on_fake_tensors() -> None:
    edit = one_layer().edit("test")
    logits = edit[one_layer().outputs["logits"]]
    with edit.after(logits):
        both = edit.call(aten.topk.default, logits, 3)
    values, ids = both.meta["val"]
    assert (values.dtype, ids.dtype, ids.shape[-1]) == (torch.float32, torch.int64, 3)
    assert str(ids.shape[0]) == str(logits.meta["val"].shape[0])  # the same symbols
    with edit.after(logits), pytest.raises(RuntimeError):
        edit.call(aten.add.Tensor, logits, edit[node_of(one_layer(), aten.embedding.default)])


def test_parameters() -> None:
    edit = one_layer().edit("test")
    logits = edit[one_layer().outputs["logits"]]
    value = torch.ones(97)
    with edit.after(logits):
        first, unread = edit.param("extra", value), edit.param("unread", value)
        edit.param("extra", value)  # the same again is the same
        with pytest.raises(AssertionError, match="already exists"):
            edit.param("extra", torch.ones(97))
    with edit.after(first):
        edit.replace(logits, edit.call(aten.add.Tensor, logits, first))
    program = edit.done(1, 1)
    assert program.params["extra"] is value
    assert "unread" not in program.params and unread not in program.main.nodes
    assert program.bytes() == one_layer().bytes() + 97 * 4
    verify(program, "test")


def test_unread_parameters_are_dropped() -> None:
    edit = one_layer().edit("test")
    edit.outputs(logits=None, hidden=edit[node_of(one_layer(), aten.embedding.default)])
    program = edit.done(1, 1)
    assert list(program.params) == ["model.embed_tokens.weight"]
    assert list(program.outputs) == ["hidden"]
    assert list(program.inputs) == ["input_ids", "position_ids"]  # inputs stay


def test_inputs_and_symbols() -> None:
    edit = one_layer().edit("test")
    batch = edit.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    first = edit.input("first", torch.float32, batch, "T", 3)
    second = edit.input("second", torch.int64, 1)
    assert [n.name for n in edit.graph.find_nodes(op="placeholder")] == ["input_ids", "position_ids", "first", "second"]
    sizes = first.meta["val"].shape
    assert str(sizes[0]) == str(batch) and str(sizes[1]) not in (str(batch), "3") and sizes[2] == 3
    assert second.meta["val"].dtype == torch.int64 and second.meta["pass"] == "test"


def test_refresh_follows_a_changed_shape() -> None:
    edit = one_layer().edit("test")
    head = edit[one_layer().outputs["logits"]]
    x = head.args[0]
    with edit.before(head):
        cut = edit.call(aten.slice.Tensor, x, 2, 0, 32)
        rows = edit.call(aten.narrow.default, cut, 1, 0, 1)
    head.update_arg(0, rows)
    edit.refresh(rows)
    assert head.meta["val"].shape[1] == 1
    verify(edit.done(1, 1), "test")


def test_dead_code() -> None:
    program = traced("llama")
    edit = program.edit("test")
    attention = edit[node_of(program, OPS.attention.default)]
    count = len(edit.graph.nodes)
    with edit.after(attention):
        first = edit.call(aten.relu.default, attention)
    with edit.after(first):
        edit.call(aten.neg.default, first)
    eliminate_dead(edit.graph)  # the second has no reader, and then the first has none
    assert first not in edit.graph.nodes and len(edit.graph.nodes) == count


def test_description_of_a_node() -> None:
    edit = one_layer().edit("test")
    bare = edit.input("bare", torch.int64, 1)
    assert (module_path(bare), source_line(bare), describe(bare)) == ("", "", "bare")
    bare.meta["stack_trace"] = '  File "/a/b/code.py", line 3, in f\n    x\n  File "/a/b/model.py", line 12, in forward\n    y = x + 1'
    assert (source_line(bare), describe(bare)) == ("model.py:12", "bare (model.py:12)")
    assert fake_mode(edit.graph) is edit.mode


def test_other_graphs_keep_their_parameters() -> None:
    """A parameter that only a second graph reads survives an edit of the main one."""
    program = one_layer()
    draft = torch.fx.Graph()
    weight = draft.get_attr("draft.weight")
    draft.output({"out": weight})
    program = program.replace(graphs={**program.graphs, "draft": draft}, params={**program.params, "draft.weight": torch.ones(3)})
    new = program.edit("test").done(1, 1)
    assert "draft.weight" in new.params
    assert torch.equal(run(new, {}, "draft")["out"], torch.ones(3))
    assert program.bytes() == one_layer().bytes() + 12

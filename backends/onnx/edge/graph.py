"""The graph of a language model with what a plain loop feeds and reads: masks are made inside, and outputs for drafters are gone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from planc.backends.onnx.build import live_nodes
from planc.runtime.errors import ArtifactError
from planc.runtime.rows import MASKED, bias_of

_FED = ("input_ids", "position_ids", "lengths", "logits_from")
_CONSTANTS = {
    "zero": np.int64(0),
    "one": np.int64(1),
    "first": np.array([0]),
    "rows": np.array([1]),
    "masked": MASKED,
    "seen": np.float32(0),
}


def plain(source: onnx.ModelProto) -> onnx.ModelProto:
    """input_ids [1,R], position_ids [1,R], lengths [1], logits_from [1]: int64, and the cache -> argmax [1,R'], logits [1,R',V], the cache.

    Rows are a chain. Raises ArtifactError[export-refused] where the graph wants an input of another kind.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    biases = [value.name for value in graph.input if value.name.startswith("bias")]
    nodes = [*(node for name in biases for node in _bias(name)), *graph.node]
    outputs = [value for value in graph.output if value.name in ("argmax", "logits") or value.name.startswith("present.")]
    live = live_nodes([*(_shared() if biases else ()), *nodes], [value.name for value in outputs])
    read = {name for node in live for name in node.input}
    constants = [numpy_helper.from_array(np.asarray(value), f"edge.{name}") for name, value in _CONSTANTS.items()]
    windows = [numpy_helper.from_array(np.int64(bias_of(name)[0]), f"edge.{name}.window") for name in biases]
    inputs = [value for value in graph.input if value.name in read and value.name not in biases]
    if odd := [value.name for value in inputs if value.name not in _FED and not value.name.startswith("past.")]:
        raise ArtifactError("export-refused", f"the graph reads {odd[0]!r}, which a plain loop does not know", fix="run it with planc")
    initializers = [tensor for tensor in (*graph.initializer, *constants, *windows) if tensor.name in read]
    for field, values in (("node", live), ("initializer", initializers), ("input", inputs), ("output", outputs)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    return model


def _node(kind: str, *values: str, **attributes: int) -> NodeProto:
    """Inputs, then the output."""
    *inputs, output = values
    return helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes)


def _shared() -> Iterator[NodeProto]:
    """Numbers of the keys [T] and slots of the rows [R,1], behind `lengths` cached tokens."""
    yield _node("Shape", "input_ids", "edge.count", start=1, end=2)
    yield _node("Add", "lengths", "edge.count", "edge.total")
    yield _node("Squeeze", "edge.total", "edge.first", "edge.end")
    yield _node("Range", "edge.zero", "edge.end", "edge.one", "edge.keys")
    yield _node("Squeeze", "lengths", "edge.first", "edge.start")
    yield _node("Range", "edge.start", "edge.end", "edge.one", "edge.slots")
    yield _node("Unsqueeze", "edge.slots", "edge.rows", "edge.slot")


def _bias(name: str) -> Iterator[NodeProto]:
    """The mask [1,1,R,T] of a chain, as `runtime.rows.key_bias` makes it."""
    own = f"edge.{name}"
    yield _node("Greater", "edge.keys", "edge.slot", f"{own}.future")
    hidden = f"{own}.future"
    if bias_of(name)[0]:
        yield _node("Sub", "edge.slot", f"{own}.window", f"{own}.last")
        yield _node("LessOrEqual", "edge.keys", f"{own}.last", f"{own}.past")
        yield _node("Or", hidden, f"{own}.past", f"{own}.hidden")
        hidden = f"{own}.hidden"
    yield _node("Where", hidden, "edge.masked", "edge.seen", f"{own}.matrix")
    yield _node("Unsqueeze", f"{own}.matrix", "edge.first", f"{own}.head")
    yield _node("Unsqueeze", f"{own}.head", "edge.first", name)

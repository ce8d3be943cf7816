"""A second view of an artifact's graph for batches: the rows of several sequences share every product, and each sequence attends alone.

GroupQueryAttention takes several rows of one sequence at a time only. So the graph gets a fixed number of *lanes*, one attention operator
each per layer: everything else runs over the rows of all sequences, packed behind each other, and `Gather` brings a lane its rows. The
weights are those of `model.onnx`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from planc.backends.onnx.build import live_nodes
from planc.backends.onnx.lower import MODEL_FILE
from planc.backends.onnx.packed import LANES_FILE

_ATTENTION, _ONE, _AXIS = "GroupQueryAttention", "lanes.one", "lanes.axis"
_ROWS, _PAST, _LAST, _TOTAL, _POSITIONS, _BIAS = (0, 1, 2), (3, 4), 5, 6, 9, 10  # inputs of the operator


def write_lanes(directory: Path, lanes: int) -> int:
    """Write `model_batch.onnx` beside `model.onnx`; returns the lanes written, 0 where an attention is not fused and so cannot be split."""
    source = onnx.load(str(directory / MODEL_FILE), load_external_data=False)
    pasts = {value.name for value in source.graph.input if value.name.startswith("past.")}
    fused = {name for node in source.graph.node if node.op_type == _ATTENTION for name in node.input}
    if not pasts or not pasts <= fused or all(value.name != "logits_from" for value in source.graph.input):
        return 0
    (directory / LANES_FILE).write_bytes(split_lanes(source, lanes).SerializeToString())
    return lanes


def split_lanes(source: onnx.ModelProto, lanes: int) -> onnx.ModelProto:
    """The graph with the interface of the lanes. N rows of all sequences, n rows of a lane with its padding, M rows with outputs.

    input_ids, position_ids [1,N]; lengths [lanes]; rows.L [n] the rows that lane L attends with; back [N] where each row's attention stands
    among those of all lanes; wanted [M]; past.i.key.L [1,heads,capacity,width]; bias.L [1,1,n,T] where trees are taken: int64, float32
    -> argmax [1,M], logits [1,M,V] ..., present.i.key.L
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    nodes = _counted(lanes)
    for node in source.graph.node:
        if node.op_type == _ATTENTION:
            nodes += _attend(node, lanes)
        elif "logits_from" in node.input:  # rows_from: any rows instead of the last ones
            nodes.append(helper.make_node("Gather", [node.input[0], "wanted"], list(node.output), name=node.name, axis=1))
        else:
            nodes.append(node)
    inputs = [value for old in source.graph.input for value in _input(old, lanes)]
    outputs = [value for old in source.graph.output for value in _output(old, lanes)]
    alive = live_nodes(nodes, [value.name for value in outputs])
    read = {name for node in alive for name in node.input}
    constants = [numpy_helper.from_array(np.array([1], np.int32), _ONE), numpy_helper.from_array(np.array([0], np.int64), _AXIS)]
    initializers = [tensor for tensor in (*source.graph.initializer, *constants) if tensor.name in read]
    for field, values in (("node", alive), ("initializer", initializers), ("input", inputs), ("output", outputs)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    return model


def _counted(lanes: int) -> list[NodeProto]:
    """Per lane, from its cached length and its rows: last key (seqlens_k [1]), keys (total_sequence_length) and positions."""
    nodes = [helper.make_node("Split", ["lengths"], [f"lengths.{lane}" for lane in range(lanes)], axis=0, num_outputs=lanes)]
    for lane in range(lanes):
        nodes += [
            helper.make_node("Shape", [f"rows.{lane}"], [f"count.{lane}"]),
            helper.make_node("Add", [f"lengths.{lane}", f"count.{lane}"], [f"long.{lane}"]),
            helper.make_node("Cast", [f"long.{lane}"], [f"keys.{lane}"], to=TensorProto.INT32),
            helper.make_node("Sub", [f"keys.{lane}", _ONE], [f"last.{lane}"]),
            helper.make_node("Squeeze", [f"keys.{lane}", _AXIS], [f"total.{lane}"]),
            helper.make_node("Gather", ["position_ids", f"rows.{lane}"], [f"position_ids.{lane}"], axis=1),
        ]
    return nodes


def _attend(node: NodeProto, lanes: int) -> list[NodeProto]:
    """One attention per lane, and their rows put back in the order of the packed ones."""
    sources = [(i, node.input[i]) for i in _ROWS if node.input[i]]
    nodes, parts = list[NodeProto](), list[str]()
    for lane in range(lanes):
        inputs = list(node.input)
        for i, name in sources:
            inputs[i] = f"{name}.lane{lane}"
            nodes.append(helper.make_node("Gather", [name, f"rows.{lane}"], [inputs[i]], axis=1))
        for i in (*_PAST, *(at for at in (_BIAS,) if at < len(inputs) and inputs[at])):
            inputs[i] += f".{lane}"
        if len(inputs) > _POSITIONS and inputs[_POSITIONS]:
            inputs[_POSITIONS] = f"position_ids.{lane}"  # of its rows, however the graph for one sequence chooses them
        inputs[_LAST], inputs[_TOTAL] = f"last.{lane}", f"total.{lane}"
        one = NodeProto()
        one.CopyFrom(node)
        one.name = f"{node.name}.{lane}"
        parts.append(f"{node.output[0]}.lane{lane}")
        del one.input[:], one.output[:]
        one.input.extend(inputs)
        one.output.extend([parts[-1], *(f"{name}.{lane}" for name in node.output[1:])])
        nodes.append(one)
    whole = f"{node.output[0]}.lanes"
    nodes.append(helper.make_node("Concat", parts, [whole], axis=1))
    nodes.append(helper.make_node("Gather", [whole, "back"], [node.output[0]], axis=1))
    return nodes


def _input(old: ValueInfoProto, lanes: int) -> list[ValueInfoProto]:
    kind, shape = old.type.tensor_type.elem_type, _shape(old)
    if old.name.startswith("past."):
        return [
            helper.make_tensor_value_info(f"{old.name}.{lane}", kind, [1, shape[1], f"slots.{lane}", shape[3]]) for lane in range(lanes)
        ]
    if old.name.startswith("bias"):
        return [
            helper.make_tensor_value_info(f"{old.name}.{lane}", kind, [1, 1, f"n.{lane}", f"{old.name}.T.{lane}"]) for lane in range(lanes)
        ]
    if old.name == "lengths":
        rows = [helper.make_tensor_value_info(f"rows.{lane}", TensorProto.INT64, [f"n.{lane}"]) for lane in range(lanes)]
        return [
            helper.make_tensor_value_info("lengths", kind, [lanes]),
            *rows,
            helper.make_tensor_value_info("back", TensorProto.INT64, ["N"]),
        ]
    if old.name == "logits_from":
        return [helper.make_tensor_value_info("wanted", kind, ["M"])]
    return [helper.make_tensor_value_info(old.name, kind, [1, "N", *shape[2:]])]


def _output(old: ValueInfoProto, lanes: int) -> list[ValueInfoProto]:
    kind, shape = old.type.tensor_type.elem_type, _shape(old)
    if old.name.startswith("present."):
        return [
            helper.make_tensor_value_info(f"{old.name}.{lane}", kind, [1, shape[1], f"slots.{lane}", shape[3]]) for lane in range(lanes)
        ]
    return [helper.make_tensor_value_info(old.name, kind, [1, "N" if old.name.startswith("tap") else "M", *shape[2:]])]


def _shape(value: ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

"""Program -> ONNX file(s) with one shared weight file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import helper
from torch.fx import Node

from planc.backends.onnx import fused, quantized, standard
from planc.backends.onnx.build import MICROSOFT, Builder, live_nodes, onnx_dtype, unsupported
from planc.backends.onnx.gates import gated
from planc.backends.onnx.weights import WeightFile
from planc.compiler.pipeline import dump
from planc.compiler.program import Program
from planc.compiler.units import find_units

OPSET = 21
_TABLES = {"fast": fused.TABLE, "standard": {**standard.TABLE, **quantized.STANDARD_TABLE}}
MODEL_FILE, WEIGHT_FILE, SKIP_FILE = "model.onnx", "model.weights", "skip.onnx"


def lower(program: Program, directory: Path, *, ops: Literal["fast", "standard"] = "fast", positions: int) -> Path:
    """Write `model.onnx` and `model.weights` into `directory`; `positions` is the longest position that the rotary tables must cover.

    Raises CompileError[lower-unsupported] naming the node that has no lowering.
    """
    with WeightFile(directory / WEIGHT_FILE) as weights:
        model, _ = build(program, weights, ops=ops, positions=positions)
    return _write(model, directory)


def lower_gated(
    program: Program, directory: Path, *, ops: Literal["fast", "standard"] = "fast", positions: int
) -> tuple[tuple[int, str], ...]:
    """The same, and beside it `skip.onnx`, with gates around its sublayers and the same weight file; layer and kind of every gate."""
    with WeightFile(directory / WEIGHT_FILE) as weights:
        model, values = build(program, weights, ops=ops, positions=positions)
    _write(model, directory)
    found = [(unit, str(values.get(unit.state)), str(values.get(unit.term))) for unit in find_units(program)]
    with_gates, units = gated(model, found)
    (directory / SKIP_FILE).write_bytes(with_gates.SerializeToString())
    return tuple((unit.layer, unit.kind) for unit in units)


def lower_forms(programs: Mapping[str, Program], directory: Path, *, ops: Literal["fast", "standard"] = "fast", positions: int) -> None:
    """Several forms of one model, each as NAME.onnx, over one weight file."""
    with WeightFile(directory / WEIGHT_FILE) as weights:
        for name, program in programs.items():
            model, _ = build(program, weights, ops=ops, positions=positions)
            (directory / f"{name}.onnx").write_bytes(model.SerializeToString())


def _write(model: onnx.ModelProto, directory: Path) -> Path:
    dump(4, lambda: "\n".join(f"    {n.name}: {', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in model.graph.node))
    path = directory / MODEL_FILE
    path.write_bytes(model.SerializeToString())
    return path


def build(
    program: Program, weights: WeightFile, *, ops: Literal["fast", "standard"], positions: int
) -> tuple[onnx.ModelProto, dict[Node, Any]]:
    """The ONNX model of the main graph and the value that each node became; large tensors go to `weights`."""
    builder = Builder(program, weights, positions)
    builder.fused = ops == "fast"
    inputs = []
    for name, node in program.inputs.items():
        builder.values[node] = name
        builder.bind_symbols(name, node)
        inputs.append(_info(name, node))
    table = _TABLES[ops]
    for node in program.main.nodes:
        if node.op != "call_function":
            continue
        _lower_node(builder, table, node)
    outputs = []
    for name, node in program.outputs.items():
        builder.nodes.append(helper.make_node("Identity", [builder[node]], [name], name=f"output/{name}"))
        outputs.append(_info(name, node))
    _rename_outputs(builder, [o.name for o in outputs])
    builder.nodes = live_nodes(builder.nodes, [o.name for o in outputs])
    graph = helper.make_graph(builder.nodes, program.info.name, inputs, outputs, _read(builder))
    used = {node.domain for node in builder.nodes}
    opsets = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(MICROSOFT, 1)] if MICROSOFT in used else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="planc"), builder.values


def _lower_node(builder: Builder, table: dict[Any, Any], node: Node) -> None:
    if str(node.target).startswith("aten.sym_") or (
        getattr(node.target, "__module__", "") == "_operator" and not hasattr(node.meta.get("val"), "dtype")
    ):
        return
    if node.target not in table:
        raise unsupported(node)
    builder.origin = node.name
    value = table[node.target](builder, node)
    if value is not None:
        builder.values[node] = value


def _rename_outputs(builder: Builder, names: list[str]) -> None:
    """Let the producing node carry the output's name instead of an Identity where the value is nobody's else."""
    produced = {out: node for node in builder.nodes for out in node.output}
    taken: dict[str, str] = {}
    kept = []
    for node in builder.nodes:
        if node.name.startswith("output/") and (source := node.input[0]) in produced and source not in taken:
            taken[source] = node.output[0]
        else:
            kept.append(node)
    for node in kept:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                if value in taken:
                    values[i] = taken[value]
    builder.nodes = kept


def _read(builder: Builder) -> list[onnx.TensorProto]:
    used = {name for node in builder.nodes for name in node.input}
    return [t for name, t in builder.initializers.items() if name in used]


def _info(name: str, node: Node) -> onnx.ValueInfoProto:
    value = node.meta["val"]
    shape = [s if isinstance(s, int) else str(s) for s in value.shape]
    return helper.make_tensor_value_info(name, onnx_dtype(value.dtype), shape)

"""Sublayers behind gates: the graph of a target that drafts for itself with some of its sublayers left out (papers/43).

Every unit becomes `If(gates[u]) {the unit} else {zeros}`, so any set can be chosen for any pass, without another session. The weights stay
where they are, in the file of the main graph. With all gates open the outputs are those of the main graph, but for sums that ONNX Runtime
fuses across the border of a unit. A unit that is left out passes its part of the cache on; past and present are the same buffer, so nothing
is copied and nothing written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import onnx
from onnx import NodeProto, TensorProto, helper

from planc.compiler.units import Unit
from planc.runtime.errors import CompileError

GATES = "gates"  #: the input: bool [units], whether each runs


def gated(model: onnx.ModelProto, units: Sequence[tuple[Unit, str, str]]) -> tuple[onnx.ModelProto, tuple[Unit, ...]]:
    """A copy of the model with gates, and the units that have one, in the order of the gates.

    `units` come with the ONNX values of their state and their term.

    Raises CompileError[pass-refused] when no unit can be gated.
    """
    new = onnx.ModelProto()
    new.CopyFrom(model)
    nodes = list(new.graph.node)
    regions = [(unit, state, term, _region(nodes, state, term)) for unit, state, term in units]
    regions = [part for part in regions if part[3]]
    if not regions:
        raise CompileError("pass-refused", "the layers do not add to a hidden state, so none can be left out", where="self_skip")
    moved = {i for _, _, _, region in regions for i in region}
    ends = {max(region): number for number, (_, _, _, region) in enumerate(regions)}
    del new.graph.node[:]
    for i, node in enumerate(nodes):
        if i in ends:
            number = ends[i]
            _, state, term, region = regions[number]
            new.graph.node.extend(_gate(number, state, term, [nodes[j] for j in sorted(region)]))
        elif i not in moved:
            new.graph.node.append(node)
    new.graph.input.append(helper.make_tensor_value_info(GATES, TensorProto.BOOL, [len(regions)]))
    return new, tuple(unit for unit, _, _, _ in regions)


def _region(nodes: Sequence[NodeProto], state: str, term: str) -> set[int]:
    """Indices of the nodes that only this unit needs: what leads to `term`, without what `state` needs or anybody else reads."""
    makers = {output: i for i, node in enumerate(nodes) for output in node.output if output}  # one that is not asked for has no name
    readers = defaultdict[str, set[int]](set)
    for i, node in enumerate(nodes):
        for name in node.input:
            readers[name].add(i)
    if term not in makers:
        return set()

    def behind(name: str) -> set[int]:
        found, stack = set[int](), [name]
        while stack:
            i = makers.get(stack.pop())
            if i is not None and i not in found:
                found.add(i)
                stack += nodes[i].input
        return found

    region = behind(term) - behind(state)
    while shared := {i for i in region if any(readers[o] - region for o in nodes[i].output if o != term)}:
        for i in shared:
            region -= {i}.union(*map(behind, nodes[i].input))
    return region if makers[term] in region else set()


def _gate(number: int, state: str, term: str, inside: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes that take a unit's place."""
    name = f"{GATES}/{number}"
    presents = [output for node in inside for output in node.output if output.startswith("present.")]
    results = [term, *presents]
    kept = [f"{name}/{output}" for output in results]
    skip = [
        helper.make_node("Shape", [state], [f"{name}/shape"], name=f"{name}/Shape"),
        helper.make_node("ConstantOfShape", [f"{name}/shape"], [kept[0]], name=f"{name}/ConstantOfShape"),  # float32 zeros
        *(
            helper.make_node("Identity", [f"past.{output.partition('.')[2]}"], [copy], name=f"{copy}/Identity")
            for output, copy in zip(presents, kept[1:], strict=True)
        ),
    ]
    run_graph = helper.make_graph(inside, f"{name}/run", [], [_float(result) for result in results])
    skip_graph = helper.make_graph(skip, f"{name}/skip", [], [_float(copy) for copy in kept])
    index = helper.make_node("Constant", [], [f"{name}/index"], name=f"{name}/Constant", value_int=number)
    gate = helper.make_node("Gather", [GATES, f"{name}/index"], [f"{name}/open"], name=f"{name}/Gather", axis=0)
    return [index, gate, helper.make_node("If", [f"{name}/open"], results, name=name, then_branch=run_graph, else_branch=skip_graph)]


def _float(name: str) -> onnx.ValueInfoProto:
    """A float32 value of any shape."""
    value = onnx.ValueInfoProto(name=name)
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    return value

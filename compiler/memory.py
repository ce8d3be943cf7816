"""Peak activation memory: what a program needs when it runs node by node and frees every tensor at its last use.

Two ways to the same number. `plan_memory` reads the graph alone. `run_counted` executes it with torch, counts the storages that are alive, and
must agree to the byte; that is how the planner is tested.

The inputs of the graph and its parameters are not counted: the caller holds the image whatever happens, and weights do not depend on the
schedule. A view shares the memory of what it views, and an activation function writes over its input where nobody else reads that, as every
runtime does that fuses it. Three more ways to save memory are options (`Allocation`), for not every runtime has them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import CONVOLUTIONS, OPS
from planc.compiler.program import Program

aten = torch.ops.aten

Kind = Literal["input", "compute", "product", "depthwise", "pointwise", "sum", "view", "concat"]

_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    operator.getitem,
}
#: Functions of one value at a time: of one tensor, or of several of the same shape.
POINTWISE = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.neg.default,
    aten.exp.default,
    aten.abs.default,
    aten.sqrt.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
}
_PRODUCTS = {*CONVOLUTIONS, aten.linear.default, aten.addmm.default, aten.mm.default}


class Allocation(BaseModel):
    """What the allocator can do, and how large an element is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inplace_depthwise: bool = Field(False, description="depthwise convolutions and sums write over an input that nobody reads afterwards")
    fuse_residual: bool = Field(False, description="the product in front of a residual sum is added to the other operand where that lies")
    place_concat: bool = Field(True, description="what is only concatenated is written to its place in the result at once")
    element_bytes: int | None = Field(None, ge=1, description="bytes of an element; left out: those of its type (1 plans for int8)")
    packed: bool = Field(False, description="codes of 4 or 2 bits lie two or four to a byte")


@dataclass(frozen=True)
class Op:
    """One operation: what it makes and reads. Free of any framework, so that a schedule can be planned before its graph is built."""

    name: str
    reads: tuple[str, ...]
    bytes: int
    kind: Kind = "compute"
    channel: int = 0  # bytes of one channel of a depthwise convolution's result


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a schedule, in bytes."""

    live: tuple[tuple[str, int], ...]  # operation -> bytes that are live while it runs
    workspace: int = 0  # largest channel that a depthwise convolution keeps aside while it writes over its input; not in `live`

    @property
    def peak(self) -> int:
        """The most that is ever live."""
        return max((size for _, size in self.live), default=0)

    @property
    def at(self) -> str:
        """The operation that needs the most."""
        return max(self.live, key=lambda entry: entry[1], default=("", 0))[0]


# ---- where values lie --------------------------------------------------------------------------------------------------------------


@dataclass
class _Placer:
    """Finds for every value the value in whose memory it lies (`home`); without one it has memory of its own."""

    ops: Sequence[Op]
    allocation: Allocation
    home: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {op.name: i for i, op in enumerate(self.ops)}
        self.readers: dict[str, list[int]] = {op.name: [] for op in self.ops}
        for i, op in enumerate(self.ops):
            for name in set(op.reads):
                self.readers[name].append(i)
        self.sharing: dict[str, list[str]] = {op.name: [op.name] for op in self.ops}  # root -> what lies in its memory

    def op(self, name: str) -> Op:
        return self.ops[self.index[name]]

    def root(self, name: str) -> str:
        while name in self.home:
            name = self.home[name]
        return name

    def put(self, name: str, where: str) -> None:
        self.sharing[self.root(where)] += self.sharing.pop(self.root(name))
        self.home[name] = where

    def free(self, name: str, at: int, but: Iterable[int] = ()) -> bool:
        """Does nobody behind operation `at`, the operations `but` aside, read the memory that `name` lies in?"""
        owner = self.root(name)
        if self.op(owner).kind in ("input", "concat"):
            return False
        return all(i <= at or i in but for member in self.sharing[owner] for i in self.readers[member])

    def run(self) -> dict[str, str]:
        if self.allocation.place_concat:
            for op in self.ops:
                if op.kind == "concat":
                    self._concat(op)
        for i, op in enumerate(self.ops):
            if op.name in self.home:
                continue
            if op.kind == "view":
                self.put(op.name, op.reads[0])
            elif op.kind == "product" and self.allocation.fuse_residual:
                self._accumulate(i, op)
            elif op.kind in ("pointwise", "sum", "depthwise"):
                one_operand = op.kind != "depthwise" and len({self.root(name) for name in op.reads}) == 1
                if one_operand or self.allocation.inplace_depthwise:
                    self._overwrite(i, op)
        return self.home

    def _concat(self, concat: Op) -> None:
        """Operands that nobody else reads lie in the result, with what only an activation function stands between."""
        for name in concat.reads:
            if self.op(name).kind in ("view", "input") or name in self.home or concat.reads.count(name) > 1:
                continue
            while len(self.readers[name]) == 1 and name not in self.home and self.op(name).kind not in ("view", "input"):
                self.put(name, concat.name)
                op = self.op(name)
                if op.kind != "pointwise" or len(op.reads) != 1:
                    break
                name = op.reads[0]

    def _overwrite(self, at: int, op: Op) -> None:
        for name in op.reads:
            if self.op(name).bytes >= op.bytes and self.free(name, at):
                self.put(op.name, name)
                return

    def _accumulate(self, at: int, op: Op) -> None:
        """op is read by one sum alone, whose other operand is there already and is needed for nothing else any more."""
        if len(self.readers[op.name]) != 1:
            return
        [then] = self.readers[op.name]
        total = self.ops[then]
        others = [name for name in total.reads if name != op.name]
        if total.kind != "sum" or len(others) != 1 or others[0] in op.reads:
            return
        skip = others[0]
        if self.index[skip] < at and self.op(skip).bytes == op.bytes and self.free(skip, at - 1, but=(then,)):
            self.put(op.name, skip)


def homes(ops: Sequence[Op], allocation: Allocation) -> dict[str, str]:
    """value -> the value in whose memory it lies, for all that have none of their own. In topological order, inputs first."""
    return _Placer(ops, allocation).run()


def plan_ops(ops: Sequence[Op], allocation: Allocation) -> MemoryPlan:
    """Live bytes at every operation of a schedule in topological order."""
    home = homes(ops, allocation)
    index = {op.name: i for i, op in enumerate(ops)}
    first, last = dict(index), dict(index)
    for i, op in enumerate(ops):
        for name in op.reads:
            last[name] = i
    for op in reversed(ops):  # a concatenation has its memory from its first operand on; nested ones are met outer first
        for name in op.reads if op.kind == "concat" else ():
            if home.get(name) == op.name:
                first[op.name] = min(first[op.name], _start(name, ops, index, home))
    buffers: dict[str, list[str]] = {}
    for op in ops:
        owner = op.name
        while owner in home:
            owner = home[owner]
        buffers.setdefault(owner, []).append(op.name)
    live = [0] * len(ops)
    for owner, members in buffers.items():
        if ops[index[owner]].kind == "input":
            continue
        sizes = [0] * (max(last[m] for m in members) + 1)
        for member in members:
            for i in range(first[member], last[member] + 1):
                sizes[i] = max(sizes[i], ops[index[member]].bytes)
        for i, size in enumerate(sizes):
            live[i] += size
    aside = [op.channel for op in ops if op.kind == "depthwise" and op.name in home]
    named = tuple((op.name, size) for op, size in zip(ops, live, strict=True) if op.kind != "input")
    return MemoryPlan(named, max(aside, default=0))


def _start(name: str, ops: Sequence[Op], index: Mapping[str, int], home: Mapping[str, str]) -> int:
    """When the memory of an operand of a concatenation is first written."""
    op = ops[index[name]]
    inside = [read for read in op.reads if home.get(read) == (name if op.kind == "concat" else home[name])]
    return min([index[name], *(_start(read, ops, index, home) for read in inside)])


# ---- programs ----------------------------------------------------------------------------------------------------------------------


def ops_of(program: Program, allocation: Allocation) -> list[Op]:
    """The main graph as operations; symbolic sizes, such as the batch, count as 1."""
    ops = []
    for node in program.main.nodes:
        if node.op == "output":
            ops.append(Op("output", _reads(node), 0))
        elif node.op == "placeholder" or (node.op == "call_function" and _tensors(node)):
            held: Any = node.args[0] if _is_half_a_crop(node) else node  # as long as a range is read, all of its source is kept
            while _is_half_a_crop(held):
                held = held.args[0]
            ops.append(Op(node.name, _reads(node), _bytes(held, allocation), kind_of(node), _channel(node, allocation)))
    return ops


def plan_memory(program: Program, allocation: Allocation | None = None) -> MemoryPlan:
    """Live bytes at every node of the main graph, in its order."""
    allocation = allocation or Allocation()
    return plan_ops(ops_of(program, allocation), allocation)


def kind_of(node: Node) -> Kind:
    """What an operation is to the allocator."""
    if node.op == "placeholder":
        return "input"
    if node.target in _VIEWS or _is_half_a_crop(node):
        return "view"
    if node.target is aten.cat.default and all(_reads_value(n) for n in node.args[0]) and len(set(node.args[0])) == len(node.args[0]):  # type: ignore[arg-type,union-attr]
        return "concat"
    if node.target in POINTWISE:
        shapes = {tuple(map(str, n.meta["val"].shape)) for n in node.all_input_nodes if _reads_value(n)}
        if shapes != {tuple(map(str, node.meta["val"].shape))}:
            return "compute"  # something is broadcast
        plain = node.target is aten.add.Tensor and len(_reads(node)) == 2 and not node.kwargs
        return "sum" if plain else "pointwise"
    if node.target is OPS.add_int8.default:
        return "sum"
    if is_depthwise(node):
        return "depthwise"
    return "product" if node.target in _PRODUCTS else "compute"


def _is_half_a_crop(node: Node) -> bool:
    """A range of one axis of which only a range of another is read: backends cut both at once."""
    return node.target is aten.slice.Tensor and len(node.users) == 1 and next(iter(node.users)).target is aten.slice.Tensor


def is_depthwise(node: Node) -> bool:
    """A convolution of every channel by itself."""
    if node.target not in CONVOLUTIONS:
        return False
    weight: Any = node.args[1]
    outputs, per_group = weight.meta["val"].shape[:2]
    return bool(per_group == 1 and outputs == node.args[6] and outputs > 1)


def _reads_value(node: Any) -> bool:
    return isinstance(node, Node) and node.op != "get_attr" and _tensors(node)


def _reads(node: Node) -> tuple[str, ...]:
    return tuple(source.name for source in node.all_input_nodes if _reads_value(source))


def _tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value))


def bits_of(node: Any) -> int:
    """Bits of one element: those that codes need, or those of the type."""
    if node.target in (OPS.quantize.default, OPS.conv2d_int8.default, OPS.add_int8.default):
        return next(b for b in (1, 2, 4, 8) if int(node.args[-1]) < 2**b)
    if node.meta["val"].dtype is not torch.uint8 or not node.all_input_nodes:
        return int(8 * node.meta["val"].element_size())
    return max(bits_of(source) for source in node.all_input_nodes)  # the same codes elsewhere


def _bytes(node: Node, allocation: Allocation) -> int:
    value = node.meta["val"]
    values = [value] if isinstance(value, Tensor) else list(value)
    if allocation.packed and isinstance(value, Tensor) and value.dtype is torch.uint8:
        return -(-_elements(value.shape) * bits_of(node) // 8)
    return sum(_elements(v.shape) * (allocation.element_bytes or v.element_size()) for v in values)


def _channel(node: Node, allocation: Allocation) -> int:
    if not is_depthwise(node):
        return 0
    value = node.meta["val"]
    return _elements(value.shape[2:]) * (allocation.element_bytes or value.element_size())


def _elements(shape: Iterable[Any]) -> int:
    total = 1
    for size in shape:
        total *= size if isinstance(size, int) else 1
    return total


# ---- execution ---------------------------------------------------------------------------------------------------------------------


class _Memory:
    """Values of a run and the storages behind them."""

    def __init__(self, element_bytes: int | None) -> None:
        self.values: dict[str, Any] = {}
        self.whole: dict[str, Tensor] = {}  # results of concatenations, from their first operand on
        self.inputs: set[int] = set()
        self.ranges: set[str] = set()  # values that are a part of another
        self.element_bytes = element_bytes

    def storages(self) -> dict[int, Any]:
        found = {}
        for value in (*self.values.values(), *self.whole.values()):
            for tensor in _each(value):
                storage = tensor.untyped_storage()
                if id_of(storage) not in self.inputs:
                    found[id_of(storage)] = (storage, tensor.element_size())
        return found

    def live(self) -> int:
        """Bytes of all storages but the inputs'."""
        return sum(s.nbytes() // size * (self.element_bytes or size) for s, size in self.storages().values())

    def shrink(self) -> None:
        """Give back what lies behind the last value in every storage."""
        needed: dict[int, int] = {}
        for name, value in (*self.values.items(), *self.whole.items()):
            for t in _each(value):
                if name in self.ranges:
                    needed[id_of(t.untyped_storage())] = int(t.untyped_storage().nbytes())
                    continue
                end = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
                key = id_of(t.untyped_storage())
                needed[key] = max(needed.get(key, 0), int(end) * t.element_size())
        for key, (storage, _) in self.storages().items():
            if needed[key] < storage.nbytes():
                storage.resize_(needed[key])


def _each(value: Any) -> Iterable[Tensor]:
    """The tensors of a value; a size is none."""
    return [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)]


def id_of(storage: Any) -> int:
    """Identity of a storage, not of the Python object around it."""
    return int(storage._cdata)


def run_counted(
    program: Program, inputs: Mapping[str, Tensor], allocation: Allocation | None = None
) -> tuple[dict[str, Tensor], MemoryPlan]:
    """Run the main graph as its memory was planned, and count: outputs by name, and the bytes that were live at every node."""
    allocation = allocation or Allocation()
    home = homes(ops_of(program, allocation), allocation)
    nodes = {node.name: node for node in program.main.nodes}
    pending = {node.name: len(node.users) for node in program.main.nodes}
    memory, live = _Memory(allocation.element_bytes), []
    with torch.no_grad():
        for node in program.main.nodes:
            if node.op == "placeholder":
                memory.values[node.name] = inputs[str(node.target)]
                memory.inputs.add(id_of(inputs[str(node.target)].untyped_storage()))
                continue
            if node.op == "get_attr":
                continue
            read = lambda n: program.params[str(n.target)] if n.op == "get_attr" else memory.values[n.name]  # noqa: E731
            if node.op == "output":
                live.append((node.name, memory.live()))
                return {name: read(value) for name, value in node.args[0].items()}, MemoryPlan(tuple(live))  # type: ignore[union-attr]
            if _is_half_a_crop(node):
                memory.ranges.add(node.name)
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), read)
            memory.values[node.name] = _settle(node, node.target(*args, **kwargs), home, memory, nodes)  # type: ignore[operator]
            if _tensors(node):
                live.append((node.name, memory.live()))
            for source in node.all_input_nodes:
                pending[source.name] -= 1
                if not pending[source.name]:
                    memory.values.pop(source.name, None)
            memory.shrink()
    raise AssertionError("graph without output")


def _settle(node: Node, made: Any, home: Mapping[str, str], memory: _Memory, nodes: Mapping[str, Node]) -> Any:
    """The result of a node where the plan says that it lies: an operation in place is done beside, and copied."""
    if not isinstance(made, Tensor) or kind_of(node) == "view":
        return made
    if kind_of(node) == "concat" and node.name in memory.whole:
        operands: Any = node.args[0]
        for operand in operands:
            if home.get(operand.name) != node.name:
                _part(node, operand, memory.whole[node.name]).copy_(memory.values[operand.name])
        whole = memory.whole.pop(node.name)
        assert torch.equal(whole, made) or bool(made.isnan().any()), f"{node.name} was not written to its place"
        return whole
    where = home.get(node.name)
    if where is None:
        return made.clone(memory_format=torch.contiguous_format)
    if where in memory.values:  # over a value that is there
        old = memory.values[where]
        place = old.as_strided(made.shape, torch.empty(made.shape, device="meta").stride(), old.storage_offset())
        place = old if old.shape == made.shape else place
    else:
        place = _slot(node, where, home, memory, nodes, made)
    return place.copy_(made)


def _slot(node: Node, where: str, home: Mapping[str, str], memory: _Memory, nodes: Mapping[str, Node], made: Tensor) -> Tensor:
    """The part of a concatenation that belongs to an operand; the whole is made when its first operand is."""
    concat, operand = nodes[where], node
    while operand not in concat.args[0]:  # type: ignore[operator]
        [operand] = operand.users  # an activation function between the two
    if where not in memory.whole:
        shape = [s if isinstance(s, int) else made.shape[i] for i, s in enumerate(concat.meta["val"].shape)]
        outer = home.get(where)
        new: Callable[[], Tensor] = lambda: made.new_full(shape, torch.nan if made.is_floating_point() else 0)  # noqa: E731
        memory.whole[where] = new() if outer is None else _slot(concat, outer, home, memory, nodes, made)
    return _part(concat, operand, memory.whole[where])


def _part(concat: Node, operand: Node, whole: Tensor) -> Tensor:
    """Where an operand lies in the result."""
    dim = int(concat.args[1]) if len(concat.args) > 1 else 0  # type: ignore[arg-type]
    sizes = [int(n.meta["val"].shape[dim]) for n in concat.args[0]]  # type: ignore[union-attr]
    at = list(concat.args[0]).index(operand)  # type: ignore[arg-type]
    return whole.narrow(dim, sum(sizes[:at]), sizes[at])

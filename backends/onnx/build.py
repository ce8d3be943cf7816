"""Builds an ONNX graph from a Program: names, constants, shapes. What each op becomes stands in `aten` and `fused` / `standard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch.fx import Node

from planc.backends.onnx.weights import WeightFile
from planc.compiler.program import Program, describe
from planc.runtime import entropy
from planc.runtime.errors import CompileError

MICROSOFT = "com.microsoft"
_INLINE = 256  # constants up to this many elements stay inside the graph file

Lowering = Callable[["Builder", Node], "str | tuple[str, ...] | None"]


class Builder:
    """State of one lowering: the nodes so far and, for each FX node, the ONNX value it became."""

    def __init__(self, program: Program, weights: WeightFile, positions: int) -> None:
        self.program, self.weights, self.positions = program, weights, positions
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.values: dict[Node, Any] = {}
        self.flat: dict[Any, str] = {}  # FX node [B,R,H,D] -> its value as [B,R,H*D]
        self.rows: dict[Any, tuple[str, str]] = {}  # FX node -> its rows in int8 and their scales
        self._constants: dict[Any, str] = {}
        self._cache: dict[Any, str] = {}
        self._symbols: dict[str, tuple[str, int]] = {}
        self._count = 0
        self.origin = ""
        self.fused = True

    # values

    def __getitem__(self, node: Any) -> str:
        """The ONNX value of an FX node, or a constant for a number."""
        if not isinstance(node, Node):
            return self.const(node)
        if node.op == "get_attr" and node not in self.values:
            self.values[node] = self.param(str(node.target))
        if node not in self.values and node.target is torch.ops.aten.sym_size.int:
            self.values[node] = self.scalar(self.size(node.meta["val"]))
        value = self.values[node]
        assert isinstance(value, str), f"{node} has several values"
        return value

    def op(self, kind: str, *inputs: Any, domain: str = "", outputs: int = 1, unused: tuple[int, ...] = (), **attributes: Any) -> Any:
        """Append a node; inputs are ONNX names, FX nodes, numbers or None. One output gives a name, several a tuple, `unused` ones empty."""
        self._count += 1
        base = f"{self.origin or kind}.{self._count}"
        names = [base] if outputs == 1 else ["" if i in unused else f"{base}.{i}" for i in range(outputs)]
        feeds = ["" if i is None else i if isinstance(i, str) else self[i] for i in inputs]
        while feeds and not feeds[-1]:
            feeds.pop()
        attributes = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(kind, feeds, names, name=f"{base}/{kind}", domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """The value under `key`, made at the first call."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def const(self, value: Any, dtype: Any = None) -> str:
        """A small constant; equal ones are shared."""
        if dtype is None and isinstance(value, float):
            dtype = np.float32
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tensor(f"const.{len(self._constants)}", array)
        return self._constants[key]

    def tensor(self, name: str, array: np.ndarray) -> str:
        """An initializer; large ones go to the weight file."""
        if name not in self.initializers:
            inline = array.size <= _INLINE
            self.initializers[name] = onnx.numpy_helper.from_array(array, name) if inline else self.weights.tensor(name, array)
        return name

    def param(self, name: str, change: Callable[[np.ndarray], np.ndarray] | None = None, suffix: str = "") -> str:
        """A parameter of the program, optionally changed (`suffix` names the changed form)."""
        full = name + suffix
        if full not in self.initializers:
            array = self.array(name)
            self.tensor(full, array if change is None else change(array))
        return full

    def coded(self, node: Node, *, transposed: bool = False) -> str:
        """The value of a decode_bf16, or its transpose, as an initializer that the engine decodes when it opens the graph."""
        source, rows, columns = node.args
        assert isinstance(source, Node) and isinstance(rows, int) and isinstance(columns, int)
        name = f"{source.target}.T" if transposed else str(source.target)
        if name not in self.initializers:
            container = entropy.transposed(self.array(str(source.target))) if transposed else self.array(str(source.target))
            self.initializers[name] = self.weights.coded(name, container, (columns, rows) if transposed else (rows, columns))
        return name

    def array(self, name: str) -> np.ndarray:
        """A parameter as numpy."""
        return self.program.params[name].detach().cpu().numpy()

    # shapes

    def bind_symbols(self, name: str, node: Node) -> None:
        """Remember which input dimension each symbolic size can be read from."""
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int):
                self._symbols.setdefault(str(size), (name, axis))

    def size(self, size: Any) -> str:
        """A symbolic size as an int64 tensor [1]."""
        if isinstance(size, int):
            return self.const([size], np.int64)
        text = str(size)
        if text in self._symbols:
            name, axis = self._symbols[text]
            return self.once(("dim", name, axis), lambda: self.op("Shape", name, start=axis, end=axis + 1))
        factors = text.split("*")
        if len(factors) == 2 and all(f in self._symbols or f.isdigit() for f in factors):
            parts = [self.const([int(f)], np.int64) if f.isdigit() else self.size_named(f) for f in factors]
            return self.once(("product", text), lambda: self.op("Mul", *parts))
        raise CompileError("lower-unsupported", f"the size {text} cannot be computed from the inputs", fix="use the reference backend")

    def size_named(self, symbol: str) -> str:
        """A bare symbol as an int64 tensor [1]."""
        name, axis = self._symbols[symbol]
        return self.once(("dim", name, axis), lambda: self.op("Shape", name, start=axis, end=axis + 1))

    def scalar(self, value: str) -> str:
        """[1] -> scalar."""
        return self.once(("scalar", value), lambda: self.op("Squeeze", value, self.const([0], np.int64)))

    def reshape(self, value: str, old: torch.Size, new: torch.Size) -> str:
        """Reshape; sizes that stay in place are copied by ONNX itself, so that a common reshape costs one node."""
        if tuple(map(str, old)) == tuple(map(str, new)):
            return value
        target: list[Any] = []
        for axis, size in enumerate(new):
            same = axis < len(old) and str(old[axis]) == str(size)
            target.append(size if isinstance(size, int) else 0 if same else size)
        unknown = [i for i, s in enumerate(target) if not isinstance(s, int)]
        if len(unknown) == 1:
            target[unknown[0]] = -1
            unknown = []
        if not unknown:
            return self.op("Reshape", value, self.const(target, np.int64))
        parts = [self.const([s], np.int64) if isinstance(s, int) else self.size(s) for s in new]
        wanted = self.once(("shape", tuple(map(str, new))), lambda: self.op("Concat", *parts, axis=0))
        return self.op("Reshape", value, wanted)

    def dtype(self, node: Node) -> int:
        """ONNX element type of a node."""
        return onnx_dtype(node.meta["val"].dtype)


def live_nodes(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Nodes that an output needs, in order."""
    needed, live = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(filter(None, node.input))
    return live[::-1]


def onnx_dtype(dtype: torch.dtype) -> int:
    """ONNX element type of a torch dtype."""
    return int(
        {
            torch.float32: TensorProto.FLOAT,
            torch.float16: TensorProto.FLOAT16,
            torch.float64: TensorProto.DOUBLE,
            torch.int64: TensorProto.INT64,
            torch.int32: TensorProto.INT32,
            torch.bool: TensorProto.BOOL,
            torch.int8: TensorProto.INT8,
            torch.uint8: TensorProto.UINT8,
            torch.bfloat16: TensorProto.BFLOAT16,
        }[dtype]
    )


def unsupported(node: Node, why: str = "") -> CompileError:
    """The error for an op without lowering."""
    return CompileError(
        "lower-unsupported",
        f"{node.target} has no lowering to ONNX" + (f": {why}" if why else ""),
        node=describe(node),
        fix="use `target: {backend: reference}`, or add the op to backends/onnx",
    )

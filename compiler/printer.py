"""Programs as text: stable names, type and shape on each line, sorted, no addresses. What golden tests and dumps show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.program import Program

_TYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "b1",
}


def show(program: Program) -> str:
    """The whole program, one node per line; symbolic sizes are renamed in order of appearance (B, R, then S1 ..)."""
    names: dict[str, str] = {}
    lines = []
    for title, graph in program.graphs.items():
        lines.append(f"graph {title}:")
        lines += ["  " + _line(node, names) for node in graph.nodes]
    return "\n".join(lines) + "\n"


def _line(node: Node, names: dict[str, str]) -> str:
    if node.op == "output":
        return "return " + ", ".join(f"{name}=%{value.name}" for name, value in node.args[0].items())
    head = f"%{node.name}: {_type(node.meta.get('val'), names)}"
    if node.op == "placeholder":
        return f"{head} = input {node.target}"
    if node.op == "get_attr":
        return f"{head} = param {node.target}"
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in sorted(node.kwargs.items())]
    made = f"  # {node.meta['pass']}" if "pass" in node.meta else ""
    return f"{head} = {_target(node)}({', '.join(arguments)}){made}"


def _target(node: Node) -> str:
    name = str(node.target).removesuffix(".default")
    return name if not name.startswith("<") else getattr(node.target, "__name__", name)


def _argument(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_argument, value)) + "]"
    if isinstance(value, torch.dtype):
        return _TYPES.get(str(value).removeprefix("torch."), str(value))
    return repr(value)


def _type(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_TYPES.get(dtype, dtype)}[{', '.join(_size(s, names) for s in value.shape)}]"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_type(v, names) for v in value) + ")"
    return _size(value, names) if isinstance(value, torch.SymInt) else "?"


def _size(size: Any, names: dict[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    text = str(size)
    if "*" in text:
        return "*".join(names.get(part, part) for part in text.split("*"))
    if text not in names:
        names[text] = "BR"[len(names)] if len(names) < 2 else f"S{len(names) - 1}"
    return names[text]

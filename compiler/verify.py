"""The verifier: what a Program must satisfy after every pass. Run by the pipeline, on by default."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import NAMESPACE
from planc.compiler.program import Program, describe, fake_mode
from planc.runtime.errors import CompileError

_Basis = tuple[Any, Any, list[Any]]  # operation, constants, recorded values (compared by identity)


def verify(program: Program, after: str, outputs: tuple[str, ...] = ()) -> None:
    """Check every graph: well-formed, only known operations, parameters present and of the recorded shape, shapes that follow from the inputs,
    and `outputs` still there.

    Raises CompileError[verify-failed] naming the pass and the node.
    """
    for graph in program.graphs.values():
        try:
            graph.lint()
        except RuntimeError as error:
            raise _broken(after, str(error)) from error
        for node in graph.nodes:
            if node.op == "output":
                continue
            _check_node(program, node, after)
            if node.op == "call_function" and not _same(basis := _basis(node), node.meta.get("checked")):
                _check_value(node, after)
                node.meta["checked"] = basis
    if missing := [name for name in outputs if name not in program.outputs]:
        raise _broken(after, f"the outputs {', '.join(missing)} are gone")


def _check_node(program: Program, node: Node, after: str) -> None:
    if node.op in ("get_attr", "placeholder") and not isinstance(node.meta.get("val"), Tensor):
        raise _broken(after, f"{node.target} has no recorded shape", node)
    if node.op == "get_attr":
        if (value := program.params.get(str(node.target))) is None:
            raise _broken(after, f"the parameter {node.target} is missing", node)
        if tuple(value.shape) != tuple(node.meta["val"].shape) or value.dtype != node.meta["val"].dtype:
            raise _broken(after, f"the parameter {node.target} is {_text(value)}, the graph expects {_text(node.meta['val'])}", node)
    elif node.op == "call_function":
        space = getattr(node.target, "namespace", None)
        if space not in ("aten", NAMESPACE) and getattr(node.target, "__module__", "") != operator.getitem.__module__:
            raise _broken(after, f"{node.target} is neither ATen nor dialect", node)
    elif node.op != "placeholder":
        raise _broken(after, f"a node of kind {node.op} is not allowed", node)


def _basis(node: Node) -> _Basis:
    """What the check of a node depends on: the operation, its constants, and its inputs' and its own recorded values.

    Passes copy most nodes as they are, so that a program costs little to check again after each: only what differs is computed.
    """
    values = [node.meta.get("val")]

    def leave_out(source: Node) -> None:
        values.append(source.meta.get("val"))

    return node.target, torch.fx.node.map_arg((node.args, node.kwargs), leave_out), values


def _same(new: _Basis, old: _Basis | None) -> bool:
    if old is None or new[:2] != old[:2] or len(new[2]) != len(old[2]):
        return False
    return all(a is b for a, b in zip(new[2], old[2], strict=True))


def _check_value(node: Node, after: str) -> None:
    """The fake value of a node from its inputs' fake values must agree with what the pass recorded."""
    recorded = node.meta.get("val")
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    try:
        with fake_mode(node.graph):
            value = node.target(*args, **kwargs)
    except Exception as error:
        raise _broken(after, f"its inputs do not fit: {str(error).splitlines()[0]}", node) from error
    if isinstance(value, Tensor) and (not isinstance(recorded, Tensor) or _rank(value) != _rank(recorded)):
        raise _broken(after, f"computes {_text(value)}, the pass recorded {_text(recorded)}", node)


def _rank(value: Tensor) -> tuple[Any, ...]:
    """Type, rank and static sizes; symbols may be renamed by data-dependent operations."""
    return (value.dtype, tuple(s if isinstance(s, int) else None for s in value.shape))


def _text(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _broken(after: str, message: str, node: Node | None = None) -> CompileError:
    fix = f"this is a bug in the pass; switch it off with --disable {after} and report it"
    return CompileError(
        "verify-failed", f"after {after}: {message}", node=describe(node) if node is not None else None, where=f"pass {after}", fix=fix
    )

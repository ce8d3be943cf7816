"""PyTorch model -> Program: `torch.export` of the forward without cache, attention captured as one opaque op, helper nodes cleaned away."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, Node

from planc.compiler import dialect
from planc.compiler.program import MAIN, ModelInfo, Program, eliminate_dead
from planc.runtime.errors import CompileError, ModelError

_HOOK = "planc"
_ATEN = torch.ops.aten


class _Forward(nn.Module):
    """A causal language model as a function of ids and positions, without cache: the form that is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        known = inspect.signature(model.forward).parameters
        self.extra = {"use_cache": False} if "use_cache" in known else {}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        out = self.model(input_ids=input_ids, position_ids=position_ids, **self.extra)
        return {"logits": out.logits if hasattr(out, "logits") else out}


def _attention_hook(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> tuple[Tensor, None]:
    """transformers' attention interface: q [B,H,R,D], k and v [B,G,R,D] -> [B,R,H,D]."""
    scaling = kw.get("scaling")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    causal = kw.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    window, softcap = int(kw.get("sliding_window") or 0), float(kw.get("softcap") or 0.0)
    if kw.get("s_aux") is not None:
        raise NotImplementedError("attention sinks (s_aux)")
    bias = kw.get("position_bias")
    out = dialect.attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, scale, causal, window, softcap)
    return out, None


@contextmanager
def _captured_attention(model: nn.Module) -> Iterator[None]:
    """While active, the model's attention calls go to `planc::attention` and no masks are built."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_HOOK, _attention_hook)
    AttentionMaskInterface.register(_HOOK, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_HOOK)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def trace(model: nn.Module, info: ModelInfo) -> Program:
    """Trace a causal language model of transformers. Inputs of the program: input_ids and position_ids [B,R] int64; output: logits [B,R,V].

    Raises ModelError[model-unsupported] when the model has no attention hook and CompileError[trace-failed] when export fails.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise ModelError(
            "model-unsupported",
            f"{type(model).__name__} is not a transformers model, so its attention cannot be captured",
            fix="use trace_module",
        )
    training = model.training
    forward = _Forward(model).eval()
    ids = torch.arange(14).reshape(2, 7) % info.vocab_size
    positions = torch.arange(7)[None].repeat(2, 1)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        with _captured_attention(model):
            exported = torch.export.export(forward, (ids, positions), dynamic_shapes=(sizes, sizes), strict=False)
    except Exception as error:
        raise CompileError(
            "trace-failed",
            f"{type(model).__name__} could not be traced: {str(error).splitlines()[0]}",
            where="torch.export",
            fix=_hint(error),
        ) from error
    finally:
        model.train(training)
    return _program(exported, info, "model.")


#: Operations whose shape functions know no symbolic batch: a model with one of them takes an image at a time.
_FIXED_BATCH = {_ATEN.upsample_bilinear2d.vec, _ATEN.upsample_bicubic2d.vec}


class _Images(nn.Module):
    """An image classifier as a function of its pixels: the form that is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        out = self.model(images)
        return {"logits": out.logits if hasattr(out, "logits") else out}


def trace_classifier(model: nn.Module, shape: tuple[int, ...], info: ModelInfo) -> Program:
    """Trace an image classifier. Input of the program: images [B, *shape] float32; output: logits [B,N]. B is dynamic where the model allows it.

    Raises CompileError[trace-failed] when export fails, or when the output is not [B,N].
    """
    forward = _Images(model).eval()
    hooked = next((m for m in model.modules() if hasattr(m, "set_attn_implementation")), None)
    try:
        with _captured_attention(hooked) if hooked is not None else nullcontext():
            exported = torch.export.export(forward, (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim.AUTO},), strict=False)
            if any(n.target in _FIXED_BATCH for n in exported.graph.nodes):
                exported = torch.export.export(forward, (torch.zeros(1, *shape),), strict=False)
        if any(n.op == "call_function" and getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in exported.graph.nodes):
            exported = exported.run_decompositions({})  # writes in place become new values; every other operation stays what it is
    except Exception as error:
        message = f"{type(model).__name__} could not be traced on images {list(shape)}: {str(error).splitlines()[0]}"
        raise CompileError("trace-failed", message, where="torch.export", fix=_hint(error)) from error
    program = _program(exported, info, "model.")
    if program.outputs["logits"].meta["val"].dim() != 2:
        found = list(program.outputs["logits"].meta["val"].shape)
        raise CompileError(
            "trace-failed", f"a classifier returns [images, classes], {type(model).__name__} returned {found}", where="torch.export"
        )
    return program


def trace_module(module: nn.Module, inputs: tuple[Tensor, ...], info: ModelInfo, dynamic: Any = None) -> Program:
    """Trace any module on example inputs; inputs keep the parameter names of `forward`, outputs are `output` or `output.i`."""
    try:
        exported = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise CompileError("trace-failed", f"{type(module).__name__}: {str(error).splitlines()[0]}", fix=_hint(error)) from error
    return _program(exported, info, "")


def _hint(error: Exception) -> str:
    text = str(error)
    if "data-dependent" in text or "GuardOnDataDependent" in text:
        return "the forward branches on tensor values; make that branch a torch.where or a fixed choice"
    return "the cause is chained below; the forward must be exportable by torch.export (non-strict)"


def _program(exported: ExportedProgram, info: ModelInfo, prefix: str) -> Program:
    signature = exported.graph_signature
    lifted: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values = {**exported.state_dict, **exported.constants}
    graph = Graph()
    copies: dict[Node, Any] = {}
    params: dict[str, Tensor] = {}
    for node in exported.graph.nodes:
        if node.op == "output":
            names = _output_names(exported)
            graph.output(dict(zip(names, (copies[n] for n in node.args[0]), strict=True)))
        elif node.op == "placeholder" and node.name in lifted:
            source = lifted[node.name]
            params[source.removeprefix(prefix)] = values[source].detach()
            copies[node] = graph.get_attr(source.removeprefix(prefix))
            copies[node].meta = dict(node.meta)
        else:
            _copy_inlined(exported.graph_module, node, graph, copies)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = node.name
    _clean(graph)
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    return Program({MAIN: graph}, {k: v for k, v in params.items() if k in used}, info)


def _output_names(exported: ExportedProgram) -> list[str]:
    spec = exported.call_spec.out_spec
    if spec is not None and spec.type is dict:
        return [str(k) for k in spec.context]
    count = len(exported.graph_signature.user_outputs)
    return ["output"] if count == 1 else [f"output.{i}" for i in range(count)]


def _copy_inlined(owner: Any, node: Node, graph: Graph, copies: dict[Node, Any]) -> None:
    """Copy a node; regions that only switch gradients or autocast off are inlined."""
    if node.op == "get_attr" and isinstance(inner := getattr(owner, str(node.target), None), torch.fx.GraphModule):
        copies[node] = inner
        return
    name = getattr(node.target, "__name__", "")
    if node.op == "call_function" and name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        at = next(i for i, a in enumerate(node.args) if isinstance(a, Node) and isinstance(copies.get(a), torch.fx.GraphModule))
        inner = copies[node.args[at]]
        arguments = iter(node.args[at + 1 :])
        local: dict[Node, Any] = {}
        for sub in inner.graph.nodes:
            if sub.op == "placeholder":
                value = next(arguments)
                local[sub] = copies[value] if isinstance(value, Node) else value
            elif sub.op == "output":
                copies[node] = [local[n] for n in sub.args[0]]
            else:
                _copy_inlined(inner, sub, graph, local)
        return
    if name == "getitem" and isinstance(copies.get(node.args[0]), list):
        copies[node] = copies[node.args[0]][node.args[1]]
        return
    copies[node] = graph.node_copy(node, lambda n: copies[n])


def _clean(graph: Graph) -> None:
    """Drop assertions, no-op casts, copies, full slices and no-op dropouts, so that patterns see only arithmetic."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        if target in (_ATEN._assert_tensor_metadata.default, _ATEN._assert_scalar.default, _ATEN.sym_constrain_range_for_size.default):
            graph.erase_node(node)
        elif _is_noop(node):
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            graph.erase_node(node)
    eliminate_dead(graph)


_CASTS = {
    _ATEN.to.dtype,
    _ATEN.to.device,
    _ATEN.to.dtype_layout,
    _ATEN.to.other,
    _ATEN.type_as.default,
    _ATEN._to_copy.default,
    _ATEN.contiguous.default,
    _ATEN.clone.default,
}
_CASTS |= {_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh_copy.default, _ATEN.detach_.default, _ATEN.expand.default}


def _is_noop(node: Node) -> bool:
    if node.target in (_ATEN.dropout.default,):
        return node.args[2] is False or node.args[1] == 0.0
    if node.target is _ATEN.slice.Tensor:
        start, end = (list(node.args[2:4]) + [None, None])[:2]
        step = node.args[4] if len(node.args) > 4 else 1
        return start in (0, None) and (end is None or (isinstance(end, int) and end >= 2**62)) and step == 1
    if node.target in _CASTS:
        old, new = node.args[0].meta.get("val"), node.meta.get("val")
        return isinstance(old, Tensor) and isinstance(new, Tensor) and old.dtype == new.dtype and old.shape == new.shape
    return False

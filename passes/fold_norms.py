"""Fold the scales of norms into the products that read them, so that the hidden state may be rotated.

Matches   linear(rms_norm(x, g), W)             Produces  linear(rms_norm(x, 1), W diag(g))
          linear(layer_norm(x, g, b), W, c)               linear(rms_norm(x, 1), W diag(g), c + W b); all that writes x loses its mean over
                                                          the channels, so that nothing is left for the norm to subtract
Keeps     every output up to rounding; where a head shares its weights with the embedding, the scale in front of it (RMSNorm), or gives them up
          (LayerNorm)
Refuses   norms behind a sublayer (Gemma 2 and 3) or behind the sum (BERT); models that mix both kinds of norm
Paper     86 SliceGPT, section 3: computational invariance
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import OPS
from planc.compiler.passbase import EXACT, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, Program, describe
from planc.compiler.residual import Norm, find_states, tied
from planc.runtime.errors import CompileError

aten = torch.ops.aten


class FoldNorms(Pass):
    """Norms without scale, shift and mean: their products take all of it; demanded by `slice`."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    conflicts: ClassVar[tuple[str, ...]] = ("fold_norms",)
    after: ClassVar[tuple[str, ...]] = ("skip_layers", "prune", "realise")

    @property
    def effect(self) -> Effect:
        """The same function, rounded elsewhere."""
        return EXACT

    def apply(self, program: Program, context: Context) -> Program:
        """Norm by norm, and once all writers."""
        if any(c.pass_name == self.key for c in program.history):
            return program
        states = find_states(program)
        norms = [norm for state in states for norm in state.norms]
        centred = {norm.node.target for norm in norms} == {aten.layer_norm.default}
        if not centred and any(norm.node.target is aten.layer_norm.default for norm in norms):
            raise CompileError("residual-form", "the model mixes LayerNorm with RMSNorm", where=f"pass {self.key}")
        shared, edit = tied(states) if not centred else {}, program.edit(self.key)
        done = 0
        for norm in norms:
            if not any(str(p.args[1].target) in shared for p in norm.products):  # type: ignore[union-attr]
                _fold(edit, norm)
                done += 1
        if centred:
            for state in states:
                for writer in state.writers:
                    _centre(edit, edit[writer])
        return edit.done(len(norms), done)


def _fold(edit: Editor, norm: Norm) -> None:
    node = edit[norm.node]
    if node.target is OPS.rms_norm.default:
        x, gain, shift, eps = node.args[0], node.args[1], None, node.args[2]
    else:
        x, gain, shift, eps = (*(a for i, a in enumerate((*node.args, None, None, 1e-5)[:5]) if i != 1),)
    scale, offset = (None if a is None else edit.params[str(a.target)].double() for a in (gain, shift))  # type: ignore[union-attr]
    for product in map(edit.__getitem__, norm.products):
        weight = _own(edit, product)
        if offset is not None and bool((offset != 0).any()):
            edit.add_bias(product, weight.double() @ offset, "+b")
        if scale is not None:
            edit.swap(product, 1, (weight.double() * scale).to(weight.dtype), "*g")
    with edit.before(node):
        width, dtype = int(node.meta["val"].shape[-1]), node.meta["val"].dtype
        plain = edit.call(OPS.rms_norm.default, x, edit.param(f"{_name(node)}=1", torch.ones(width, dtype=dtype)), eps)
    edit.replace(node, plain)


def _centre(edit: Editor, writer: Node) -> None:
    """Take the mean over the channels from what a node writes."""
    if writer.target is aten.embedding.default:
        table = edit.params[str(writer.args[0].target)]  # type: ignore[union-attr]
        edit.swap(writer, 0, _without_mean(table, 1), "-m")
        return
    edit.swap(writer, 1, _without_mean(_own(edit, writer), 0), "-m")
    if len(writer.args) > 2 and writer.args[2] is not None:
        edit.swap(writer, 2, _without_mean(edit.params[str(writer.args[2].target)], 0), "-m")  # type: ignore[union-attr]


def _without_mean(value: Tensor, axis: int) -> Tensor:
    wide = value.double()
    return (wide - wide.mean(axis, keepdim=True)).to(value.dtype)


def _own(edit: Editor, product: Node) -> Tensor:
    """A product's weight; an embedding may share it, another product may not."""
    node = product.args[1]
    assert isinstance(node, Node)
    if sum(user.target is aten.linear.default for user in node.users) > 1:
        raise CompileError("residual-form", "two products share their weight", node=describe(product), fix="leave this model as it is")
    return edit.params[str(node.target)]


def _name(node: Node) -> str:
    """What the norm's parameter is called, or the node where it has none."""
    return str(next((a.target for a in node.args[1:] if isinstance(a, Node)), node.name))

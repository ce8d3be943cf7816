"""Rotate the hidden state into the basis of its principal components and cut the small ones off (SliceGPT).

Matches   the residual stream of a decoder whose norms carry no scale (see fold_norms)
Produces  embeddings, products, biases and norms over d of D channels: W_in Q for what reads, Q^T W_out for what writes, Q orthogonal;
          `bases: layer`: one Q per sublayer, and a product with Q_j^T Q_k on the way past the sublayer from the basis j into the basis k;
          a head that shares its weights with the embedding stays shared: x Q_k^T diag(g) Q_0 comes in front of it
Keeps     the function up to rounding at sparsity 0; a cut program computes what the whole one would if every value of the hidden state were
          projected onto what is kept
Refuses   what fold_norms refuses; a width that nothing would be left of
Paper     86 SliceGPT (Ashkboos et al. 2024). One basis for all (`bases: one`) needs no product past the sublayers, which in small models cost more
          than the cut saves; it is taken from values scaled to the same length, as the norms see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.fx import Node

from planc.compiler.calibration import Gram, NormedGram, calibration_text, collect, collect_in_turn
from planc.compiler.passbase import CHANGES, Context, Effect, Pass, Stage
from planc.compiler.program import Editor, Program
from planc.compiler.residual import Norm, State, find_states, tied
from planc.runtime.errors import CompileError

aten = torch.ops.aten


class Slice(Pass):
    """Narrow the hidden state to its principal components."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    conflicts: ClassVar[tuple[str, ...]] = ("slice",)
    demands: ClassVar[tuple[str, ...]] = ("fold_norms",)
    after: ClassVar[tuple[str, ...]] = ("fold_norms", "skip_layers", "prune", "realise")
    calibrates: ClassVar[bool] = True
    sparsity: float = Field(default=0.1, ge=0.0, lt=1.0, description="share of the channels of the hidden state that is cut off")
    bases: Literal["one", "layer"] = Field(
        default="one", description="one: the same basis everywhere; layer: one per sublayer, with a product where the basis changes"
    )
    directions: Literal["principal", "channels"] = Field(
        default="principal",
        description="channels: cut the channels themselves that have the least energy, without a rotation, to compare with",
    )
    multiple: PositiveInt = Field(default=8, description="the channels that are left are a multiple of this")
    spread: bool = Field(default=True, description="turn the kept channels at random, so that none is much larger than the others")
    seed: int = Field(default=0, description="of that turn")

    @property
    def effect(self) -> Effect:
        """A rotation changes nothing but rounding."""
        return Effect("exact", 1e-4) if not self.sparsity else CHANGES

    def apply(self, program: Program, context: Context) -> Program:
        """Find the bases, and write everything that touches the hidden state in them."""
        if any(c.pass_name == self.key for c in program.history):
            return program
        states = find_states(program)
        bases = self.bases_of(program, states, context)
        edit, whole = program.edit(self.key), states[0].width
        heads = {name: bases[i] for name, i in tied(states).items()}
        gains = [[edit.params[str(norm.node.args[1].target)] for norm in state.norms] for state in states]  # type: ignore[union-attr]
        for state, basis in zip(states, bases, strict=True):
            _rewrite(edit, state, basis, heads)
        for node in edit.graph.nodes:
            if node.op == "call_function":
                edit.compute(node)
        for state, basis, scales in zip(states, bases, gains, strict=True):
            _change_bases(edit, state, basis, [(states[i].node, bases[i]) for _, i in state.skips])
            for norm, gain in zip(state.norms, scales, strict=True):
                _into_head(edit, norm, gain.double()[:, None] * basis, heads)
        note = f"{whole} -> {bases[0].shape[1]} channels, bases: {self.bases}"
        return edit.done(len(states), len(states), [note])

    def bases_of(self, program: Program, states: list[State], context: Context) -> list[Tensor]:
        """Orthonormal columns [D, d] float64 for each state, the largest principal components first (before `spread`)."""
        whole = states[0].width
        kept = whole if not self.sparsity else int((1 - self.sparsity) * whole) // self.multiple * self.multiple
        if not kept:
            raise CompileError(
                "pass-refused", f"of {whole} channels no {self.multiple} would be left", where=f"pass {self.key}", fix="lower `sparsity`"
            )
        text = calibration_text(context, self.key)
        turn = torch.block_diag(self._turn(kept), torch.eye(whole - kept, dtype=torch.float64))[:, :kept]
        if self.bases == "one":
            seen = collect(program, {state.node: {NormedGram} for state in states}, text, context.progress)
            gram = sum((seen[state.node, NormedGram].matrix for state in states), torch.zeros(()))
            return [self._components(gram) @ turn] * len(states)
        found: list[Tensor] = []

        def cut(gram: Gram) -> Tensor:
            found.append(self._components(gram.matrix))
            return found[-1][:, :kept] @ found[-1][:, :kept].t()

        collect_in_turn(program, [state.node for state in states], text, cut)
        return [components @ turn for components in found]

    def _turn(self, width: int) -> Tensor:
        """A random orthogonal matrix, or none."""
        if not self.spread:
            return torch.eye(width, dtype=torch.float64)
        random = torch.randn(width, width, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return torch.linalg.qr(random).Q

    def _components(self, gram: Tensor) -> Tensor:
        """Directions [D, D] by falling energy: eigenvectors of a Gram matrix, or the channels themselves."""
        if self.directions == "channels":
            return torch.eye(len(gram), dtype=gram.dtype)[:, gram.diagonal().argsort(descending=True, stable=True)]
        return torch.linalg.eigh(gram).eigenvectors.flip(1)


def _rewrite(edit: Editor, state: State, basis: Tensor, heads: Mapping[str, Tensor]) -> None:
    """Write what makes a state, and what reads it, in its basis; `heads`: tables of embeddings that are read as heads, with their bases."""
    whole, width = basis.shape
    for writer in map(edit.__getitem__, state.writers):
        if writer.target is aten.embedding.default:
            _swap(edit, writer, 0, _times(edit, writer.args[0], basis))
        else:
            _swap(edit, writer, 1, _times(edit, writer.args[1], basis, left=True))
            if len(writer.args) > 2 and writer.args[2] is not None:
                _swap(edit, writer, 2, _times(edit, writer.args[2], basis))
    for view in map(edit.__getitem__, (*state.views, *(v for norm in state.norms for v in norm.views))):
        shape: Any = view.args[1]
        if shape[-1] == whole:
            view.update_arg(1, [*shape[:-1], width])
    for norm in state.norms:
        node = edit[norm.node]
        gain, eps = edit.params[str(node.args[1].target)], node.args[2]  # type: ignore[union-attr]
        # a norm over d channels divides by the root of their mean square; that over all D, of which the others are zero, is smaller
        edit.swap(node, 1, torch.full((width,), (whole / width) ** 0.5, dtype=gain.dtype), "*q")
        node.update_arg(2, eps * whole / width)  # type: ignore[operator]
        for product in map(edit.__getitem__, norm.products):
            weight: Any = product.args[1]
            _swap(edit, product, 1, _times(edit, weight, heads.get(str(weight.target), gain.double()[:, None] * basis)))


def _change_bases(edit: Editor, state: State, basis: Tensor, sources: list[tuple[Node, Tensor]]) -> None:
    """Where an earlier state goes into the sum, turn it into the basis of this one."""
    for (node, _), (source, other) in zip(state.skips, sources, strict=True):
        if other is not basis:
            reader, old = edit[node], edit[source]
            with edit.before(reader):
                change = edit.param(f"{state.node.name}.from.{source.name}", (basis.t() @ other).to(old.meta["val"].dtype))
                reader.replace_input_with(old, edit.call(aten.linear.default, old, change))


def _into_head(edit: Editor, norm: Norm, basis: Tensor, heads: Mapping[str, Tensor]) -> None:
    """Turn what a shared head reads into the basis of its embedding; `basis` [D, d] with the norm's scale."""
    for old in norm.products:
        if (own := heads.get(str(old.args[1].target))) is not None:  # type: ignore[union-attr]
            product = edit[old]
            x: Any = product.args[0]
            with edit.before(product):
                change = edit.param(f"{old.args[1].target}.basis", (own.t() @ basis).to(x.meta["val"].dtype))  # type: ignore[union-attr]
                product.update_arg(0, edit.call(aten.linear.default, x, change))


def _times(edit: Editor, parameter: Any, basis: Tensor, *, left: bool = False) -> Tensor:
    """A parameter times the basis over its last axis, or (left) the transposed basis times the parameter."""
    value = edit.params[str(parameter.target)]
    return (basis.t() @ value.double() if left else value.double() @ basis).to(value.dtype)


def _swap(edit: Editor, node: Node, index: int, value: Tensor) -> None:
    """Let an argument of a node be the rotated parameter; an embedding and the head that shares it get the same one."""
    name = f"{node.args[index].target}*q"  # type: ignore[union-attr]
    with edit.before(node):
        node.update_arg(index, edit.param(name, edit.params.get(name, value)))

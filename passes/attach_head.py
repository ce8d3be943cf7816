"""Make a draft head of a model: let it read the target's state beside the token, and hand on what the next guess is to read.

Matches   the first decoder layer of a program, h = layer(e), and what makes the logits of its last, head(s)
Produces  body: layer   h = layer(fuse(e, f)) with the new input `states` f [B,R,K]; the output `tap.feedback` [B,R,K]: s, or a vector of its own
          body: mlp     head(mlp(u)), u = [f, e_1 .. e_i], with the new input `states` [f, e_1 .. e_(i-1)] [B,R,iK]; `tap.feedback`: u [B,R,(i+1)K]
                        fuse: none     u = f, and so are `states` and `tap.feedback`
Keeps     all other shapes; new parameters start such that a layer reads e and f in equal parts, as large together as what it adds to them, and
          that an MLP hands f to the head as it is
Refuses   a layer that does not read one hidden state; with `feedback: own` a layer whose last sublayer is no MLP
Paper     EAGLE (fuse: linear), FSPAD (83: fuse: gated, feedback: own), Hydra (49: body: mlp), Medusa (mlp, fuse: none); papers/A1 sections 2 and 5
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.fx import Node

from planc.compiler.blocks import find_blocks, head_of
from planc.compiler.calibration import Moments, collect
from planc.compiler.dialect import OPS
from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.program import Editor, Program, describe
from planc.compiler.units import find_units
from planc.runtime.drafters.draft_head import Fuse
from planc.runtime.drafters.head_source import FEEDBACK
from planc.runtime.errors import CompileError

aten = torch.ops.aten
_NAME = "draft_head"  # of new parameters
_SAMPLE, _TINY, _END = 64, 1e-6, 1 << 30
#: what may stand between the last product of an MLP and its sum with the hidden state
_BEHIND = (OPS.rms_norm.default, aten.layer_norm.default, aten.view.default, aten.reshape.default)


class AttachHead(Pass):
    """Turn a program into a draft head on the states of a target: its decoder layers, or an MLP in their place."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    after: ClassVar[tuple[str, ...]] = ("skip_layers",)
    body: Literal["layer", "mlp"] = "layer"
    fuse: Fuse | None = Field(None, description="as for the drafter draft_head; left out: linear, or concat for an MLP")
    feedback: Literal["shared", "own"] = "shared"
    level: PositiveInt = Field(1, description="mlp: which guess below the newest token it makes")
    blocks: PositiveInt = Field(1, description="mlp: residual blocks")

    @property
    def own(self) -> str:
        """Pattern of the parameters, by name, that training gives other numbers."""
        return "*" if self.body == "layer" else f"{_NAME}.{self.level}.*"

    def apply(self, program: Program, context: Context) -> Program:
        """Fuse in front of the first layer, and a second vector behind the last if it is asked for; or cut the layers out."""
        if "states" in program.inputs:
            return program
        return self._tail(program) if self.body == "mlp" else self._layer(program)

    def _layer(self, program: Program) -> Program:
        blocks = find_blocks(program)
        edit = program.edit(self.key)
        entry = edit[blocks[0].entry]
        batch, rows, width = entry.meta["val"].shape
        states = edit.input("states", torch.float32, batch, rows, width)
        self._fuse(edit, entry, states, width, *_parts(program, entry.name))
        state = edit[head_of(program).args[0]]
        edit.outputs(**{FEEDBACK: state if self.feedback == "shared" else self._own(program, edit, state)})
        return edit.done(1, 1)

    def _tail(self, program: Program) -> Program:
        edit = program.edit(self.key)
        product, token = edit[head_of(program)], edit[find_blocks(program)[0].entry]
        batch, rows, width = token.meta["val"].shape
        states = edit.input("states", torch.float32, batch, rows, width * (1 if self.fuse == "none" else self.level))
        with edit.before(product):
            state = edit.call(aten.slice.Tensor, states, -1, 0, width)
            parts = [edit.call(OPS.rms_norm.default, state, self._param(edit, "state_norm.weight", torch.ones(width)), _TINY)]
            read = states
            if self.fuse != "none":
                normed = edit.call(OPS.rms_norm.default, token, self._param(edit, "token_norm.weight", torch.ones(width)), _TINY)
                read = edit.call(aten.cat.default, [states, normed], -1)
                parts.append(edit.call(aten.slice.Tensor, read, -1, width, _END))
            made = self._mlp(edit, edit.call(aten.cat.default, parts, -1), state)
        product.update_arg(0, made)
        edit.outputs(**{FEEDBACK: read})
        return edit.done(1, 1)

    def _mlp(self, edit: Editor, read: Node, state: Node) -> Node:
        """y = f + R u, then y + silu(B norm(y) + b) for every block. All matrices start with zeros, so that y = f."""
        width, inputs = int(state.meta["val"].shape[-1]), int(read.meta["val"].shape[-1])
        read = edit.call(aten.linear.default, read, self._param(edit, "read.weight", torch.zeros(width, inputs)))
        made = edit.call(aten.add.Tensor, state, read)
        for block in range(self.blocks):
            normed = edit.call(OPS.rms_norm.default, made, self._param(edit, f"{block}.norm.weight", torch.ones(width)), _TINY)
            weight = self._param(edit, f"{block}.weight", torch.zeros(width, width))
            inner = edit.call(aten.linear.default, normed, weight, self._param(edit, f"{block}.bias", torch.zeros(width)))
            made = edit.call(aten.add.Tensor, made, edit.call(aten.silu.default, inner))
        return made

    def _param(self, edit: Editor, name: str, value: Tensor) -> Node:
        return edit.param(f"{_NAME}.{self.level}.{name}", value)

    def _fuse(self, edit: Editor, entry: Node, states: Node, width: int, token: float, state: float) -> None:
        readers = sorted(entry.users, key=list(edit.graph.nodes).index)
        with edit.before(readers[0]):
            weight = edit.param(f"{_NAME}.fuse.weight", torch.cat([token * torch.eye(width), state * torch.eye(width)], 1))
            bias = edit.param(f"{_NAME}.fuse.bias", torch.zeros(width))
            fused = edit.call(aten.linear.default, edit.call(aten.cat.default, [entry, states], -1), weight, bias)
            if self.fuse == "gated":
                fused = self._gate(edit, entry, fused, width)
        for reader in readers:
            reader.replace_input_with(entry, fused)

    def _gate(self, edit: Editor, token: Node, fused: Node, width: int) -> Node:
        """fused + D(silu(G token) * (U norm(fused))): the token decides which part of the state it is about (papers/83 step 2)."""
        inner, seed = _inner(edit, width), torch.Generator().manual_seed(0)
        values = {
            "norm": torch.ones(width),
            "gate": torch.randn(inner, width, generator=seed) * width**-0.5,
            "up": torch.randn(inner, width, generator=seed) * width**-0.5,
            "down": torch.zeros(width, inner),  # so that the gate starts without effect
        }
        norm, gate, up, down = (edit.param(f"{_NAME}.{name}.weight", value) for name, value in values.items())
        normed = edit.call(OPS.rms_norm.default, fused, norm, 1e-5)
        sides = edit.call(aten.linear.default, token, gate), edit.call(aten.linear.default, normed, up)
        product = edit.call(OPS.glu.default, *sides, "silu")
        return edit.call(aten.add.Tensor, fused, edit.call(aten.linear.default, product, down))

    def _own(self, program: Program, edit: Editor, state: Node) -> Node:
        """The state again, over a second last product of the MLP: one vector for the logits, one to feed back (papers/83 step 3)."""
        unit = find_units(program)[-1:]
        term: Any = edit[unit[0].term] if unit and unit[0].kind == "mlp" else None
        while term is not None and term.target in _BEHIND:
            term = term.args[0]
        if term is None or term.target is not aten.linear.default:
            place = describe(unit[0].term) if unit else None
            message = "`feedback: own` doubles the last product of an MLP, and the layer does not end in one"
            raise CompileError("pass-refused", message, node=place, where=f"pass {self.key}", fix="use `feedback: shared`")
        copies: dict[Node, Node] = {}
        with edit.before(edit.graph.output_node()):
            weight = edit.param(f"{_NAME}.feedback.weight", edit.params[str(term.args[1].target)].clone())
            copies[term] = edit.call(aten.linear.default, term.args[0], weight, *term.args[2:])
            for node in _between(term, state):
                copies[node] = edit.call(node.target, *torch.fx.node.map_arg(node.args, lambda n: copies.get(n, n)))
        return copies[state]


def _parts(program: Program, entry: str) -> tuple[float, float]:
    """By how much to multiply token and state at first, from their sizes and from what the layers make of a token, on random ones.

    Embeddings are often much smaller than states, and both than what a late layer adds: unscaled, the layer would see nothing of the token, and
    the next layer nothing of either.
    """
    ids = torch.randint(0, program.info.vocab_size, (1, _SAMPLE), generator=torch.Generator().manual_seed(0))
    nodes = {node.name: node for node in program.main.nodes}
    state: Any = head_of(program).args[0]
    places = nodes[entry], state, nodes[find_blocks(program)[-1].exit]
    seen = collect(program, {node: {Moments} for node in places}, ids)
    token, state_size, made = (float(seen[node, Moments].mean_square.mean().sqrt()) for node in places)
    return 0.5 * made / max(token, _TINY), 0.5 * made / max(state_size, _TINY)


def _inner(edit: Editor, width: int) -> int:
    """Width of the layer's MLP, by its widest product; a layer without one gets four times its own."""
    linears = [n for n in edit.graph.nodes if n.target is aten.linear.default and n.args[1].op == "get_attr"]
    inputs: list[Tensor] = [edit.params[str(n.args[1].target)] for n in linears]
    return max((w.shape[1] for w in inputs if w.shape[0] == width), default=4 * width)


def _between(start: Node, end: Node) -> list[Node]:
    """What depends on `start` on the way to `end`, in order, `end` included."""
    behind, found = {start}, list[Node]()
    for node in start.graph.nodes:
        if node is not start and any(source in behind for source in node.all_input_nodes):
            behind.add(node)
            found.append(node)
    wanted, needed = {end}, list[Node]()
    for node in reversed(found):
        if node in wanted:
            needed.append(node)
            wanted.update(node.all_input_nodes)
    return needed[::-1]

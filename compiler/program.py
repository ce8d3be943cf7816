"""The Program: named FX graphs over one parameter store, with signature, decoder blocks, state and history. The only thing a pass sees."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from planc.runtime.kv import KvPolicy, LayerSpec

MAIN = "main"


@dataclass(frozen=True)
class Block:
    """Decoder layer `index`: the nodes from `entry` (hidden state read) to `exit` (hidden state written), by node name."""

    index: int
    path: str  # module path, e.g. model.layers.3
    entry: str
    exit: str


@dataclass(frozen=True)
class KVState:
    """Keys and values of one attention layer: [B, heads, capacity, width] each. Rolls back by truncation."""

    name: str  # e.g. past.3
    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    window: int = 0
    split: bool = False  # attention as separate products, see passes/kv_cache
    layer: LayerSpec | None = None  # what a cache with a policy must know of it


@dataclass(frozen=True)
class Change:
    """One pass as it went over the program."""

    pass_name: str
    matched: int
    rewritten: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """What the graph alone does not say: identity, text and position limits."""

    name: str
    vocab_size: int
    max_length: int
    eos_ids: tuple[int, ...] = ()
    gguf: Any = None
    tokenizer_files: Mapping[str, Any] = field(default_factory=dict)
    task: str = "generation"  # or "classification": images in, logits of classes out; or "filling": masked slots
    mask_id: int | None = None  # the token that stands in slots that are to be filled
    shift: bool = False  # the output of slot i - 1 predicts slot i


@dataclass(frozen=True)
class Program:
    """An immutable program; passes return a new one (`edit`, `replace`). Graphs read parameters through `get_attr` nodes named as in `params`."""

    graphs: Mapping[str, Graph]
    params: Mapping[str, Tensor]
    info: ModelInfo
    states: tuple[KVState, ...] = ()
    history: tuple[Change, ...] = ()
    policy: KvPolicy | None = None  # of the cache

    @property
    def main(self) -> Graph:
        """The graph that runs every pass."""
        return self.graphs[MAIN]

    @property
    def inputs(self) -> dict[str, Node]:
        """Placeholders of the main graph by name, in order."""
        return {str(n.target): n for n in self.main.nodes if n.op == "placeholder"}

    @property
    def outputs(self) -> dict[str, Node]:
        """Outputs of the main graph by name."""
        return dict(self.main.output_node().args[0])

    def replace(self, **changes: Any) -> Program:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def edit(self, pass_name: str) -> Editor:
        """A private copy of the main graph to rewrite; `Editor.done` gives the new program."""
        return Editor(self, pass_name)

    def bytes(self) -> int:
        """Bytes of the parameters that the graphs read."""
        used = {str(n.target) for g in self.graphs.values() for n in g.nodes if n.op == "get_attr"}
        return sum(self.params[name].numel() * self.params[name].element_size() for name in used)


class Editor:
    """Builds nodes in a copied graph. Shapes of new nodes are computed by running their op on fake tensors; each records its pass and origin."""

    def __init__(self, program: Program, pass_name: str) -> None:
        self.program, self.pass_name = program, pass_name
        self.graph = Graph()
        copies: dict[Node, Node] = {}
        result = self.graph.graph_copy(program.main, copies)
        self.graph.output(result)
        self.params: dict[str, Tensor] = dict(program.params)
        self._new = {old.name: new for old, new in copies.items()}
        self.mode = fake_mode(program.main)
        self._origin: Node | None = None

    def __getitem__(self, node: Node | str) -> Node:
        """The copy of a node of the old program (or the new node of that name)."""
        return self._new[node if isinstance(node, str) else node.name]

    def before(self, node: Node) -> Any:
        """Insertion point: new nodes come before `node` and are recorded as made from it."""
        self._origin = node
        return self.graph.inserting_before(node)

    def after(self, node: Node) -> Any:
        """Insertion point after `node`."""
        self._origin = node
        return self.graph.inserting_after(node)

    def call(self, target: Callable[..., Any], *args: Any) -> Node:
        """A new call of `target` with its fake value computed."""
        node = self.graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*values)
        return self._sign(node)

    def param(self, name: str, value: Tensor) -> Node:
        """A parameter node; registers `value` under `name` (same name and same value share)."""
        assert name not in self.params or self.params[name] is value, f"parameter {name} already exists"
        self.params[name] = value
        node = self.graph.get_attr(name)
        with self.mode:
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        return self._sign(node)

    def input(self, name: str, dtype: torch.dtype, *sizes: int | torch.SymInt | str) -> Node:
        """A new graph input behind the others. A size given as text opens a new symbolic dimension."""
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty([self.symbol() if isinstance(s, str) else s for s in sizes], dtype=dtype)
        return self._sign(node)

    def symbol(self) -> torch.SymInt:
        """A fresh symbolic dimension."""
        real = torch.empty(7, 3)
        fake = self.mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]))
        return fake.shape[0]

    def refresh(self, *starts: Node) -> None:
        """Recompute the fake values of everything behind the nodes (new or changed ones, which changed a shape)."""
        stale = set(starts)
        for node in self.graph.nodes:
            if node.op == "call_function" and any(a in stale for a in node.all_input_nodes):
                stale.add(node)
                self.compute(node)

    def compute(self, node: Node) -> None:
        """Recompute the fake value of one node."""
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def swap(self, node: Node, index: int, value: Tensor, mark: str) -> Node:
        """Let argument `index` of one node, a parameter, be `value`; it is called as the old one with `mark` behind. Other readers keep theirs."""
        old = node.args[index]
        assert isinstance(old, Node)
        with self.before(node):
            new = self.param(f"{old.target}{mark}", value)
        node.update_arg(index, new)
        return new

    def add_bias(self, product: Node, more: Tensor, mark: str) -> None:
        """Add `more` [N] to the bias of one dense layer or convolution, which need not have one; the new one is called with `mark` behind."""
        weight = product.args[1]
        assert isinstance(weight, Node)
        if len(product.args) > 2 and isinstance(old := product.args[2], Node):
            value = self.params[str(old.target)]
            self.swap(product, 2, (value + more).to(value.dtype), mark)
            return
        with self.before(product):
            name = str(weight.target).partition(".weight")[0]
            bias = self.param(f"{name}.bias{mark}", more.to(self.params[str(weight.target)].dtype))
        product.args = (*product.args[:2], bias, *product.args[3:])

    def outputs(self, **new: Node | None) -> None:
        """Add, replace or (None) remove named outputs."""
        node = self.graph.output_node()
        old: Any = node.args[0]
        kept = {**old, **new}
        node.args = ({k: v for k, v in kept.items() if v is not None},)

    def replace(self, old: Node, new: Node) -> None:
        """All uses of `old` read `new`."""
        if new in old.users:  # e.g. a node that wraps `old`
            old.replace_all_uses_with(new, propagate_meta=False, delete_user_cb=lambda user: user is not new)
        else:
            old.replace_all_uses_with(new, propagate_meta=False)

    def _sign(self, node: Node) -> Node:
        origin = self._origin
        node.meta["pass"] = self.pass_name
        if origin is not None:
            node.meta["origin"] = origin.meta.get("origin", origin.name)
            for key in ("nn_module_stack", "stack_trace"):
                if key in origin.meta:
                    node.meta.setdefault(key, origin.meta[key])
        return node

    def done(self, matched: int, rewritten: int, notes: Iterable[str] = (), **fields: Any) -> Program:
        """The new program: dead nodes removed, unread parameters dropped, history extended."""
        eliminate_dead(self.graph)
        graphs = {**self.program.graphs, MAIN: self.graph}
        used = {str(n.target) for g in graphs.values() for n in g.nodes if n.op == "get_attr"}
        params = {name: value for name, value in self.params.items() if name in used}
        change = Change(self.pass_name, matched, rewritten, tuple(notes))
        return self.program.replace(graphs=graphs, params=params, history=(*self.program.history, change), **fields)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake-tensor mode that the graph's shapes live in."""
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), torch._subclasses.FakeTensor):
            return value.fake_mode
    raise AssertionError("graph without fake values")


def eliminate_dead(graph: Graph) -> None:
    """Remove nodes nobody reads; every op of the dialect and of inference ATen is pure, inputs stay."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def module_path(node: Node) -> str:
    """Path of the innermost module that made the node, e.g. model.layers.3.mlp; empty when unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def module_paths(name: str) -> list[str]:
    """Module paths behind a parameter's name: several when products were joined; what passes append (`*s`, `.int8`) is left out."""
    return [part.partition(".weight")[0] for part in name.split("|")]


def module_matches(name: str, pattern: str) -> bool:
    """Whether a parameter belongs to a module that a pattern of the plan names."""
    return any(fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"*.{pattern}") for path in module_paths(name))


def source_line(node: Node) -> str:
    """The user's source line behind the node, `file.py:123`, or empty."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).splitlines() if line.strip().startswith("File ")]
    if not lines:
        return ""
    file, _, rest = lines[-1].removeprefix('File "').partition('", line ')
    return f"{file.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"


def describe(node: Node) -> str:
    """A node for people: name (module path, source line)."""
    place = ", ".join(p for p in (module_path(node) and f"module {module_path(node)}", source_line(node)) if p)
    return f"{node.name} ({place})" if place else node.name

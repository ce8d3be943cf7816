"""`planc explain`: what every step of the pipeline does to a model, as a table of nodes, parameters, bytes and FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planc.compiler import files
from planc.compiler.memory import plan_memory
from planc.compiler.page import page
from planc.compiler.structure import Group, groups_of

if TYPE_CHECKING:
    from torch.fx import Node

    from planc.compiler.plan import Plan
    from planc.compiler.program import Program
    from planc.compiler.told import Told
    from planc.runtime.contract import Contract

PAST = 512  #: cached tokens that attention is counted with

_PRODUCTS = {"linear", "linear_int8", "linear_blocks", "addmm", "mm", "matmul", "bmm"}
_MASKED = 0.1  # share of zeros in a weight from which on they are no accident: rounding to 8 bits gives 1 to 3 %
_ATTENTION = {"attention", "cached_attention"}


@dataclass(frozen=True)
class Step:
    """The program after one step. Counts are of the graph that runs every pass."""

    name: str
    nodes: int
    calls: int  # nodes that compute
    parameters: int  # elements of all stored tensors, scales included
    bytes: int
    flops: int  # of one row behind `PAST` cached tokens: products and attention
    matched: int | None = None
    rewritten: int | None = None
    notes: tuple[str, ...] = ()
    peak: int | None = None  # bytes of activations at the worst moment, for one image; None for a model that reads text
    live: tuple[tuple[str, int], ...] = ()  # node -> bytes that are live while it runs
    kinds: tuple[tuple[str, int], ...] = ()  # operation -> how often it occurs
    groups: tuple[Group, ...] = ()  # layers, and modules outside of them

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("live", "groups")}
        return {**kept, "notes": list(self.notes), "kinds": dict(self.kinds), "past": PAST}


def explain(model: str, plan: Plan) -> list[Step]:
    """The steps of compiling `model` with `plan`, from the traced program on."""
    return list(_measured(_programs(model, plan)))


def _programs(model: str, plan: Plan) -> Iterator[tuple[str, Program]]:
    """The program after each step, as `planc.compile` makes it; not probed."""
    from planc.compiler import classify
    from planc.compiler.compile import context_of, demanded, text_ids
    from planc.compiler.image_models import load_classifier
    from planc.compiler.models import load_model
    from planc.compiler.passbase import Context
    from planc.compiler.pipeline import ordered, run_passes
    from planc.compiler.program import ModelInfo
    from planc.compiler.raising import raise_program
    from planc.compiler.search.spec import check_closed
    from planc.compiler.trace import trace

    check_closed(plan)
    if (classifier := load_classifier(model)) is not None:
        program = classify.traced(classifier)
        yield "trace", program
        for part in ordered(classify.demanded(plan)):
            program, _ = run_passes(program, [part], Context())
            yield part.key, program
        return
    passes = ordered(demanded(plan))
    loaded = load_model(model)
    info = ModelInfo(loaded.name, loaded.vocab_size, loaded.max_length, loaded.eos_ids, loaded.gguf, loaded.tokenizer_files)
    program = trace(loaded.module, info)
    yield "trace", program
    program = raise_program(program)
    yield "raise", program
    context = context_of(plan, loaded, text_ids(loaded))
    for part in passes:
        program, _ = run_passes(program, [part], context)
        yield part.key, program


def _measured(programs: Iterable[tuple[str, Program]]) -> Iterator[Step]:
    known, said = 0, None
    for name, program in programs:
        step = measure(name, program, changed=len(program.history) > known)
        known, zeros = len(program.history), unused_zeros(program)
        yield replace(step, notes=(*step.notes, zeros)) if zeros and zeros != said else step
        said = zeros


def unused_zeros(program: Program) -> str | None:
    """What to say where the weights of products hold zeros that are multiplied like any other number, as a mask leaves them; else None.

    Ops that do skip zeros are none of `_PRODUCTS`. Packed blocks are left out: their bytes are no weights.
    """
    products = [node for node in program.main.nodes if node.op == "call_function" and _op(node) in _PRODUCTS - {"linear_blocks"}]
    keys = {str(source.target) for node in products for source in node.all_input_nodes if source.op == "get_attr"}
    weights = [value for key in sorted(keys) if (value := program.params[key]).dim() > 1]
    masked = [weight for weight in weights if int((weight == 0).sum()) > _MASKED * weight.numel()]
    if not masked:
        return None
    zeros = sum(int((weight == 0).sum()) for weight in masked)
    share = zeros / sum(weight.numel() for weight in weights)
    return f"{share:.0%} of the weights of products are zero, in {len(masked)} of {len(weights)}, and no product here skips a zero: no time is saved"


def measure(name: str, program: Program, *, changed: bool = False) -> Step:
    """Count a program. `changed`: its last history entry belongs to this step."""
    nodes = list(program.main.nodes)
    used = {str(node.target) for graph in program.graphs.values() for node in graph.nodes if node.op == "get_attr"}
    change = program.history[-1] if changed else None
    memory = plan_memory(program) if program.info.task == "classification" else None
    return Step(
        name,
        len(nodes),
        sum(node.op == "call_function" for node in nodes),
        sum(program.params[key].numel() for key in used),
        program.bytes(),
        sum(map(_flops, nodes)),
        change.matched if change else None,
        change.rewritten if change else None,
        change.notes if change else (),
        memory.peak if memory is not None else None,
        memory.live if memory is not None else (),
        tuple(sorted(Counter(_op(node) for node in nodes if node.op == "call_function").items())),
        groups_of(program, _flops),
    )


def _flops(node: Node) -> int:
    """Multiplications and additions of one row: symbolic dimensions count as 1."""
    if node.op != "call_function":
        return 0
    name = _op(node)
    if name in _PRODUCTS:
        first = node.all_input_nodes[0] if name != "addmm" else node.args[1]
        return 2 * _size(node.meta["val"].shape) * _fixed(first.meta["val"].shape[-1])  # type: ignore[union-attr]
    if name in _ATTENTION:
        q, v = node.args[0].meta["val"], node.args[2].meta["val"]  # type: ignore[union-attr]
        return 2 * _fixed(q.shape[-2]) * (_fixed(q.shape[-1]) + _fixed(v.shape[-1])) * PAST
    if name in ("conv2d", "conv1d", "convolution"):
        weight = node.args[1].meta["val"]  # type: ignore[union-attr]
        return 2 * _size(node.meta["val"].shape) * _size(weight.shape[1:])
    return 0


def _op(node: Node) -> str:
    return str(getattr(node.target, "__name__", str(node.target))).split(".")[0]


def _size(shape: Iterable[Any]) -> int:
    total = 1
    for dimension in shape:
        total *= _fixed(dimension)
    return total


def _fixed(dimension: Any) -> int:
    return dimension if isinstance(dimension, int) else 1


# ---- for people --------------------------------------------------------------------------------------------------------------------

_COLUMNS = ("step", "nodes", "parameters", "MiB", "MFLOP", "peak MiB", "rewritten", "notes")


def _cells(step: Step, before: Step | None) -> list[str]:
    def delta(now: float, then: float | None) -> str:
        return "" if then is None or now == then or not then else f" ({now / then - 1:+.1%})"

    hits = "" if step.matched is None else f"{step.rewritten}/{step.matched}"
    return [
        step.name,
        str(step.nodes) + delta(step.nodes, before.nodes if before else None),
        f"{step.parameters / 1e6:.2f} M",
        f"{step.bytes / 2**20:.1f}" + delta(step.bytes, before.bytes if before else None),
        f"{step.flops / 1e6:.1f}" + delta(step.flops, before.flops if before else None),
        "" if step.peak is None else f"{step.peak / 2**20:.2f}" + delta(step.peak, before.peak if before else None),
        hits,
        "; ".join(step.notes),
    ]


def _rows(steps: list[Step]) -> list[list[str]]:
    return [_cells(step, steps[index - 1] if index else None) for index, step in enumerate(steps)]


def table(steps: list[Step], title: str) -> Any:
    """The steps as a rich table."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left")
    for index, name in enumerate(_COLUMNS):
        shown.add_column(name, justify="right" if 0 < index < 7 else "left")
    for row in _rows(steps):
        shown.add_row(*map(Text, row))
    return shown


def memory_chart(steps: list[Step], width: int = 60) -> str:
    """Live activations of the first and the last step, node by node, as lines of text; empty for a model that reads text."""
    shown = [step for step in (steps[0], steps[-1]) if step.live]
    most = max((step.peak or 0 for step in shown), default=0)
    lines = []
    for step in shown:
        lines.append(f"memory after {step.name}: at most {(step.peak or 0) / 2**20:.2f} MiB")
        count = -(-len(step.live) // 24)  # nodes of one line: as many as make two dozen lines
        for start in range(0, len(step.live), count):
            name, size = max(step.live[start : start + count], key=lambda entry: entry[1])
            lines.append(f"  {name:<24.24} {'#' * round(width * size / max(1, most)):<{width}} {size / 2**20:.2f}")
    return "\n".join(lines)


def write_html(path: Path, steps: list[Step], title: str, contract: Contract | None = None, told: Told | None = None) -> None:
    """The steps as a page that needs no other file; complete or not at all.

    `contract` adds what was measured of the compiled plan, `told` an answer. Raises InputError[input-invalid] where the file cannot be written.
    """
    about = f"FLOPs are those of one image, or of one token behind {PAST} cached ones."
    files.write(path, page(title, steps, about, contract, told).encode())

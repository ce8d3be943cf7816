"""What compile measures on the engine it has just made: exactness and the cost table; and how it shows that it is busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from planc.runtime import exactness, profile
from planc.runtime.contract import Contract, hardware
from planc.runtime.engine import Engine

if TYPE_CHECKING:
    from planc.compiler.compile import Planned

TREE_BLOCK = 256  # keys after which ONNX Runtime's product starts a new block; a bitwise tree may not cross it


def measured(planned: Planned, note: Callable[[str], None]) -> Callable[[Engine, int], Contract]:
    """The function that measures an engine with a capacity and gives the contract."""

    def measure(engine: Engine, capacity: int) -> Contract:
        speculative = planned.plan.decode.speculative
        split = any(state.split for state in planned.program.states)
        note("probing exactness")
        uses_trees = speculative is not None and speculative.tree.shape != "chain" and engine.spec.trees
        slots = min(capacity, 1024)
        exact = exactness.probe(engine, planned.text_ids, capacity=slots, tree_block=TREE_BLOCK if split else None, uses_trees=uses_trees)
        if speculative is not None and speculative.transfer is not None and speculative.transfer.strength > 0.0:
            exact = exact.model_copy(update={"level": "lossy", "note": "transfer moves the target's distribution towards the draft's"})
        if planned.program.policy is not None:
            exact = exact.model_copy(update={"note": "; ".join(filter(None, (exact.note, "against the same cache policy without drafts")))})
        note("measuring the cost of passes")
        cost = profile.measure_cost(engine, capacity=slots, batch=planned.plan.decode.batch_sizes)
        return Contract(exactness=exact, cost=cost, effects=planned.effects, hardware=hardware())

    return measure


@contextmanager
def stages(show: bool) -> Iterator[Callable[[str], None]]:
    """Names the stage that is running, with a spinner on a terminal."""
    if not show:
        yield lambda text: None
        return
    with Status("compiling", console=Console(stderr=True)) as status:
        yield lambda text: status.update(f"compiling: {text}")

"""The reference backend: a Program executed node by node with torch. Slow; it defines what every op means."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from planc.compiler.dialect import REFERENCES
from planc.compiler.program import MAIN, Program
from planc.runtime.engine import Cache, EngineSpec, Floats, Ints, Outputs, Step
from planc.runtime.kv import LayerSpec, PolicyCache
from planc.runtime.rows import bias_of, key_bias, positions_of, states_of

_NO_OPS: Mapping[Any, Callable[..., Any]] = {}


def execute(
    program: Program,
    inputs: Mapping[str, Tensor],
    graph: str = MAIN,
    *,
    grad: bool = False,
    ops: Mapping[Any, Callable[..., Any]] = _NO_OPS,
) -> Generator[tuple[Node, Any], Any]:
    """Every computed node of one graph with its value, in order; last the output node with the outputs by name.

    Values are freed as soon as nobody reads them. What is sent back (`send`) takes the place of the value for all readers.
    With `grad` the outputs can be differentiated; `ops` take the place of operations.
    """
    values: dict[Any, Any] = {}
    pending = {node: len(node.users) for node in program.graphs[graph].nodes}
    for node in program.graphs[graph].nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            values[node] = program.params[str(node.target)]
        elif node.op == "output":
            yield node, {name: values[value] for name, value in node.args[0].items()}
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            target: Any = ops.get(node.target) or (REFERENCES.get(node.target, node.target) if grad else node.target)
            with torch.set_grad_enabled(grad):  # not around the loop: a generator must not leave the switch set while it waits
                values[node] = target(*args, **kwargs)
            for source in node.all_input_nodes:
                pending[source] -= 1
                if not pending[source]:
                    del values[source]
            other = yield node, values[node]
            if other is not None:
                values[node] = other


def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    graph: str = MAIN,
    *,
    grad: bool = False,
    ops: Mapping[Any, Callable[..., Any]] = _NO_OPS,
) -> dict[str, Tensor]:
    """Outputs by name of one graph on `inputs` by name."""
    for node, value in execute(program, inputs, graph, grad=grad, ops=ops):
        if node.op == "output":
            return dict(value)
    raise AssertionError("graph without output")


def empty_state(program: Program, batch: int, capacity: int) -> dict[str, Tensor]:
    """Empty cache inputs of a program with state."""
    state = {}
    for s in program.states:
        state[f"{s.name}.key"] = torch.zeros(batch, s.heads, capacity, s.key_width, dtype=s.dtype)
        state[f"{s.name}.value"] = torch.zeros(batch, s.heads, capacity, s.value_width, dtype=s.dtype)
    for name, node in program.inputs.items():
        if name.startswith("body."):
            state[name] = torch.zeros(0, *node.meta["val"].shape[1:], dtype=node.meta["val"].dtype)
    return state


def step_inputs(program: Program, lengths: Ints, step: Step, rows: Callable[[int], Ints] | None = None) -> dict[str, Tensor]:
    """Inputs of a pass other than the cache; `rows` gives the rows [B] that layers of a group read where that is not the length."""
    feeds: dict[str, Any] = {"input_ids": step.tokens, "position_ids": positions_of(lengths, step)}
    feeds["logits_from"] = np.array([step.logits_from])
    for name in program.inputs:
        if name.startswith("lengths"):
            feeds[name] = lengths if rows is None else rows(int(name.partition(".")[2] or 0))
        elif name.startswith("bias"):
            window, group = bias_of(name)
            feeds[name] = key_bias(lengths if rows is None else rows(group), step, window)
        elif name == "states":
            feeds[name] = states_of(step, int(program.inputs[name].meta["val"].shape[-1]))
    return {name: torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in program.inputs if name in feeds}


def as_tensor(array: np.ndarray) -> Tensor:
    """An array of a cache; bfloat16, which numpy does not have, comes in uint16."""
    return torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)


def layers_of(program: Program) -> tuple[LayerSpec, ...]:
    """What a cache with a policy must know of the layers."""
    return tuple(state.layer for state in program.states if state.layer is not None)


def probe(program: Program, sample: Tensor) -> dict[str, Tensor]:
    """Outputs on token ids [B,R] from an empty cache, or on images [B,...]: how passes are compared with each other."""
    if "images" in program.inputs:
        return run(program, {"images": sample})
    ids = sample
    lengths = np.zeros(ids.shape[0], dtype=np.int64)
    inputs = {**step_inputs(program, lengths, Step(ids.numpy())), **empty_state(program, ids.shape[0], ids.shape[1])}
    return run(program, inputs)


class ReferenceImageEngine:
    """Runs an image classifier."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.batches = not isinstance(program.inputs["images"].meta["val"].shape[0], int)

    def forward(self, pixels: Floats) -> Floats:
        """See `runtime.vision.ImageEngine`."""
        logits: Floats = run(self.program, {"images": torch.from_numpy(pixels)})["logits"].numpy()
        return logits


class ReferenceCache(Cache):
    """Cache of the reference engine: dense tensors, one dictionary."""

    def __init__(self, program: Program, batch: int, capacity: int) -> None:
        self.state = empty_state(program, batch, capacity)
        self.lengths = np.zeros(batch, dtype=np.int64)
        self.capacity = capacity

    def keep(self, sequence: int, rows: Ints) -> None:
        """See the engine contract."""
        start = int(self.lengths[sequence])
        source = start + torch.from_numpy(np.asarray(rows, dtype=np.int64))
        for tensor in self.state.values():
            tensor[sequence, :, start : start + len(rows)] = tensor[sequence][:, source].clone()
        self.lengths[sequence] += len(rows)

    def rollback(self, sequence: int, length: int) -> None:
        """See the engine contract."""
        assert 0 <= length <= self.lengths[sequence]
        self.lengths[sequence] = length

    def bytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for t in self.state.values())


class ReferenceEngine:
    """Runs a program with state by the engine contract."""

    def __init__(self, program: Program) -> None:
        self.program = program
        top = program.outputs.get("top_ids")
        self.spec = EngineSpec(
            vocab_size=program.info.vocab_size,
            max_length=program.info.max_length,
            top_k=int(top.meta["val"].shape[-1]) if top is not None else 0,
            trees=any(name.startswith("bias") for name in program.inputs),
            taps=tuple(name for name in program.outputs if name.startswith("tap")),
            guesses=program.policy.guesses if program.policy is not None else 0,
        )

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See the engine contract."""
        if self.program.policy is not None:
            return PolicyCache(self.program.policy, layers_of(self.program), batch, capacity)
        return ReferenceCache(self.program, batch, capacity)

    def forward(self, cache: Cache, step: Step, *, logits: bool = False, top_k: bool = False) -> Outputs:
        """See the engine contract."""
        if isinstance(cache, PolicyCache):
            return self._forward_policy(cache, step, logits, top_k)
        assert isinstance(cache, ReferenceCache)
        which = np.arange(len(cache.lengths)) if step.sequences is None else step.sequences
        state = {name: tensor[torch.from_numpy(which)] for name, tensor in cache.state.items()}
        out = run(self.program, {**step_inputs(self.program, cache.lengths[which], step), **state})
        for name, tensor in cache.state.items():
            tensor[torch.from_numpy(which)] = out[f"present.{name.partition('.')[2]}"]
        return self._outputs(out, logits, top_k)

    def _forward_policy(self, cache: PolicyCache, step: Step, logits: bool, top_k: bool) -> Outputs:
        """The sequences one by one: each has buffers of its own size."""
        which = range(len(cache.lengths)) if step.sequences is None else step.sequences.tolist()
        parts = []
        for place, b in enumerate(which):
            parents = None if step.parents is None else step.parents[place : place + 1]
            own = replace(step, tokens=step.tokens[place : place + 1], parents=parents, sequences=None, counts=None)
            cache.reserve(b, step.tokens.shape[1])
            tensors, stored = cache.tensors(b), cache.stored(b)
            state = {name: as_tensor(array) for name, array in (tensors | stored).items()}
            feeds = step_inputs(self.program, cache.lengths[b : b + 1], own, lambda group, b=b: np.array([cache.rows(b, group)]))
            out = run(self.program, {**feeds, **state})
            for name, array in tensors.items():
                array[:] = out[f"present.{name.partition('.')[2]}"].numpy()
            cache.observe(b, 0, {f"past.{n.partition('.')[2]}": v[0].numpy() for n, v in out.items() if n.startswith("query.")})
            parts.append(out)
        return self._outputs(
            {n: torch.cat([p[n] for p in parts]) for n in parts[0] if not n.startswith(("present.", "query."))}, logits, top_k
        )

    def _outputs(self, out: Mapping[str, Tensor], logits: bool, top_k: bool) -> Outputs:
        return Outputs(
            argmax=out["argmax"].numpy(),
            logits=out["logits"].numpy() if logits else None,
            top_ids=out["top_ids"].numpy() if top_k else None,
            top_logits=out["top_logits"].numpy() if top_k else None,
            taps={name: out[name].numpy() for name in self.spec.taps},
        )

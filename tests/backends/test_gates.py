"""Graphs with gates around their sublayers: with all gates open the same bits, with some closed the model without those sublayers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from models_tiny import FAMILIES, MAX_LENGTH, apply, close, decoding, eager, layers_of, make, raised, token_ids

from planc.backends.onnx.artifact import signature
from planc.backends.onnx.engine import OnnxCache, OnnxEngine
from planc.backends.onnx.gates import gated
from planc.backends.onnx.lower import lower_gated
from planc.compiler.program import Program
from planc.compiler.raising import raise_program
from planc.compiler.trace import trace
from planc.compiler.units import find_units
from planc.passes.quantize_weights import QuantizeWeights
from planc.runtime.artifact import Manifest
from planc.runtime.engine import Step
from planc.runtime.errors import CompileError
from planc.runtime.profile import fill_cache


def engine(program: Program, directory: Path, ops: Literal["fast", "standard"] = "fast") -> OnnxEngine:
    units = lower_gated(program, directory, ops=ops, positions=MAX_LENGTH)
    return OnnxEngine(directory, Manifest(planc="0", signature=signature(program, MAX_LENGTH), extra={"units": units}))


def filled(target: OnnxEngine, batch: int = 2, length: int = 9) -> OnnxCache:
    cache = target.new_cache(batch, 40)
    fill_cache(target, cache, token_ids(batch, length).numpy())
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_sublayers(family: str) -> None:
    units = find_units(decoding(raised(family)))
    count = len({unit.layer for unit in units})
    assert [(unit.layer, unit.kind) for unit in units] == [(i, kind) for i in range(count) for kind in ("attention", "mlp")]


@pytest.mark.parametrize(("ops", "trees"), [("fast", "none"), ("fast", "fused"), ("fast", "split"), ("standard", "none")])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt"])
def test_open_gates_change_nothing(family: str, ops: Any, trees: Any, tmp_path: Path) -> None:
    target = engine(decoding(raised(family), trees), tmp_path, ops)
    skip, caches = target.skipping(), (filled(target), filled(target))
    step = Step(token_ids(1, 4, seed=1).numpy())
    for sequence in (1, 0):
        found = skip.forward(caches[0], sequence, step, np.ones(len(skip.units), dtype=bool), logits=True).logits
        assert found is not None
        wanted = target._run(caches[1], slice(sequence, sequence + 1), step, True, False).logits
        assert wanted is not None
        if family == "gpt_neox":  # where ONNX Runtime fuses the sum of three across the gates' border
            close(found, wanted)
        else:
            assert np.array_equal(found, wanted)
    for name, tensor in caches[0].state.items():
        close(tensor, caches[1].state[name])


def test_closed_gates_leave_sublayers_out(tmp_path: Path) -> None:
    module = make("llama", num_hidden_layers=3)
    program = raise_program(trace(module, raised("llama").info))
    target = engine(decoding(program), tmp_path)
    cache, ids = filled(target, 1, 1), token_ids(1, 7, seed=3)
    cache.rollback(0, 0)
    before = {name: tensor.copy() for name, tensor in cache.state.items()}
    skip = target.skipping()
    closed = [(1, "attention"), (2, "mlp")]
    found = skip.forward(cache, 0, Step(ids.numpy()), np.array([unit not in closed for unit in skip.units]), logits=True).logits
    with torch.no_grad():
        layers_of(module)[1].self_attn.o_proj.weight.zero_()  # type: ignore[union-attr, operator]
        layers_of(module)[2].mlp.down_proj.weight.zero_()  # type: ignore[union-attr, operator]
    wanted = eager(module, ids).numpy()
    assert found is not None
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    for part in ("key", "value"):
        assert np.array_equal(cache.state[f"past.1.{part}"], before[f"past.1.{part}"])  # nothing was written for what did not run
        assert not np.array_equal(cache.state[f"past.0.{part}"], before[f"past.0.{part}"])


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """Also of quantised graphs, where scales of activations are shared between layers."""
    program = decoding(apply(raised("llama"), QuantizeWeights(format="int8")))
    target = engine(program, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "skip.onnx", "model.weights"}
    places = []
    for name in ("model.onnx", "skip.onnx"):
        model = onnx.load(tmp_path / name, load_external_data=False)
        places.append(sorted(str(t.external_data) for t in model.graph.initializer if t.external_data))
    assert places[0] == places[1]
    skip, caches = target.skipping(), (filled(target, 1), filled(target, 1))
    step = Step(token_ids(1, 3, seed=1).numpy())
    open_ = skip.forward(caches[0], 0, step, np.ones(4, dtype=bool), logits=True).logits
    assert np.array_equal(open_, target.forward(caches[1], step, logits=True).logits)  # type: ignore[arg-type]


def test_replay_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    target = engine(decoding(raised("llama")), tmp_path)
    skip, cache = target.skipping(), filled(target)
    before = {name: tensor.copy() for name, tensor in cache.state.items()}
    tokens = token_ids(2, 9).numpy()[1]
    everything = skip.replay(cache, 1, tokens[-4:], np.ones(4, dtype=bool))
    skip.replay(cache, 1, tokens[-4:], np.array([True, False, False, True]))
    assert cache.lengths.tolist() == [9, 9]
    assert all(np.array_equal(tensor[:, :, :9], before[name][:, :, :9]) for name, tensor in cache.state.items())
    whole = target.forward(target.new_cache(1, 16), Step(tokens[None])).argmax
    assert whole is not None
    assert everything.tolist() == whole[0, -4:].tolist()


def test_a_graph_without_sublayers_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        gated(onnx.ModelProto(), [])
    assert caught.value.code == "pass-refused"

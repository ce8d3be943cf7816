"""The reference backend: running graphs, and the engine contract on top of them."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from models_tiny import TOP_K, VOCAB, apply, close, decoding, eager, model, raised, token_ids
from torch import Tensor, nn

from planc.backends.reference import ReferenceEngine, empty_state, execute, probe, run, step_inputs
from planc.compiler.program import ModelInfo
from planc.compiler.trace import trace_module
from planc.passes.tap import Tap
from planc.runtime.engine import EngineSpec, Step


class _Chain(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x + 1
        second = first * 2
        return second.relu(), first


def test_run() -> None:
    x = torch.randn(3)
    program = trace_module(_Chain(), (x,), ModelInfo("chain", 0, 1))
    x.requires_grad_(True)
    out = run(program, {"x": x})
    assert torch.equal(out["output.0"], ((x + 1) * 2).relu()) and torch.equal(out["output.1"], x + 1)
    assert not out["output.0"].requires_grad


def test_a_value_that_is_sent_back_takes_the_place_of_the_other() -> None:
    x = torch.randn(3)
    steps = execute(trace_module(_Chain(), (x,), ModelInfo("chain", 0, 1)), {"x": x})
    _, value = next(steps)
    assert torch.equal(value, x + 1)
    _, value = steps.send(torch.full((3,), 2.0))
    assert torch.equal(value, torch.full((3,), 4.0))
    *_, (_, outputs) = steps
    assert outputs["output.0"].tolist() == [4.0] * 3 and outputs["output.1"].tolist() == [2.0] * 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_outputs_can_be_differentiated(family: str) -> None:
    """The same logits, and gradients that reach every weight through the operations of the dialect."""
    program, ids = raised(family), token_ids(1, 5)
    inputs = {"input_ids": ids, "position_ids": torch.arange(5)[None]}
    leaves = {n: v.clone().requires_grad_() for n, v in program.params.items() if v.is_floating_point() and v.dim() == 2}
    logits = run(program.replace(params={**program.params, **leaves}), inputs, grad=True)["logits"]
    close(logits.detach(), run(program, inputs)["logits"])
    logits.pow(2).mean().backward()  # type: ignore[no-untyped-call]
    assert all(leaf.grad is not None and float(leaf.grad.abs().max()) > 0 for leaf in leaves.values())


def test_values_are_freed_as_soon_as_nobody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace_module(_Chain(), (torch.randn(3),), ModelInfo("chain", 0, 1))
    product = next(n for n in program.main.nodes if n.target is torch.ops.aten.mul.Tensor)
    seen: list[weakref.ref[Tensor]] = []
    whole = product.target

    def watched(*args: Tensor) -> Tensor:
        out = whole(*args)  # type: ignore[operator]
        seen.append(weakref.ref(out))
        return out

    monkeypatch.setattr(product, "target", watched)
    run(program, {"x": torch.randn(3)})
    gc.collect()
    assert seen[0]() is None


def test_state_and_inputs_follow_the_program() -> None:
    program = decoding(raised("gemma3"), "fused")
    state = empty_state(program, 3, 20)
    assert list(state) == [f"past.{i}.{part}" for i in range(6) for part in ("key", "value")]
    assert all(t.shape == (3, 2, 20, 16) and float(t.abs().max()) == 0 for t in state.values())
    feeds = step_inputs(program, np.array([4, 0, 2]), Step(token_ids(3, 5).numpy(), logits_from=2))
    assert set(feeds) == {"input_ids", "position_ids", "lengths", "logits_from", "bias", "bias.8"}
    assert feeds["position_ids"].tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]
    assert feeds["bias"].shape == (3, 1, 5, 9)
    assert not step_inputs(raised("llama"), np.zeros(1, np.int64), Step(np.zeros((1, 2), np.int64))).keys() - {"input_ids", "position_ids"}


def test_spec() -> None:
    program = decoding(apply(raised("llama"), Tap(layers=(0,))), "fused")
    assert ReferenceEngine(program).spec == EngineSpec(VOCAB, 256, TOP_K, True, ("tap.0",))
    assert not ReferenceEngine(decoding(raised("llama"), "none")).spec.trees


def test_contract() -> None:
    engine = ReferenceEngine(decoding(apply(raised("llama"), Tap(layers=(0,))), "fused"))
    ids = token_ids(2, 12).numpy()
    want = eager(model("llama"), torch.from_numpy(ids))
    cache = engine.new_cache(2, 30)
    assert cache.capacity == 30 and cache.bytes() == 2 * 2 * 2 * 2 * 30 * 8 * 4
    out = engine.forward(cache, Step(ids[:, :6], logits_from=2))
    assert out.logits is None and out.top_ids is None and out.argmax is not None
    assert np.array_equal(out.argmax, want[:, 2:6].argmax(-1).numpy())
    assert out.taps["tap.0"].shape == (2, 6, 32)
    assert cache.lengths.tolist() == [0, 0]  # a pass moves no length
    again = engine.forward(cache, Step(ids[:, :6]), logits=True, top_k=True)  # and what it wrote is scratch
    close(again.logits, want[:, :6])
    assert again.top_ids is not None and np.array_equal(again.top_ids, want[:, :6].topk(TOP_K).indices.numpy())
    cache.keep(0, np.array([0, 1, 2, 3]))
    cache.keep(1, np.array([0, 2]))  # rows that were not kept are forgotten, later ones move up
    text = torch.from_numpy(ids[1:2, [0, 2, 6, 7]])
    assert cache.lengths.tolist() == [4, 2]
    parents = np.array([[-1, 0], [-1, 0]])
    close(probe_at(engine, cache, ids[:, 6:8], parents)[0], eager(model("llama"), torch.from_numpy(ids[:1, [0, 1, 2, 3, 6, 7]]))[0, -2:])
    # row 2 was rotated for the position after row 1, so its keys stand one too far: a chain's row may only be kept with its ancestors
    assert not np.allclose(probe_at(engine, cache, ids[:, 6:8], parents)[1], eager(model("llama"), text)[0, -2:].numpy(), atol=1e-3)
    cache.rollback(1, 1)
    close(probe_at(engine, cache, ids[:, 6:8], None)[1], eager(model("llama"), torch.from_numpy(ids[1:2, [0, 6, 7]]))[0, -2:])
    with pytest.raises(AssertionError):
        cache.rollback(1, 2)
    close(probe(engine.program, torch.from_numpy(ids))["logits"], want)


def probe_at(engine: ReferenceEngine, cache: object, tokens: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
    out = engine.forward(cache, Step(tokens, parents), logits=True)  # type: ignore[arg-type]
    assert out.logits is not None
    return out.logits


def test_two_caches_are_two_texts() -> None:
    engine = ReferenceEngine(decoding(raised("llama")))
    ids = token_ids(2, 8).numpy()
    one, two = engine.new_cache(1, 10), engine.new_cache(1, 12)
    for cache, text in ((one, ids[:1]), (two, ids[1:])):
        engine.forward(cache, Step(text[:, :7]))
        cache.keep(0, np.arange(7))
    for cache, text in ((two, ids[1:]), (one, ids[:1])):
        out = engine.forward(cache, Step(text[:, 7:]), logits=True)
        close(out.logits, eager(model("llama"), torch.from_numpy(text))[:, -1:])

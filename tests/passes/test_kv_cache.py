"""The pass kv_cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import (
    FAMILIES,
    POOL,
    applied,
    apply,
    before_and_after,
    close,
    decoding,
    eager,
    model,
    one_layer,
    onnx_engine,
    pooled,
    raised,
    token_ids,
)
from torch import nn

import planc
from planc.backends.onnx.engine import OnnxEngine
from planc.backends.reference import ReferenceCache, ReferenceEngine, empty_state, probe, step_inputs
from planc.backends.reference import run as execute_run
from planc.compiler.dialect import MASKED, OPS
from planc.compiler.head_classes import far_attention
from planc.compiler.passbase import Context
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.argmax import Argmax
from planc.passes.kv_cache import KvCache
from planc.passes.logits_rows import LogitsRows
from planc.passes.top_k import TopK
from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Speculative, Tree
from planc.runtime.drafters import DrafterPart, PromptLookup
from planc.runtime.engine import Cache, Engine, Step
from planc.runtime.errors import CompileError, PlanError
from planc.runtime.kv import KvPolicy, PolicyCache
from planc.runtime.loops import Stats, autoregressive, speculative

Trees = Literal["none", "fused", "split"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(KvCache(trees="fused"), one_layer()), "kv_cache.txt")


def test_golden_of_a_policy(golden: Callable[[str, str], None]) -> None:
    policy = KvPolicy.model_validate(
        {"store": {"bitmap": {"keep": 4}}, "evict": {"recent": {"capacity": 40}}, "streaming": {"heads": [[1]]}}
    )
    golden(before_and_after(KvCache(policy=policy), one_layer()), "kv_cache_policy.txt")


# a split program is the fused one but for a mark that only a backend reads, so one family is enough
@pytest.mark.parametrize(("family", "trees"), [*((f, t) for f in FAMILIES for t in ("none", "fused")), ("gemma2", "split")])
def test_equals_eager(family: str, trees: Trees) -> None:
    """Prefill, a ragged batch, a tree, decoding and a rollback give the logits of one pass without cache."""
    program = decoding(raised(family), trees)
    assert [s.split for s in program.states] == [trees == "split"] * len(program.states)
    engine = ReferenceEngine(program)
    run(engine, model(family))


def run(engine: ReferenceEngine, module: nn.Module) -> None:
    ids = token_ids(2, 24).numpy()
    texts = [list(ids[0, :11]), list(ids[1, :9])]  # what is committed
    cache = engine.new_cache(2, 40)
    out = engine.forward(cache, Step(ids[:, :11]), logits=True)
    close(out.logits, eager(module, torch.from_numpy(ids[:, :11])))
    cache.keep(0, np.arange(11))
    cache.keep(1, np.arange(9))
    if engine.spec.trees:
        parents = np.array([[-1, 0, 0, 1, 1, 3], [-1, 0, 1, 2, 0, 4]])
        check(engine, cache, module, texts, ids[:, 11:17], parents)
        for b, rows in enumerate(([0, 2], [0, 1, 2])):
            cache.keep(b, np.array(rows))
            texts[b] += [ids[b, 11 + r] for r in rows]
    check(engine, cache, module, texts, ids[:, 17:19], None)
    cache.keep(0, np.arange(2))
    texts[0] += list(ids[0, 17:19])
    cache.rollback(1, 5)
    texts[1] = texts[1][:5]
    check(engine, cache, module, texts, ids[:, 19:20], None)


def check(
    engine: ReferenceEngine,
    cache: ReferenceCache,
    module: nn.Module,
    texts: list[list[int]],
    tokens: np.ndarray,
    parents: np.ndarray | None,
) -> None:
    """Each row's logits are those of the text on the path to it."""
    out = engine.forward(cache, Step(tokens, parents), logits=True)
    assert out.logits is not None
    for b, text in enumerate(texts):
        paths: list[list[int]] = []
        for row, token in enumerate(tokens[b]):
            parent = row - 1 if parents is None else int(parents[b, row])
            paths.append([*(paths[parent] if parent >= 0 else []), int(token)])
            close(out.logits[b, row], eager(module, torch.tensor([[*text, *paths[row]]]))[0, -1])


def test_states_follow_the_graph() -> None:
    program = apply(raised("gemma3"), KvCache(trees="fused"))
    assert [(s.name, s.heads, s.key_width, s.window) for s in program.states] == [
        (f"past.{i}", 2, 16, 0 if i == 5 else 8) for i in range(6)
    ]
    assert [n for n in program.inputs if n.startswith("bias")] == ["bias.8", "bias"]  # one mask per kind of layer
    assert not any(n.startswith("bias") for n in apply(raised("gemma3"), KvCache(trees="none")).inputs)


def changed(index: int, value: object) -> Program:
    """A program whose attention has another argument."""
    edit = raised("llama").edit("test")
    node = next(n for n in edit.graph.nodes if n.target is OPS.attention.default)
    node.update_arg(index, node.args[0] if value == "bias" else value)
    return edit.done(1, 1)


@pytest.mark.parametrize(("index", "value"), [(5, False), (3, "bias")])
def test_refuses(index: int, value: object) -> None:
    with pytest.raises(CompileError) as caught:
        apply(changed(index, value), KvCache())
    assert caught.value.code == "pass-refused"
    assert "model.layers.0.self_attn" in (caught.value.node or "")


def test_refuses_no_room() -> None:
    with pytest.raises(PlanError) as refused:
        Plan.from_dict({"passes": [{"kv_cache": {"capacity": 1}}]})
    assert refused.value.code == "plan-bad-value"


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(POOL), st.sampled_from(["none", "fused", "split"]), st.integers(1, 3), st.data())
def test_property(name: str, trees: Trees, batch: int, data: st.DataObject) -> None:
    """However a text is cut into passes, its logits are those of one pass."""
    module, program = pooled(name)
    new = applied(KvCache(trees=trees), program)
    ids = token_ids(batch, data.draw(st.integers(2, 20)), seed=data.draw(st.integers(0, 99)))
    want = eager(module, ids)
    close(probe(new, ids)["logits"], want)
    engine = ReferenceEngine(apply(new, Argmax()))
    cache = engine.new_cache(batch, ids.shape[1] + data.draw(st.integers(0, 5)))
    done = 0
    while done < ids.shape[1]:
        count = data.draw(st.integers(1, ids.shape[1] - done))
        out = engine.forward(cache, Step(ids[:, done : done + count].numpy()), logits=True)
        close(out.logits, want[:, done : done + count])
        for b in range(batch):
            cache.keep(b, np.arange(count))
        done += count


# ---- policies ----

POLICIES: dict[str, dict[str, Any]] = {
    "attention_window": {"evict": {"attention_window": {"capacity": 40, "window": 8}}},
    "streaming": {"streaming": {"share": 1.0, "sink": 4, "local": 16}},
    "some streaming": {"streaming": {"heads": [[0], [0, 1]], "sink": 4, "local": 16}},
    "bfloat16": {"store": {"dense": {"dtype": "bfloat16"}}, "window": 8, "sinks": 3},
    "int8": {"store": "int8", "window": 8, "layers": [1]},
    "quantized": {"store": {"quantized": {"bits": 4, "group": 8}}, "window": 8},
    "gear": {"store": {"gear": {"bits": 2, "group": 8, "rank": 2, "outliers": 0.04, "factors": "int8"}}, "window": 8},
    "bitmap": {"store": {"bitmap": {"keep": 4, "dtype": "int8"}}, "window": 8},
    "pages": {"store": "int8", "select": {"pages": {"budget": 64}}, "window": 8, "sinks": 4},
    "low_rank": {"store": {"low_rank": {"rank": 8}}, "select": {"landmarks": {"budget": 64, "outliers": 2, "interval": 3}}, "window": 8},
    "together": {
        "evict": {"attention_window": {"capacity": 100, "window": 8}},
        "store": {"bitmap": {"keep": 4}},
        "streaming": {"heads": [[0], []], "sink": 4, "local": 16},
        "window": 8,
    },
}

#: What leaves nothing out: stores that keep all, budgets and windows that hold the whole text.
NEUTRAL: dict[str, dict[str, Any]] = {
    "evict": {"evict": {"attention_window": {"capacity": 200, "window": 8}}},
    "streaming": {"streaming": {"heads": [[0], [1]], "sink": 4, "local": 200}},
    "bitmap": {"store": {"bitmap": {"keep": 8, "dtype": "float32"}}, "window": 8},
    "window": {"store": {"gear": {"bits": 2, "group": 8}}, "window": 200},
    "rank": {"store": {"gear": {"bits": 2, "group": 8, "rank": 8}}, "window": 8},
    "pages": {"select": {"pages": {"budget": 256}}, "window": 8},
    "low_rank": {
        "store": {"low_rank": {"rank": 16, "values": "float32"}},
        "select": {"landmarks": {"budget": 256, "outliers": 2}},
        "window": 8,
    },
}


def policed(options: dict[str, Any], family: str = "llama", trees: Trees = "none") -> Program:
    return apply(raised(family), KvCache(policy=KvPolicy.model_validate(options), trees=trees), LogitsRows(), Argmax(), TopK(k=4))


def generated(engine: Engine, prompt: list[int], tokens: int, drafter: DrafterPart | None = None) -> tuple[list[int], Cache, Stats]:
    """An answer at two rows a pass, and the cache and the counts that it left."""
    held, stats = engine.new_cache(1, 250), Stats()
    if drafter is None:
        pieces = autoregressive(engine, held, [prompt], Decode(max_new_tokens=tokens, min_rows=2), stats=stats)
    else:
        tree = Tree(shape="chain", budget=6)
        decode = Decode(max_new_tokens=tokens, min_rows=2, speculative=Speculative(drafter=(drafter,), tree=tree))
        drafters = [drafter.build(engine.spec.vocab_size)]
        pieces = speculative(engine, held, [prompt], drafters, Controller(tree), decode, stats=stats)
    return [token for piece in pieces for token in piece.tokens], held, stats


@pytest.fixture(scope="module")
def plain_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OnnxEngine]:
    """The engine of a family with a plain cache, made once."""
    return cache(lambda family: onnx_engine(decoding(raised(family)), tmp_path_factory.mktemp("plain")))


def repetitive(count: int) -> list[int]:
    """A prompt that drafters guess well."""
    return (token_ids(11, seed=5).tolist() * (count // 11 + 1))[:count]


@pytest.mark.parametrize(("family", "trees", "name"), [*(("llama", "none", name) for name in POLICIES), ("gpt2", "fused", "together")])
def test_policy_verifies(family: str, trees: Trees, name: str) -> None:
    part = KvCache(policy=KvPolicy.model_validate(POLICIES[name]), trees=trees)
    close(probe(applied(part, raised(family)), token_ids(2, 12))["logits"], eager(model(family), token_ids(2, 12)))


@pytest.mark.parametrize("name", POLICIES)
def test_backends_agree_on_a_policy(name: str, tmp_path: Path) -> None:
    """Prompt, blocks that close, and selections: ONNX Runtime's logits are the reference's after many tokens."""
    program = policed(POLICIES[name], "qwen3")
    prompt, found = token_ids(90, seed=2).tolist(), []
    for engine in (ReferenceEngine(program), onnx_engine(program, tmp_path)):
        cache = engine.new_cache(1, 200)
        for start in range(0, 90, 45):
            engine.forward(cache, Step(np.array([prompt[start : start + 45]])))
            cache.keep(0, np.arange(45))
        cache.seal(0)
        for part in token_ids(5, 14, seed=3).numpy():
            out = engine.forward(cache, Step(part[None]), logits=True)
            cache.keep(0, np.arange(14))
        assert out.logits is not None
        found.append(out.logits.copy())
    close(found[1], found[0], 2e-3)  # keys that differ in the last bit may be rounded to the next code


@pytest.mark.parametrize(("family", "name"), [*(("llama", name) for name in NEUTRAL), ("gemma3", "evict"), ("gemma3", "window")])
def test_a_policy_that_leaves_nothing_out(family: str, name: str, plain_engine: Callable[[str], OnnxEngine], tmp_path: Path) -> None:
    """The tokens are those of a plain cache; bit for bit the same logits where the attention is the same."""
    prompt = token_ids(130, seed=4).tolist()
    plain, other = plain_engine(family), onnx_engine(policed(NEUTRAL[name], family), tmp_path)
    want, cache, _ = generated(plain, prompt, 60)
    have, policy_cache, _ = generated(other, prompt, 60)
    assert have == want
    last = [e.forward(c, Step(np.array([[5, 6]])), logits=True).logits for e, c in ((plain, cache), (other, policy_cache))]
    assert last[0] is not None and last[1] is not None
    if name == "evict":
        assert np.array_equal(last[1], last[0])
    else:
        close(last[1], last[0], 2e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_speculation_keeps_the_text_of_a_policy(name: str, tmp_path: Path) -> None:
    """Token by token what the same policy gives without drafts, and drafts are accepted."""
    engine = onnx_engine(policed(POLICIES[name]), tmp_path)
    prompt = repetitive(100)
    plain, one, _ = generated(engine, prompt, 80)
    drafted, other, stats = generated(engine, prompt, 80, PromptLookup())
    assert drafted == plain
    assert sum(stats.accepted.values()) < len(plain) - 10
    assert isinstance(one, PolicyCache) and isinstance(other, PolicyCache)
    assert one.usage() == other.usage()


def test_lookahead_reads_the_drafts(tmp_path: Path) -> None:
    """Drafted rows judge the prompt and are gone; the plain run with the same drafters gives the same text."""
    options = {"evict": {"lookahead": {"capacity": 40, "window": 8, "tokens": 6}}}
    engine = onnx_engine(policed(options), tmp_path)
    assert engine.spec.guesses == 6
    _, cache, stats = generated(engine, repetitive(120), 40, PromptLookup())
    assert isinstance(cache, PolicyCache) and cache.rows(0, 1) == 40 + 40 - 1 and stats.purposes["prefill"] == 2
    short, _, _ = generated(engine, repetitive(30), 40, PromptLookup())
    plain, _, _ = generated(onnx_engine(decoding(raised("llama")), tmp_path), repetitive(30), 40)
    assert short == plain  # a prompt that fits is left alone


def test_an_evicted_row_is_as_if_masked(tmp_path: Path) -> None:
    """What remains keeps its positions: the logits are those of dense attention in which nobody sees the row."""
    program = policed({"evict": {"recent": {"capacity": 20, "window": 8}}})
    engine, ids = ReferenceEngine(program), token_ids(1, 31, seed=7)
    cache = engine.new_cache(1, 60)
    engine.forward(cache, Step(ids[:, :30].numpy()))
    cache.keep(0, np.arange(30))
    cache.seal(0)
    assert isinstance(cache, PolicyCache) and cache.rows(0, 1) == 20
    have = engine.forward(cache, Step(ids[:, 30:].numpy()), logits=True).logits
    dense = decoding(raised("llama"), "fused")
    state = empty_state(dense, 1, 60)
    first = step_inputs(dense, np.array([0]), Step(ids[:, :30].numpy()))
    out = execute_run(dense, {**first, **state})
    state = {name: out[f"present.{name.partition('.')[2]}"] for name in state}
    last = step_inputs(dense, np.array([30]), Step(ids[:, 30:].numpy()))
    last["bias"][..., :10] = MASKED
    close(have, execute_run(dense, {**last, **state})["logits"])


def test_heads_that_look_back_least_stream() -> None:
    far = far_attention(raised("llama"), token_ids(2, 64))
    context = Context(token_ids(2, 64))
    program = KvCache(policy=KvPolicy.model_validate({"streaming": {"share": 0.5}})).apply(raised("llama"), context)
    streaming = {s.name: s.heads for s in program.states if s.layer is not None and s.layer.group == 2}
    assert sum(streaming.values()) == 2 and 0.0 < min(float(f.min()) for f in far) < max(float(f.max()) for f in far) < 1.0
    kept = {s.name: s.heads for s in program.states if s.layer is not None and s.layer.group == 1}
    worst = min((float(f[h]), layer) for layer, f in enumerate(far) for h in range(2))[1]
    assert f"past.{worst}s" in streaming and sum(kept.values()) == 2


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"store": "int8", "layers": [7]}, "skip-out-of-range"),
        ({"streaming": {"heads": [[0], [2]]}}, "skip-out-of-range"),
        ({"store": {"bitmap": {"keep": 9}}}, "pass-refused"),
        ({"store": {"quantized": {"group": 64}}}, "pass-refused"),
    ],
)
def test_refuses_a_policy_for_another_model(options: dict[str, Any], code: str) -> None:
    with pytest.raises(CompileError) as caught:
        policed(options)
    assert caught.value.code == code and caught.value.fix


def test_refuses_a_policy_where_all_layers_have_a_window() -> None:
    with pytest.raises(CompileError, match="no layer has the cache policy") as caught:
        policed({"store": "int8"}, "mistral")
    assert caught.value.code == "pass-refused"


DRAFTS = {"drafter": {"prompt_lookup": {}}}


@pytest.mark.parametrize(
    ("policy", "rest", "code", "words"),
    [
        ({"store": "int8"}, {"decode": {"batching": {}}}, "plan-conflict", "each has its own"),
        ({"evict": {"lookahead": {"capacity": 99}}}, {}, "plan-requires", "what follows the prompt"),
        ({"store": "int8"}, {"decode": {"speculative": {"drafter": {"self_skip": {}}}}}, "plan-conflict", "positions"),
        ({"store": "int8"}, {"decode": {"speculative": {**DRAFTS, "tree": {"shape": "tree"}}}}, "plan-conflict", "bitwise trees"),
        (
            {"select": {"pages": {"budget": 64, "interval": 4}}},
            {"decode": {"speculative": {**DRAFTS, "tree": {"budget": 4}}}},
            "plan-conflict",
            "4 tok",
        ),
        ({"store": "int8"}, {"decode": {"speculative": {**DRAFTS, "tree": {"budget": 64}}}}, "plan-conflict", "after 64 tokens"),
        ({"select": {"landmarks": {"budget": 64}}}, {"decode": {"speculative": DRAFTS}}, "plan-conflict", "after every token"),
        ({"store": {"low_rank": {"rank": 4}}}, {}, "plan-conflict", "would have to be read"),
    ],
)
def test_refuses_what_excludes_a_policy(policy: dict[str, Any], rest: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        Plan.from_dict({"passes": [{"kv_cache": {"policy": policy}}], **rest})
    assert caught.value.code == code and caught.value.plan and caught.value.fix


@pytest.mark.parametrize("name", ["bitmap", "together"])
def test_a_server_under_a_policy(name: str, tmp_path: Path) -> None:
    """From plan to artifact to answers: many at once, each as alone."""
    data = {"passes": [{"kv_cache": {"policy": POLICIES[name]}}], "target": {"capacity": 240}, "decode": {"speculative": DRAFTS}}
    planc.compile(model("llama"), data, out=tmp_path / "a", measure=False)
    exe = planc.load(tmp_path / "a")
    assert isinstance(exe, planc.Executable)
    prompts = [repetitive(120), token_ids(40, seed=8).tolist(), repetitive(77)]
    alone = [exe.generate(prompt, max_new_tokens=50).ids for prompt in prompts]  # type: ignore[union-attr]
    assert alone == [exe.plain().generate(prompt, max_new_tokens=50).ids for prompt in prompts]  # type: ignore[union-attr]
    assert alone == [answer.ids for answer in exe.generate(prompts, max_new_tokens=50)]  # type: ignore[union-attr]
    with exe.serve(max_batch=2, capacity=200) as server:
        assert alone == [handle.result().ids for handle in [server.submit(p, max_new_tokens=50) for p in prompts]]

"""Methods of all stages in one plan: dropped sublayers, pruned units, 8-bit products and drafts."""

from __future__ import annotations

from pathlib import Path

import pytest
from models_tiny import MAX_LENGTH, make, token_ids

import planc
from planc.compiler.compile import rewrite
from planc.compiler.plan import Plan
from planc.runtime.executable import Executable

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/combined.yaml"
PLAN = {
    "passes": [
        {"skip_layers": {"attention": [1], "mlp": [2]}},
        {"prune": {"score": "fluctuation", "granularity": "units", "allocation": "everywhere", "sparsity": 0.3, "repair": "mean_bias"}},
        {"smooth": {}},
        {"quantize_weights": {"format": "int8"}},
    ],
    "decode": {"speculative": {"drafter": [{"prompt_lookup": {}}, {"token_recycling": {}}]}},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_everything_at_once(family: str, tmp_path: Path) -> None:
    """Compiles, drafts without changing its text, and reports a chain of effects that adds up to the file."""
    module = make(family, **({"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}))
    exe = planc.compile(module, PLAN, out=tmp_path / "made", measure=False)
    assert isinstance(exe, Executable)
    prompt = token_ids(12).tolist() * 2
    made, plain = (run.generate(prompt, max_new_tokens=40) for run in (exe, exe.plain()))
    assert made.ids == plain.ids  # type: ignore[union-attr]
    assert made.stats.passes <= plain.stats.passes  # type: ignore[union-attr]

    report = exe.report()
    effects = {effect["name"]: effect for effect in report["contract"]["effects"]}
    order = ["skip_layers", "prune", "realise", "fuse_projections", "smooth", "quantize_weights", "kv_cache", "top_k"]
    assert [name for name in effects if name in order] == order[:-1] + (["top_k"] if "top_k" in effects else [])
    steps = list(effects.values())
    for before, after in zip(steps, steps[1:], strict=False):
        assert after["params_bytes_before"] == before["params_bytes_after"]
        assert after["nodes_before"] == before["nodes_after"]
    shrinking = [effects[name] for name in ("skip_layers", "realise", "quantize_weights")]
    assert all(step["params_bytes_after"] < step["params_bytes_before"] for step in shrinking)
    planned = rewrite(module, PLAN)
    assert planned.program.bytes() == steps[-1]["params_bytes_after"]
    assert len(planned.program.states) == 3  # one attention is gone, and with it its part of the cache
    bytes_, files = steps[-1]["params_bytes_after"], report["files"]
    tables = 2 * MAX_LENGTH * 4 * 4 if family == "llama" else 0  # cos and sin of every position, which the graph had computed
    assert files["model.weights"] <= bytes_ + tables + 4096 * 8  # on pages of their own
    assert bytes_ <= files["model.weights"] + files["model.onnx"]  # small ones lie in the graph
    assert report["bytes"] == sum(report["files"].values())


def test_the_example_is_that_plan() -> None:
    """On the real model the same passes run, in the same order."""
    plan = Plan.from_yaml(EXAMPLE)
    assert [part.key for part in plan.passes] == [next(iter(part)) for part in PLAN["passes"]]  # type: ignore[union-attr]
    assert plan.decode.speculative is not None and len(plan.decode.speculative.drafter) == 2

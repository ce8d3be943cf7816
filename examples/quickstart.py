"""A plan in Python: compile, look at what changed, generate, compare with plain decoding. Takes about a minute on two cores."""

from __future__ import annotations

import planc

# 1. A plan is data. This one is examples/fast-cpu.yaml; `planc.Plan.from_yaml(path)` reads the file itself.
plan = planc.Plan.from_dict(
    {
        "passes": ["smooth", {"quantize_weights": {"format": "int8"}}],
        "decode": {"speculative": {"drafter": [{"prompt_lookup": {"max_ngram": 3}}, "token_recycling"]}},
    }
)

# 2. Compile: trace the model, apply the passes, lower to ONNX, probe exactness and measure the cost of a pass.
exe = planc.compile("smollm2-135m", plan, progress=True)

# 3. The contract says what every pass did, and how exact a verified draft is.
for effect in exe.contract.effects:
    moved = effect.largest_difference
    print(f"{effect.name:<17} {effect.nodes_after:>4} nodes, largest logit change {'-' if moved is None else format(moved, '.2g')}")
print("exactness:", exe.report()["exactness_line"])

# 4. Generate, and once more without drafts: the same tokens, in more passes.
prompt = "Explain in three sentences why the sky is blue."
for chunk in exe.stream(prompt, max_new_tokens=64):
    print(chunk.text, end="", flush=True)
fast = exe.generate(prompt, max_new_tokens=64)
plain = exe.plain().generate(prompt, max_new_tokens=64)
print(f"\n\nspeculative {fast.stats.tokens_per_s:.0f} tokens/s in {fast.stats.passes} passes")
print(f"plain       {plain.stats.tokens_per_s:.0f} tokens/s in {plain.stats.passes} passes")
print("the same tokens" if fast.ids == plain.ids else "OTHER TOKENS: please report this")

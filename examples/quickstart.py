"""A plan in Python: compile, look at what changed, generate, compare with plain decoding."""

from __future__ import annotations

import planc

# 1. A plan is data. This one is like examples/fast-cpu.yaml; `planc.Plan.from_yaml(path)` reads a file.
plan = planc.Plan.from_dict(
    {
        "passes": ["smooth", {"quantize_weights": {"format": "int8"}}],
        "decode": {"speculative": {"drafter": [{"prompt_lookup": {"max_ngram": 3}}, "token_recycling"]}},
    }
)

# 2. Compile: trace the model, apply the passes, lower to ONNX, probe exactness and measure the cost of a pass.
exe = planc.compile("smollm2-135m", plan, progress=True)

# 3. The contract says what every pass did, and how exact verified drafts are.
for effect in exe.contract.effects:
    moved = effect.largest_difference
    print(f"{effect.name:<17} {effect.nodes_after:>4} nodes, largest logit change {'-' if moved is None else format(moved, '.2g')}")
print("exactness:", exe.report()["exactness_line"])

# 4. Generate, and once more without drafts: the tokens must be equal, whatever the speed.
prompt = "Explain in three sentences why the sky is blue."
fast = exe.generate(prompt, max_new_tokens=64)
plain = exe.plain().generate(prompt, max_new_tokens=64)
print(f"\n{fast.text}\n")
print(f"speculative: {fast.stats.passes} passes, {fast.stats.end_to_end_tokens_per_s:.1f} tokens/s")
print(f"plain:       {plain.stats.passes} passes, {plain.stats.end_to_end_tokens_per_s:.1f} tokens/s")
print("the same tokens" if fast.ids == plain.ids else "OTHER TOKENS: please report this")

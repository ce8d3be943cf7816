"""What a cache policy excludes, found before anything is traced (papers/A4 section 13). What its own parts exclude stands in `KvPolicy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planc.runtime.drafters import SelfSkip
from planc.runtime.errors import PlanError

if TYPE_CHECKING:
    from planc.compiler.plan import Plan


def check_cache(plan: Plan) -> None:
    """Refuse a plan that asks for what a cache with a policy cannot do. Raises PlanError."""
    from planc.passes.kv_cache import KvCache

    at, cache = next(((i, p) for i, p in enumerate(plan.passes) if isinstance(p, KvCache)), (0, None))
    if cache is None or (policy := cache.policy) is None:
        return
    place, speculative = plan.where("passes", at) or f"passes[{at}].kv_cache", plan.decode.speculative

    def refuse(message: str, fix: str, code: str = "plan-conflict") -> PlanError:
        return PlanError(code, message, plan=place, fix=fix)

    if plan.decode.batching is not None:
        message = "sequences share a pass where their caches have one shape, and under a policy each has its own"
        raise refuse(message, "remove `batching`, or the policy")
    if any(p.key == "layer_parallel" for p in plan.passes):
        raise refuse("layer_parallel joins the caches of several layers, and a policy treats them apart", "remove one of the two")
    if speculative is None:
        if policy.guesses:
            message = "lookahead asks the plan's drafters what follows the prompt, and the plan has none"
            raise refuse(message, "add a drafter to decode.speculative; `tree: {budget: 0}` lets it do nothing else", "plan-requires")
        return
    if any(isinstance(part, SelfSkip) for part in speculative.drafter):
        raise refuse("self_skip reads the cache by positions, and under a policy slots are not positions", "use another drafter")
    if speculative.tree.shape == "tree" and plan.exactness == "bitwise":
        message = "bitwise trees stop at multiples of 256 slots, and under a cache policy slots are not positions"
        raise refuse(message, "use `tree: {shape: chain}`, or `exactness: tokens`")
    longest, budget = policy.longest_pass - 1, speculative.tree.budget
    if longest == 0 and budget != 0:
        message = "what is read is selected anew after every token, so that no row of a draft sees what it would see in plain decoding"
        raise refuse(message, "give the selection an `interval` of 2 or more, or remove `speculative`")
    if budget != "auto" and budget > longest:
        message = f"drafts of {budget} tokens cross a change of what is visible, which comes after {longest + 1} tokens at the latest"
        raise refuse(message, f"use a budget of at most {longest}, or auto")

"""Paper 43, SWIFT: the five working conditions of its card, on SmolLM2-135M and on a copy of it made redundant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import planc
from planc.backends.onnx.engine import OnnxCache, OnnxEngine, OnnxSkipEngine
from planc.compiler.bench import load_prompts
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.skip_fit import fit_skip
from planc.compiler.store import open_plan
from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Tree
from planc.runtime.drafters import Host, SelfSkip
from planc.runtime.drafters.self_skip import SkipDrafter, alternating, free_units
from planc.runtime.drafters.serving_search import Gates, Serving, ServingSearch
from planc.runtime.drafters.skip_search import chain_speed
from planc.runtime.engine import Ints, Step
from planc.runtime.executable import Executable, Generation
from planc.runtime.loops import Stats, speculative
from planc.runtime.text import Text
from planc_paper_checks.common import MIXED, MODEL, chats

PLAN = ROOT / "examples/papers/43-swift.yaml"
WINDOW = 40  # newest tokens of an answer on which sets are scored
SETS = 240


@dataclass(frozen=True)
class _Place:
    """A cache with a prompt and the model's own answer, the answer's tokens at its end, and what follows each of them."""

    cache: OnnxCache
    tokens: Ints
    following: Ints


class _Target:
    """The plan's target, with what is needed to score sets."""

    def __init__(self, exe: Executable, prompts: Sequence[list[int]]) -> None:
        assert isinstance(exe.engine, OnnxEngine)
        self.exe, self.engine, self.prompts = exe, exe.engine, prompts
        self.skip: OnnxSkipEngine = exe.engine.skipping()
        self.free = free_units(self.skip.units)

    def places(self) -> list[_Place]:
        found = []
        for ids in self.prompts:
            answer = self.exe.plain().generate(ids, max_new_tokens=WINDOW + 1)
            assert isinstance(answer, Generation)
            text, count = [*ids, *answer.ids], len(answer.ids) - 1
            cache = self.engine.new_cache(1, len(text) + 8)
            self.engine.forward(cache, Step(np.array([text[:-1]])))
            cache.keep(0, np.arange(len(text) - 1))
            found.append(_Place(cache, np.array(text[-count - 1 : -1]), np.array(text[-count:])))
        return found

    def match(self, gates: Gates, places: Sequence[_Place]) -> float:
        """Share of the answers' tokens that the target guesses with these gates."""
        return float(np.concatenate([self.skip.replay(p.cache, 0, p.tokens, gates) == p.following for p in places]).mean())

    def speed(self, match: float, gates: Gates) -> float:
        """Decoding speed with chains against plain, by measured cost."""
        cost, draft = self.exe.contract.cost, self.skip.pass_ms(gates)
        assert cost is not None and draft is not None
        return chain_speed(match, draft, lambda rows: cost.ms(max(rows, self.exe.min_rows), 128, 1))

    def run(
        self,
        ids: Sequence[int],
        gates: Gates,
        part: SelfSkip,
        budget: int,
        tokens: int,
        each: Callable[[Any, list[int]], None] | None = None,
    ) -> tuple[list[int], Stats]:
        """The answer with drafts by one set, and what it took; `each` is shown the cache and the text after every round."""
        drafts = SkipDrafter(Host(self.engine, tuple(self.exe.eos_ids), None, self.exe.min_rows), self.skip, gates, part)
        cache, stats, text = self.engine.new_cache(1, len(ids) + tokens + 64), Stats(), list(ids)
        controller, decode = Controller(Tree(shape="chain", budget=budget)), Decode(max_new_tokens=tokens, min_rows=self.exe.min_rows)
        for piece in speculative(self.engine, cache, [ids], [drafts], controller, decode, eos=self.exe.eos_ids, stats=stats):
            text += piece.tokens
            if each is not None:
                each(cache, text)
        return text[len(ids) :], stats


@paper(43)
def swift() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe, _ = open_plan(PLAN, MODEL)
    prompts = chats(exe, MIXED, 10)
    target = _Target(exe, prompts)
    places = target.places()
    yield _identical(target)
    yield _cache(target)
    item, _ = _search(target, places)
    yield item
    yield _decision(target, places)
    yield _stop_rule(target, places)


def _identical(target: _Target) -> Item:
    """Any set, and a set that changes while it serves."""
    units, plain = len(target.free), target.exe.plain()
    answers = [plain.generate(ids, max_new_tokens=48).ids for ids in target.prompts[:4]]  # type: ignore[union-attr]
    some = np.random.default_rng(0).random(units) < 0.7
    sets = {"nothing out": np.ones(units, dtype=bool), "all out": ~target.free, "a random set": some | ~target.free}
    fixed, searched = SelfSkip(min_p=0.0), SelfSkip(min_p=0.0, search=Serving(window=8))
    cases = {**{name: (gates, fixed) for name, gates in sets.items()}, "searched": (alternating(target.skip.units, 0.45), searched)}
    same, accepted = {}, {}
    for name, (gates, part) in cases.items():
        found = [target.run(ids, gates, part, 5, 48) for ids in target.prompts[:4]]
        same[name] = sum(a == b for (a, _), b in zip(found, answers, strict=True))
        drafted = sum(stats.drafted_by["self_skip"] for _, stats in found)
        accepted[name] = round(sum(stats.accepted_by["self_skip"] for _, stats in found) / max(1, drafted), 4)
    passed = set(same.values()) == {len(answers)} and accepted["nothing out"] == 1.0
    return Item(
        1,
        "greedy output is identical with any set; with nothing left out all drafts are accepted",
        passed,
        {"same": same, "accepted": accepted},
    )


def _cache(target: _Target) -> Item:
    """The cache after every round against a prefill of the same text, in passes of as many rows."""
    largest, rounds = 0.0, 0

    def compare(cache: OnnxCache, text: list[int]) -> None:
        nonlocal largest, rounds
        length = int(cache.lengths[0])
        fresh = target.engine.new_cache(1, cache.capacity)
        for start in range(0, length, 32):
            part = text[start : min(start + 32, length)]
            rows = part + part[-1:] * (2 - len(part))  # a single row takes other kernels
            target.engine.forward(fresh, Step(np.array([rows])))
            fresh.keep(0, np.arange(len(part)))
        for name, tensor in cache.state.items():
            largest = max(largest, float(np.abs(tensor[:, :, :length] - fresh.state[name][:, :, :length]).max()))
        rounds += 1

    for ids in target.prompts[:2]:
        target.run(ids, alternating(target.skip.units, 0.45), SelfSkip(min_p=0.0), 5, 24, compare)
    return Item(
        2, "after every round keys and values equal a fresh prefill", largest <= 1e-4, {"rounds": rounds, "largest_difference": largest}
    )


def _found(target: _Target, places: Sequence[_Place], ratio: float, sets: int) -> ServingSearch:
    """The runtime's search, over the answers to the even prompts at once."""
    options = Serving(ratio=ratio, stop=2.0, most=sets, patience=sets)
    search = ServingSearch(options, target.free, alternating(target.skip.units, ratio))
    while not search.done:
        gates = search.next()
        search.learn(gates, target.match(gates, places[::2]))
    return search


def _search(target: _Target, places: Sequence[_Place]) -> tuple[Item, Gates]:
    start, search = alternating(target.skip.units, 0.45), _found(target, places, 0.45, SETS)
    before, after = (target.match(gates, places[1::2]) for gates in (start, search.best))
    figures = {"sets": search.tried, "left_out": int((~start).sum()), "start": round(before, 4), "found": round(after, 4)}
    return Item(3, "a search over >= 200 sets raises the match rate on other text by >= 0.10", after - before >= 0.1, figures), search.best


def _decision(target: _Target, places: Sequence[_Place]) -> Item:
    """The gain by measured cost over the ratio, what compile decides, and a model with layers that hardly do anything."""
    gains, matches = {}, {}
    for ratio in (0.1, 0.2, 0.3, 0.45):
        best = _found(target, places, ratio, 60).best
        matches[str(ratio)] = round(target.match(best, places[1::2]), 4)
        gains[str(ratio)] = round(target.speed(matches[str(ratio)], best), 4)
    text = target.exe.text.encode(" ".join(prompt.text for prompt in load_prompts(str(MIXED), 20)))
    part, found = fit_skip(SelfSkip(), target.engine, text, target.exe.contract, lambda note: None)
    chosen = found["self_skip"]
    stops = (chosen["left_out"] == 0) == (not part.attention and not part.mlp) and (chosen["left_out"] > 0 or max(gains.values()) < 1.02)
    redundant = _redundant(target.prompts[:4])
    passed = stops and redundant["gain"] > 1.1 and redundant["same"] == 4
    what = "compile takes the ratio that pays, or none; > 1.1 on a model with idle layers"
    return Item(4, what, passed, {"match": matches, "gain": gains, "compile": chosen, "redundant": redundant})


def _redundant(prompts: Sequence[list[int]]) -> dict[str, Any]:
    """SmolLM2 whose layers 6..23 add next to nothing, by a plan that lets compile search; tokens per second against plain, in turns."""
    model = load_model(MODEL)
    module = model.module
    with torch.no_grad():
        for layer in module.model.layers[6:24]:  # type: ignore[union-attr, index]
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    plan = {
        "passes": [{"quantize_weights": {"format": "int8"}}],
        "decode": {"speculative": {"drafter": ["self_skip"], "tree": {"shape": "chain"}}},
    }
    files = model.tokenizer_files
    exe = planc.compile(module, plan, tokenizer=next(iter(files.values())).parent if files else None)
    assert isinstance(exe.text, Text)
    plain, seconds, tokens, same = exe.plain(), [0.0, 0.0], [0, 0], 0
    for ids in prompts:
        answers = [e.generate(ids, max_new_tokens=96) for e in (exe, plain)]
        same += answers[0].ids == answers[1].ids  # type: ignore[union-attr]
        for i, answer in enumerate(answers):
            seconds[i] += answer.stats.seconds  # type: ignore[union-attr]
            tokens[i] += len(answer.ids)  # type: ignore[union-attr]
    gain = (tokens[0] / seconds[0]) / (tokens[1] / seconds[1])
    return {"gain": round(gain, 4), "same": same, **(exe.report()["self_skip"] or {})}


def _stop_rule(target: _Target, places: Sequence[_Place]) -> Item:
    """Drafts that end behind an unsure guess, against drafts of one length, two more than the mean of those."""
    gates = _found(target, places, 0.1, 60).best

    def drafts(part: SelfSkip, budget: int) -> dict[str, float]:
        every = [target.run(ids, gates, part, budget, 64)[1] for ids in target.prompts[:6]]
        rounds = sum(sum(stats.accepted.values()) for stats in every)
        made, right = (sum(getattr(stats, name)["self_skip"] for stats in every) for name in ("drafted_by", "accepted_by"))
        return {"drafted": made / rounds, "wasted": (made - right) / rounds, "per_pass": 1 + right / rounds}

    stopped = drafts(SelfSkip(min_p=0.0, confidence=0.8), 25)
    fixed = drafts(SelfSkip(min_p=0.0), round(stopped["drafted"]) + 2)
    passed = stopped["wasted"] <= 0.7 * fixed["wasted"] and stopped["per_pass"] >= 0.95 * fixed["per_pass"]
    figures = {name: {key: round(value, 3) for key, value in found.items()} for name, found in (("stopped", stopped), ("fixed", fixed))}
    return Item(5, "the stop rule wastes >= 30 % fewer drafts at as many tokens per pass", passed, figures)

"""Paper 28, RAPID: the five working conditions of its card, on SmolLM2-135M. Its 2048 positions stand in for the card's longer documents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.store import open_plan
from planc.runtime.acceptance import rejected, transferred
from planc.runtime.contract import CostTable
from planc.runtime.decode import Control, Speculative, Transfer, Tree
from planc.runtime.drafters import Host, Retrieval
from planc.runtime.drafters import retrieval as module
from planc.runtime.drafters.base import Loaded
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.engine import Cache
from planc.runtime.executable import Executable, Generation
from planc.runtime.sampling import probabilities

MODEL = "smollm2-135m"
PLAN = ROOT / "examples/papers/28-rapid.yaml"
DOCUMENT, TOKENS, GUESSES = 1800, 64, 4
STRENGTHS = (0.0, 1.0, 3.0, 10.0)
SHELVES = ("third shelf from the left", "broken piano", "sacks of barley", "stuffed heron")
VISITORS = ("visitors sign the green ledger", "the bell is rung twice", "no boat may leave the quay", "the shutters stay closed")
PLACES = ("north archive", "glass tower", "river depot", "old observatory")


@dataclass(frozen=True)
class _Question:
    ids: list[int]
    answer: str


@paper(28)
def rapid() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    base, _ = open_plan(PLAN, MODEL)
    questions = _questions(base)
    plain = [_answer(base.plain(), question.ids) for question in questions]
    forced = [_answer(_variant(base), question.ids) for question in questions]
    yield _identical(base, questions, plain, forced)
    yield _acceptance(base, questions, forced)
    yield _passes(base, questions, forced)
    yield _bounded(base, questions, plain)
    yield _streams(base, questions[0].ids)


def _questions(base: Executable) -> list[_Question]:
    """Documents of running text, with a sentence that the question asks for at different depths."""
    file = Path(os.environ.get("PLANC_DATA", ROOT.parent / "shared/data"), "wikitext2/valid.txt")
    text = base.text.encode(file.read_text(encoding="utf-8")[:60_000], special=False)
    found = []
    for i, place in enumerate(PLACES):
        code = 48213 + 1711 * i
        needle = (
            f" The keeper of the {place} wrote that the iron door opens with the code {code}, that lamp oil is kept behind the {SHELVES[i]}, "
            f"and that {VISITORS[i]} before noon. "
        )
        document = text[i * DOCUMENT : (i + 1) * DOCUMENT]
        cut = DOCUMENT * (i + 1) // (len(PLACES) + 1)
        whole = base.text.decode(document[:cut]) + needle + base.text.decode(document[cut:])
        question = f"Copy from the text, word for word, the sentence that begins: The keeper of the {place} wrote"
        found.append(_Question(base.text.apply_chat([{"role": "user", "content": f"{whole}\n\n{question}"}]), str(code)))
    return found


def _variant(base: Executable, transfer: float | None = None, **options: Any) -> Executable:
    """The plan's drafter, made to draft `GUESSES` tokens whatever it costs; with a `transfer` of this strength."""
    assert base.decode.speculative is not None
    part = base.decode.speculative.drafter[0].model_dump() | {"min_p": 0.0, **options}
    if transfer is not None:
        part["builder"] = "chain"
    speculative = Speculative(
        drafter=(Retrieval.model_validate(part),),
        tree=Tree(budget=GUESSES, shape="chain", depth=GUESSES),
        controller=Control(),
        transfer=None if transfer is None else Transfer(strength=transfer),
    )
    decode = base.decode.model_copy(update={"speculative": speculative, "min_rows": base.min_rows})
    return Executable(base.engine, base.text, decode, base.contract, base.manifest, base.directory)


def _answer(exe: Executable, ids: Sequence[int], **options: Any) -> Generation:
    answer = exe.generate(list(ids), max_new_tokens=TOKENS, **options)
    assert isinstance(answer, Generation)
    return answer


def _rate(answers: Sequence[Generation]) -> float:
    """Accepted by tested guesses: behind the first wrong guess of a round none is tested."""
    accepted = sum(count * times for answer in answers for count, times in answer.stats.accepted.items())
    wrong = sum(times for answer in answers for count, times in answer.stats.accepted.items() if count < GUESSES)
    return round(accepted / max(1, accepted + wrong), 4)


def _identical(base: Executable, questions: list[_Question], plain: list[Generation], forced: list[Generation]) -> Item:
    sampled = {"temperature": 0.8, "seed": 5}
    same = {
        "greedy": sum(a.ids == b.ids for a, b in zip(forced, plain, strict=True)),
        "transfer 0": sum(_answer(_variant(base, 0.0), q.ids).ids == b.ids for q, b in zip(questions, plain, strict=True)),
        "sampled": sum(_answer(_variant(base), q.ids, **sampled).ids == _answer(base.plain(), q.ids, **sampled).ids for q in questions),
    }
    law = max(_distance(p, _law(p, q, 0.0)) for p, q in _toys())
    passed = set(same.values()) == {len(questions)} and law < 1e-9
    return Item(
        1, "without transfer the text is the plain one", passed, {"prompts": len(questions), **same, "law_distance": round(law, 12)}
    )


def _toys() -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    rng = np.random.default_rng(0)
    return [(rng.dirichlet(np.full(12, a)), rng.dirichlet(np.full(12, b))) for a in (0.1, 1.0, 5.0) for b in (0.1, 1.0, 5.0)]


def _law(p: NDArray[np.float64], q: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """The law of the token committed after a row with a draw."""
    moved = transferred(p, q, strength, 0.1)
    accepted, rest = np.minimum(q, moved), rejected(p, q, moved)
    return accepted + (1.0 - accepted.sum()) * (rest / rest.sum() if rest.any() else p)


def _distance(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float(np.abs(p - q).sum() / 2)


def _acceptance(base: Executable, questions: list[_Question], forced: list[Generation]) -> Item:
    """The control draws as many chunks at random, without the one that holds the answer."""
    rng = Random(0)

    def blind(chunks: Sequence[Sequence[int]], query: Sequence[int], most: int) -> list[int]:
        found = set(module_retrieve(chunks, query, most))
        return sorted(rng.sample([i for i in range(len(chunks)) if i not in found], most))

    module_retrieve, exe = module.retrieve, _variant(base)
    with patch.object(module, "retrieve", blind):
        control = [_answer(exe, question.ids) for question in questions]
    short = _short(base, questions[0].ids)
    share = len(short) / len(questions[0].ids)
    retrieved = sum(question.answer in base.text.decode(_short(base, question.ids)) for question in questions)
    rate, without = _rate(forced), _rate(control)
    passed = share <= 1 / 6 and rate >= 0.5 and without <= 0.8 * rate
    figures = {"prompt": len(questions[0].ids), "share_of_keys": round(share, 4), "answers_retrieved": retrieved}
    figures |= {"acceptance": rate, "acceptance_of_random_chunks": without}
    return Item(2, "draft keys <= 1/6, acceptance >= 0.5, markedly less with random chunks", passed, figures)


def _drafter(base: Executable) -> module.RetrievalDrafter:
    assert base.decode.speculative is not None
    return Retrieval.model_validate(base.decode.speculative.drafter[0].model_dump()).build_for(Host(base.engine))


def _short(base: Executable, ids: list[int]) -> list[int]:
    """What the draft sees of a prompt."""
    source = module.ShortSource(Loaded(base.engine, base.capacity))
    source.skipped = _drafter(base)._skipped(ids)
    return source.short(ids)


def _passes(base: Executable, questions: list[_Question], forced: list[Generation]) -> Item:
    """Passes for 64 tokens, and where the price of drafting would be earned back by this acceptance."""
    cost, rate = base.contract.cost, _rate(forced)
    assert cost is not None and base.decode.speculative is not None
    per_64 = 64 / float(np.mean([answer.stats.tokens_per_pass for answer in forced]))
    short = base.decode.speculative.drafter[0].model_dump()["context"]
    lengths = [2**i for i in range(9, 18)]
    crossover = next((length for length in lengths if _speedup(cost, rate, length, short) > 1.0), None)
    auto = [_answer(base, question.ids) for question in questions[:2]]
    drafted = sum(answer.stats.drafted_by.get("retrieval", 0) for answer in auto)
    pays = _speedup(cost, rate, len(questions[0].ids), short) > 1.0
    figures = {"passes_per_64": round(per_64, 2), "pays_from_tokens": crossover, "drafted_by_the_plan": drafted, "pays_here": pays}
    figures["expected_speed_here"] = round(_speedup(cost, rate, len(questions[0].ids), short), 4)
    return Item(
        3,
        "<= 40 passes per 64 tokens; drafts only where the short pass is measured to pay",
        per_64 <= 40 and (pays or drafted <= 32),
        figures,
    )


def _speedup(cost: CostTable, rate: float, past: int, short: int) -> float:
    """Speed against plain decoding with drafts of the best length, the draft being the target over a short context."""

    def of(n: int) -> float:
        return sum(rate**i for i in range(n + 1)) / (n * cost.ms(1, short) + cost.ms(n + 1, past))

    return max(of(n) for n in range(1, GUESSES + 1)) * cost.ms(1, past)


def _bounded(base: Executable, questions: list[_Question], plain: list[Generation]) -> Item:
    """KL(law | p) after every token of the plain answers, and whether the answer is still found with the strongest transfer."""
    pairs = [pair for question, answer in zip(questions[:2], plain, strict=False) for pair in _pairs(base, question.ids, answer.ids[:24])]
    kl = [float(np.mean([_kl(_law(p, q, strength), p) for p, q in pairs])) for strength in STRENGTHS]
    found = sum(question.answer in answer.text for question, answer in zip(questions, plain, strict=True))
    moved = sum(question.answer in _answer(_variant(base, 10.0), question.ids).text for question in questions)
    passed = all(b >= a - 1e-9 for a, b in zip(kl, kl[1:], strict=False)) and moved >= found
    figures = {"rows": len(pairs), "kl": dict(zip(map(str, STRENGTHS), (round(k, 4) for k in kl), strict=True))}
    figures |= {"answers_plain": found, "answers_transfer": moved, "questions": len(questions)}
    return Item(4, "KL to p rises with the strength; answers not below plain", passed, figures)


def _pairs(base: Executable, prompt: list[int], answer: list[int]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """What target and draft say after every token of an answer."""
    found = []
    long, short = (ModelSource(Loaded(base.engine, base.capacity), base.capacity) for _ in range(2))
    text, seen = list(prompt), _short(base, prompt)
    for token in answer:
        text, seen = [*text, token], [*seen, token]
        found.append(tuple(probabilities(source.begin(ids).astype(np.float64)) for source, ids in ((long, text), (short, seen))))
    return found  # type: ignore[return-value]


def _kl(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    held = a > 0.0
    return float((a[held] * np.log(a[held] / b[held])).sum())


def _streams(base: Executable, ids: list[int]) -> Item:
    """After an answer both caches hold what a fresh prefill of their own texts would hold."""
    exe = _variant(base)
    answer = _answer(exe, ids)
    lane = exe._take_lane()
    drafter = lane.drafters[0]
    assert isinstance(drafter, module.RetrievalDrafter) and lane.cache is not None
    source = drafter._sources[0]._source
    text = [*ids, *answer.ids]
    short = _short(base, ids) + answer.ids
    held = min(len(source.held), len(short) - 1)
    assert source._cache is not None
    figures = {
        "held": len(source.held),
        "short": len(short),
        "same_ids": source.held[:held] == short[:held] and held >= len(short) - 1 - GUESSES,
    }
    differences = {}
    for name, cache, tokens in (("target", lane.cache, text[:-1]), ("draft", source._cache, source.held)):
        fresh = ModelSource(Loaded(base.engine, base.capacity), base.capacity)
        fresh.begin(list(tokens))
        assert fresh._cache is not None
        differences[name] = _difference(cache, fresh._cache, len(tokens))
    exe._return_lane(lane)
    figures |= {f"{name}_difference": round(value, 6) for name, value in differences.items()}
    return Item(
        5, "both caches equal fresh prefills of their texts", bool(figures["same_ids"]) and max(differences.values()) < 0.05, figures
    )


def _difference(a: Cache, b: Cache, length: int) -> float:
    """Largest difference of keys and values, by the size of the tensor's values."""
    found = 0.0
    for name, tensor in a.state.items():  # type: ignore[attr-defined]
        one, other = tensor[0, :, :length], b.state[name][0, :, :length]  # type: ignore[attr-defined]
        found = max(found, float(np.abs(one - other).mean() / np.abs(other).mean()))
    return found

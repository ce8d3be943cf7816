"""The promise in one place: for every family, what planc generates is what transformers generates."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from models_tiny import FAMILIES, WINDOW, model, token_ids

import planc
from planc.runtime.executable import Executable, Generation

NEW = 24
PROMPTS = [token_ids(length, seed=length).tolist() for length in (12, 15, 20)]
assert min(map(len, PROMPTS)) > WINDOW

_LOOKUP = {"prompt_lookup": {"max_ngram": 2}}
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chains": {"decode": {"speculative": {"drafter": [_LOOKUP, {"token_recycling": {}}], "tree": {"shape": "chain", "budget": 5}}}},
    "trees": {
        "exactness": "tokens",
        "decode": {"speculative": {"drafter": [_LOOKUP, {"token_recycling": {}}], "tree": {"shape": "tree", "budget": 7}}},
    },
    "bitwise trees": {"decode": {"speculative": {"drafter": [{"token_recycling": {}}], "tree": {"shape": "tree", "budget": 6}}}},
    "standard": {"target": {"ops": "standard"}, "decode": {"speculative": {"drafter": [_LOOKUP], "tree": {"budget": 4}}}},
    "reference": {"target": {"backend": "reference"}, "decode": {"speculative": {"drafter": [_LOOKUP], "tree": {"budget": 4}}}},
}
CASES = [
    *((family, "plain") for family in FAMILIES),
    *((family, "trees" if number % 2 else "chains") for number, family in enumerate(FAMILIES)),
    *((family, plan) for plan in ("standard", "reference") for family in ("gemma2", "gpt_neox")),
    *((family, "bitwise trees") for family in ("llama", "mistral")),
]


@cache
def expected(family: str) -> list[list[int]]:
    """Greedy continuations by transformers, up to and with the first end token."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model(family).generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)  # type: ignore[operator]
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@cache
def compiled(family: str, plan: str) -> Executable:
    return planc.compile(model(family), PLANS[plan], measure=False)


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_same_tokens_as_transformers(family: str, plan: str) -> None:
    executable = compiled(family, plan)
    answers = [executable.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    assert [answer.ids for answer in answers if isinstance(answer, Generation)] == expected(family)
    together = executable.generate(PROMPTS, max_new_tokens=NEW)  # prompts of different lengths in one batch
    assert isinstance(together, list)
    assert [answer.ids for answer in together] == expected(family)
    assert [answer.finish_reason for answer in together] == ["stop" if ids[-1] == 2 else "length" for ids in expected(family)]


def test_the_answers_are_worth_comparing() -> None:
    """Answers rarely end early, depend on the prompt and do not repeat one token."""
    answers = [ids for family in FAMILIES for ids in expected(family)]
    assert sum(len(ids) == NEW for ids in answers) > len(answers) / 2
    assert len({tuple(ids) for ids in answers}) > len(answers) / 2
    assert sum(len(set(ids)) > 4 for ids in answers) > len(answers) / 2


def test_speculation_saves_passes() -> None:
    """A text that repeats itself needs fewer passes than tokens."""
    prompt = PROMPTS[0][:6] * 4
    for family, plan in (("llama", "chains"), ("mistral", "trees")):
        answer, plain = (compiled(family, name).generate(prompt, max_new_tokens=NEW) for name in (plan, "plain"))
        assert isinstance(answer, Generation) and isinstance(plain, Generation)
        assert answer.ids == plain.ids
        assert answer.stats.passes < plain.stats.passes

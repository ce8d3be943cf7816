"""The `decode:` section: what it accepts, what it refuses, and that it survives a round trip."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from planc.runtime.decode import Decode, Sampling, Speculative, Tree
from planc.runtime.drafters import DrafterPart, PromptLookup, TokenRecycling
from planc.runtime.errors import PlanError
from planc.runtime.registry import parts


def test_defaults_are_greedy_plain_decoding() -> None:
    decode = Decode()
    assert (decode.max_new_tokens, decode.min_rows, decode.stop, decode.speculative) == (256, "auto", (), None)
    assert decode.sampling == Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0)


def test_drafters_by_key_options_list_or_alone() -> None:
    decode = Decode.model_validate({"speculative": {"drafter": [{"prompt_lookup": {"max_ngram": 2}}, "token_recycling"]}})
    assert decode.speculative is not None
    assert decode.speculative.drafter == (PromptLookup(max_ngram=2), TokenRecycling())
    assert decode.speculative.tree == Tree(shape="auto", budget="auto", depth=32)
    assert Speculative.model_validate({"drafter": "prompt_lookup"}).drafter == (PromptLookup(),)
    assert Speculative.model_validate({"drafter": {"token_recycling": {"k": 3}}}).drafter == (TokenRecycling(k=3),)


def test_round_trip_keeps_the_plan() -> None:
    decode = Decode.model_validate(
        {"stop": "###", "speculative": {"drafter": [{"token_recycling": {"template": [[0], [0, 0]]}}], "tree": {"budget": 4}}}
    )
    assert decode.stop == ("###",)
    assert Decode.model_validate(decode.model_dump(mode="json")) == decode


@pytest.mark.parametrize(
    "bad",
    [
        {"speculative": {"drafter": []}},
        {"speculative": {"drafter": ["crystal_ball"]}},
        {"speculative": {"drafter": [{"prompt_lookup": {"ngram": 3}}]}},
        {"speculative": {"drafter": [{"prompt_lookup": {"max_ngram": 1, "min_ngram": 2}}]}},
        {"speculative": {"drafter": ["prompt_lookup"], "tree": {"budget": -1}}},
        {"speculative": {"drafter": ["prompt_lookup"], "tree": {"shape": "bush"}}},
        {"sampling": {"temperature": -0.1}},
        {"sampling": {"temperature": float("nan")}},
        {"sampling": {"top_p": 0.0}},
        {"max_new_tokens": 0},
        {"min_rows": 0},
        {"stop": [""]},
        {"batching": {"sequences": 1}},
        {"batching": {"window": 8}},
        {"batching": {"policy": "regroup", "sequences": 4, "window": 3}},
        {"batching": {"policy": "pad"}},
        {"beams": 4},
    ],
)
def test_refuses(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Decode.model_validate(bad)


def test_every_registered_drafter_builds_with_its_defaults() -> None:
    for key, part in parts("drafter").items():
        if part.build_for is not DrafterPart.build_for:  # type: ignore[attr-defined]
            continue  # needs a loaded target
        if key == "ngram_model":  # has no default for its table
            with pytest.raises(PlanError, match="no table yet"):
                part().build(11)  # type: ignore[attr-defined]
            continue
        built = part().build(11)  # type: ignore[attr-defined]
        assert built.prompt_rows >= 0, key
        assert built.top_k >= 0, key


def test_a_plan_part_is_frozen() -> None:
    with pytest.raises(ValidationError):
        TokenRecycling().k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"tree": {"budget": 4}, "controller": {"margin": 1.1}},
        {"controller": {"estimate": "position", "policy": "confidence"}},
        {"controller": {"estimate": "constant"}, "tree": {"shape": "tree"}},
    ],
)
def test_a_controller_with_nothing_to_settle_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as error:
        Speculative.model_validate({"drafter": "prompt_lookup", **options})
    (found,) = error.value.errors()
    assert found["ctx"]["error"].code == "plan-conflict"

"""Draft models of real artifacts: compiled into the target's, loaded without torch, refused where they cannot work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models_tiny import VOCAB, close, layers_of, make, model
from test_edge import RUNNER  # what runs an artifact where torch cannot be imported
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

import planc
from planc.backends.onnx.engine import OnnxEngine
from planc.compiler import store
from planc.runtime.artifact import Manifest, read_artifact, write_manifest
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.drafters.self_skip import SkipDrafter
from planc.runtime.errors import PlancError
from planc.runtime.trees import Draft

PROMPT = [5, 9, 5, 9, 5, 9, 7]
SKIPPING = {"passes": [{"skip_layers": {"layers": [1]}}]}


def plan(draft: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"decode": {"speculative": {"drafter": [{"draft_model": {"min_p": 0.0, **draft}}], "tree": {"budget": 3}}}, **options}


def refused(module: nn.Module, draft: dict[str, Any], tmp_path: Path, **options: Any) -> PlancError:
    with pytest.raises(PlancError) as caught:
        planc.compile(module, plan(draft, **options), out=tmp_path / "refused", measure=False)
    assert not (tmp_path / "refused").exists()
    return caught.value


def equals_plain(exe: planc.Executable, accepted: bool = False) -> None:
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        answer, plain = (e.generate(PROMPT, max_new_tokens=40, **options) for e in (exe, exe.plain()))
        assert answer.ids == plain.ids  # type: ignore[union-attr]
        assert answer.stats.drafted_by["draft_model"] > 0  # type: ignore[union-attr]
        assert not accepted or answer.stats.accepted_by == answer.stats.drafted_by  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two layers whose draft has one."""
    out = tmp_path_factory.mktemp("drafts") / "skipping"
    planc.compile(model("llama"), plan(SKIPPING, target={"capacity": 128}), out=out)
    return out


def test_the_target_after_more_passes(skipping: Path) -> None:
    manifest = read_artifact(skipping)
    assert {"draft/manifest.json", "draft/model.onnx", "draft/model.weights"} <= set(manifest.files)
    draft = read_artifact(skipping / "draft")
    assert (draft.signature.layers, manifest.signature.layers) == (1, 2)
    assert draft.contract.cost is not None  # what the stop rule weighs
    assert draft.contract.exactness is None  # nobody relies on it
    assert manifest.decode["speculative"]["drafter"] == [{"draft_model": {"artifact": "draft", "min_p": 0.0}}]
    assert manifest.plan["decode"]["speculative"]["drafter"] == [{"draft_model": {"min_p": 0.0, **SKIPPING}}]
    exe = planc.load(skipping)
    equals_plain(exe)
    assert exe.report()["draft_models"] == {"draft": {"same_vocabulary": True, "pass_ms": draft.contract.cost.ms(1, 128), "fuzzy": False}}


@pytest.mark.parametrize("builder", [{"chain": {}}, {"constant": {"branching": [2, 1]}}, {"dynamic": {"budget": 4}}])
def test_a_builder_draws_the_tree(builder: dict[str, Any], tmp_path: Path) -> None:
    """It is part of the artifact; under coupled acceptance the text is the plain one, tested draws go through the same artifact."""
    options = {"exactness": "tokens", "target": {"capacity": 128}}
    exe = planc.compile(model("llama"), plan({**SKIPPING, "builder": builder}, **options), out=tmp_path / "a", measure=False)
    assert read_artifact(tmp_path / "a").decode["speculative"]["drafter"][0]["draft_model"]["builder"] == builder
    equals_plain(exe)


def test_prompts_of_different_lengths_share_a_drafter(skipping: Path) -> None:
    exe = planc.load(skipping)
    prompts = [PROMPT, [3], PROMPT[:4]]
    together = [answer.ids for answer in exe.generate(prompts, max_new_tokens=20)]  # type: ignore[union-attr]
    assert together == [answer.ids for answer in exe.plain().generate(prompts, max_new_tokens=20)]  # type: ignore[union-attr]
    assert together == [exe.generate(prompt, max_new_tokens=20).ids for prompt in prompts]  # type: ignore[union-attr]


def test_a_copy_is_complete(skipping: Path, tmp_path: Path) -> None:
    copy = planc.load(skipping).save(tmp_path / "copy")
    expected = planc.load(skipping).generate(PROMPT, max_new_tokens=24).ids  # type: ignore[union-attr]
    command = [sys.executable, "-c", RUNNER, str(copy), json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == expected == found["plain"]


def test_a_changed_draft_is_noticed(skipping: Path, tmp_path: Path) -> None:
    copy = planc.load(skipping).save(tmp_path / "copy")
    weights = copy / "draft" / "model.weights"
    data = bytearray(weights.read_bytes())
    data[7] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(PlancError) as caught:
        planc.load(copy)
    assert caught.value.code == "artifact-corrupt" and "draft/model.weights" in caught.value.message


@pytest.mark.parametrize("name", ["../skipping", "elsewhere", "/"])
def test_an_artifact_names_no_draft_outside(skipping: Path, tmp_path: Path, name: str) -> None:
    copy = planc.load(skipping).save(tmp_path / "copy")
    manifest = read_artifact(copy)
    decode = {**manifest.decode, "speculative": {"drafter": [{"draft_model": {"artifact": name}}]}}
    write_manifest(copy, Manifest.model_validate({**manifest.model_dump(mode="json"), "decode": decode}))
    with pytest.raises(PlancError) as caught:
        planc.load(copy)
    assert caught.value.code == "artifact-corrupt"


def test_trees_reach_the_draft(tmp_path: Path) -> None:
    exe = planc.compile(model("llama"), plan(SKIPPING, exactness="tokens"), out=tmp_path / "made", measure=False)
    assert exe.models["draft"].engine.spec.trees
    equals_plain(exe)


def test_a_finished_artifact_drafts(tmp_path: Path) -> None:
    planc.compile(model("llama"), {"target": {"capacity": 64}}, out=tmp_path / "small", measure=False)
    exe = planc.compile(model("llama"), plan({"artifact": str(tmp_path / "small")}), out=tmp_path / "made", measure=False)
    equals_plain(exe, accepted=True)  # the same model
    (tmp_path / "small" / "manifest.json").unlink()
    equals_plain(planc.load(tmp_path / "made"), accepted=True)
    assert refused(model("llama"), {"artifact": str(tmp_path / "small")}, tmp_path).code == "artifact-not-found"


def test_a_plan_and_a_model(tmp_path: Path) -> None:
    """Paths count from the plan's file."""
    make("llama", seed=4, num_hidden_layers=1).save_pretrained(tmp_path / "tiny")
    make("llama").save_pretrained(tmp_path / "large")
    (tmp_path / "small.yaml").write_text("planc: 1\npasses: [quantize_weights]\n")
    for options in ({"plan": "small.yaml"}, {"plan": "small.yaml", "model": "tiny"}):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan(options)))
        exe = planc.compile(tmp_path / "large", tmp_path / "plan.yaml", out=tmp_path / "made", measure=False)
        draft = read_artifact(tmp_path / "made" / "draft")
        assert draft.signature.layers == (1 if "model" in options else 2)
        assert [effect.name for effect in draft.contract.effects][:2] == ["fuse_projections", "quantize_weights"]
        equals_plain(exe)


def test_other_vocabulary(tmp_path: Path) -> None:
    """Ids of the draft model are those of the target in reverse; its embeddings too, so that it is the same model."""
    words = [f"w{i}" for i in range(VOCAB)]
    target, small = make("llama"), make("llama")
    for part in (small.get_input_embeddings(), small.get_output_embeddings()):  # type: ignore[operator]
        part.weight.data = part.weight.data.flip(0)
    for name, module, vocabulary in (("target", target, words), ("small", small, words[::-1]), ("alien", small, [f"x{w}" for w in words])):
        module.save_pretrained(tmp_path / name)  # type: ignore[operator]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    empty = tmp_path / "empty.yaml"
    empty.write_text("planc: 1\n")
    exe = planc.compile(
        tmp_path / "target", plan({"plan": str(empty), "model": str(tmp_path / "small")}), out=tmp_path / "made", measure=False
    )
    assert not exe.report()["draft_models"]["draft"]["same_vocabulary"]
    equals_plain(exe, accepted=True)
    error = refused(tmp_path / "target", {"plan": str(empty), "model": str(tmp_path / "alien")}, tmp_path)  # type: ignore[arg-type]
    assert error.code == "draft-mismatch"


def test_refusals(tmp_path: Path) -> None:
    drafting = tmp_path / "drafting.yaml"
    drafting.write_text("planc: 1\ndecode: {speculative: {drafter: prompt_lookup}}\n")
    other = tmp_path / "other.yaml"
    other.write_text("planc: 1\ntarget: {backend: reference}\n")
    llama = model("llama")
    assert refused(llama, {"plan": str(drafting)}, tmp_path).code == "plan-conflict"
    assert refused(llama, {"plan": str(other)}, tmp_path).code == "plan-conflict"
    assert refused(llama, SKIPPING, tmp_path, target={"backend": "reference"}).code == "plan-conflict"
    assert refused(llama, {"plan": str(tmp_path / "none.yaml")}, tmp_path).code == "plan-not-found"
    assert refused(llama, {"passes": [{"skip_layers": {"layers": [9]}}]}, tmp_path).code == "skip-out-of-range"
    assert refused(llama, {"passes": [{"quantize_weights": {}}]}, tmp_path, passes=["quantize_weights"]).code == "pass-no-match"
    planc.compile(make("llama", vocab_size=64), out=tmp_path / "small", measure=False)
    assert refused(llama, {"artifact": str(tmp_path / "small")}, tmp_path).code == "draft-mismatch"


def test_the_cache_of_artifacts_sees_another_draft(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("planc: 1\n")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan({"plan": "small.yaml"})))
    first = store.key(tmp_path / "plan.yaml", "smollm2-135m")
    assert store.key(tmp_path / "plan.yaml", "smollm2-135m") == first
    (tmp_path / "small.yaml").write_text("planc: 1\npasses: [smooth]\n")
    assert store.key(tmp_path / "plan.yaml", "smollm2-135m") != first


# ---- a draft model in two forms ----


def grouped(**options: Any) -> dict[str, Any]:
    return {"fuzzy": [{"layer_parallel": {"n": 2, **options}}]}


@pytest.fixture(scope="module")
def four_layers() -> nn.Module:
    return make("llama", num_hidden_layers=4)


@pytest.mark.parametrize(("options", "states"), [({}, 4), ({"fused": True}, 3), ({"fused": True, "ops": "standard"}, 3)])
def test_a_fuzzy_form_works_on_the_exact_ones_cache(options: dict[str, Any], states: int, four_layers: nn.Module, tmp_path: Path) -> None:
    target = {"capacity": 128, "ops": options.pop("ops", "fast")}
    exe = planc.compile(four_layers, plan(grouped(**options), target=target), out=tmp_path / "made", measure=False)
    assert {"draft/manifest.json", "draft/fuzzy/manifest.json"} <= set(read_artifact(tmp_path / "made").files)
    assert exe.report()["draft_models"]["draft"]["fuzzy"]
    equals_plain(exe)
    model = exe.models["draft"]
    assert isinstance(model.engine, OnnxEngine) and isinstance(model.fuzzy, OnnxEngine)
    assert len(model.fuzzy.states) == 2 * states
    source, draft = ModelSource(model), Draft(7)
    source.begin(PROMPT)
    row = draft.add(0, 4, ("x",), 0.5)
    approximate = source.expand(draft, [row])[0]
    source.expand(draft, [draft.add(row, 6, ("x",), 0.5)])
    after = source.begin([*PROMPT, 4, 6, 8])  # both guesses accepted: their keys and values are made again
    fresh = ModelSource(model)
    close(after, fresh.begin([*PROMPT, 4, 6, 8]))
    assert np.abs(approximate - ModelSource(model).begin([*PROMPT, 4])).max() > 1e-2
    for name, tensor in source._cache.state.items():  # type: ignore[union-attr]
        close(tensor[:, :, : len(PROMPT) + 3], fresh._cache.state[name][:, :, : len(PROMPT) + 3])  # type: ignore[union-attr]


def test_a_fuzzy_form_that_is_not_cheaper_is_left_out(four_layers: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dearest, kept in ((1e-9, False), (1e9, True)):
        monkeypatch.setattr("planc.compiler.drafts._DEAREST", dearest)
        exe = planc.compile(four_layers, plan(grouped(n=1), target={"capacity": 128}), out=tmp_path / str(kept))
        assert exe.report()["fuzzy"]["kept"] is kept and exe.report()["fuzzy"]["step_ratio"] > 0
        assert exe.report()["draft_models"]["draft"]["fuzzy"] is kept
        assert ("draft/fuzzy/manifest.json" in read_artifact(tmp_path / str(kept)).files) is kept
        equals_plain(exe)


def test_forms_that_are_refused(tmp_path: Path) -> None:
    assert refused(model("llama"), {"artifact": "x", **grouped()}, tmp_path).code == "plan-bad-value"
    assert refused(model("gpt_neox"), grouped(), tmp_path).code == "pass-refused"
    assert refused(model("llama"), grouped(), tmp_path).code == "pass-refused"  # no two layers between the first and the last


# ---- the target itself with sublayers left out ----


def skipping_plan(**options: Any) -> dict[str, Any]:
    return {"decode": {"speculative": {"drafter": [{"self_skip": {"min_p": 0.0, **options}}], "tree": {"budget": 3}}}}


def test_self_skip_is_searched_and_stored(tmp_path: Path) -> None:
    module = make("llama", num_hidden_layers=4)
    with torch.no_grad():  # two layers that hardly do anything
        for layer in layers_of(module)[1:3]:
            layer.self_attn.o_proj.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
            layer.mlp.down_proj.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
    exe = planc.compile(module, skipping_plan(steps=40), out=tmp_path / "made")
    manifest = read_artifact(tmp_path / "made")
    assert {"skip.onnx", "model.onnx", "model.weights"} <= set(manifest.files)
    assert manifest.files["skip.onnx"].bytes < 2 * manifest.files["model.onnx"].bytes
    found = manifest.extra["self_skip"]
    assert found["match"] > 0.9 and found["tried"] == 40
    assert exe.report()["self_skip"] == found
    [item] = manifest.decode["speculative"]["drafter"]
    assert set(item["self_skip"]["attention"]) | set(item["self_skip"]["mlp"]) == {1, 2}
    answer, plain = (e.generate(PROMPT, max_new_tokens=40) for e in (exe, exe.plain()))
    assert answer.ids == plain.ids  # type: ignore[union-attr]
    assert answer.stats.tokens_per_pass > 2  # type: ignore[union-attr]
    copy = exe.save(tmp_path / "copy")
    command = [sys.executable, "-c", RUNNER, str(copy), json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ids"] == answer.ids[:24] == result["plain"]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("target", [{}, {"ops": "standard"}])
def test_self_skip_with_a_set_of_the_plan(family: str, target: dict[str, Any], tmp_path: Path) -> None:
    plan = {**skipping_plan(attention=[1], mlp=[0]), "target": target, "exactness": "tokens"}
    exe = planc.compile(model(family), plan, out=tmp_path / "made", measure=False)
    assert exe.report()["decode"]["speculative"]["drafter"] == [{"self_skip": {"attention": [1], "mlp": [0], "min_p": 0.0}}]
    prompts = [PROMPT, [3], PROMPT[:4]]
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        answers, plain = (e.generate(prompts, max_new_tokens=20, **options) for e in (exe, exe.plain()))
        assert [a.ids for a in answers] == [p.ids for p in plain]  # type: ignore[union-attr]
        assert answers[0].stats.drafted_by["self_skip"] > 0  # type: ignore[index]


def test_self_skip_searches_while_it_serves(tmp_path: Path) -> None:
    """Over requests, from every other layer on; the two layers that hardly do anything are found, as far as scores tell."""
    module = make("llama", num_hidden_layers=6)
    with torch.no_grad():
        for layer in layers_of(module)[2:4]:
            layer.self_attn.o_proj.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
            layer.mlp.down_proj.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
    options = {"search": {"ratio": 0.5, "window": 12, "stop": 0.99}, "confidence": 0.1}
    exe = planc.compile(module, skipping_plan(**options), out=tmp_path / "made", measure=False)
    [item] = read_artifact(tmp_path / "made").decode["speculative"]["drafter"]
    assert item["self_skip"]["search"] == options["search"]
    assert item["self_skip"]["attention"] == item["self_skip"]["mlp"] == [1, 3]
    for seed in range(16):
        prompt = [5 + seed, *PROMPT]
        answer, plain = (e.generate(prompt, max_new_tokens=80, temperature=0.7, seed=seed) for e in (exe, exe.plain()))
        assert answer.ids == plain.ids  # type: ignore[union-attr]
    [drafts] = exe._idle[0].drafters
    assert isinstance(drafts, SkipDrafter) and drafts.search is not None
    closed = {unit for unit, runs in zip(drafts.skip.units, drafts.gates, strict=True) if not runs}
    assert len(closed) == 4
    assert len(closed & {(layer, kind) for layer in (2, 3) for kind in ("attention", "mlp")}) >= 3  # two of them at the start


def test_self_skip_refusals(tmp_path: Path) -> None:
    for plan, code in (
        (skipping_plan(attention=[7]), "skip-out-of-range"),
        ({**skipping_plan(), "target": {"backend": "reference"}}, "plan-conflict"),
    ):
        with pytest.raises(PlancError) as caught:
            planc.compile(model("llama"), plan, out=tmp_path / "refused", measure=False)
        assert caught.value.code == code
        assert not (tmp_path / "refused").exists()


# ---- what else a draft is good for ----

LONG = [3 + (7 * i) % 89 for i in range(90)]


def test_a_draft_chooses_what_stays_of_a_prompt(tmp_path: Path) -> None:
    """Its guesses judge the prompt (papers/87); the plain run asks it the same and gives the same text."""
    policy = {"evict": {"lookahead": {"capacity": 40, "window": 8, "tokens": 5}}}
    options = {"passes": [{"kv_cache": {"policy": policy}}], "target": {"capacity": 200}}
    exe = planc.compile(model("llama"), plan(SKIPPING, **options), out=tmp_path / "a", measure=False)
    manifest = read_artifact(tmp_path / "a")
    assert manifest.extra["kv"]["policy"] == policy and "kv" not in read_artifact(tmp_path / "a/draft").extra
    exe = planc.load(tmp_path / "a")
    answer, alone = exe.generate(LONG, max_new_tokens=40), exe.plain().generate(LONG, max_new_tokens=40)
    assert answer.ids == alone.ids and answer.stats.purposes["prefill"] == 2  # type: ignore[union-attr]
    assert answer.stats.drafted_by["draft_model"] > 0 and not alone.stats.drafted_by  # type: ignore[union-attr]
    other = planc.compile(model("llama"), plan(SKIPPING, target={"capacity": 200}), out=tmp_path / "b", measure=False)
    assert other.generate(LONG[:30], max_new_tokens=20).ids == exe.generate(LONG[:30], max_new_tokens=20).ids  # type: ignore[union-attr]


def test_a_draft_shortens_prompts(tmp_path: Path) -> None:
    """A prompt that is no longer than the capacity is left alone; another becomes that short, and its end stays."""
    base = plan(SKIPPING, target={"capacity": 200})
    base["decode"]["context"] = {"capacity": 40, "window": 10, "neighbours": 4}
    exe = planc.compile(model("llama"), base, out=tmp_path / "a", measure=False)
    exe = planc.load(tmp_path / "a")
    answer = exe.generate(LONG, max_new_tokens=20)
    (draft,) = exe.models.values()
    short = exe.decode.context.shortened(draft.engine, LONG)  # type: ignore[union-attr]
    assert len(short) == 40 == answer.prompt_tokens and short[-10:] == LONG[-10:]  # type: ignore[union-attr]
    assert answer.ids == exe.plain().generate(LONG, max_new_tokens=20).ids == exe.generate(short, max_new_tokens=20).ids  # type: ignore[union-attr]
    with pytest.raises(PlancError, match="does not shorten"):
        exe.serve()


def test_a_foreign_draft_shortens_nothing(skipping: Path, tmp_path: Path) -> None:
    draft = {"artifact": str(skipping / "draft")}
    options = plan(draft, target={"capacity": 128})
    options["decode"]["context"] = {}
    with pytest.raises(PlancError) as caught:
        planc.compile(model("llama"), options, out=tmp_path / "refused", measure=False)
    assert caught.value.code == "draft-mismatch" and caught.value.fix


def test_refuses_a_policy_of_the_draft(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"passes": [{"kv_cache": {"policy": {"store": "int8"}}}]}))
    error = refused(model("llama"), {"plan": str(own)}, tmp_path)
    assert error.code == "plan-conflict" and "where a prompt ends" in error.message

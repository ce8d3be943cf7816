"""Executables on the toy engine: prompts of every form, streams, stop strings, batches, refusals, saving."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_engine import ToyCache, ToyEngine

from planc.runtime.artifact import Manifest, Signature, write_artifact
from planc.runtime.contract import Contract, CostTable, Exactness
from planc.runtime.decode import Decode
from planc.runtime.errors import PlancError
from planc.runtime.executable import CACHE_STEP, Executable, Generation
from planc.runtime.text import Text

LETTERS = "abcdefghijklmnopqrst"  # ids 0..19; 20 ends a text, 21 and 22 are the two bytes of one character
EOS = 20
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
SPECULATIVE = {"speculative": {"drafter": ["prompt_lookup", "token_recycling"], "tree": {"budget": 6}}}
BITWISE = Exactness(level="bitwise", chains="bitwise", trees="bitwise", batch="bitwise", min_rows=2)
COST = CostTable(rows=(1, 2, 32), past=(16,), measured=(((1.0, 1.0, 2.0),),))


def tokenizer() -> Tokenizer:
    pieces = {piece: i for i, piece in enumerate([*LETTERS, "<end>", "Ã", "©"])}
    made = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


def executable(
    decode: dict[str, Any] | None = None, *, contract: Contract | None = None, template: str | None = None, text: bool = True, **engine: Any
) -> Executable:
    contract = contract if contract is not None else Contract(exactness=BITWISE, cost=COST)
    side = Text(tokenizer(), chat_template=template, eos_ids=[EOS]) if text else Text(eos_ids=[EOS])
    return Executable(ToyEngine(**engine), side, Decode.model_validate({"max_new_tokens": 40, **(decode or {})}), contract)


def one(result: Generation | list[Generation]) -> Generation:
    assert isinstance(result, Generation)
    return result


def reference(engine: ToyEngine, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without caches or loops."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != EOS):
        tokens.append(int(engine.logits(list(enumerate(tokens))).argmax()))
    return tokens[len(prompt) :]


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(PlancError) as caught:
        call()
    return caught.value.code


# ---- what is generated ----


@pytest.mark.parametrize("decode", [{}, SPECULATIVE])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 1, 2, 3, 1], list(range(18))])
def test_greedy_is_what_the_model_says(decode: dict[str, Any], prompt: list[int]) -> None:
    run = executable(decode, seed=len(prompt))
    found = one(run.generate(prompt))
    assert found.ids == reference(ToyEngine(seed=len(prompt)), prompt, 40)
    assert found.prompt_tokens == len(prompt)
    assert found.finish_reason == ("stop" if found.ids[-1] == EOS else "length")
    assert found.text == run.text.decode(found.ids)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 19), min_size=1, max_size=12),
    st.lists(st.text("abcdé", min_size=1, max_size=3), max_size=3),
    st.sampled_from([0.0, 0.8]),
    st.booleans(),
)
def test_stream_generate_and_plain_agree(seed: int, prompt: list[int], stop: list[str], temperature: float, with_stop: bool) -> None:
    run = executable(SPECULATIVE, seed=seed % 97, predictable=0.9)
    options: dict[str, Any] = {"stop": stop if with_stop else None, "temperature": temperature, "seed": seed, "chat": False}
    whole, plain = one(run.generate(prompt, **options)), one(run.plain().generate(prompt, **options))
    chunks = list(run.stream(prompt, **options))
    assert (whole.text, whole.ids, whole.finish_reason) == (plain.text, plain.ids, plain.finish_reason)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert all("".join(chunk.pieces) == chunk.text and len(chunk.pieces) == len(chunk.ids) for chunk in chunks)
    assert all([chunk.draft.tokens[row] for row in chunk.rows[1:]] == chunk.ids[: chunk.accepted] for chunk in chunks if chunk.draft)
    assert [token for chunk in chunks for token in chunk.ids] == whole.ids
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [whole.finish_reason]
    full = run.text.decode(whole.ids)
    if whole.finish_reason == "stop_string":
        assert any(full.startswith(whole.text + s) for s in stop), "the text after the stop string, and the string, are cut"
    else:
        assert whole.text == full


def test_speculation_is_at_work() -> None:
    run = executable(SPECULATIVE, predictable=1.0, vocab=20)
    found = one(run.generate([1, 2, 3], max_new_tokens=60))
    assert found.stats.tokens_per_pass > 1.2 and found.stats.passes < 60
    assert sum((count + 1) * times for count, times in found.stats.accepted.items()) == found.stats.tokens - 1
    assert sum(found.stats.widths.values()) == found.stats.purposes.get("plain", 0) + found.stats.purposes["verify"] == found.stats.passes
    assert sum(rows * passes for rows, passes in found.stats.widths.items()) == found.stats.rows
    assert found.stats.purposes["prefill"] == 1 and "draft" not in found.stats.purposes
    chunks = list(run.stream([1, 2, 3], max_new_tokens=60))
    assert max(chunk.accepted for chunk in chunks) > 1
    assert {name for chunk in chunks for name in chunk.sources} <= {"prompt_lookup", "token_recycling"}
    assert all(bool(chunk.accepted) == bool(chunk.sources) for chunk in chunks)
    assert chunks[-1].generation is not None and chunks[-1].generation.ids == found.ids


def test_what_was_learned_is_kept_between_calls() -> None:
    run = executable({"speculative": {"drafter": "token_recycling", "tree": {"budget": 4}}}, predictable=1.0, vocab=20)
    first, second = one(run.generate([1, 2], max_new_tokens=20)), one(run.generate([1, 2], max_new_tokens=20))
    assert first.ids == second.ids
    assert second.stats.passes < first.stats.passes, "the matrix of token recycling is warm the second time"


def test_sampling_options() -> None:
    run = executable({"sampling": {"temperature": 1.5}})
    texts = {tuple(one(run.generate([5], seed=seed)).ids) for seed in range(4)}
    assert len(texts) == 4 and tuple(one(run.generate([5], seed=3)).ids) in texts
    assert one(run.generate([5], temperature=0)).ids == reference(ToyEngine(), [5], 40)
    assert one(run.generate([5], top_k=1)).ids == one(run.generate([5], temperature=0)).ids
    assert one(run.generate([5], temperature=0, repetition_penalty=50.0)).ids != reference(ToyEngine(), [5], 40)


# ---- streams ----


def test_streams_can_be_interleaved_and_abandoned() -> None:
    run = executable(SPECULATIVE, predictable=0.8)
    alone = {p: one(run.generate([p])).ids for p in (1, 2)}
    first, second = run.stream([1]), run.stream([2])
    got: dict[int, list[int]] = {1: [], 2: []}
    for a, b in zip(first, second, strict=False):
        got[1] += a.ids
        got[2] += b.ids
    got[1] += [i for chunk in first for i in chunk.ids]
    assert all(alone[p][: len(got[p])] == got[p] for p in got) and got[1] and got[2]
    third = run.stream([3])
    next(third)
    third.close()  # type: ignore[attr-defined]
    assert one(run.generate([1])).ids == alone[1]


def test_stream_checks_its_arguments_at_once() -> None:
    assert code_of(lambda: executable().stream([])) == "prompt-empty"
    assert code_of(lambda: executable().stream([1], temperature=-1)) == "input-invalid"


# ---- prompts ----


def test_forms_of_prompts() -> None:
    run = executable(template=TEMPLATE, vocab=23)
    ids = run.text.encode
    expected = one(run.generate(ids("ubeda"))).ids  # "u" is no letter here: byte fallback drops it
    assert one(run.generate("bed")).ids == expected
    assert one(run.generate([{"role": "user", "content": "bed"}])).ids == expected
    assert one(run.generate("bed", chat=False)).ids == one(run.generate(ids("bed"))).ids != expected
    assert one(run.generate(np.array(ids("bed")))).ids == one(run.generate(tuple(ids("bed")))).ids
    without = executable()
    assert one(without.generate("bed")).prompt_tokens == 3


def test_batches_equal_single_prompts() -> None:
    prompts = [[1], "bed", [4, 5, 6, 7, 8, 9], np.array([2, 2])] * 3
    run = executable(SPECULATIVE, predictable=0.8)
    together = run.generate(prompts, max_new_tokens=12)
    assert isinstance(together, list) and len(together) == len(prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.ids == one(run.generate(prompt, max_new_tokens=12)).ids
        assert answer.text == run.text.decode(answer.ids)
    rows = run.generate(np.array([[1, 2], [3, 4]]), max_new_tokens=3)
    assert isinstance(rows, list) and [len(answer.ids) for answer in rows] == [3, 3]


def test_batches_run_apart_where_sharing_a_pass_promises_less() -> None:
    class Counting(ToyEngine):
        sizes: list[int] = []  # noqa: RUF012

        def new_cache(self, batch: int, capacity: int) -> ToyCache:
            self.sizes.append(batch)
            return super().new_cache(batch, capacity)

    for batch, rows, sizes in (("bitwise", 2, [2]), ("bitwise", 1, [1]), ("lossy", 2, [1]), (None, 2, [1])):
        Counting.sizes.clear()
        contract = Contract(exactness=BITWISE.model_copy(update={"batch": batch}))
        Executable(Counting(), Text(), Decode(max_new_tokens=4, min_rows=rows), contract).generate([[1], [2]])
        assert Counting.sizes == sizes, "and the one cache serves both prompts"


def test_refusals() -> None:
    run = executable(max_length=64)
    invalid = ([1.5], [True], 7, None, [[1], 3], {"role": "user", "content": "x"}, [99], [-1])
    for prompt in invalid:
        assert code_of(lambda prompt=prompt: run.generate(prompt)) == "input-invalid", prompt  # type: ignore[misc]
    for prompt in ("", [], [[1], []], "é"[:0]):
        assert code_of(lambda prompt=prompt: run.generate(prompt)) == "prompt-empty", prompt  # type: ignore[misc]
    assert code_of(lambda: run.generate([1] * 64)) == "prompt-too-long"
    assert code_of(lambda: run.generate([{"role": "user", "content": "x"}])) == "chat-template"
    assert code_of(lambda: run.generate("bed", chat=True)) == "chat-template"
    assert code_of(lambda: executable(template=TEMPLATE).generate([{"content": "x"}])) == "input-invalid"
    assert code_of(lambda: executable(template=TEMPLATE).generate([{"role": "user", "content": "x"}], chat=False)) == "input-invalid"
    assert code_of(lambda: executable(text=False).generate("bed")) == "tokenizer-missing"
    assert code_of(lambda: executable(text=False).generate([1], stop="x")) == "tokenizer-missing"
    wrong: list[dict[str, Any]] = [{"temperature": -0.1}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2}, {"seed": -1}, {"max_new_tokens": 0}]
    wrong += [{"repetition_penalty": 0.0}, {"temperature": float("nan")}, {"stop": ""}, {"stop": 5}, {"temperature": "hot"}]
    for options in wrong:
        assert code_of(lambda options=options: run.generate([1], **options)) == "input-invalid", options  # type: ignore[misc]


def test_ids_only() -> None:
    found = one(executable(text=False).generate([1, 2]))
    assert found.text == "" and found.ids == reference(ToyEngine(), [1, 2], 40)


def test_full_cache_ends_the_text() -> None:
    run = executable({"max_new_tokens": 500}, max_length=48, vocab=20)
    found = one(run.generate([1] * 8))
    assert found.finish_reason == "length" and 8 + len(found.ids) <= 48
    assert (
        one(executable({**SPECULATIVE, "max_new_tokens": 500, "min_rows": 1}, max_length=48, vocab=20).generate([1] * 8)).ids == found.ids
    )


# ---- what the contract decides ----


def test_minimum_of_rows() -> None:
    assert executable().min_rows == 1, "nothing is verified, so nothing needs padding"
    assert executable(SPECULATIVE).min_rows == executable(SPECULATIVE).plain().min_rows == 2
    assert executable({**SPECULATIVE, "min_rows": 4}).min_rows == 4
    assert executable(SPECULATIVE, contract=Contract(exactness=BITWISE.model_copy(update={"min_rows": 8}))).min_rows == 8
    executable(SPECULATIVE, least=2).plain().generate([1])  # the engine refuses narrower passes


def test_trees_only_where_they_promise_no_less() -> None:
    class Noting(ToyEngine):
        siblings = False

        def forward(self, cache: ToyCache, step: Any, **options: bool) -> Any:
            self.siblings |= step.parents is not None
            return super().forward(cache, step, **options)

    for trees, expected in (("bitwise", True), ("tokens", False), (None, False)):
        engine = Noting(predictable=0.9)
        contract = Contract(exactness=BITWISE.model_copy(update={"trees": trees}), cost=COST)
        run = Executable(engine, Text(), Decode.model_validate({"max_new_tokens": 80, **SPECULATIVE}), contract)
        run.generate([1, 2, 3, 1, 2, 4, 1, 2])
        assert (run.trees_allowed, engine.siblings) == (expected, expected)


def test_cache_memory_fits_the_call() -> None:
    run = executable()
    run.generate([1, 2], max_new_tokens=5)
    assert run.report()["cache_bytes"] == 16 * CACHE_STEP
    run.generate([1, 2], max_new_tokens=CACHE_STEP)
    assert run.report()["cache_bytes"] == 16 * 2 * CACHE_STEP


# ---- artifacts ----


def saved(directory: Path) -> Executable:
    signature = Signature(vocab_size=23, max_length=128, capacity=100)
    exactness = Contract(exactness=BITWISE, cost=COST)
    manifest = Manifest(planc="0", model="toy", signature=signature, eos_ids=(EOS,), contract=exactness, decode=SPECULATIVE)

    def build(target: Path) -> Manifest:
        (target / "weights").mkdir()
        (target / "weights" / "data").write_bytes(b"weights")
        tokenizer().save(str(target / "tokenizer.json"))
        return manifest

    manifest = write_artifact(directory, build)
    return Executable(ToyEngine(max_length=128), Text.load(directory), Decode.model_validate(manifest.decode), None, manifest, directory)


@pytest.mark.parametrize("acceptance", ["coupled", "recursive", "block"])
def test_tested_draws_keep_the_distribution_alone(acceptance: str) -> None:
    """Greedy answers stay what was measured under every rule; sampled ones do where noise is shared with plain decoding."""
    speculative = {**SPECULATIVE["speculative"], "acceptance": acceptance}
    greedy, warm = (executable({"speculative": speculative, "sampling": {"temperature": t}}) for t in (0.0, 0.7))
    sampled = "bitwise" if acceptance == "coupled" else "distribution"
    assert (greedy.report()["exactness"], greedy.report(temperature=0.5)["exactness"]) == ("bitwise", sampled)
    assert (warm.report()["exactness"], warm.report(temperature=0.0)["exactness"]) == (sampled, "bitwise")
    assert warm.report()["exactness_line"].startswith(sampled) and warm.plain().report()["exactness"] == "bitwise"
    assert ("another text" in warm.report()["exactness_line"]) == (sampled == "distribution")
    worse = BITWISE.model_copy(update={"level": "lossy"})
    assert executable({"speculative": speculative}, contract=Contract(exactness=worse)).report(0.7)["exactness"] == "lossy"
    unknown = executable({"speculative": speculative}, contract=Contract())
    assert (unknown.report(0.7)["exactness"], unknown.report(0.7)["exactness_line"]) == (None, "not measured")


def test_save_and_report(tmp_path: Path) -> None:
    run = saved(tmp_path / "a")
    assert run.capacity == 100 and run.eos_ids == (EOS,) and run.trees_allowed
    assert run.save(tmp_path / "b") == tmp_path / "b"
    assert (tmp_path / "b" / "weights" / "data").read_bytes() == b"weights"
    assert run.save(tmp_path / "a").exists(), "also onto itself"
    report = run.report()
    assert report["model"] == "toy" and report["exactness"] == "bitwise" and report["bytes"] == sum(report["files"].values())
    assert report["contract"]["cost"]["rows"] == [1, 2, 32]
    (tmp_path / "a" / "weights" / "data").write_bytes(b"WEIGHTS")
    assert code_of(lambda: run.save(tmp_path / "c")) == "artifact-corrupt"
    assert not (tmp_path / "c").exists()
    assert code_of(lambda: executable().save(tmp_path / "d")) == "artifact-not-found"


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    from planc._load import load

    run = saved(tmp_path / "a")
    assert code_of(lambda: load(tmp_path / "nothing")) == "artifact-not-found"
    for backend, code in (("nosuch", "backend-missing"), ("../evil", "artifact-corrupt")):
        manifest = run.manifest
        assert manifest is not None
        (tmp_path / "a" / "weights" / "data").write_bytes(b"weights")
        write_artifact(tmp_path / backend[-4:], lambda target: Manifest(planc="0", backend=backend, signature=manifest.signature))  # noqa: B023
        assert code_of(lambda: load(tmp_path / backend[-4:])) == code  # noqa: B023


def test_import_is_light() -> None:
    """Running an artifact never imports torch, and importing planc imports next to nothing."""
    code = (
        "import sys, planc; light = set(sys.modules);"
        "assert not light & {'torch', 'numpy', 'onnxruntime'}, light;"
        "planc.load, planc.Executable, planc.Generation, planc.PlancError, planc.__version__;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "assert set(planc.__all__) <= set(dir(planc))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""})

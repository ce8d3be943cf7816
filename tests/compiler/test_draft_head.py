"""Draft heads: attached to real artifacts, trained by `fit`, refused where they do not belong (papers/A1 section 12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_tiny import close, make, model
from safetensors.torch import load_file

import planc
from planc.backends.reference import run
from planc.compiler.heads.fit import fit_head, packed, untrained
from planc.compiler.heads.states import states_of_texts
from planc.compiler.heads.texts import Texts, loops
from planc.compiler.heads.train import Batch, Data, Options, Trainer, _Distil
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.load_weights import FITS
from planc.runtime.artifact import read_artifact
from planc.runtime.drafters import DraftHead
from planc.runtime.drafters.head_source import STATE, StateSource, TailSource
from planc.runtime.engine import Step
from planc.runtime.errors import CompileError, InputError, PlancError, PlanError
from planc.runtime.trees import Draft

PROMPT = [5, 9, 5, 9, 5, 9, 7]
GATED = {"fuse": "gated", "feedback": "own"}
HYDRA = {"body": "mlp", "blocks": 2}
MEDUSA = {"body": "mlp", "fuse": "none"}


def plan(file: Path | str, tree: dict[str, Any] | None = None, **options: Any) -> Plan:
    head = {"file": str(file), "min_p": 0.0, **options}
    return Plan.from_dict({"decode": {"speculative": {"drafter": [{"draft_head": head}], "tree": tree or {"budget": 3, "shape": "chain"}}}})


def write_head(path: Path, family: str = "llama", seed: int = 0, keep: int = 90, **options: Any) -> Path:
    """A head with random weights: whatever it guesses, the text must stay."""
    part = DraftHead(**options)
    programs, frozen, head = untrained(model(family), plan("none"), part)
    trainer = Trainer(part, programs, head, torch.arange(keep), Options())
    random = torch.Generator().manual_seed(seed)
    values = {
        name: value + 0.3 * max(0.3, float(value.std())) * torch.randn(value.shape, generator=random)
        for name, value in trainer.snapshot().items()
        if value.numel() > 1
    }
    path.write_bytes(packed(part, values, torch.arange(keep), {FITS: frozen}))
    return path


def equals_plain(exe: Any) -> None:
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        answer, plain = (e.generate(PROMPT, max_new_tokens=40, **options) for e in (exe, exe.plain()))
        assert answer.ids == plain.ids
        assert answer.stats.drafted_by["draft_head"] > 0


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("heads")
    return planc.compile(model("llama"), plan(write_head(folder / "head.safetensors")), out=folder / "artifact", measure=False)


@pytest.mark.parametrize(
    ("family", "options"), [("llama", GATED), ("gemma2", {}), ("gpt2", {}), ("gpt_neox", {}), ("gpt2", HYDRA), ("gemma2", MEDUSA)]
)
def test_text_stays_the_same(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    file = write_head(tmp_path / "head.safetensors", family, **options)
    tree = {"budget": 7, "shape": "tree"}
    exe = planc.compile(model(family), plan(file, tree, builder={"dynamic": {"threshold": 0.01}}, **options), measure=False)
    equals_plain(exe)


def test_it_lies_in_the_artifact_and_needs_no_torch_to_draft(compiled: Any) -> None:
    manifest = read_artifact(compiled.directory)
    assert {"head/manifest.json", "head/model.onnx"} <= set(manifest.files) and manifest.signature.taps == (STATE,)
    assert manifest.decode["speculative"]["drafter"][0]["draft_head"]["artifact"] == "head"
    again = planc.load(compiled.directory)
    equals_plain(again)
    one, other = again.generate([PROMPT, PROMPT[2:]], max_new_tokens=20)  # type: ignore[union-attr]
    assert [one.ids, other.ids] == [again.generate(p, max_new_tokens=20).ids for p in (PROMPT, PROMPT[2:])]  # type: ignore[union-attr]


def states_of(exe: Any, ids: list[int]) -> np.ndarray:
    cache = exe.engine.new_cache(1, 64)
    return np.array(exe.engine.forward(cache, Step(np.array([ids]))).taps[STATE][0])


def test_rounds_leave_no_trace(compiled: Any) -> None:
    """After rounds of guesses and of text the head says what it says when it reads the text from the beginning."""
    head, text = compiled.models["head"], [5, 9, 7, 11, 13, 6, 8, 10, 12]
    states = states_of(compiled, text)
    source = StateSource(head)
    source.observe(0, states[:3])
    for length in (4, 5, 7, 9):
        source.observe(length - 2, states[length - 2 : length - 1])
        if not source.ready(text[:length]):
            source.observe(0, states[: length - 1])
        assert source.ready(text[:length])
        have, fresh = source.begin(text[:length]), StateSource(head)
        fresh.observe(0, states[: length - 1])
        close(torch.from_numpy(have), torch.from_numpy(fresh.begin(text[:length])))
        draft = Draft(text[length - 1])
        first, second = draft.add(0, 20, ("x",), 0.5), draft.add(0, 21, ("x",), 0.5)
        along = source.expand(draft, [first])
        third = draft.add(first, 22, ("x",), 0.5)
        deeper = source.expand(draft, [third])
        beside = source.expand(draft, [second])
        for row, logits in ((first, along), (third, deeper), (second, beside)):
            alone = StateSource(head)
            alone.observe(0, states[: length - 1])
            alone.begin(text[:length])
            if row == third:
                alone.expand(draft, [first])
            close(torch.from_numpy(logits), torch.from_numpy(alone.expand(draft, [row])))


def test_a_text_whose_beginning_was_not_seen_is_not_guessed(compiled: Any) -> None:
    source = StateSource(compiled.models["head"])
    source.observe(4, np.zeros((2, 32), np.float32))
    assert not source.ready([1, 2, 3, 4, 5, 6, 7])
    source.observe(0, np.zeros((6, 32), np.float32))
    assert source.ready([1, 2, 3, 4, 5, 6, 7]) and not source.ready([1, 2, 3, 4, 5, 6, 7, 8]) and not source.ready([1])


@pytest.mark.parametrize("options", [HYDRA, MEDUSA], ids=["hydra", "medusa"])
def test_heads_without_memory_guess_level_by_level(options: dict[str, Any], tmp_path: Path) -> None:
    """What a drafter is told below every path of a tree is what the graphs say, run by hand from the path's tokens."""
    part = DraftHead(**options)
    file = write_head(tmp_path / "head.safetensors", keep=97, **options)
    exe = planc.compile(model("llama"), plan(file, **options), out=tmp_path / "artifact", measure=False)
    assert {"head/level-2.onnx", "head/level-3.onnx"} <= set(read_artifact(tmp_path / "artifact").files)
    text, states = [5, 9, 7, 11], states_of(exe, [5, 9, 7, 11])  # type: ignore[arg-type]
    source = TailSource(exe.models["head"], conditioned=part.fused == "concat")  # type: ignore[union-attr]
    source.observe(0, states[:3])
    assert source.ready(text) and not source.ready(text[:3]) and not source.ready([*text, 5]) and source.room(text) == 3
    draft = Draft(text[-1])
    found = {0: source.begin(text)}
    first, second = draft.add(0, 20, ("x",), 0.5), draft.add(0, 21, ("x",), 0.5)
    found |= zip((second, first), source.expand(draft, [second, first]), strict=True)
    below = draft.add(second, 22, ("x",), 0.5)
    found[below] = source.expand(draft, [below])[0]
    programs, _, head = untrained(model("llama"), plan("none"), part)
    programs = [load_trained(program, file) for program in programs]
    for row, logits in found.items():
        path = [text[-1], *draft.path(row)]
        states_in = torch.from_numpy(states[None, 2:3])
        for program, token in zip(programs, path, strict=False):
            ids = torch.tensor([[token]])
            out = run(program, {"input_ids": ids, "position_ids": torch.zeros_like(ids), "states": states_in})
            states_in = out["tap.feedback"]
        wanted = out["tap.logits"] @ head.T
        assert float((torch.from_numpy(logits) - wanted[0, 0]).abs().max()) < 0.1 * float(wanted.abs().max())  # int8 against float
        assert logits.argmax() == int(wanted.argmax())
    assert source.passes == 3


def load_trained(program: Program, file: Path) -> Program:
    return program.replace(params={**program.params, **{n: v.float() for n, v in load_file(file).items() if n in program.params}})


def test_heads_that_ignore_the_tokens_are_unconditioned_ones() -> None:
    """With zeros for the embeddings a head of Hydra says what one of Medusa with the other weights says (papers/49)."""
    hydra, medusa = (
        untrained(model("llama"), plan("none"), DraftHead(body="mlp", heads=2, fuse=fuse))[0][1] for fuse in ("concat", "none")
    )
    params = {name: torch.randn(value.shape) for name, value in medusa.params.items() if name.startswith("draft_head")}
    wide = {
        name: torch.cat([value, torch.zeros(len(value), hydra.params[name].shape[1] - value.shape[1])], 1) if value.dim() == 2 else value
        for name, value in params.items()
    }
    ids, states = torch.tensor([[3, 5, 8]]), torch.randn(1, 3, 64)
    inputs = {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
    have = run(hydra.replace(params={**hydra.params, **wide}), {**inputs, "states": states})["tap.logits"]
    close(have, run(medusa.replace(params={**medusa.params, **params}), {**inputs, "states": states[..., :32]})["tap.logits"])


def refused(code: str, file: Path | str, module: Any = None, **options: Any) -> PlancError:
    with pytest.raises(PlancError) as caught:
        planc.compile(module if module is not None else model("llama"), plan(file, **options), measure=False)
    assert caught.value.code == code
    return caught.value


def test_refusals(tmp_path: Path) -> None:
    file = write_head(tmp_path / "head.safetensors")
    refused("input-invalid", tmp_path / "missing.safetensors")
    assert "no parameter here" in refused("pass-refused", write_head(tmp_path / "gated.safetensors", **GATED)).message
    assert "other weights" in refused("pass-refused", file, make("llama", seed=7)).message
    for options, message in (
        ({"fuse": "concat"}, "has no `fuse: concat`"),
        ({"heads": 2}, "`heads` says nothing"),
        ({**HYDRA, "layer": 0}, "`layer`"),
    ):
        with pytest.raises(PlanError, match=message):
            plan(file, **options)
    with pytest.raises(PlanError, match="no trained head"):
        planc.compile(model("llama"), {"decode": {"speculative": {"drafter": ["draft_head"]}}}, measure=False)


# fit


def toy_texts() -> list[list[int]]:
    return [[int(t) for t in np.random.default_rng(seed).integers(3, 97, 6)] for seed in range(24)]


def test_fit_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file, work = tmp_path / "head.safetensors", tmp_path / "work"
    options = Options(steps=60, batch=384, window=48, rate=3e-3)
    seen: list[str] = []
    common: dict[str, Any] = {"tokens": 2500, "longest": 60, "options": options}
    made = fit_head(model("llama"), plan(file, vocabulary=97), toy_texts(), work, progress=lambda w, d, t: seen.append(w), **common)
    assert made.losses[25] < made.losses[0] and len(made.losses) == 60 and made.tokens >= 2500
    assert made.after.agreement[0] > made.before.agreement[0] and 1.0 < made.after.expected < 4.0
    assert {"the target writes", "the target's states"} <= set(seen)
    equals_plain(planc.compile(model("llama"), plan(file, vocabulary=97), measure=False))
    first = load_file(file)
    again = fit_head(model("llama"), plan(file, vocabulary=97), toy_texts(), work, **common)
    assert again.losses == made.losses, "everything was there already"
    assert all(torch.equal(value, first[name]) for name, value in load_file(file).items())
    with pytest.raises(InputError, match="another head"):
        fit_head(model("llama"), plan(file, vocabulary=97, **GATED), toy_texts(), work, **common)


def test_states_are_kept_for_a_run_that_goes_on(compiled: Any, tmp_path: Path) -> None:
    texts = Texts(tuple(np.array(t * 3) for t in toy_texts()), tuple(6 for _ in toy_texts()))
    made = states_of_texts(compiled.engine, texts, tmp_path, lambda done, total: None)
    [file] = tmp_path.glob("states-*.npy")
    kept = np.load(file)
    kept[-1] += 1
    np.save(file, kept)
    again = states_of_texts(compiled.engine, texts, tmp_path, lambda done, total: None)
    assert np.array_equal(again[0], made[0]) and np.array_equal(again[-1][-1], kept[-1]), "they were read"
    np.save(file, kept + 1)
    other = states_of_texts(compiled.engine, texts, tmp_path, lambda done, total: None)
    assert all(np.array_equal(a, b) for a, b in zip(other, made, strict=True)), "those of another target are made again"


@pytest.mark.parametrize("options", [HYDRA, MEDUSA], ids=["hydra", "medusa"])
def test_fit_teaches_all_heads(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    made = fit_head(
        model("llama"),
        plan(file, vocabulary=97, **options),
        toy_texts(),
        tmp_path / "work",
        tokens=2500,
        longest=60,
        options=Options(steps=40, batch=512, rate=1e-2),
    )
    assert len(made.after.agreement) == 3 and made.losses[-1] < made.losses[0] - 0.15
    assert made.after.loss < made.before.loss - 0.1, "of other texts, too"
    equals_plain(planc.compile(model("llama"), plan(file, vocabulary=97, **options), measure=False))


def test_the_gradient_made_with_the_loss_is_that_of_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    guesses, targets, rows = (torch.randn(*size, generator=generator) for size in ((2, 700, 16), (700, 16), (50, 16)))
    weights = torch.rand(2, 700, generator=generator)
    results = []
    for blocked in (True, False):
        leaf = guesses.clone().requires_grad_()
        if blocked:
            loss = _Distil.apply(leaf, targets, rows, weights)
        else:
            teacher = torch.softmax(targets @ rows.T, -1)
            loss = -(weights * (teacher * torch.log_softmax(leaf @ rows.T, -1)).sum(-1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), leaf.grad))
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)


def test_a_budget_of_time_ends_the_training() -> None:
    part = DraftHead(**MEDUSA)
    programs, _, head = untrained(model("llama"), plan("none"), part)
    trainer, shown = Trainer(part, programs, head, torch.arange(97), Options(minutes=0.01, batch=64)), list[int]()
    trainer.train(toy_data(), lambda done, total, loss: shown.append(done), lambda: None)
    assert trainer.spent >= 0.6 and trainer.done == 1.0 and shown[-1] == 1000 and shown == sorted(shown)
    more = Trainer(part, programs, head, torch.arange(97), Options(minutes=0.01, batch=64), losses=trainer.losses, spent=trainer.spent)
    more.train(toy_data(), lambda *progress: pytest.fail("the time is over"), lambda: None)


def toy_data() -> Data:
    ids = [np.array(t * 4) for t in toy_texts()]
    states = [np.random.default_rng(0).normal(size=(24, 32)).astype(np.float16) for _ in ids]
    return Data(Texts(tuple(ids), tuple(6 for _ in ids)), states)


def test_a_loss_that_diverges_keeps_the_last_good_state() -> None:
    programs, _, head = untrained(model("llama"), plan("none"), DraftHead())
    trainer = Trainer(DraftHead(), programs, head, torch.arange(97), Options(steps=40, batch=32, window=16, rate=1e30))
    before, saved = trainer.snapshot(), list[int]()
    with pytest.raises(CompileError) as caught:
        trainer.train(toy_data(), lambda *progress: None, lambda: saved.append(1))
    assert caught.value.code == "fit-diverged" and saved
    assert all(torch.equal(value, before[name]) for name, value in trainer.snapshot().items())


def test_unrolled_rows_see_what_they_will_see_in_use() -> None:
    """The second guess of the unrolled head equals that of a head that drafts: true rows before it, its own estimate, itself."""
    [program], _, head = untrained(model("llama"), plan("none"), DraftHead())
    trainer = Trainer(DraftHead(), [program], head, torch.arange(97), Options())
    ids, states = np.array([[5, 9, 7, 11, 13, 6]]), torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    steps = list(trainer._unrolled(Batch(torch.from_numpy(ids), states, states, torch.ones(1, 6)), 3))
    at = 4  # the row whose third guess is looked at: rows 0 .. at - 2 are true, at - 1 and at read estimates
    fed = states.clone()
    for row in (at - 1, at):
        part = run(program, {"input_ids": torch.from_numpy(ids[:, :row]), "position_ids": torch.arange(row)[None], "states": fed[:, :row]})
        fed[:, row] = part["tap.feedback"][:, -1]
    last = run(
        program, {"input_ids": torch.from_numpy(ids[:, : at + 1]), "position_ids": torch.arange(at + 1)[None], "states": fed[:, : at + 1]}
    )
    close(steps[2][1][:, at].detach(), last["tap.feedback"][:, -1])


def test_answers_that_loop_are_left_out() -> None:
    assert loops([1, 2, 3, 4] * 6) and not loops(list(range(40)))


def test_a_plan_without_a_head_has_nothing_to_fit(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no draft_head to fit"):
        fit_head(model("llama"), Plan(), [[1, 2]], tmp_path)
    with pytest.raises(PlanError, match="no file to write"):
        fit_head(model("llama"), Plan.from_dict({"decode": {"speculative": {"drafter": ["draft_head"]}}}), [[1, 2]], tmp_path)

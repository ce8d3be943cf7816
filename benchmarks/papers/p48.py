"""Paper 48, VocabTrim: the six working conditions of its card, on SmolLM2-135M, its distilled draft model, and a one-layer draft head."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import planc
from planc.compiler.compile import rewrite
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.plan import Plan
from planc.compiler.store import open_plan
from planc.passes.load_weights import VOCABULARY
from planc.runtime.acceptance import RULES, Target, walk
from planc.runtime.builders import Chain
from planc.runtime.decode import Sampling, Tree
from planc.runtime.drafters import Context, DraftModel, Loaded
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.executable import Executable
from planc.runtime.sampling import Drawing, Sampler, probabilities
from planc.runtime.trees import Draft
from planc_paper_checks.common import MIXED, MODEL, TableSource, answers, chats, equal, pass_seconds, replay, wikitext

PLAN = ROOT / "examples/papers/48-vocabtrim.yaml"
DRAFT = ROOT / "examples/drafts/smollm2-135m-draft.safetensors"
SMALL, GAMMA, TOKENS = 8192, 4, 64
INT8 = {"quantize_weights": {"format": "int8"}}


@paper(48)
def vocabtrim() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    exe, _ = open_plan(PLAN, MODEL)
    prompts = chats(exe, MIXED, 12)
    plain = answers(exe.plain(), prompts, TOKENS)
    texts = [(ids, made.ids) for ids, made in zip(prompts, plain, strict=True)]
    kept = load_file(DRAFT)[VOCABULARY].long()
    eos = torch.tensor(exe.eos_ids)
    with tempfile.TemporaryDirectory() as folder:
        lists = {"all": None, "8192": kept, "4096": kept.sort().values[:4096], "1": eos[:1]}
        models = {name: _draft(Path(folder), name, listed) for name, listed in lists.items()}
        yield _identical(exe, models, prompts[:4], plain)
        yield _logits(models["all"], models["8192"], torch.cat([kept, eos]).unique(), texts)
        yield _lighter(Path(folder))
        yield _coverage(kept, texts)
        yield _economy(exe, models, texts)
        yield _sampling()


def _draft(folder: Path, name: str, kept: Tensor | None) -> Loaded:
    """The draft model over the listed tokens."""
    passes: list[dict[str, Any]] = [{"skip_layers": {"keep": [0, 29]}}, {"load_weights": {"file": str(DRAFT)}}]
    if kept is not None:
        save_file({VOCABULARY: kept.to(torch.int32)}, folder / f"{name}.safetensors")
        passes.append({"trim_vocab": {"file": str(folder / f"{name}.safetensors")}})
    return _loaded([*passes, INT8])


def _loaded(passes: list[dict[str, Any]]) -> Loaded:
    exe = planc.compile(MODEL, {"passes": passes, "target": {"capacity": 1024}}, measure=False)
    assert isinstance(exe, Executable)
    return Loaded(exe.engine, 1024)


def _identical(exe: Executable, models: dict[str, Loaded], prompts: list[list[int]], plain: list[Any]) -> Item:
    same = {}
    for name, model in models.items():
        decode = exe.decode.model_copy(
            update={"speculative": exe.decode.speculative.model_copy(update={"tree": Tree(shape="chain", budget=GAMMA)})}  # type: ignore[union-attr]
        )
        part = decode.speculative.drafter[0]  # type: ignore[union-attr]
        assert isinstance(part, DraftModel) and part.artifact is not None
        variant = Executable(exe.engine, exe.text, decode, exe.contract, exe.manifest, exe.directory, {part.artifact: model})
        same[name] = equal(answers(variant, prompts, TOKENS), plain[: len(prompts)])
    return Item(1, "greedy output is identical for every k", set(same.values()) == {len(prompts)}, {"prompts": len(prompts), **same})


def _logits(full: Loaded, trimmed: Loaded, kept: Tensor, texts: list[tuple[list[int], list[int]]]) -> Item:
    inside, apart, agree, places = set(kept.tolist()), 0.0, 0, 0
    for prompt, answer in texts[:4]:
        sources = ModelSource(full), ModelSource(trimmed)
        for done in range(1, 16):
            whole, part = (np.array(source.begin([*prompt, *answer[:done]])) for source in sources)
            apart = max(apart, float(np.abs(whole[kept.numpy()] - part[kept.numpy()]).max()))
            if int(whole.argmax()) in inside:
                places += 1
                agree += int(whole.argmax() == part.argmax())
    figures = {"largest_difference": apart, "places": places, "same_first_choice": agree}
    return Item(
        2, "kept logits are exact, and drafts equal where the full draft chose a kept token", apart == 0.0 and agree == places, figures
    )


def _lighter(folder: Path) -> Item:
    """Of a one-layer head on the target's state (EAGLE), untrained: bytes and time do not depend on the numbers."""
    head = [{"skip_layers": {"keep": [29]}}, {"attach_head": {}}]
    trim = [{"trim_vocab": {"file": str(DRAFT)}}]
    sizes = {name: _read(passes) for name, passes in (("full", head), ("trimmed", head + trim))}
    rows, width, vocab = len(load_file(DRAFT)[VOCABULARY]), _width(), load_model(MODEL).vocab_size
    fell = sizes["full"] - sizes["trimmed"]
    engines = {name: _loaded([*passes, INT8]).engine for name, passes in (("full", head), ("trimmed", head + trim))}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(15):
        for name, engine in engines.items():
            seconds[name].append(pass_seconds(engine, 1, past=64, passes=8))
    ratio = float(np.median(np.array(seconds["full"]) / np.array(seconds["trimmed"])))
    figures = {
        "parameters_a_step": sizes,
        "fewer": fell,
        "expected": (vocab - rows) * width,
        "time_ratio": round(ratio, 3),
    }
    figures["lighter"] = round(sizes["full"] / sizes["trimmed"], 3)
    passed = fell == figures["expected"] and figures["lighter"] >= 3.0 and ratio >= 2.0
    return Item(3, "a head's step reads (V-k) H fewer parameters, is >= 3x lighter and >= 2x faster", passed, figures)


def _read(passes: list[dict[str, Any]]) -> int:
    """Parameters that a pass of one row reads: all but the embedding, of which it reads a row; the output layer may be the same table."""
    program = rewrite(load_model(MODEL), Plan.from_dict({"passes": passes}), check=False).program
    products = {str(n.args[1].target) for n in program.main.nodes if n.target is torch.ops.aten.linear.default}
    small = {name for name, value in program.params.items() if value.is_floating_point() and value.dim() == 1}
    return sum(program.params[name].numel() for name in products | small)


def _width() -> int:
    return int(load_model(MODEL).module.get_input_embeddings().weight.shape[1])


def _coverage(kept: Tensor, texts: list[tuple[list[int], list[int]]]) -> Item:
    ids, _ = wikitext(load_model(MODEL), 128, 512)
    raw = {token for token, _ in Counter(ids.reshape(-1).tolist()).most_common(len(kept))}
    own, written = set(kept.tolist()), [token for _, answer in texts for token in answer]
    share = {name: round(sum(t in listed for t in written) / len(written), 4) for name, listed in (("own_text", own), ("raw_text", raw))}
    figures = {"tokens": len(written), "k": len(kept), "raw_tokens": ids.numel(), **share}
    return Item(
        4,
        "8192 tokens of the target's text cover >= 95 % of what it writes, and more than those of raw text",
        share["own_text"] >= 0.95 and share["own_text"] > share["raw_text"],
        figures,
    )


def _economy(exe: Executable, models: dict[str, Loaded], texts: list[tuple[list[int], list[int]]]) -> Item:
    target, body = _read([]), _read([{"skip_layers": {"keep": [0, 29]}}])
    vocab = exe.engine.spec.vocab_size
    figures: dict[str, Any] = {}
    for name, kept in (("all", vocab), ("8192", SMALL), ("4096", 4096)):
        tau = replay(models[name], Chain(), texts, GAMMA).per_pass
        c = (body - (vocab - kept) * _width()) / target
        figures[name] = {"tau": round(tau, 4), "c": round(c, 4), "mbsu": round(tau / (c * GAMMA + 1), 4)}
    kept_tau = figures["8192"]["tau"] / figures["all"]["tau"]
    gain = figures["8192"]["mbsu"] / figures["all"]["mbsu"]
    passed = kept_tau >= 0.93 and gain >= 1.15
    return Item(
        5,
        "tau(8192) >= 0.93 tau(V), memory-bound speed-up >= 15 % more",
        passed,
        {**figures, "tau_kept": round(kept_tau, 4), "gain": round(gain, 4)},
    )


WORDS, TRIALS, LIMIT = 10, 20_000, 27.88  # 0.999 quantile of chi-square with 9 degrees of freedom


def _sampling() -> Item:
    """A draft that can only say seven of ten words, which have 70 % of the mass."""
    rng = np.random.default_rng(0)
    p = np.log(np.concatenate([rng.dirichlet(np.ones(7)) * 0.7, rng.dirichlet(np.ones(3)) * 0.3])).astype(np.float32)
    q = np.where(np.arange(WORDS) < 7, rng.normal(size=WORDS), -1e4).astype(np.float32)
    sampling, counts = Sampling(temperature=1.0, seed=0), np.zeros(WORDS)
    sampler, table, target = Sampler(sampling), np.tile(q, (WORDS, 1)), np.tile(p, (WORDS, 1))
    for text in range(TRIALS):
        draft = Draft(0)
        Chain().grow(TableSource(table), Context(0, [0], 2, 2, Drawing(sampling, text, 1, tested=True)), draft, "draft_model")
        path = walk(draft, RULES["recursive"].choices(draft, Target(target[draft.tokens], sampler, text, 1)))
        counts[path.tokens[0]] += 1
    expected = TRIALS * probabilities(p.astype(np.float64))
    found = float(((counts - expected) ** 2 / expected).sum())
    return Item(
        6,
        "sampled tokens have the target's distribution though 30 % of its mass is outside k",
        found < LIMIT,
        {"chi_square": round(found, 2), "limit": LIMIT},
    )

"""Paper 14, EasySpec: the five working conditions of its card, on SmolLM2-135M as its own draft model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import onnx
import torch

from planc.backends.onnx.artifact import signature
from planc.backends.onnx.engine import OnnxEngine
from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.blocks import ATTENTIONS
from planc.compiler.compile import text_ids
from planc.compiler.models import load_model
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context, Pass
from planc.compiler.program import ModelInfo, Program
from planc.compiler.raising import raise_program
from planc.compiler.store import open_plan
from planc.compiler.trace import trace
from planc.passes.argmax import Argmax
from planc.passes.fuse_projections import FuseProjections
from planc.passes.kv_cache import KvCache
from planc.passes.layer_parallel import LayerParallel
from planc.passes.logits_rows import LogitsRows
from planc.passes.quantize_weights import QuantizeWeights
from planc.runtime.artifact import Manifest
from planc.runtime.controller import Controller
from planc.runtime.decode import Decode, Tree
from planc.runtime.drafters import Host, Loaded
from planc.runtime.drafters.draft_model import ModelDrafter
from planc.runtime.drafters.model_source import ModelSource
from planc.runtime.engine import Step
from planc.runtime.executable import Executable
from planc.runtime.loops import Stats, speculative
from planc.runtime.trees import Draft
from planc_paper_checks.common import MIXED, MODEL, chats

PLAN = ROOT / "examples/papers/14-easyspec.yaml"
CAPACITY, GUESSES, POSITIONS = 1024, 4, 500

Ops = Literal["fast", "standard"]


class _Forms:
    """Engines of the model with groups of n attentions, each made once."""

    def __init__(self, folder: Path) -> None:
        model = load_model(MODEL)
        info = ModelInfo(model.name, model.vocab_size, model.max_length, model.eos_ids, model.gguf, model.tokenizer_files)
        self.program, self.text, self._folder = raise_program(trace(model.module, info)), text_ids(model), folder
        self._made: dict[Any, OnnxEngine] = {}

    def grouped(self, n: int, fused: bool = False) -> Program:
        return LayerParallel(n=n, fused=fused).apply(self.program, Context())

    def engine(self, n: int = 1, *, fused: bool = False, ops: Ops = "fast", int8: bool = True) -> OnnxEngine:
        """The form as compile would make it."""
        key = (n, fused and n > 1, ops, int8)
        if key not in self._made:
            program, directory = self.grouped(n, fused), self._folder / "-".join(map(str, key))
            numerics: list[Pass] = [QuantizeWeights(format="int8")] if int8 else []
            for part in (FuseProjections(), *numerics, KvCache(trees="none"), LogitsRows(), Argmax()):
                program = part.apply(program, Context())
            directory.mkdir()
            lower(program, directory, ops=ops, positions=CAPACITY)
            manifest = Manifest(planc="0", signature=signature(program, CAPACITY), extra={"batches": ops == "standard"})
            self._made[key] = OnnxEngine(directory, manifest)
        return self._made[key]

    def nodes(self, n: int, ops: Ops) -> int:
        """Nodes of the graph that ONNX Runtime is given."""
        engine = self.engine(n, fused=True, ops=ops)
        return len(onnx.load(str(engine.directory / "model.onnx"), load_external_data=False).graph.node)


@paper(14)
def easyspec() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    base, _ = open_plan(PLAN, MODEL)
    prompts = chats(base, MIXED, 4)
    with tempfile.TemporaryDirectory() as folder:
        forms = _Forms(Path(folder))
        yield _identical(base, forms, prompts)
        yield _agreement(forms)
        yield _calibration(base, forms, prompts)
        yield _structure(forms)
        yield _fused(base, forms)


def _run(base: Executable, forms: _Forms, ids: Sequence[int], n: int, calibrate: bool, tokens: int) -> tuple[list[int], Stats]:
    model = Loaded(forms.engine(), CAPACITY, fuzzy=forms.engine(n, fused=True))
    drafts = ModelDrafter(Host(base.engine, base.eos_ids), model, 0.0, calibrate=calibrate)
    decode, stats = Decode(max_new_tokens=tokens, min_rows=base.min_rows), Stats()
    cache, controller = base.engine.new_cache(1, len(ids) + tokens + 16), Controller(Tree(shape="chain", budget=GUESSES))
    pieces = speculative(base.engine, cache, [ids], [drafts], controller, decode, eos=base.eos_ids, stats=stats)
    return [token for piece in pieces for token in piece.tokens], stats


def _identical(base: Executable, forms: _Forms, prompts: list[list[int]]) -> Item:
    plain = [base.plain().generate(ids, max_new_tokens=32).ids for ids in prompts]  # type: ignore[union-attr]
    same, per_pass = {}, {}
    for n in range(1, 7):
        for calibrate in (True, False) if n in (1, 2, 4) else (True,):
            found = [_run(base, forms, ids, n, calibrate, 32) for ids in prompts]
            name = f"N={n}" + ("" if calibrate else " uncalibrated")
            same[name] = sum(a == b for (a, _), b in zip(found, plain, strict=True))
            per_pass[name] = round(float(np.mean([stats.tokens_per_pass for _, stats in found])), 3)
    figures = {"prompts": len(prompts), "same": same, "tokens_per_pass": per_pass}
    return Item(1, "greedy output is identical for N = 1..6, calibrated or not", set(same.values()) == {len(prompts)}, figures)


def _agreement(forms: _Forms) -> Item:
    """Share of positions with the exact form's argmax: as in drafting, one fuzzy row behind an exact cache, and with the whole text fuzzy."""
    ids = np.array([forms.text[: POSITIONS + 1]], dtype=np.int64)
    exact = forms.engine(int8=False)
    cache = exact.new_cache(1, POSITIONS + 8)
    wanted = exact.forward(cache, Step(ids[:, :POSITIONS])).argmax[0].copy()  # type: ignore[index]
    cache.keep(0, np.arange(POSITIONS))
    kept = {name: tensor.copy() for name, tensor in cache.state.items()}
    step, whole = {}, {}
    for n in (2, 3, 4, 6):
        fuzzy, hits = forms.engine(n, fused=True, int8=False), 0
        for t in range(POSITIONS):
            cache.lengths[0] = t
            argmax = fuzzy.forward(cache, Step(ids[:, t : t + 1])).argmax
            hits += int(argmax[0, 0] == wanted[t])  # type: ignore[index]
            for name, tensor in cache.state.items():
                tensor[:, :, t : t + 2] = kept[name][:, :, t : t + 2]
        step[f"N={n}"] = round(hits / POSITIONS, 4)
        own = fuzzy.new_cache(1, POSITIONS + 8)
        whole[f"N={n}"] = round(float((fuzzy.forward(own, Step(ids[:, :POSITIONS])).argmax[0] == wanted).mean()), 4)  # type: ignore[index]
    sample = torch.from_numpy(ids[:, :64])
    difference = float((probe(forms.grouped(1), sample)["logits"] - probe(forms.program, sample)["logits"]).abs().max())
    figures = {"positions": POSITIONS, "one_row_fuzzy": step, "all_rows_fuzzy": whole, "N=1_difference": difference}
    return Item(
        2, "N = 1 equals the model (< 1e-5); argmax agreement at N = 2 is >= 0.7", difference < 1e-5 and step["N=2"] >= 0.7, figures
    )


def _calibration(base: Executable, forms: _Forms, prompts: list[list[int]]) -> Item:
    """Rounds in which all guesses count as accepted: the cache that the next round begins with against one that was never fuzzy."""
    model = Loaded(forms.engine(int8=False), CAPACITY, fuzzy=forms.engine(4, fused=True, int8=False))
    source, text, largest = ModelSource(model), list(prompts[0]), 0.0
    for _ in range(8):
        draft, row = Draft(text[-1]), 0
        logits = source.begin(text)
        fresh = ModelSource(model)
        fresh.begin(text)
        assert isinstance(source._cache, type(fresh._cache)) and source.exact == len(text)
        for name, tensor in source._cache.state.items():  # type: ignore[union-attr]
            part = np.abs(tensor[:, :, : len(text)] - fresh._cache.state[name][:, :, : len(text)])  # type: ignore[union-attr]
            largest = max(largest, float(part.max()))
        for _ in range(GUESSES):
            row = draft.add(row, int(logits.argmax()), ("x",), 0.5)
            logits = source.expand(draft, [row])[0]
        text += draft.tokens[1:]
    per_pass = {
        name: round(float(np.mean([_run(base, forms, ids, 4, calibrate, 128)[1].tokens_per_pass for ids in prompts[:3]])), 4)
        for name, calibrate in (("calibrated", True), ("uncalibrated", False))
    }
    passed = largest < 1e-4 and per_pass["calibrated"] > per_pass["uncalibrated"]
    what = "after every round the draft's cache is exact (< 1e-4); without calibration tokens per pass drop over 128 tokens"
    return Item(3, what, passed, {"largest_difference": largest, "tokens_per_pass": per_pass})


def _structure(forms: _Forms) -> Item:
    chains = {f"N={n}": _chain(forms.grouped(n, fused=True)) for n in (1, 2, 4, 6)}
    nodes = {ops: {f"N={n}": forms.nodes(n, ops) for n in (1, 4)} for ops in ("fast", "standard")}  # type: ignore[arg-type]
    fewer = {ops: round(1 - count["N=4"] / count["N=1"], 4) for ops, count in nodes.items()}
    passed = chains["N=4"] == 9 and max(fewer.values()) >= 0.4
    figures = {"chain": chains, "kernels": nodes, "fewer": fewer}
    return Item(4, "attentions in a row fall from 30 to 9 at N = 4, kernels by >= 40 % with one set of operators", passed, figures)


def _chain(program: Program) -> int:
    """Attentions on the longest way through the graph."""
    depth: dict[Any, int] = {}
    for node in program.main.nodes:
        depth[node] = max((depth[a] for a in node.all_input_nodes), default=0) + (node.target in ATTENTIONS)
    return max(depth.values())


def _fused(base: Executable, forms: _Forms) -> Item:
    sample = torch.tensor([forms.text[:64]])
    branches, fused = (probe(forms.grouped(4, fused), sample)["logits"] for fused in (False, True))
    difference = float((branches - fused).abs().max() / branches.abs().max())
    ratios = {f"{ops} {kind}": _ratio(forms, ops, kind == "int8") for ops in ("fast", "standard") for kind in ("int8", "fp32")}  # type: ignore[arg-type]
    decided = base.report()["fuzzy"]
    honest = decided is not None and decided["kept"] == (decided["step_ratio"] <= 0.9)
    passed = difference < 1e-5 and honest and (min(ratios.values()) <= 0.9 or not decided["kept"])
    figures = {"difference": difference, "step_ratio": ratios, "compiled": decided}
    what = "joined attentions equal separate ones (< 1e-5); a fuzzy step costs <= 0.9 exact steps, else compile leaves the form out"
    return Item(5, what, passed, figures)


def _ratio(forms: _Forms, ops: Ops, int8: bool) -> float:
    """Time of a fuzzy step at N = 4 over that of an exact step, behind 128 tokens; medians of passes in turns."""
    engines = [forms.engine(n, fused=True, ops=ops, int8=int8) for n in (1, 4)]
    cache = engines[0].new_cache(1, 256)
    engines[0].forward(cache, Step(np.array([forms.text[:128]])))
    cache.keep(0, np.arange(128))
    times: list[list[float]] = [[], []]
    for turn in range(32):
        for own, engine in zip(times, engines, strict=True):
            begin = perf_counter()
            engine.forward(cache, Step(np.array([[5]])), logits=True)
            if turn > 1:
                own.append(perf_counter() - begin)
    return round(float(np.median(times[1]) / np.median(times[0])), 4)

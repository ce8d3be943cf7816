"""Paper 25, MCUNetV2: the five working conditions of its card, on EfficientNet-Lite0."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import planc
from planc.backends.reference import probe
from planc.compiler.classify import rewrite, traced
from planc.compiler.efficientnet import EfficientNetLite
from planc.compiler.image_models import LoadedClassifier, load_classifier
from planc.compiler.memory import plan_memory, run_counted
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.patches import Search, network_macs
from planc.compiler.plan import Plan
from planc.compiler.program import MAIN, Program, eliminate_dead
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.patchwise import Patchwise
from planc.runtime.vision import Classifier, ImageSpec

MODEL = "efficientnet-lite0"
PLAN = ROOT / "examples/papers/25-mcunetv2.yaml"
PUBLISHED: dict[str, tuple[Patchwise, float, float]] = {  # options -> KiB, percent of multiplications added; card, int8, 224
    "3x3": (Patchwise(split="_blocks.3", grid=(3, 3), element_bytes=1), 398, 8.4),
    "4x4 in place": (Patchwise(split="_blocks.3", grid=(4, 4), element_bytes=1, inplace_depthwise=True, fuse_residual=True), 214, 13.1),
}


@paper(25)
def mcunetv2() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    with tempfile.TemporaryDirectory() as folder:
        plain, parts = (_compiled(plan, Path(folder) / name) for name, plan in (("plain", None), ("parts", PLAN)))
        yield _equal(plain, parts)
        symmetric = _program(EfficientNetLite(padding="symmetric").eval(), 224)
        yield _planned(symmetric)
        yield _memory(symmetric, Path(folder))
    yield _multiplications(symmetric)
    yield Item(5, "one part is the program itself", Patchwise(grid=(1, 1)).apply(symmetric, Context()) is symmetric, {})


def _compiled(plan: Any, out: Path, size: int | None = None) -> Classifier:
    exe = planc.compile(MODEL, plan, image=size, out=out)
    assert isinstance(exe, Classifier)
    return exe


def _program(module: nn.Module, size: int) -> Program:
    return FoldBatchNorm().apply(traced(LoadedClassifier(module, MODEL, ImageSpec(size=(size, size)))), Context())


def _equal(plain: Classifier, parts: Classifier) -> Item:
    """fp32 on real images where there are some, on a size that nothing divides; whole numbers in float64 to the bit."""
    folder = Path(os.environ.get("PLANC_DATA") or ROOT.parent / "shared/data") / "imagenet_samples"
    figures: dict[str, Any] = {}
    if folder.is_dir():
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        shots, truth = [folder / name for name in labels], np.array(list(labels.values()))
        logits = [exe.logits(shots) for exe in (plain, parts)]
        figures |= {name: float((rows.argmax(1) == truth).mean()) for name, rows in zip(("top1_plain", "top1_parts"), logits, strict=True)}
        figures |= {"images": len(shots), "other_classes": int((logits[0].argmax(1) != logits[1].argmax(1)).sum())}
    else:
        shots = list(np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8))
        logits = [exe.logits(shots) for exe in (plain, parts)]
    figures["relative_224"] = _relative(*logits)
    loaded = load_classifier(MODEL)
    assert loaded is not None
    program = _program(loaded.module, 191)
    image = torch.randn(1, 3, 191, 191, generator=torch.Generator().manual_seed(0))
    part = Patchwise(split="_blocks.3", grid=(3, 3))
    figures["relative_191"] = _relative(*(probe(p, image)["logits"].numpy() for p in (program, part.apply(program, Context()))))
    whole = _whole_numbers(program)
    exact = [probe(p, (image * 4).round().double())["logits"] for p in (whole, part.apply(whole, Context()))]
    figures["whole_numbers_equal"] = bool(torch.equal(*exact)) and bool(exact[0].abs().max() > 0)
    passed = figures["whole_numbers_equal"] and max(figures["relative_224"], figures["relative_191"]) <= 1e-5
    return Item(1, "fp32 within 1e-5 of the largest logit, whole numbers equal to the bit", passed, figures)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def _whole_numbers(program: Program) -> Program:
    """The convolutions up to the split with weights -1, 0 and 1 in float64: every sum is a whole number, and none is rounded."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        params = {k: torch.randint(-1, 2, v.shape, generator=random).double() for k, v in program.params.items()}
    graph = torch.fx.Graph()
    copies: dict[Any, Any] = {}
    graph.output(graph.graph_copy(program.main, copies))
    search = Search(program, Patchwise().allocation)
    cut = next(s.cut for s in reversed(search.found[0]) if "_blocks.3." in str(s.cut.meta.get("nn_module_stack")))
    with FakeTensorMode():
        for old, new in copies.items():
            if isinstance(old.meta.get("val"), torch.Tensor):
                shape = [s if isinstance(s, int) else 1 for s in old.meta["val"].shape]
                new.meta = {**old.meta, "val": torch.empty(shape, dtype=torch.float64)}
    graph.output_node().args = ({"logits": copies[cut]},)
    eliminate_dead(graph)
    return program.replace(graphs={MAIN: graph}, params=params)


def _planned(program: Program) -> Item:
    full = plan_memory(program, PUBLISHED["3x3"][0].allocation).peak / 1024
    figures, passed = {"full_kib": full}, round(full) == 1470
    for name, (part, kib, percent) in PUBLISHED.items():
        found = part.choose(Search(program, part.allocation))
        assert found is not None
        convolutions = 100 * found.extra_macs / (found.network - 1280 * 1000)  # the published share leaves the last layer out
        figures |= {f"{name} kib": round(found.peak / 1024, 2), f"{name} added percent": round(convolutions, 2)}
        passed = passed and round(found.peak / 1024) == kib and abs(convolutions - percent) < 0.06
    return Item(2, "planner: 1470 KiB, 3x3 gives 398 (8.4 % more), 4x4 in place 214 (13.1 %)", passed, figures)


def _memory(program: Program, folder: Path) -> Item:
    """Counted storages, then what a process takes at 1024x1024."""
    image, same = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)), {}
    for name, (part, _, _) in PUBLISHED.items():
        new = part.apply(program, Context())
        same[name] = run_counted(new, {"images": image}, part.allocation)[1].live == plan_memory(new, part.allocation).live
    plain, parts = (_compiled(plan, folder / f"{name}-1024", 1024) for name, plan in (("plain", None), ("parts", PLAN)))
    planned = [plan_memory(_rewritten(p), Patchwise().allocation).peak / 2**20 for p in (None, PLAN)]
    shot = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    pixels = plain.image.pixels(shot)[None]
    relative = _relative(*(exe.engine.forward(pixels) for exe in (plain, parts)))
    times: dict[str, list[float]] = {"plain": [], "parts": []}
    for _ in range(5):
        for name, exe in (("plain", plain), ("parts", parts)):
            begin = perf_counter()
            exe.engine.forward(pixels)
            times[name].append(perf_counter() - begin)
    del plain, parts
    gc.collect()
    peak = {name: min(_high_water(folder / f"{name}-1024") for _ in range(3)) for name in times}
    figures: dict[str, Any] = {"counted_equal_planned": same, "relative_1024": relative, "planned_mib": [round(p, 1) for p in planned]}
    figures |= {"measured_mib": {k: round(v, 1) for k, v in peak.items()}, "gain": round(peak["plain"] / peak["parts"], 3)}
    figures["time_ratio"] = round(median(times["parts"]) / median(times["plain"]), 3)
    passed = all(same.values()) and figures["gain"] > 2.5
    return Item(3, "counted bytes equal planned ones; the process needs > 2.5 times less at 1024x1024", passed, figures)


def _rewritten(plan: Path | None) -> Program:
    loaded = load_classifier(MODEL, 1024)
    assert loaded is not None
    return rewrite(loaded, Plan.from_yaml(plan) if plan is not None else Plan(), check=False).program


_MEASURE = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = options.enable_mem_pattern = False
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
pixels = numpy.random.default_rng(0).standard_normal((1, 3, 1024, 1024), dtype=numpy.float32)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
session.run(None, {"images": pixels})
print((status("VmHWM") - before) / 1024)
"""


def _high_water(directory: Path) -> float:
    """MiB that one pass takes at its worst, in a process of its own that returns freed memory at once."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(directory)], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _multiplications(program: Program) -> Item:
    figures: dict[str, Any] = {}
    for name, (part, _, _) in PUBLISHED.items():
        found = part.choose(Search(program, part.allocation))
        assert found is not None
        counted = network_macs(part.apply(program, Context())) - network_macs(program)
        figures[name] = {"counted": counted, "analytic": found.extra_macs}
    passed = all(f["counted"] == f["analytic"] > 0 for f in figures.values())
    return Item(4, "multiplications counted in the rewritten graph equal the analytic ones", passed, figures)

"""Paper 72, EMOv2: the five working conditions of its card, on the 5M size with every parameter random."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from planc.backends.onnx.lower import lower
from planc.backends.reference import probe
from planc.compiler.classify import traced
from planc.compiler.emov2 import CONFIGS, EMOv2, window_attention
from planc.compiler.image_models import LoadedClassifier
from planc.compiler.memory import plan_memory
from planc.compiler.papers import ROOT, Item, paper
from planc.compiler.passbase import Context
from planc.compiler.patches import Search, network_macs
from planc.compiler.plan import Plan
from planc.compiler.program import Program
from planc.passes.fold_batch_norm import FoldBatchNorm
from planc.passes.patchwise import Patchwise
from planc.runtime.vision import ImageSpec

PLAN = ROOT / "examples/papers/72-emov2.yaml"
aten = torch.ops.aten


@cache
def _model() -> EMOv2:
    """Layer scales of about one: with those of a fresh network whatever attention did would drown."""
    torch.manual_seed(0)
    module = EMOv2(CONFIGS["5M"])
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith(("scale", "running_var", "norm.weight")):
            torch.nn.init.uniform_(value.detach(), 0.5, 1.5)
        elif value.dim() == 1 and value.is_floating_point():
            torch.nn.init.normal_(value.detach(), std=0.2)
    return module.eval()


def _program(size: int) -> Program:
    return traced(LoadedClassifier(_model(), "emov2-5m", ImageSpec(size=(size, size))))


def _image(size: int) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@paper(72)
def emov2() -> Iterator[Item]:
    """Every condition of the card, in its order."""
    program = _program(224)
    yield _exported(program)
    yield _folded(program)
    yield _one_window()
    yield _parts()
    count = sum(p.numel() for p in _model().parameters())
    figures = {"parameters": count, "multiplications": network_macs(program)}
    passed = round(count / 1e6, 1) == 5.1 and abs(network_macs(program) / 1e9 - 1.03) < 0.01
    yield Item(5, "5.1 million parameters, about 1.03 G multiplications at 224", passed, figures)


def _exported(program: Program) -> Item:
    figures = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for size, each in ((224, program), (200, _program(200))):
            session = ort.InferenceSession(lower(each, Path(folder), ops="standard", positions=1))
            made = session.run(["logits"], {"images": _image(size).numpy()})[0]
            figures[f"relative {size}"] = _relative(torch.from_numpy(made), _model()(_image(size)))
    return Item(1, "ONNX equals PyTorch to 1e-4 at 224 and at 200, where windows are filled up", max(figures.values()) <= 1e-4, figures)


def _folded(program: Program) -> Item:
    folded = FoldBatchNorm().apply(program, Context())
    left = sum(n.target in (aten.batch_norm.default, aten.mul.Tensor) for n in folded.main.nodes)
    relative = _relative(probe(folded, _image(224))["logits"], probe(program, _image(224))["logits"])
    change = folded.history[-1]
    figures = {"norms and scales": change.matched, "left": left, "relative": relative}
    return Item(2, "folded norms and layer scales are gone and change less than 1e-5", left == 0 and relative < 1e-5, figures)


def _one_window() -> Item:
    q, k, v = (torch.randn(2, 64, 7, 7, generator=torch.Generator().manual_seed(i)) for i in range(3))
    near, far = (window_attention(q, k, v, 2, 7, layout) for layout in ("near", "far"))  # type: ignore[arg-type]
    return Item(3, "near equals far where one window is the map", torch.equal(near, far), {"places": 49})


def _parts() -> Item:
    program, part = (
        FoldBatchNorm().apply(_program(448), Context()),
        next(p for p in Plan.from_yaml(PLAN).passes if isinstance(p, Patchwise)),
    )
    found = part.choose(Search(program, part.allocation))
    assert found is not None
    new = part.apply(program, Context())
    relative = _relative(probe(new, _image(448))["logits"], probe(program, _image(448))["logits"])
    peaks = [plan_memory(p).peak for p in (program, new)]
    counted = network_macs(new) - network_macs(program)
    figures = {"relative": relative, "mib": [round(p / 2**20, 1) for p in peaks], "gain": round(peaks[0] / peaks[1], 2)}
    figures |= {"multiplications added": counted, "planned": found.extra_macs, "share": round(found.overhead, 3)}
    passed = relative <= 1e-5 and peaks[0] >= 2 * peaks[1] and counted == found.extra_macs
    return Item(4, "parts of the first stages at 448: equal to 1e-5, half the peak, multiplications as planned", passed, figures)
